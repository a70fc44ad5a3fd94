"""The parity command: equal backends pass, broken ones are caught, incomparable runs are refused."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from blacksmith import parity
from blacksmith.parity import Outcome, Tolerances, compare_outcomes
from blacksmith.run import metrics

# Small and short; the slow test below runs 500 steps at full size.
TINY = [
    "mnist.Model.hidden = (32,)",
    'mnist.Data.source = "mnist5k"',
    "Run.seed = 3",
]
FILES = ["gin/mnist_jax.gin", "gin/mnist_torch.gin", "gin/mnist_lightning.gin"]

BROKEN = '''
from blacksmith import registry
from blacksmith.experiments.keras.mnist import configs

def epsilon(run):
    """A wrong epsilon in the fused kernel, as in PyTorch's own Adam."""
    from blacksmith.experiments.keras.mnist import train
    from blacksmith.trainers.torch_optimizer import FusedAdam
    plan = FusedAdam.plan
    FusedAdam.plan = lambda self, count: [
        (rate, self._keras.epsilon * 100, decay) for rate, _, decay in plan(self, count)
    ]
    return train.train(run)

def batches(run):
    """Batches one step late."""
    from blacksmith.experiments.keras.mnist import train
    from blacksmith.run.order import Order
    block = Order.block
    Order.block = lambda self, step, steps: block(self, step + 1, steps)
    return train.train(run)

for name in ("epsilon", "batches"):
    registry.add(
        registry.Experiment(
            name=f"broken/{name}",
            summary="for a test",
            configs=configs.__name__,
            modes={"train": f"broken_backends:{name}"},
            backends={"torch": registry.Needs("torch", ("keras", "torch"))},
            checkpoint_format="keras-arrays-1",
            uses_keras=True,
            weights="arrays.safetensors",
        )
    )
