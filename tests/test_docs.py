"""What the documentation says is what the code does."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
    """Every command of the bash blocks, in order, in one directory, with a small and short model.

    The set-up commands (make ...) are what started this test.
    """
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


@pytest.mark.parametrize(
    ("page", "settings"),
    [
        ("README.md", ["mnist.Train.epochs = 1", "mnist.Model.hidden = (8,)"]),
        ("docs/experiment.md", []),
    ],
)
def test_the_experiment_of_ones_own_runs_as_printed(tmp_path, page, settings):
    code = next(b for b in blocks(ROOT / page, "python") if "registry.add" in b)
    (tmp_path / "roll.py").write_text(code)
    command = next(
        line
        for language in ("text", "bash")
        for block in blocks(ROOT / page, language)
        for line in block.splitlines()
        if "--plugin=roll" in line
    )
    words = [sys.executable, *shlex.split(command)[1:], f"--workdir={tmp_path / 'run'}"]
    words += [f"--gin_param={p}" for p in settings]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
