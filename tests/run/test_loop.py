"""The loop: what is due when, what ends a run, when values are fetched, and what rates leave out."""

import math
import time

import numpy as np
import pytest
from numpy_toy import BY_STEPS, STEPS, VARIANTS, Toy, lines, make_run, result_of, train

from blacksmith.errors import ConfigError, NotFinite, RunError
from blacksmith.run.checkpoint import direction, load
from blacksmith.run.loop import show
from blacksmith.run.order import Order
from blacksmith.run.progress import Progress

pytestmark = pytest.mark.usefixtures("quick")


def _steps(toy, what):
    return [step for event, step in toy.events if event == what]


# What is due when


@pytest.mark.parametrize("block", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("bindings", "validated", "saved", "drawn"),
    [
        (["Checkpoint.every_epochs = 2"], [3, 6, 9, 12, 14], [6, 12, 14], []),
        (["Checkpoint.every_epochs = None"], [3, 6, 9, 12, 14], [14], []),
        (BY_STEPS, [4, 8, 12, 14], [3, 6, 9, 12, 14], []),
        (["Checkpoint.every_steps = 4"], [3, 6, 9, 12, 14], [3, 4, 6, 8, 9, 12, 14], []),
        (
            ["Log.tensorboard = True", "Log.histograms_every = 5"],
            [3, 6, 9, 12, 14],
            [3, 6, 9, 12, 14],
            [0, 5, 10],
        ),
        (["toy.Train.evaluate_every_steps = 20"], [14], [3, 6, 9, 12, 14], []),
    ],
)
def test_everything_happens_when_it_is_due(tmp_path, block, bindings, validated, saved, drawn):
    toy = train(tmp_path, STEPS, "Checkpoint.keep_best = 0", *bindings, block=block)
    assert _steps(toy, "validate") == validated
    assert _steps(toy, "save") == saved
    assert _steps(toy, "histograms") == drawn
    assert [line["step"] for line in lines(tmp_path, "val")] == validated
    # Blocks follow each other, are as long as allowed, and none has something due inside.
    assert [first for first, _ in toy.blocks] == [0, *np.cumsum([n for _, n in toy.blocks])[:-1]]
    due = {*validated, *saved, *drawn, 3, 6, 9, 12, 14}
    for first, steps in toy.blocks:
        assert steps <= block
        assert not due & set(range(first + 1, first + steps))


def test_validate_first_validates_before_the_first_step(tmp_path):
    toy = train(tmp_path, "toy.Train.steps = 4", validate_first=True)
    assert _steps(toy, "validate") == [0, 3, 4]
    assert _steps(toy, "save") == [3, 4]
    # The toy's initial weights have the least loss of all, and are no candidate for the best.
    losses = [line["loss"] for line in lines(tmp_path, "val")]
    assert min(losses) == losses[0]
    assert result_of(tmp_path)["best"]["step"] in (3, 4)


def test_a_line_is_the_mean_since_the_line_before(tmp_path):
    every = train(tmp_path / "every", STEPS, "Log.every_steps = 1")
    losses = [line["loss"] for line in lines(every.run.directory, "train")]
    train(tmp_path / "fourth", STEPS, "Log.every_steps = 4")
    found = lines(tmp_path / "fourth", "train")
    assert [line["step"] for line in found] == [4, 8, 12, 14]  # the last line at the end
    for line, (start, end) in zip(found, [(0, 4), (4, 8), (8, 12), (12, 14)]):
        assert line["loss"] == sum(losses[start:end]) / (end - start)
        assert line["learning_rate"] == 0.1 / end
        assert line["epoch"] == pytest.approx(end / 3, abs=1e-6)


def test_values_are_summarized_before_they_are_written(tmp_path):
    train(tmp_path, STEPS, "Log.every_steps = 14", summarize=lambda means: {"root": means["loss"] ** 0.5})
    (line,) = lines(tmp_path, "train")
    assert 0 < line["root"] < 2
    assert "loss" not in line


def test_a_body_that_does_not_log_is_an_error(tmp_path):
    with make_run(tmp_path).opened() as run, pytest.raises(RuntimeError, match=r"call loop\.log"):
        for _ in Toy(run).loop:
            pass


# Early stopping, target, best


def test_early_stopping_counts_validations_without_improvement(tmp_path):
    toy = train(tmp_path, *VARIANTS["early stopping"])
    losses = [line["loss"] for line in lines(tmp_path, "val")]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3
    result = result_of(tmp_path)
    assert (toy.status, result["status"], result["step"]) == (0, "done", 4 * len(losses))
    assert result["best"] == {"metric": "val_loss", "value": losses[best], "step": 4 * (best + 1)}
    assert result["final"] == {"val_loss": losses[-1]}
    assert result["tested_checkpoint"] == f"step_{4 * (best + 1):08d}"