'''


def run_parity(directory: Path, files: list[str], *more: str) -> tuple[int, list[dict], bool]:
    """Exit status, table rows and verdict of the command in `directory`."""
    arguments = [f"--gin_file={f}" for f in files] + [f"--gin_param={p}" for p in TINY]
    status = parity.main(["parity", *arguments, f"--workdir={directory}", *more])
    content = json.loads((directory / "parity.json").read_text())
    return status, content["rows"], content["passed"]


def test_three_backends_agree(tmp_path, capsys):
    tolerances = ("--loss_tolerance=1e-5", "--weight_tolerance=1e-5")
    status, rows, passed = run_parity(tmp_path / "p", FILES, "--steps=60", *tolerances)
    printed = capsys.readouterr().err  # before the runs
    assert status == 0, printed
    assert passed
    assert len({row["initial weights"] for row in rows}) == 1
    assert len({row["batches"] for row in rows}) == 1
    assert "mnist.Model.dropout = 0.0 for the comparison (was 0.2)" in printed
    assert "mnist.Data.shift = 0.0 for the comparison (was 1.0)" in printed
    torch, lightning = (
        [x["loss"] for x in metrics.read(tmp_path / "p" / name / "metrics.jsonl") if x["split"] == "train"]
        for name in ("mnist_torch", "mnist_lightning")
    )
    assert torch == lightning, "Lightning must give PyTorch's losses bit for bit"
    page = (tmp_path / "p" / "parity.html").read_text()
    assert "plotly" in page
    assert "mnist_torch" in page


def test_broken_backends_are_caught(tmp_path, monkeypatch, own_registry):
    monkeypatch.delitem(sys.modules, "broken_backends", raising=False)
    (tmp_path / "broken_backends.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    broken = [tmp_path / f"{name}.gin" for name in ("epsilon", "batches")]
    for gin in broken:
        gin.write_text(
            f'include "include/mnist.gin"\nRun.experiment = "broken/{gin.stem}"\nRun.backend = "torch"\n'
        )
    files = ["gin/mnist_torch.gin", *map(str, broken)]
    status, rows, passed = run_parity(tmp_path / "p", files, "--steps=40", "--plugin=broken_backends")
    assert status == 1
    assert not passed
    assert [row["within tolerance"] for row in rows] == ["yes", "NO", "NO"]
    assert rows[0]["batches"] == rows[1]["batches"]
    assert float(rows[1]["max |loss difference|"]) > 1e-4
    assert "(differ)" in rows[2]["batches"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file=gin/mnist_jax.gin"], "two or more --gin_file"),
        (["--gin_file=gin/mnist_jax.gin", "--gin_file=other.gin"], "cannot be compared: Run.seed"),
        (["--gin_file=gin/mnist_jax.gin", "--gin_file=nothing.gin"], "no Gin file 'nothing.gin'"),
        (["--gin_file=gin/mnist_jax.gin", "--gin_file=gin/mnist_torch.gin", "--stepz=3"], "stepz"),
        (["--gin_file=gin/mnist_jax.gin", "--gin_file=gin/mnist_torch.gin", "--steps=0"], "steps"),
    ],
)
def test_incomparable_runs_are_a_one_line_error(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.gin").write_text(
        'include "include/mnist.gin"\nRun.experiment = "keras/mnist"\nRun.backend = "torch"\nRun.seed = 1\n'
    )
    assert parity.main(["parity", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.gin"]


def outcome(losses, weights=(1.0, 2.0), accuracy=0.9, **changes) -> Outcome:
    values = {
        "name": "a",
        "backend": "b",
        "initial_weights": "1" * 64,
        "batches": "2" * 64,
        "losses": np.array(losses),
        "weights": {"model/w": np.array(weights, np.float32)},
        "test_accuracy": accuracy,
        "seconds": 1.0,
    }
    return Outcome(**(values | changes))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (outcome([1.0, 0.5, 0.2 + 2e-4]), "loss"),
        (outcome([1.0, math.nan, 0.2]), "a loss that is not a number"),
        (outcome([1.0, 0.5]), "too few steps"),
        (outcome([1.0, 0.5, 0.2], weights=(1.0, 2.1)), "weights"),
        (outcome([1.0, 0.5, 0.2], weights=(1.0, math.nan)), "a weight that is not a number"),
        (outcome([1.0, 0.5, 0.2], weights=(1.0, 2.0, 3.0)), "shapes"),
        (outcome([1.0, 0.5, 0.2], accuracy=0.8985), "accuracy"),
        (outcome([1.0, 0.5, 0.2], initial_weights="3" * 64), "initial weights"),
        (outcome([1.0, 0.5, 0.2], batches="3" * 64), "batches"),
    ],
)
def test_each_difference_alone_fails(other, why):
    reference = outcome([1.0, 0.5, 0.2])
    assert compare_outcomes(reference, reference, 3, Tolerances())["within tolerance"] == "yes"
    assert compare_outcomes(other, reference, 3, Tolerances())["within tolerance"] == "NO", why


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 2e-3), ("sgd", 0.1)])
def test_500_steps_at_the_defaults_agree(tmp_path, optimizer, rate):
    arguments = [f"--gin_file={f}" for f in FILES]
    status = parity.main(
        [
            "parity",
            *arguments,
            "--steps=500",
            "--loss_tolerance=1e-5",
            f"--gin_param=Optimizer.name = {optimizer!r}",
            f"--gin_param=Optimizer.learning_rate = {rate}",
            f"--workdir={tmp_path / 'p'}",
        ]
    )
    assert status == 0


def test_a_signal_ends_the_run_that_is_training(tmp_path, monkeypatch):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("subprocess.run", stop)
    arguments = [f"--gin_file={file}" for file in FILES[:2]]
    assert parity.main(["parity", *arguments, f"--workdir={tmp_path / 'p'}"]) == 130


def test_every_run_has_a_directory_of_its_own(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    made = []

    def run(gin_file, params, workdir, values):
        made.append(workdir.name)
        return 0

    def outcome(name, *_):
        if len(made) == 4:
            raise Stop
        return Outcome(name, "", "", "", np.zeros(1), {}, None, 0.0)

    files = [tmp_path / name for name in ("a.gin", "a_2.gin", "x/a.gin", "parity.json.gin")]
    (tmp_path / "x").mkdir()
    for file in files:
        file.write_text('include "gin/mnist_jax.gin"')
    monkeypatch.setattr(parity, "_run", run)
    monkeypatch.setattr(parity, "read_outcome", outcome)
    with pytest.raises(Stop):
        parity.main(["parity", *(f"--gin_file={file}" for file in files), f"--workdir={tmp_path / 'p'}"])
    assert made == ["a", "a_2", "a_3", "parity.json_2"]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "x"):
        arguments = [f"--gin_file={file}" for file in FILES[:2]]
        assert parity.main(["parity", *arguments, f"--workdir={workdir}"]) == 2
        assert f"error: --workdir: cannot make {workdir}: " in capsys.readouterr().err
