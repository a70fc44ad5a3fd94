"""A run that is killed or stopped and then resumed equals an uninterrupted one, bit for bit.

Everything here goes through the real launcher in separate processes, on bundled data.
"""

import json
import os
import random
import shutil
import signal

import pytest
from interruptions import end, interrupt, outcome, run

from blacksmith.run.checkpoint import Checkpoints
from blacksmith.run.metrics import is_timed


@pytest.fixture
def assert_equal():
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
            done = run(case, directory / case)
            assert done.returncode == 0, done.stderr
        return directory / case

    return run_once


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of a case's uninterrupted run, to be continued."""
    return lambda case: shutil.copytree(whole(case), tmp_path / "copy")


# --- interruptions ---


def _assert_stopped(case, directory, status, error, number):
    """Checks that a signal stopped a run in good order."""
    assert status == 75, error
    assert f"{number.name}: finishing this step" in error
    result = json.loads((directory / "result.json").read_text())
    assert result["status"] == "stopped"
    assert 0 < result["step"] < end(case)
    assert Checkpoints(directory / "checkpoints").newest().step == result["step"]
    assert (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("case", "stops"),
    [
        ("mnist_jax", [signal.SIGINT]),
        pytest.param("mnist_torch", [], marks=pytest.mark.slow),  # Lightning runs the same backend
        ("mnist_lightning", []),
        ("nerf_blender", []),
        ("llama_sst2_tiny", []),
    ],
)
def test_killed_then_stopped_then_resumed(case, stops, whole, tmp_path, assert_equal):
    rng = random.Random(case)
    directory = tmp_path / "run"
    status, error = interrupt(case, directory, signal.SIGKILL, "training", rng)
    assert status == -signal.SIGKILL, error
    for number in stops:
        _assert_stopped(case, directory, *interrupt(case, directory, number, "training", rng), number)
    newest = Checkpoints(directory / "checkpoints").newest()
    done = run(case, directory)
    assert done.returncode == 0, done.stderr
    if newest is not None:
        assert f", from {newest.path}\n" in done.stderr
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
    assert run("mnist_jax", tmp_path / "whole", **settings).returncode == 0
    rng = random.Random("tensorboard")
    directory = tmp_path / "run"
    for _ in range(2):
        status, error = interrupt("mnist_jax", directory, signal.SIGKILL, "training", rng, **settings)
        assert status == -signal.SIGKILL, error
    assert run("mnist_jax", directory, **settings).returncode == 0
    assert shown(directory) == shown(tmp_path / "whole")


# --- resuming ---


def test_a_broken_checkpoint_falls_back_to_the_one_before(whole, copy, assert_equal):
    directory = copy("mnist_jax")
    newest = directory / "checkpoints" / "step_00000400" / "arrays.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    done = run("mnist_jax", directory)
    assert done.returncode == 0, done.stderr
    assert f"warning: {newest} is missing or has changed since it was written" in done.stderr
    assert f"from {directory}/checkpoints/step_00000380" in done.stderr
    assert_equal(directory, whole("mnist_jax"))


def test_resume_from_a_path_writes_a_new_directory(whole, tmp_path, tree):
    before = tree(whole("mnist_jax"))
    start = whole("mnist_jax") / "checkpoints" / "step_00000380"
    done = run("mnist_jax", tmp_path / "new", f"--resume={start}")
    assert done.returncode == 0, done.stderr
    found, expected = outcome(tmp_path / "new"), outcome(whole("mnist_jax"))
    assert found.saved["arrays.safetensors"] == expected.saved["arrays.safetensors"]
    assert found.stream[0]["step"] == 381  # where the mean of three steps is due
    assert found.stream[:-1] == expected.stream[-len(found.stream) : -1]
    assert tree(whole("mnist_jax")) == before


def test_a_later_end_and_another_cadence_are_allowed(whole, copy):
    directory = copy("mnist_jax")
    changed = {"mnist__Train__steps": "430", "Checkpoint__every_steps": "25", "Log__progress": "'lines'"}
    done = run("mnist_jax", directory, **changed)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in Checkpoints(directory / "checkpoints").steps()]
    assert names[-2:] == ["step_00000425", "step_00000430"]
    found, expected = outcome(directory), outcome(whole("mnist_jax"))
    assert found.stream[: len(expected.stream) - 1] == expected.stream[:-1]  # all but the test
    assert [line["step"] for line in found.stream if line["split"] == "test"] == [430]


@pytest.mark.slow
def test_a_later_end_with_the_same_decay_continues_it(whole, copy):
    directory = copy("mnist_torch")
    done = run("mnist_torch", directory, mnist__Train__steps="430", Schedule__decay_steps="400")
    assert done.returncode == 0, done.stderr
    found, expected = outcome(directory), outcome(whole("mnist_torch"))
    assert found.saved["step"] == 430
    assert found.stream[: len(expected.stream) - 1] == expected.stream[:-1]  # all but the test
    late = [line for line in found.stream if line["step"] > 403 and "learning_rate" in line]
    assert {line["learning_rate"] for line in late} == {0.0}