@pytest.mark.parametrize(("mode", "target"), [("min", "0.63"), ("max", "0.3")])
def test_the_target_ends_the_run_at_the_first_that_reaches_it(tmp_path, mode, target):
    bindings = [*BY_STEPS, STEPS, f"toy.Train.stop_at = {target}", f"Checkpoint.mode = '{mode}'"]
    train(tmp_path, *bindings)
    losses = [line["loss"] for line in lines(tmp_path, "val")]
    reached = [loss <= 0.63 if mode == "min" else loss >= 0.3 for loss in losses]
    assert reached == [False] * (len(losses) - 1) + [True]
    assert result_of(tmp_path)["step"] == 4 * len(losses) < 14


@pytest.mark.parametrize(("keep_best", "tested"), [(1, 8), (0, 14)])
def test_the_best_checkpoint_is_tested_if_it_is_kept(tmp_path, keep_best, tested):
    class Scripted(Toy):
        def loss(self):
            return {4: 0.5, 8: 0.1, 12: 0.2}.get(self.loop.step, 0.3)

    toy = train(tmp_path, *BY_STEPS, STEPS, f"Checkpoint.keep_best = {keep_best}", toy=Scripted)
    assert toy.events[-1] == ("test", tested)
    assert result_of(tmp_path)["tested_checkpoint"] == f"step_{tested:08d}"
    # Step 8 is no multiple of 3: it is saved only because it is the best.
    assert (8 in _steps(toy, "save")) == bool(keep_best)


def test_a_checkpoint_carries_only_metrics_of_its_own_weights(tmp_path):
    toy = train(tmp_path, *BY_STEPS, STEPS, "Checkpoint.keep_last = 100")
    validated = {line["step"]: {"val_loss": line["loss"]} for line in lines(tmp_path, "val")}
    metrics = {saved.step: saved.state["metrics"] for saved in map(load, toy.run.checkpoints.steps())}
    assert metrics == {step: validated.get(step, {}) for step in _steps(toy, "save")}
    assert set(validated) < set(metrics)


@pytest.mark.parametrize(
    ("value", "mode", "target"), [(math.nan, "min", 0.1), (math.nan, "max", 0.9), (math.inf, "min", 0.1)]
)
def test_a_validation_that_is_not_finite_is_no_best_and_no_target(tmp_path, value, mode, target):
    class Unstable(Toy):
        def loss(self):
            return value if self.loop.step == 4 else 0.5

    bindings = (f"Checkpoint.mode = '{mode}'", f"toy.Train.stop_at = {target}")
    train(tmp_path, *BY_STEPS, STEPS, *bindings, toy=Unstable)
    result = result_of(tmp_path)
    assert (result["step"], result["best"]["step"], result["best"]["value"]) == (14, 8, 0.5)


def test_outputs_that_are_not_finite_end_a_run_that_has_taken_steps(tmp_path):
    class Broken(Toy):
        def loss(self):
            raise NotFinite("sample 3")

    with pytest.raises(RunError, match=r"validation at step 4: sample 3; .*; a lower learning rate"):
        train(tmp_path, *BY_STEPS, STEPS, toy=Broken)
    assert result_of(tmp_path)["status"] == "failed"


def test_a_metric_that_validation_does_not_have_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Checkpoint.metric = 'val_f1': .* validates val_loss"):
        train(tmp_path / "run", "Checkpoint.metric = 'val_f1'")


def test_a_metric_of_unknown_direction_needs_a_mode(tmp_path):
    with pytest.raises(ConfigError, match=r"'val_depth': set Checkpoint.mode to 'min' or 'max'"):
        train(tmp_path / "run", "Checkpoint.metric = 'val_depth'")
    for metric, lower in (("val_mae", "min"), ("val_top_error", "min"), ("val_psnr", "max")):
        assert direction(metric, "auto") == lower


@pytest.mark.parametrize(
    "values", [{"loss": np.ones(4)}, {"loss": np.ones((1, 2))}, {"loss": np.ones(1), "accuracy": 1.0}]
)
def test_a_step_logs_one_number_by_name(tmp_path, values):
    with make_run(tmp_path / "run", STEPS).opened() as run:
        toy = Toy(run)
        next(iter(toy.loop))
        with pytest.raises(ValueError, match="log takes a number or an array"):
            toy.loop.log(values)


def test_scores_may_be_numbers_of_numpy(tmp_path):
    class Scores(Toy):
        def test(self, saved):
            return {"loss": np.float32(0.5), "rows": np.int64(3)}

    train(tmp_path, STEPS, toy=Scores)
    assert result_of(tmp_path)["test"] == {"loss": 0.5, "rows": 3}
    assert lines(tmp_path, "test")[0]["loss"] == 0.5


