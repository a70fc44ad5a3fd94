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


def test_every_promise_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+|tests/\S+)`", (ROOT / "docs" / "reliability.md").read_text()))
    files = list((ROOT / "tests").rglob("test_*.py"))
    there = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) > 30
    assert named <= there | {str(file.relative_to(ROOT)) for file in files}


def test_the_tables_of_parameters_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "parameter_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"run python tools/parameter_tables.py: {done.stdout}{done.stderr}"


def run(directory, words):
    done = subprocess.run([sys.executable, *words[1:]], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def test_the_commands_of_the_readme_run(tmp_path):
    """Runs every command of the bash blocks but `make`, in order, with a small model and few epochs."""
    short = [
        "--gin_param=mnist.Model.hidden = (16,)",
        "--gin_param=mnist.Train.epochs = 2",
        '--gin_param=mnist.Data.source = "mnist5k"',
        "--gin_param=mnist.Data.shift = 0.0",
    ]
    commands = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(c) for c in commands if c.strip() and not c.startswith("make ")]
    assert len(commands) >= 8
    for words in commands:
        assert words[:2] == ["python", "-m"]
        if words[2] == "blacksmith.parity":  # run by tests/parity with these files
            assert words[3:] == [f"--gin_file=gin/mnist_{name}.gin" for name in ("jax", "torch", "lightning")]
            continue
        trains = words[2] == "blacksmith.launch" and not {"--list", "--helpfull", "--dry_run"} & set(words)
        run(tmp_path, words + short if trains else words)
    for made in ("first/report.html", "first/eval.json", "first/export/model.keras", "comparison.html"):
        assert (tmp_path / "runs" / made).exists(), made
    lines = [json.loads(x) for x in (tmp_path / "runs/second/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["split"] == "train"] == [250, 300, 350, 400, 420]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A directory in which the programs and commands of docs/experiment.md have run."""
    directory, page = tmp_path_factory.mktemp("own"), ROOT / "docs" / "experiment.md"
    for name, code, limit in zip(("cnn.py", "vit.py"), blocks(page, "python"), (80, 110)):
        assert len(code.splitlines()) <= limit
        (directory / name).write_text(code)
    for block in blocks(page, "bash"):
        for command in block.splitlines():
            run(directory, shlex.split(command))
    return directory


def test_own_keras_model_resumes_on_another_backend(own):
    first, second = (json.loads((own / f"runs/{d}/result.json").read_text()) for d in ("cnn", "cnn_torch"))
    assert (first["backend"], second["backend"]) == ("jax", "torch")
    assert second["step"] == 1.5 * first["step"]
    assert second["initial_weights_sha256"] == first["initial_weights_sha256"]
    tested = json.loads((own / "runs/cnn_torch/eval.json").read_text())["test"]["accuracy"]
    assert tested == second["test"]["accuracy"] > 0.5


def test_own_keras_model_exports_and_passes_parity(own):
    python = ["python", "-m"]
    flags = ["--plugin=cnn", '--gin_param=Run.experiment = "keras/cnn"', '--gin_param=Run.backend = "jax"']
    flags += ["--gin_param=cnn.Train.epochs = 2", "--workdir=runs/cnn", "--mode=export"]
    run(own, [*python, "blacksmith.launch", *flags])
    assert (own / "runs/cnn/export/model.keras").exists()
    for backend in ("jax", "torch"):
        lines = f"""Run.experiment = "keras/cnn"\nRun.backend = "{backend}"\n"""
        (own / f"{backend}.gin").write_text(lines)
    files = ["--gin_file=jax.gin", "--gin_file=torch.gin", "--steps=5"]
    run(own, [*python, "blacksmith.parity", "--plugin=cnn", *files])


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
