"""A run of the loop that is stopped or crashes at any point ends as if it had been left alone, to the bit."""

import itertools
import json
import shutil
import signal

import numpy as np
import pytest
from numpy_toy import BY_STEPS, STEPS, VARIANTS, Toy, lines, result_of, train

from blacksmith.errors import ConfigError
from blacksmith.run.checkpoint import Checkpoints, load

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def outcome(stream):
    """What equal runs have in common: metric stream, result, weights and the newest checkpoint's state."""

    def read(directory):
        newest = Checkpoints(directory / "checkpoints").newest()
        result = {k: v for k, v in result_of(directory).items() if k not in ("seconds", "peak_memory_bytes")}
        state = {name: newest.state[name] for name in ("step", "position", "own", "metrics")}
        return stream(directory), result, np.load(newest.path / "arrays.npy").tolist(), state

    return read


@pytest.mark.parametrize("block", [2, 5, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_give_the_same_run_as_single_steps(tmp_path, outcome, name, block):
    for directory, size in (("single", 1), ("blocks", block)):
        train(tmp_path / directory, *VARIANTS[name], block=size)
    assert outcome(tmp_path / "blocks") == outcome(tmp_path / "single")


class Crash(Exception):
    """As if the process ended here."""


def _crash():
    raise Crash


def _stop():
    signal.raise_signal(signal.SIGTERM)


class OneStep(Toy):
    """Is stopped in each step."""

    def step(self, step):
        _stop()
        return super().step(step)


def _interrupted(directory, bindings, point, action, **options):
    """A training in which `action` comes at the point number `point`; whether it was reached."""
    number = itertools.count()

    def at():
        if next(number) == point:
            action()

    try:
        train(directory, *bindings, at=at, **options)
    except Crash:
        return True
    return next(number) > point


@pytest.mark.parametrize("action", [_stop, _crash])
@pytest.mark.parametrize(("name", "block"), [*((name, 1) for name in VARIANTS), ("early stopping", 5)])
def test_a_run_interrupted_at_any_point_ends_as_if_left_alone(tmp_path, outcome, name, block, action):
    """A signal or a crash comes in a step, a validation, a save or the test, at every one of them."""
    options = {"block": block, "validate_first": name != "target"}  # the toy's start is beyond the target
    train(tmp_path / "whole", *VARIANTS[name], **options)
    whole = outcome(tmp_path / "whole")
    for point in itertools.count():
        directory = tmp_path / str(point)
        interrupted = _interrupted(directory, VARIANTS[name], point, action, **options)
        assert result_of(directory)["status"] in ("done", "stopped", "failed")
        train(directory, *VARIANTS[name], **options)
        assert outcome(directory) == whole, f"interrupted at point {point}"
        if not interrupted:
            break
        shutil.rmtree(directory)
    assert point > 15


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_at_every_step_ends_as_if_left_alone(tmp_path, outcome, name):
    whole = train(tmp_path / "whole", *VARIANTS[name])
    for _ in range(whole.loop.step):
        assert train(tmp_path / "run", *VARIANTS[name], toy=OneStep).status == 75
    train(tmp_path / "run", *VARIANTS[name], toy=OneStep)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_histograms_are_drawn_once(tmp_path):
    class Drawing(OneStep):
        def histograms(self):
            if self.loop.step == 0:
                _stop()
            return super().histograms()

    bindings = ("toy.Train.steps = 6", "Log.tensorboard = True", "Log.histograms_every = 2")
    runs = [train(tmp_path, *bindings, toy=Drawing, validate_first=True) for _ in range(8)]
    assert [event for toy in runs for event in toy.events if event[0] == "histograms"] == [
        ("histograms", step) for step in (0, 2, 4, 6)
    ]


def test_an_interrupted_validation_is_repeated_and_saved(tmp_path):
    class Interrupted(Toy):
        def validate(self):
            if self.loop.step == 12 and self.run.resumed is None:
                _stop()
            return super().validate()

    def saved():
        return json.loads((tmp_path / "checkpoints" / "step_00000012" / "state.json").read_text())["metrics"]

    stopped = train(tmp_path, *BY_STEPS, STEPS, toy=Interrupted)
    assert (stopped.status, stopped.events[-2:]) == (75, [("validate", 12), ("save", 12)])
    assert saved() == {}
    resumed = train(tmp_path, *BY_STEPS, STEPS, toy=Interrupted)
    assert resumed.events[:2] == [("validate", 12), ("save", 12)]
    assert saved() == {"val_loss": lines(tmp_path, "val")[2]["loss"]}


def test_a_stop_before_the_first_step_saves_and_loses_nothing(tmp_path, outcome):
    train(tmp_path / "whole", STEPS)
    start = train(tmp_path / "start", STEPS, toy=OneStep).run.checkpoints.newest()

    class AtOnce(Toy):
        def train(self):
            _stop()
            return super().train()

    for resumed in (None, start):
        directory = tmp_path / ("new" if resumed is None else "resumed")
        stopped = train(directory, STEPS, resumed=resumed, toy=AtOnce)
        assert (stopped.status, stopped.events) == (75, [])
        train(directory, STEPS, resumed=resumed)
    assert outcome(tmp_path / "new") == outcome(tmp_path / "whole")
    assert outcome(tmp_path / "resumed")[2:] == outcome(tmp_path / "whole")[2:]


@pytest.mark.parametrize("block", [1, 4])
def test_a_resume_into_a_new_directory_gives_the_rest(tmp_path, stream, tree, block):
    class Worse(Toy):
        def loss(self):
            return 0.1 * self.loop.step

    bindings = (STEPS, "Log.every_steps = 4", "Checkpoint.keep_last = 100", "Checkpoint.every_steps = 1")
    options = {"toy": Worse, "block": block}
    whole = train(tmp_path / "whole", *bindings, **options)
    before = tree(tmp_path / "whole")
    (*expected, _) = stream(tmp_path / "whole")
    for start in whole.run.checkpoints.steps()[:-1]:
        new, saved = tmp_path / start.name, load(start)
        train(new, *bindings, resumed=saved, **options)
        (*found, _) = stream(new)
        assert found == [line for line in expected if line["step"] > saved.step]
        newest = "checkpoints/step_00000014/arrays.npy"
        assert (new / newest).read_bytes() == (tmp_path / "whole" / newest).read_bytes()
        # The search for the best starts again: here with the first validation.
        best = next(line["step"] for line in found if line["split"] == "val")
        assert result_of(new)["best"] == {"metric": "val_loss", "value": 0.1 * best, "step": best}
        assert result_of(new)["tested_checkpoint"] == f"step_{best:08d}"
    assert tree(tmp_path / "whole") == before


def test_a_finished_run_started_again_only_repeats_the_test(tmp_path, outcome, tree, capsys):
    train(tmp_path, STEPS)
    whole, before = outcome(tmp_path), tree(tmp_path / "checkpoints")
    capsys.readouterr()
    again = train(tmp_path, STEPS)
    assert [event for event, _ in again.events] == ["test"]
    assert "already finished at step 14" in capsys.readouterr().err
    assert outcome(tmp_path) == whole
    assert tree(tmp_path / "checkpoints") == before


def test_a_later_end_continues_a_finished_run(tmp_path, stream):
    train(tmp_path / "run", "toy.Train.steps = 9", "Log.every_steps = 3")
    train(tmp_path / "whole", STEPS, "Log.every_steps = 3")
    toy = train(tmp_path / "run", STEPS, "Log.every_steps = 3")
    assert toy.blocks[0] == (9, 1)
    assert stream(tmp_path / "run") == stream(tmp_path / "whole")


def test_an_end_before_the_steps_taken_is_refused_and_changes_nothing(tmp_path, tree):
    train(tmp_path, STEPS)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="has taken 14 steps, more than the 9 "):
        train(tmp_path, "toy.Train.steps = 9")
    assert tree(tmp_path) == before


def test_a_decay_to_another_end_is_refused_and_changes_nothing(tmp_path, tree):
    train(tmp_path, "Schedule.name = 'cosine'", "toy.Train.steps = 6")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"set Schedule.decay_steps = 6"):
        train(tmp_path, "Schedule.name = 'cosine'", "toy.Train.steps = 9")
    assert tree(tmp_path) == before
    train(tmp_path, "Schedule.name = 'cosine'", "toy.Train.steps = 9", "Schedule.decay_steps = 6")


def test_a_stop_during_the_test_can_be_resumed(tmp_path, outcome):
    train(tmp_path / "whole", STEPS)

    class Interrupted(Toy):
        def test(self, saved):
            _stop()
            return super().test(saved)

    assert train(tmp_path / "run", STEPS, toy=Interrupted).status == 75
    result = result_of(tmp_path / "run")
    assert (result["status"], result["step"]) == ("stopped", 14)
    assert "test" not in result
    assert train(tmp_path / "run", STEPS).status == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
