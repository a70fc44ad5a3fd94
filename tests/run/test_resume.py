"""A run that is killed or stopped and then resumed equals an uninterrupted one, bit for bit.

Everything here goes through the real launcher in separate processes, on bundled data.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from blacksmith.run.checkpoint import Checkpoints
from blacksmith.run.metrics import is_timed

# Checkpoints, training lines and epochs fall on different steps, so that running means and the position in
# the epoch have to survive.
COMMON = {
    "Checkpoint.every_epochs": "None",
    "Log.every_steps": "3",
    "Log.progress": "'off'",
    "Log.tensorboard": "False",
}
# Small blocks, so that signals come in the middle of the training. An epoch has 28 steps.
MNIST = {
    "mnist.Data.source": "'mnist5k'",
    "mnist.Model.hidden": "(16,)",
    "mnist.Model.dropout": "0.3",
    "mnist.Train.steps": "400",
    "mnist.Train.block_steps": "4",
    "Checkpoint.every_steps": "20",
}
NERF = {
    "nerf.Data.downscale": "4",
    "nerf.Grid.resolutions": "(12, 18, 28)",
    "nerf.Grid.upsample_at": "(0.2, 0.5)",
    "nerf.Grid.refresh_at": "(0.4, 0.7)",
    "nerf.Grid.occupancy_resolution": "32",
    "nerf.Train.steps": "150",
    "nerf.Train.samples": "8192",
    "nerf.Train.evaluate_every_steps": "40",
    "nerf.Train.validation_views": "1",
    "nerf.Results.video_frames": "0",
    "Schedule.warmup_steps": "5",
    "Checkpoint.every_steps": "20",
}
LLAMA = {
    "llama.Model.hidden_size": "32",
    "llama.Model.intermediate_size": "48",
    "llama.Train.epochs": "None",
    "llama.Train.steps": "150",
    "llama.Train.batch_size": "8",
    "llama.Train.accumulate": "2",
    "llama.Train.average": "0.9",
    "llama.Train.evaluate_every_steps": "40",
    "llama.Evaluation.generate": "3",
    "llama.Lora.rank": "4",
    "llama.Lora.dropout": "0.2",
    "Checkpoint.every_steps": "20",
}
CASES = {
    "mnist_jax": MNIST | {"Schedule.name": "'constant'", "mnist.Data.shift": "2.0"},
    "mnist_torch": MNIST | {"Schedule.name": "'cosine'"},
    "mnist_lightning": MNIST | {"Optimizer.name": "'sgd'", "Optimizer.momentum": "0.9"},
    "nerf_blender": NERF,
    "llama_sst2_tiny": LLAMA,
}


def _end(case):
    return int(next(value for name, value in CASES[case].items() if name.endswith("Train.steps")))


def _command(case, directory, *flags, **changed):
    """The launcher's command for a case; `changed` are settings with `__` for the dots."""
    settings = COMMON | CASES[case] | {name.replace("__", "."): value for name, value in changed.items()}
    bindings = [f"--gin_param={name} = {value}" for name, value in settings.items()]
    files = [f"--gin_file=gin/{case}.gin", f"--workdir={directory}", "--device=cpu"]
    return [sys.executable, "-m", "blacksmith.launch", *files, *bindings, *flags]


def _run(case, directory, *flags, **changed):
    command = _command(case, directory, *flags, **changed)
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What two equal runs have in common; `saved` are the checkpoint's tensors and loop state by name."""

    result: dict
    stream: list
    saved: dict


def _untimed(value):
    """JSON without what differs between two equal runs."""
    if isinstance(value, list):
        return [_untimed(item) for item in value]
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if not is_timed(k) and k != "peak_memory_bytes"}
    return value


def _tensors(path):
    """The bytes of a checkpoint file; of Lightning's, the tensors and other values that training reads."""
    if path.name != "lightning.ckpt":
        return path.read_bytes()
    import torch

    content = torch.load(path, weights_only=True)
    return {
        "weights": {name: value.numpy().tobytes() for name, value in content["state_dict"].items()},
        "moments": [
            {name: value.numpy().tobytes() for name, value in slots.items()}
            for slots in content["optimizer_states"][0]["state"].values()
        ],
        "schedules": content["lr_schedulers"],
    }