def test_the_console_shows_means_and_no_rates(tmp_path, monkeypatch):
    shown = set()
    monkeypatch.setattr(Progress, "update", lambda self, done, step, epoch, values: shown.update(values))
    train(tmp_path, STEPS)
    assert shown == {"loss", "val_loss"}


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 11 is more than the 10 training examples"):
        train(tmp_path / "run", STEPS, "toy.Train.batch_size = 11")


def test_histograms_of_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="this experiment writes no histograms"):
        train(tmp_path, "Log.tensorboard = True", "Log.histograms_every = 2", histograms=None)


def test_why_a_run_ended_early_is_said(tmp_path, capsys):
    train(tmp_path, *VARIANTS["target"])
    reason = result_of(tmp_path)["ended_early"]
    assert reason == "val_loss has reached 0.63"
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["stop_at = 0.5", "early_stopping = 2"])
def test_a_target_needs_a_validation_set(tmp_path, setting):
    with pytest.raises(ConfigError, match=r"toy\.Train\.\w+ needs a validation set"):
        train(tmp_path / "run", f"toy.Train.{setting}", validate=None)


def test_a_warm_up_leaves_a_step(tmp_path):
    with pytest.raises(ConfigError, match="warmup_steps = 14 leaves no step"):
        train(tmp_path / "run", STEPS, "Schedule.warmup_steps = 14")


def test_the_same_values_are_logged_at_every_step(tmp_path):
    with make_run(tmp_path).opened() as run:
        loop = Toy(run).loop
        loop.log({"loss": 1.0})
        loop.log({"loss": 1.0, "norm": 2.0})
        with pytest.raises(RuntimeError, match="the same values at every step"):
            loop.save_checkpoint()


# The end


def test_a_finished_run_writes_and_prints_its_test(tmp_path, capsys):
    toy = train(tmp_path, STEPS)
    result = result_of(tmp_path)
    assert (toy.status, result["status"], result["weights"], result["epoch"]) == (0, "done", 3, 4.6667)
    assert result["test"] == {"loss": result["best"]["value"], "rows": 10, "seconds_per_row": 0.1}
    # Numbers go to the stream, but neither times nor what is not a float.
    (line,) = lines(tmp_path, "test")
    assert set(line) == {"step", "epoch", "seconds", "split", "loss"}
    printed = capsys.readouterr().out
    assert f"test loss {line['loss']:.4f} (step_000000" in printed
    assert "report.html" not in printed  # there is none


def test_finish_does_what_a_framework_with_its_own_loop_left_out(tmp_path):
    class Framework(Toy):
        def train(self):
            for step in range(self.loop.step, self.loop.end):
                self.loop.log({"loss": self.step(step)})
            return self.loop.finish(self.test)

    toy = train(tmp_path, "toy.Train.steps = 5", toy=Framework)
    assert toy.events == [("validate", 5), ("save", 5), ("test", 5)]
    again = train(tmp_path, "toy.Train.steps = 5", toy=Framework)
    assert (again.status, again.events) == (0, [("test", 5)])


def test_show_rounds_for_the_console():
    assert show({"loss": 0.12734, "accuracy": 0.961}) == "loss 0.1273, accuracy 96.10%"


# Values that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("bad", [1, 7, 9, 14])  # the first, no event, validation and checkpoint, the last
def test_a_loss_that_is_not_finite_ends_the_run_unsaved(tmp_path, block, bad, value):
    class Diverging(Toy):
        def step(self, step):
            loss = super().step(step)
            return np.float32(value) if step == bad - 1 else loss

    bindings = (STEPS, "Log.every_steps = 100", "Checkpoint.keep_last = 100")
    histograms = ("Log.tensorboard = True", "Log.histograms_every = 7")
    with make_run(tmp_path, *bindings, *histograms).opened() as run:
        toy = Diverging(run, block=block)
        # No advice about learning rates where no step has used one.
        cure = "lower learning rate" if bad > 1 else "the weights that it started with"
        with pytest.raises(RunError, match=rf"loss {value} at step {bad} \(rows \[.*{cure}") as e:
            toy.train()
    assert str(toy.order.rows(bad - 1).tolist()) in str(e.value)
    assert all(step < bad for _, step in toy.events)
    assert [p.name for p in run.checkpoints.steps()] == [f"step_{n:08d}" for n in (3, 6, 9, 12) if n < bad]
    newest = run.checkpoints.steps()
    assert (newest[-1].name if newest else "there is no checkpoint yet") in str(e.value)


# Values on a device


