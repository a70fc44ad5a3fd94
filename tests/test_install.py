"""Each extra, installed alone into a new environment, runs its experiment.

Needs the package index, a few minutes, and disk space for JAX and PyTorch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["mnist.Train.epochs = 1", "mnist.Model.hidden = (16,)", 'mnist.Data.source = "mnist5k"']


def python_of(directory: Path) -> Path:
    return directory / "bin" / "python"


@pytest.fixture(scope="module", params=["jax", "torch", "lightning"])
def installed(request, tmp_path_factory):
    """The name of an extra, and the Python of an environment with only that extra."""
    directory = tmp_path_factory.mktemp(f"only-{request.param}")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    command = [python_of(directory), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--constraint", ROOT / "constraints.txt", f"{ROOT}[{request.param}]"]
    subprocess.run(command, check=True, cwd=directory)
    return request.param, python_of(directory)


def launch(python: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    # The installed package with its Gin files, not the checkout.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "-m", "blacksmith.launch", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def has(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_one_extra_alone_runs_its_experiment(installed, tmp_path):
    extra, python = installed
    assert has(python, "jax") == (extra == "jax")
    assert has(python, "torch") == (extra != "jax")
    assert has(python, "lightning") == (extra == "lightning")
    bindings = [f"--gin_param={p}" for p in SHORT]
    done = launch(python, tmp_path, f"--gin_file=gin/mnist_{extra}.gin", "--workdir=run", *bindings)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_missing_extra_is_named(installed, tmp_path):
    extra, python = installed
    other = {"jax": "torch", "torch": "jax", "lightning": "jax"}[extra]
    done = launch(python, tmp_path, f"--gin_file=gin/mnist_{other}.gin", "--workdir=run")
    assert done.returncode == 2
    assert f"pip install '.[{other}]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
