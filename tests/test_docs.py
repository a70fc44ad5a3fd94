"""The documentation matches the code: its links, tables, commands and programs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from blacksmith import launch
from blacksmith.run.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "blacksmith" / "experiments").rglob("README.md"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tables_of_parameters_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "parameter_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"run python tools/parameter_tables.py: {done.stdout}{done.stderr}"


def test_the_commands_of_the_readme_run(tmp_path):
    """Runs every command of the bash blocks but `make`, in order, with a small model and few epochs."""
    short = [
        "mnist.Model.hidden = (16,)",
        "mnist.Train.epochs = 2",
        'mnist.Data.source = "mnist5k"',
        "mnist.Data.shift = 0.0",
    ]
    commands = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [c for c in commands if c.strip() and not c.startswith("make ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"], command
        if words[2] == "blacksmith.launch" and "--list" not in words and "--helpfull" not in words:
            words += [f"--gin_param={p}" for p in short]
        if words[2] == "blacksmith.parity":
            words += [f"--gin_param={p}" for p in short] + ["--steps=20"]
        words = [f"--gin_param={short[1]}" if "mnist.Train.epochs = 3" in w else w for w in words]
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    for made in ("first/report.html", "first/eval.json", "first/export/model.keras", "second/result.json"):
        assert (tmp_path / "runs" / made).exists(), made
    assert (tmp_path / "runs" / "comparison.html").exists()
    lines = [json.loads(x) for x in (tmp_path / "runs/second/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["split"] == "train"] == [250, 300, 350, 400, 420]


def run(directory, command):
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A directory in which the programs and commands of docs/experiment.md have run."""
    directory, page = tmp_path_factory.mktemp("own"), ROOT / "docs" / "experiment.md"
    for name, code, limit in zip(("cnn.py", "vit.py"), blocks(page, "python"), (80, 110)):
        assert len(code.splitlines()) <= limit
        (directory / name).write_text(code)
    for block in blocks(page, "bash"):
        for command in block.splitlines():
            run(directory, command)
    return directory


def test_own_keras_model_resumes_on_another_backend(own):
    first, second = (json.loads((own / f"runs/{d}/result.json").read_text()) for d in ("cnn", "cnn_torch"))
    assert (first["backend"], second["backend"]) == ("jax", "torch")
    assert second["step"] == 1.5 * first["step"]
    assert second["initial_weights_sha256"] == first["initial_weights_sha256"]
    tested = json.loads((own / "runs/cnn_torch/eval.json").read_text())["test"]["accuracy"]
    assert tested == second["test"]["accuracy"] > 0.5


def test_own_keras_model_exports_and_passes_parity(own):
    cnn = """--plugin=cnn --gin_param='Run.experiment = "keras/cnn"'"""
    jax = f"""{cnn} --gin_param='Run.backend = "jax"' --gin_param='cnn.Train.epochs = 2'"""
    run(own, f"python -m blacksmith.launch {jax} --workdir=runs/cnn --mode=export")
    assert (own / "runs/cnn/export/model.keras").exists()
    for backend in ("jax", "torch"):
        lines = f"""Run.experiment = "keras/cnn"\nRun.backend = "{backend}"\n"""
        (own / f"{backend}.gin").write_text(lines)
    run(own, "python -m blacksmith.parity --plugin=cnn --gin_file=jax.gin --gin_file=torch.gin --steps=5")


def test_own_torch_model_resumes_bit_for_bit(own, own_registry, monkeypatch):
    monkeypatch.chdir(own)
    vit = ["launch", "--plugin=vit", '--gin_param=Run.experiment = "pytorch/vit"', "--workdir=runs/resumed"]
    for steps in (20, 56):  # a run of two epochs that first stops in the middle of one
        assert launch.main([*vit, f"--gin_param=vit.Train.steps = {steps}"]) == 0
    whole, resumed = (
        Checkpoints(own / "runs" / name / "checkpoints").newest().path for name in ("vit", "resumed")
    )
    assert whole.name == resumed.name == "step_00000056"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