class OnDevice:
    """A value on a device, whose transfers are counted; a transfer may have to wait for the device."""

    transfers = 0

    def __init__(self, value, wait=lambda: None):
        self._value, self._wait = np.asarray(value), wait
        self.shape = self._value.shape

    def __array__(self, dtype=None, copy=None):
        OnDevice.transfers += 1
        self._wait()
        return self._value.astype(dtype)


@pytest.fixture
def transfers(monkeypatch):
    """How many values have been fetched so far."""
    monkeypatch.setattr(OnDevice, "transfers", 0)
    return lambda: OnDevice.transfers


def test_values_stay_on_the_device_until_something_is_due(tmp_path, transfers):
    seen = {}

    class Remote(Toy):
        def step(self, step):
            seen[step] = transfers()
            return OnDevice(super().step(step))

    bindings = ("Log.every_steps = 8", "toy.Train.evaluate_every_steps = 10", "Checkpoint.every_steps = 12")
    train(tmp_path / "device", STEPS, *bindings, "Checkpoint.every_epochs = None", toy=Remote)
    # Before each step: fetched after the first step, which compiles, and then at 8, 10, 12 and 14.
    expected = [0, *[1] * 7, 8, 8, 10, 10, 12, 12]
    assert [seen[step] for step in range(14)] == expected
    assert transfers() == 14
    train(tmp_path / "host", STEPS, *bindings, "Checkpoint.every_epochs = None")
    assert lines(tmp_path / "device", "train")[0]["loss"] == lines(tmp_path / "host", "train")[0]["loss"]


def test_bfloat16_tensors_can_be_logged(tmp_path):
    torch = pytest.importorskip("torch")

    class Half(Toy):
        def step(self, step):
            return torch.tensor(super().step(step), dtype=torch.bfloat16, requires_grad=True)

    train(tmp_path, STEPS, "Log.every_steps = 7", toy=Half)
    assert [line["step"] for line in lines(tmp_path, "train")] == [7, 14]


def test_discarded_values_are_in_no_mean(tmp_path):
    class Restarted(Toy):
        def train(self):
            for step in self.loop:
                if step == 6:  # training starts over
                    self.loop.discard()
                self.loop.log({} if step == 6 else {"loss": float(step)})
            return 0

    # Of the values since the line at step 4, the validation has fetched one, and one is on the device.
    train(tmp_path, STEPS, "Log.every_steps = 4", "toy.Train.evaluate_every_steps = 5", toy=Restarted)
    # The means of 0 to 3, of 7 alone, of 8 to 11, of 12 and 13.
    assert [line["loss"] for line in lines(tmp_path, "train")] == [1.5, 7, 9.5, 12.5]


# Rates


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


class Timed(Toy):
    """A step takes 2 s, but the first 500 s; validation, histograms and saving far longer."""

    clock = Clock()
    on_device = False

    def step(self, step):
        value, seconds = super().step(step), 500 if step == 0 else 2
        if self.on_device:  # the host waits when it fetches the value
            return OnDevice(value, lambda: self.clock.wait(seconds))
        self.clock.wait(seconds)
        return value

    def validate(self):
        self.clock.wait(7000)
        return super().validate()

    def histograms(self):
        self.clock.wait(8000)
        return super().histograms()

    def save(self, directory):
        self.clock.wait(9000)
        return super().save(directory)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("every", [1, 4, 6])
def test_rates_leave_out_the_first_step_and_what_is_no_training(tmp_path, monkeypatch, every, on_device):
    monkeypatch.setattr(Timed, "on_device", on_device)
    monkeypatch.setattr(time, "perf_counter", Timed.clock)
    bindings = (STEPS, f"Log.every_steps = {every}", "Checkpoint.every_steps = 2")
    train(tmp_path, *bindings, "Log.tensorboard = True", "Log.histograms_every = 5", toy=Timed)
    order, start = Order(10, 4, 0), 1
    for line in lines(tmp_path, "train"):
        if line["step"] == 1:
            assert "examples_per_second" not in line
            continue
        rows = sum(len(order.rows(step)) for step in range(start, line["step"]))
        assert line["examples_per_second"] == pytest.approx(rows / (2 * (line["step"] - start)), rel=1e-9)
        start = line["step"]


def test_further_counts_have_rates_of_their_own(tmp_path):
    class Tokens(Toy):
        def train(self):
            for step in self.loop:
                self.loop.log({"loss": self.step(step)}, tokens=10)
            return 0

    train(tmp_path / "a", STEPS, "Log.every_steps = 7", toy=Tokens)
    train(tmp_path / "b", STEPS, "Log.every_steps = 7", toy=Tokens, unit="steps")
    for directory, expected in (
        ("a", {"examples_per_second", "tokens_per_second"}),
        ("b", {"tokens_per_second"}),
    ):
        for line in lines(tmp_path / directory, "train"):
            assert {name for name in line if name.endswith("_per_second")} == expected
