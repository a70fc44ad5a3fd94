"""A run that is killed or stopped and goes on equals one that was left alone, bit for bit.

Everything here goes through the real launcher in processes of its own, on the embedded digits.
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
from pathlib import Path

import pytest

from blacksmith.run import metrics
from blacksmith.run.checkpoint import Checkpoints, load

STEPS = 400
# Checkpoints, log lines (every 3) and epochs (28 steps) fall on different steps, so that running means and
# the position in the epoch have to survive; small blocks, so that signals come in the middle of the training.
SETTINGS = {
    "mnist.Data.source": "'mnist5k'",
    "mnist.Model.hidden": "(16,)",
    "mnist.Model.dropout": "0.3",
    "mnist.Train.steps": str(STEPS),
    "mnist.Train.block_steps": "4",
    "Checkpoint.every_steps": "20",
    "Checkpoint.every_epochs": "None",
    "Log.every_steps": "3",
    "Log.progress": "'off'",
    "Log.tensorboard": "False",
}
CASES = {
    "jax": {"Schedule.name": "'constant'", "mnist.Data.shift": "2.0"},
    "torch": {"Schedule.name": "'cosine'"},
    "lightning": {"Schedule.name": "'cosine'", "Optimizer.name": "'sgd'", "Optimizer.momentum": "0.9"},
}


def _command(case, directory, *flags, **changed):
    """The launcher's command for a case; `changed` are settings with `__` for the dots."""
    settings = SETTINGS | CASES[case] | {name.replace("__", "."): value for name, value in changed.items()}
    bindings = [f"--gin_param={name} = {value}" for name, value in settings.items()]
    files = [f"--gin_file=gin/mnist_{case}.gin", f"--workdir={directory}", "--device=cpu"]
    return [sys.executable, "-m", "blacksmith.launch", *files, *bindings, *flags]


def _run(case, directory, *flags, **changed):
    command = _command(case, directory, *flags, **changed)
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What two equal runs have in common."""

    step: int
    weights: bytes
    stream: list
    result: dict


def _outcome(directory):
    newest = Checkpoints(directory / "checkpoints").newest()
    stream = [
        {name: value for name, value in line.items() if not metrics.is_timed(name)}
        for line in metrics.read(directory / "metrics.jsonl")
    ]
    result = json.loads((directory / "result.json").read_text())
    own = ("seconds", "peak_memory_bytes")
    result = {name: value for name, value in result.items() if name not in own}
    return Outcome(newest.step, (newest.path / "arrays.safetensors").read_bytes(), stream, result)


def _assert_equal(directory, whole):
    """Compares part by part, for the sake of a readable failure."""
    found, expected = _outcome(directory), _outcome(whole)
    assert found.step == expected.step
    assert found.stream == expected.stream
    assert found.result == expected.result
    assert found.weights == expected.weights


def _tree(directory):
    """Every path below `directory` with its bytes; the lock, which every start writes, left out."""
    paths = [p for p in directory.rglob("*") if p.name != ".lock"]
    return {str(p.relative_to(directory)): p.is_file() and p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a case's uninterrupted run; all cases run once, side by side."""
    directory = tmp_path_factory.mktemp("whole")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = {case: subprocess.Popen(_command(case, directory / case), **pipes) for case in CASES}
    errors = {case: process.communicate(timeout=300)[1] for case, process in running.items()}
    for case, process in running.items():
        assert process.returncode == 0, errors[case]
    return lambda case: directory / case


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of a case's uninterrupted run, to go on with."""
    return lambda case: shutil.copytree(whole(case), tmp_path / "copy")


# Interruptions