@pytest.fixture
def outcome(stream):
    """Reads what a run left in its directory."""

    def read(directory):
        newest = Checkpoints(directory / "checkpoints").newest()
        paths = [path for path in newest.path.iterdir() if path.suffix in (".safetensors", ".ckpt")]
        files = {path.name: _tensors(path) for path in paths}
        saved = files | {name: newest.state[name] for name in ("step", "position", "own", "metrics")}
        result = json.loads((directory / "result.json").read_text())
        return Outcome(_untimed(result), stream(directory), saved)

    return read


@pytest.fixture
def assert_equal(outcome):
    """Compares two runs part by part, so that a failure can be read."""

    def check(directory, whole):
        found, expected = outcome(directory), outcome(whole)
        assert found.stream == expected.stream
        assert found.result == expected.result
        assert found.saved.keys() == expected.saved.keys()
        different = [name for name, value in expected.saved.items() if found.saved[name] != value]
        assert not different

    return check


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a case's uninterrupted run, which is started when it is first asked for."""
    directory = tmp_path_factory.mktemp("whole")

    def run_once(case):
        if not (directory / case).exists():
            done = _run(case, directory / case)
            assert done.returncode == 0, done.stderr
        return directory / case

    return run_once


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of a case's uninterrupted run, to be continued."""
    return lambda case: shutil.copytree(whole(case), tmp_path / "copy")


# --- interruptions ---


