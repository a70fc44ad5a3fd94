"""The three MNIST experiments end to end, as a user runs them, on the bundled digits."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from blacksmith import launch as launcher
from blacksmith.errors import ConfigError

FILES = {name: f"gin/mnist_{name}.gin" for name in ("jax", "torch", "lightning")}
SMALL = ["mnist.Model.hidden = (64,)", 'mnist.Data.source = "mnist5k"', "Log.tensorboard = False"]


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


def of_split(lines: list[dict], split: str, name: str) -> dict[int, float]:
    """One metric of a split by step."""
    return {line["step"]: line[name] for line in lines if line["split"] == split}


@pytest.fixture
def experiment(launch):
    """Runs a Gin file in a directory with bindings and further flags."""

    def run(file: str, directory: Path, *params: str, flags: list[str] = ()):
        bindings = [f"--gin_param={p}" for p in params]
        return launch(f"--gin_file={file}", f"--workdir={directory}", "--device=cpu", *bindings, *flags)

    return run


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_trains_tests_and_reports(experiment, stream, tmp_path, name):
    run = tmp_path / "run"
    done = experiment(FILES[name], run, *SMALL, "mnist.Train.epochs = 3")
    assert done.returncode == 0, done.stderr
    assert "mnist5k" in done.stderr
    content = result(run)
    assert content["status"] == "done"
    assert content["data"]["source"] == "mnist5k"
    # A linear classifier is at 0.85 here and chance at 0.1.
    assert content["test"]["accuracy"] > 0.8
    confusion = np.array(content["test"]["confusion_matrix"])
    assert confusion.sum() == content["data"]["test"]
    assert np.trace(confusion) / confusion.sum() == pytest.approx(content["test"]["accuracy"])
    per_class = np.diag(confusion) / confusion.sum(axis=1)
    np.testing.assert_allclose(content["test"]["per_class_accuracy"], per_class)
    splits = [line["split"] for line in stream(run)]
    assert splits.count("val") == 3
    assert splits.count("test") == 1
    assert splits[-1] == "test"
    for file in ("config.gin", "operative.gin", "environment.json", "report.html"):
        assert (run / file).exists(), file
    files = sorted((run / "images").glob("test_worst_*.png"))
    assert len(files) == min(48, confusion.sum() - np.trace(confusion))
    captions = [Image.open(file).text["Description"] for file in files]
    chances = [float(caption.rpartition("= ")[2]) for caption in captions]
    assert chances == sorted(chances)
    for caption in captions:
        true, predicted = int(caption[0]), int(caption[4])
        assert true != predicted
        assert confusion[true, predicted] > 0, caption
    assert (run / "checkpoints" / content["tested_checkpoint"]).is_dir()


PORTABLE = [
    *SMALL,
    "mnist.Model.dropout = 0.0",
    "mnist.Data.shift = 0.0",
    "Schedule.decay_steps = 100",
    "Log.every_steps = 1",
    "Checkpoint.every_steps = 50",
]


@pytest.fixture(scope="module")
def begun(launch, tmp_path_factory):
    """Runs of 50 and of 100 steps on a backend, made when they are first asked for."""
    directory = tmp_path_factory.mktemp("begun")

    def run(name, steps):
        path = directory / f"{name}_{steps}"
        if not path.exists():
            params = [f"--gin_param={p}" for p in (*PORTABLE, f"mnist.Train.steps = {steps}")]
            done = launch(f"--gin_file={FILES[name]}", f"--workdir={path}", "--device=cpu", *params)
            assert done.returncode == 0, done.stderr
        return path

    return run


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("jax", "torch", marks=pytest.mark.slow),  # the README's commands do the same
        ("torch", "jax"),
        ("jax", "lightning"),
    ],
)
def test_a_checkpoint_is_resumed_on_another_backend(experiment, stream, tmp_path, begun, first, second):
    alone, half, rest = begun(first, 100), begun(first, 50), tmp_path / "rest"
    done = experiment(FILES[second], rest, *PORTABLE, "mnist.Train.steps = 100", flags=[f"--resume={half}"])
    assert done.returncode == 0, done.stderr
    expected = of_split(stream(alone), "train", "loss")
    joined = of_split(stream(half), "train", "loss") | of_split(stream(rest), "train", "loss")
    assert joined.keys() == expected.keys()
    # The parity tolerance: float32 sums in another order.
    assert max(abs(joined[step] - expected[step]) for step in expected) < 1e-5
    ours = load_file(rest / "checkpoints" / "step_00000100" / "arrays.safetensors")
    theirs = load_file(alone / "checkpoints" / "step_00000100" / "arrays.safetensors")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        norm = np.linalg.norm(theirs[key].astype(np.float64))
        assert np.linalg.norm(ours[key].astype(np.float64) - theirs[key]) <= 1e-4 * norm + 1e-9, key


@pytest.mark.parametrize("name", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_eval_and_export_use_the_best_checkpoint(experiment, tmp_path, name):
    run = tmp_path / "run"
    settings = [*SMALL, "mnist.Train.epochs = 2"]
    assert experiment(FILES[name], run, *settings).returncode == 0
    before = (run / "metrics.jsonl").read_bytes()
    tested = result(run)
    done = experiment(FILES[name], run, *settings, flags=["--mode=eval"])
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((run / "eval.json").read_text())
    assert evaluated["checkpoint"].endswith(tested["tested_checkpoint"])
    assert evaluated["val"]["accuracy"] == tested["best"]["value"]
    assert evaluated["test"] == tested["test"]
    done = experiment(FILES[name], run, *settings, flags=["--mode=export"])
    assert done.returncode == 0, done.stderr
    exported = json.loads((run / "export" / "export.json").read_text())
    assert exported["files"] == ["model.keras", {"jax": "model.stablehlo", "torch": "model.pt2"}[name]]
    assert (exported["input"], exported["output"]) == ("float32 [batch, 28, 28]", "logits [batch, 10]")
    for file in exported["files"]:
        assert (run / "export" / file).stat().st_size > 1000
    assert (run / "metrics.jsonl").read_bytes() == before
    assert result(run) == tested


def test_early_stopping_ends_the_run_and_the_best_is_tested(experiment, stream, tmp_path):
    run = tmp_path / "run"
    # A rate this high gets worse soon.
    done = experiment(
        FILES["jax"],
        run,
        *SMALL,
        "mnist.Train.epochs = 40",
        "mnist.Train.early_stopping = 2",
        "Optimizer.learning_rate = 0.03",
        'Checkpoint.metric = "val_loss"',
    )
    assert done.returncode == 0, done.stderr
    losses = of_split(stream(run), "val", "loss")
    best = min(losses, key=losses.get)
    assert list(losses).index(best) + 3 == len(losses) < 40
    assert result(run)["best"] == {"metric": "val_loss", "value": losses[best], "step": best}
    assert result(run)["tested_checkpoint"] == f"step_{best:08d}"


def test_the_best_weights_are_tested_though_not_due(experiment, stream, tmp_path):
    run = tmp_path / "run"
    settings = ["mnist.Train.epochs = 3", "mnist.Train.evaluate_every_steps = 5"]
    done = experiment(FILES["jax"], run, *SMALL, *settings, "Optimizer.learning_rate = 0.02")
    assert done.returncode == 0, done.stderr
    values = of_split(stream(run), "val", "accuracy")
    best = max(values, key=lambda step: (values[step], -step))
    assert result(run)["best"] == {"metric": "val_accuracy", "value": values[best], "step": best}
    assert result(run)["tested_checkpoint"] == f"step_{best:08d}"


def test_eval_refuses_other_settings_and_notes_other_data(experiment, tmp_path):
    run = tmp_path / "run"
    assert experiment(FILES["jax"], run, *SMALL, "mnist.Train.epochs = 1").returncode == 0
    done = experiment(FILES["jax"], run, *SMALL, "mnist.Data.scale = 100.0", flags=["--mode=eval"])
    assert done.returncode == 2
    assert "mnist.Data.scale" in done.stderr
    idx = tmp_path / "idx"
    write_idx(idx)
    more = ['mnist.Data.source = "idx"', f"mnist.Data.path = {str(idx)!r}", "mnist.Train.batch_size = 128"]
    done = experiment(FILES["jax"], run, *SMALL, *more, flags=["--mode=eval"])
    assert done.returncode == 0, done.stderr
    assert "trained on other data" in done.stderr
    assert "val" not in json.loads((run / "eval.json").read_text())


def write_idx(directory: Path) -> None:
    """A small set in the standard files: 6,000 train images, of which 5,000 are held out, and 50 test."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    for name, count in (("train", 6000), ("t10k", 50)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        (directory / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = rng.integers(0, 10, count).astype(np.uint8)
        head = np.array([2049, count], ">i4").tobytes()
        (directory / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def test_pixels_that_float32_cannot_hold_are_refused():
    for extreme in ("scale = 1e-40", "std = 1e-300", "mean = -1e300"):
        with pytest.raises(ConfigError, match="give pixels up to"):
            launcher.resolve([FILES["jax"]], [f"mnist.Data.{extreme}"])


def test_a_mode_that_the_experiment_lacks_is_refused(tmp_path):
    resolved = launcher.resolve([FILES["torch"]], [])
    with pytest.raises(ConfigError, match=r"--mode=view: .*train, eval, export"):
        launcher.run_experiment(resolved, tmp_path / "run", mode="view", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "steps", "says"),
    [
        # The first step sees the initial weights, and the second those that the first one ruined.
        pytest.param(
            "lightning",
            10,
            r"loss (nan|inf) .*at step 2 \(training samples [\d, ]+",
            marks=pytest.mark.slow,  # tests/run/test_loop.py has the loop's part of it
        ),
        (
            "jax",
            1,
            "validation at step 1: the outputs of 500 .*after the layer.*; there is no checkpoint yet",
        ),
    ],
)
def test_values_that_are_not_finite_are_one_line(experiment, tmp_path, name, steps, says):
    run = tmp_path / "run"
    settings = ['Optimizer.name = "sgd"', "Optimizer.learning_rate = 1e30", 'mnist.Train.loss = "mse"']
    done = experiment(FILES[name], run, *SMALL, *settings, f"mnist.Train.steps = {steps}")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(says, errors[0])
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    assert result(run)["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_bundled_digits_reach_93_percent(experiment, tmp_path, name):
    done = experiment(FILES[name], tmp_path / "run", 'mnist.Data.source = "mnist5k"')
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["test"]["accuracy"] >= 0.93


@pytest.mark.slow
@pytest.mark.skipif(
    "BLACKSMITH_MNIST_DIR" not in os.environ, reason="BLACKSMITH_MNIST_DIR names no full MNIST"
)
@pytest.mark.parametrize("name", FILES)
def test_the_full_set_reaches_98_4_percent(experiment, tmp_path, name):
    path = os.environ["BLACKSMITH_MNIST_DIR"]
    done = experiment(
        FILES[name],
        tmp_path / "run",
        'mnist.Data.source = "idx"',
        f"mnist.Data.path = {path!r}",
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["test"]["accuracy"] >= 0.984