def _lines(directory):
    with contextlib.suppress(FileNotFoundError):
        return (directory / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _saving(directory):
    with contextlib.suppress(FileNotFoundError):
        return any(".tmp-" in name for name in os.listdir(directory / "checkpoints"))
    return False


def _interrupt(command, directory, number, moment, rng):
    """Starts `command` and sends it a signal; returns its status and standard error.

    Args:
      command: from `_command`.
      directory: its run directory.
      number: the signal.
      moment: ``start``: within the time that a run takes to its first step; ``training``: when the metric
        stream has grown by a random number of lines; ``save``: while a checkpoint is being written.
      rng: draws what is random.
    """
    before = _lines(directory)
    enough = before + rng.randint(1, STEPS // 3 // 5)
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


def _assert_stopped(directory, status, error, number):
    """Checks that a run has ended in good order after a signal."""
    assert status == 75, error
    assert f"{number.name}: finishing the step and saving" in error
    result = json.loads((directory / "result.json").read_text())
    assert result["status"] == "stopped"
    assert 0 < result["step"] < STEPS
    assert Checkpoints(directory / "checkpoints").newest().step == result["step"]
    assert (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("case", "stops"), [("jax", [signal.SIGINT]), ("torch", []), ("lightning", [signal.SIGTERM])]
)
def test_a_run_killed_then_stopped_then_resumed_equals_one_left_alone(case, stops, whole, tmp_path):
    rng = random.Random(case)
    directory = tmp_path / "run"
    command = _command(case, directory)
    status, error = _interrupt(command, directory, signal.SIGKILL, "training", rng)
    assert status == -signal.SIGKILL, error
    for number in stops:
        _assert_stopped(directory, *_interrupt(command, directory, number, "training", rng), number)
    newest = Checkpoints(directory / "checkpoints").newest()
    done = _run(case, directory)
    assert done.returncode == 0, done.stderr
    if newest is not None:
        assert f", from {newest.path}\n" in done.stderr
    _assert_equal(directory, whole(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_many_random_moments_equals_one_left_alone(case, whole, tmp_path, monkeypatch):
    # Every process compiles anew, as a user's does.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    rng = random.Random(f"many {case}")
    directory = tmp_path / "run"
    command = _command(case, directory)
    moments = ["start", "training", "save", "training", "start", "save", "training", "save", "start"]
    rng.shuffle(moments)
    statuses = [_interrupt(command, directory, signal.SIGKILL, moment, rng)[0] for moment in moments]
    # A run may have come to its end before the later kills; those of the first ones all hit.
    assert set(statuses) <= {-signal.SIGKILL, 0}
    assert statuses.count(-signal.SIGKILL) >= 7
    done = _run(case, directory)
    assert done.returncode == 0, done.stderr
    _assert_equal(directory, whole(case))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_again_and_again_equals_one_left_alone(case, number, whole, tmp_path):
    rng = random.Random(f"stop {case} {number}")
    directory = tmp_path / "run"
    for _ in range(2):
        ended = _interrupt(_command(case, directory), directory, number, "training", rng)
        _assert_stopped(directory, *ended, number)
    done = _run(case, directory)
    assert done.returncode == 0, done.stderr
    _assert_equal(directory, whole(case))


@pytest.mark.slow
def test_tensorboard_shows_a_killed_and_resumed_run_as_one(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as tensorboard

    def shown(directory):
        guidance = {tensorboard.SCALARS: 0, tensorboard.HISTOGRAMS: 0}
        events = tensorboard.EventAccumulator(str(directory / "tensorboard"), guidance).Reload()
        found = {
            tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not metrics.is_timed(tag)
        }
        for tag in events.Tags()["histograms"]:
            found[tag] = [(e.step, e.histogram_value) for e in events.Histograms(tag)]
        return found

    settings = {"Log__tensorboard": "True", "Log__histograms_every": "20"}
    assert _run("jax", tmp_path / "whole", **settings).returncode == 0
    rng = random.Random("tensorboard")
    directory = tmp_path / "run"
    command = _command("jax", directory, **settings)
    for _ in range(2):
        status, error = _interrupt(command, directory, signal.SIGKILL, "training", rng)
        assert status == -signal.SIGKILL, error
    assert _run("jax", directory, **settings).returncode == 0
    assert shown(directory) == shown(tmp_path / "whole")


# Going on


def test_a_truncated_newest_checkpoint_falls_back_and_the_run_still_ends_equal(whole, copy):
    directory = copy("jax")
    newest = directory / "checkpoints" / f"step_{STEPS:08d}" / "arrays.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    done = _run("jax", directory)
    assert done.returncode == 0, done.stderr
    assert f"warning: {newest} has changed since it was written; trying another" in done.stderr
    assert f"from {directory}/checkpoints/step_{STEPS - 20:08d}" in done.stderr
    _assert_equal(directory, whole("jax"))


def test_a_finished_run_started_again_changes_nothing_and_says_so(whole, copy):
    directory = copy("jax")
    done = _run("jax", directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("already finished at step ")
    assert json.loads((directory / "result.json").read_text())["status"] == "done"
    _assert_equal(directory, whole("jax"))
    assert _tree(directory / "checkpoints") == _tree(whole("jax") / "checkpoints")


def test_resume_from_a_path_starts_a_new_directory_that_ends_equal(whole, tmp_path):
    before = _tree(whole("jax"))
    start = whole("jax") / "checkpoints" / f"step_{STEPS - 20:08d}"
    done = _run("jax", tmp_path / "new", f"--resume={start}")
    assert done.returncode == 0, done.stderr
    found, expected = _outcome(tmp_path / "new"), _outcome(whole("jax"))
    assert found.weights == expected.weights
    assert found.stream[0]["step"] == STEPS - 20 + 1  # 381, where the mean of three steps is due
    assert found.stream[:-1] == expected.stream[-len(found.stream) : -1]
    assert _tree(whole("jax")) == before


def test_a_later_end_and_another_cadence_are_allowed(whole, copy):
    directory = copy("jax")
    later = STEPS + 30
    done = _run(
        "jax",
        directory,
        mnist__Train__steps=str(later),
        Checkpoint__every_steps="25",
        Log__progress="'lines'",
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in Checkpoints(directory / "checkpoints").steps()][-2:] == [
        f"step_{STEPS + 25:08d}",
        f"step_{later:08d}",
    ]
    found, expected = _outcome(directory), _outcome(whole("jax"))
    assert found.step == later
    assert found.stream[: len(expected.stream) - 1] == expected.stream[:-1]  # all but the test
    assert [line["step"] for line in found.stream if line["split"] == "test"] == [later]


def test_a_later_end_of_a_schedule_that_decays_to_the_end_is_refused_and_changes_nothing(copy):
    directory = copy("torch")
    before = _tree(directory)
    done = _run("torch", directory, mnist__Train__steps=str(STEPS + 30))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the schedule 'cosine' ")
    assert "Schedule.decay_steps" in line
    assert line.endswith(f" {STEPS}")
    assert "Traceback" not in done.stderr
    assert _tree(directory) == before


@pytest.mark.slow
def test_a_later_end_of_a_schedule_that_decays_goes_on_with_the_decay_as_it_was(whole, copy):
    """What the refusal above says to do."""
    directory = copy("torch")
    changed = {"mnist__Train__steps": str(STEPS + 30), "Schedule__decay_steps": str(STEPS)}
    done = _run("torch", directory, **changed)
    assert done.returncode == 0, done.stderr
    found, expected = _outcome(directory), _outcome(whole("torch"))
    assert found.step == STEPS + 30
    assert found.stream[: len(expected.stream) - 1] == expected.stream[:-1]  # all but the test
    assert {
        line["learning_rate"] for line in found.stream if line["step"] > STEPS + 3 and "learning_rate" in line
    } == {0.0}


def test_another_setting_is_refused_naming_it_and_changes_nothing(copy):
    directory = copy("jax")
    before = _tree(directory)
    done = _run("jax", directory, Optimizer__learning_rate="0.5")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot go on from {directory}/checkpoints/step_{STEPS:08d} with other settings: "
        "Optimizer.learning_rate was 0.002, now 0.5; set them back, or start in a new --workdir\n"
    )
    assert _tree(directory) == before


def test_other_data_is_refused_and_changes_nothing(copy):
    directory = copy("jax")
    saved = Checkpoints(directory / "checkpoints").newest()
    arrays = (saved.path / "arrays.safetensors").read_bytes()
    # The same checkpoint, as if it had been trained on other images.
    other = {**saved.state, "data": {**saved.state["data"], "sha256": "f" * 64}}
    Checkpoints(saved.path.parent, keep_last=9).save(
        saved.step, other, lambda path: (path / "arrays.safetensors").write_bytes(arrays)
    )
    assert load(saved.path).state["data"]["sha256"] == "f" * 64
    before = _tree(directory)
    done = _run("jax", directory)
    assert done.returncode == 3
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        f"error: the data has changed since step_{STEPS:08d}: it was mnist5k ffffffffffff, "
    )
    assert "Traceback" not in done.stderr
    assert _tree(directory) == before


def test_never_refuses_a_directory_with_checkpoints(copy):
    directory = copy("jax")
    before = _tree(directory)
    done = _run("jax", directory, "--resume=never")
    assert done.returncode == 2
    assert "already has checkpoints" in done.stderr
    assert _tree(directory) == before


def test_the_package_is_the_one_under_test():
    """The launcher's processes must not pick up another installed copy."""
    code = "import blacksmith; print(blacksmith.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    assert Path(found) == Path(metrics.__file__).with_name("__init__.py")