def _lines(directory):
    with contextlib.suppress(FileNotFoundError):
        return (directory / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _saving(directory):
    with contextlib.suppress(FileNotFoundError):
        return any(".tmp-" in name for name in os.listdir(directory / "checkpoints"))
    return False


def _interrupt(case, directory, number, moment, rng):
    """Starts a case and sends it a signal; returns its status and standard error.

    Args:
      case: of `CASES`.
      directory: its run directory.
      number: the signal.
      moment: ``start``: within the time that a run takes to its first step; ``training``: when the metric
        stream has grown by a random number of lines; ``save``: while a checkpoint is being written.
      rng: draws what is random.
    """
    before = _lines(directory)
    enough = before + rng.randint(1, _end(case) // 3 // 5)
    command = _command(case, directory)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if moment == "start":
        time.sleep(rng.uniform(0, 4))
    else:
        while process.poll() is None:
            lines = _lines(directory)
            if lines >= enough and (moment == "training" or _saving(directory)):
                break
            # A resume first cuts off what follows the last checkpoint.
            before, enough = min(before, lines), enough - max(before - lines, 0)
            time.sleep(0.001)
        if moment == "training":
            time.sleep(rng.uniform(0, 0.01))
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    _, error = process.communicate(timeout=300)
    return process.returncode, error


def _assert_stopped(case, directory, status, error, number):
    """Checks that a signal stopped a run in good order."""
    assert status == 75, error
    assert f"{number.name}: finishing this step" in error
    result = json.loads((directory / "result.json").read_text())
    assert result["status"] == "stopped"
    assert 0 < result["step"] < _end(case)
    assert Checkpoints(directory / "checkpoints").newest().step == result["step"]
    assert (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("case", "stops"),
    [
        ("mnist_jax", [signal.SIGINT]),
        ("mnist_torch", []),
        ("mnist_lightning", [signal.SIGTERM]),
        ("nerf_blender", [signal.SIGTERM]),
        ("llama_sst2_tiny", [signal.SIGTERM]),
    ],
)
def test_killed_then_stopped_then_resumed(case, stops, whole, tmp_path, assert_equal):
    rng = random.Random(case)
    directory = tmp_path / "run"
    status, error = _interrupt(case, directory, signal.SIGKILL, "training", rng)
    assert status == -signal.SIGKILL, error
    for number in stops:
        _assert_stopped(case, directory, *_interrupt(case, directory, number, "training", rng), number)
    newest = Checkpoints(directory / "checkpoints").newest()
    done = _run(case, directory)
    assert done.returncode == 0, done.stderr
    if newest is not None:
        assert f", from {newest.path}\n" in done.stderr
    assert_equal(directory, whole(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_many_random_moments(case, whole, tmp_path, monkeypatch, assert_equal):
    # Every process compiles again, as a user's does.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    rng = random.Random(f"many {case}")
    directory = tmp_path / "run"
    moments = ["start", "training", "save", "training", "start", "save", "training", "save", "start"]
    rng.shuffle(moments)
    statuses = [_interrupt(case, directory, signal.SIGKILL, moment, rng)[0] for moment in moments]
    # A run may have ended before the later kills.
    assert set(statuses) <= {-signal.SIGKILL, 0}
    assert statuses.count(-signal.SIGKILL) >= 5
    done = _run(case, directory)
    assert done.returncode == 0, done.stderr
    assert_equal(directory, whole(case))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("case", CASES)
def test_stopped_twice_and_resumed(case, number, whole, tmp_path, assert_equal):
    rng = random.Random(f"stop {case} {number}")
    directory = tmp_path / "run"
    for _ in range(2):
        _assert_stopped(case, directory, *_interrupt(case, directory, number, "training", rng), number)
    done = _run(case, directory)
    assert done.returncode == 0, done.stderr
    assert_equal(directory, whole(case))


@pytest.mark.slow
def test_tensorboard_shows_a_killed_and_resumed_run_as_one(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as tensorboard

    def shown(directory):
        guidance = {tensorboard.SCALARS: 0, tensorboard.HISTOGRAMS: 0}
        events = tensorboard.EventAccumulator(str(directory / "tensorboard"), guidance).Reload()
        found = {
            tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not is_timed(tag.partition("/")[2])
        }
        for tag in events.Tags()["histograms"]:
            found[tag] = [(e.step, e.histogram_value) for e in events.Histograms(tag)]
        return found

    settings = {"Log__tensorboard": "True", "Log__histograms_every": "20"}
    assert _run("mnist_jax", tmp_path / "whole", **settings).returncode == 0
    rng = random.Random("tensorboard")
    directory = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            CASES, "mnist_jax", CASES["mnist_jax"] | {k.replace("__", "."): v for k, v in settings.items()}
        )
        for _ in range(2):
            status, error = _interrupt("mnist_jax", directory, signal.SIGKILL, "training", rng)
            assert status == -signal.SIGKILL, error
    assert _run("mnist_jax", directory, **settings).returncode == 0
    assert shown(directory) == shown(tmp_path / "whole")


# --- resuming ---


def test_a_broken_checkpoint_falls_back_to_the_one_before(whole, copy, assert_equal):
    directory = copy("mnist_jax")
    newest = directory / "checkpoints" / "step_00000400" / "arrays.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    done = _run("mnist_jax", directory)
    assert done.returncode == 0, done.stderr
    assert f"warning: {newest} is missing or has changed since it was written" in done.stderr
    assert f"from {directory}/checkpoints/step_00000380" in done.stderr
    assert_equal(directory, whole("mnist_jax"))


def test_resume_from_a_path_writes_a_new_directory(whole, tmp_path, tree, outcome):
    before = tree(whole("mnist_jax"))
    start = whole("mnist_jax") / "checkpoints" / "step_00000380"
    done = _run("mnist_jax", tmp_path / "new", f"--resume={start}")
    assert done.returncode == 0, done.stderr
    found, expected = outcome(tmp_path / "new"), outcome(whole("mnist_jax"))
    assert found.saved["arrays.safetensors"] == expected.saved["arrays.safetensors"]
    assert found.stream[0]["step"] == 381  # where the mean of three steps is due
    assert found.stream[:-1] == expected.stream[-len(found.stream) : -1]
    assert tree(whole("mnist_jax")) == before


def test_a_later_end_and_another_cadence_are_allowed(whole, copy, outcome):
    directory = copy("mnist_jax")
    changed = {"mnist__Train__steps": "430", "Checkpoint__every_steps": "25", "Log__progress": "'lines'"}
    done = _run("mnist_jax", directory, **changed)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in Checkpoints(directory / "checkpoints").steps()]
    assert names[-2:] == ["step_00000425", "step_00000430"]
    found, expected = outcome(directory), outcome(whole("mnist_jax"))
    assert found.stream[: len(expected.stream) - 1] == expected.stream[:-1]  # all but the test
    assert [line["step"] for line in found.stream if line["split"] == "test"] == [430]


@pytest.mark.slow
def test_a_later_end_with_the_same_decay_continues_it(whole, copy, outcome):
    directory = copy("mnist_torch")
    done = _run("mnist_torch", directory, mnist__Train__steps="430", Schedule__decay_steps="400")
    assert done.returncode == 0, done.stderr
    found, expected = outcome(directory), outcome(whole("mnist_torch"))
    assert found.saved["step"] == 430
    assert found.stream[: len(expected.stream) - 1] == expected.stream[:-1]  # all but the test
    late = [line for line in found.stream if line["step"] > 403 and "learning_rate" in line]
    assert {line["learning_rate"] for line in late} == {0.0}
