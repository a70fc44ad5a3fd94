"""The training loop's bookkeeping, written once for every framework.

An experiment computes; the loop decides when to validate, save, log and stop, and what a resume needs::

    loop = Loop(run, order, end=1000, validate=validate, save=save)
    for step in loop:
        loop.log({"loss": train_step(order.rows(step))})
    return loop.finish(test, {"parameters": count})
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blacksmith.config.settings import check_warmup
from blacksmith.errors import ConfigError, NotFinite, RunError, closest
from blacksmith.run.checkpoint import Position, Saved, direction
from blacksmith.run.metrics import is_timed
from blacksmith.run.progress import Progress
from blacksmith.run.run import Run
from blacksmith.run.schedule import check_same_decay

_CURE = "a lower learning rate or gradient clipping may help"


class Batches(Protocol):
    """What the loop asks of a batch order, see `order.Order`."""

    steps_per_epoch: int | None

    def epoch(self, step: int) -> float:
        """Passes over the training set after `step` steps."""

    def examples_before(self, step: int) -> int:
        """How many examples the steps before `step` have seen."""


@dataclasses.dataclass(eq=False)
class Loop:
    """The steps from where a run stands to its end.

    Iterate over it, or over `blocks`, and call `log` after each step; a framework that owns the loop calls
    `log` and `between` from its hooks. The `train`, `checkpoint` and `log` sections of the run's
    configuration say how often things happen.

    Raises:
      ConfigError: the warm-up is longer than the run, a resumed run is past the end or its learning rate
        would follow a different schedule, or there is no validation set for `stop_at` or `early_stopping`.
    """

    run: Run  # resumes from `run.resumed` if set
    order: Batches
    _: dataclasses.KW_ONLY
    end: int  # the last step
    # Returns the metrics of the validation set, or None if the run is to stop; None: no validation set.
    # May raise `NotFinite`, which ends a run that has taken steps with a `RunError`.
    validate: Callable[[], Mapping[str, float] | None] | None
    # Writes the experiment's files into a directory; returns JSON values to find again in `Saved.own`.
    save: Callable[[Path], Mapping[str, Any] | None]
    validate_every: int | None = None  # steps; None: `evaluate_every_steps`, or else each epoch
    validate_first: bool = False  # also before the first step
    learning_rate: Callable[[int], float] | None = None  # of a step, from 0, for the training lines
    histograms: Callable[[], Mapping[str, np.ndarray]] | None = None  # by name, for ``Log.histograms_every``
    # Turns the mean values of a training line into those that are written.
    summarize: Callable[[dict[str, float]], dict[str, float]] = lambda means: means
    examples_of: Callable[[int], str] | None = None  # names those of a step, from 0, for an error message
    unit: str = "examples"  # what `order.examples_before` counts, for rates and progress

    def __post_init__(self) -> None:
        run, order = self.run, self.order
        self.position = Position()
        self._saved_at = -1
        train, checkpoint = run.config.train, run.config.checkpoint
        self._limit = 1 << 30  # steps in a call of `log`
        direction(checkpoint.metric, checkpoint.mode)
        for name in ("stop_at", "early_stopping"):
            if self.validate is None and getattr(train, name) is not None:
                raise ConfigError(f"{train.gin_name}.{name} needs a validation set, and there is none")
        if self.histograms is None and run.config.log.histograms_every:
            raise ConfigError("Log.histograms_every has no effect: this experiment writes no histograms")
        size = order.examples_before(order.steps_per_epoch) if order.steps_per_epoch else math.inf
        if train.batch_size > size:
            setting = f"{train.gin_name}.batch_size = {train.batch_size}"
            raise ConfigError(f"{setting} is more than the {size:,} training examples")
        check_warmup(run.config.schedule, self.end)
        if run.resumed is not None:
            check_same_decay(
                run.config.schedule, run.resumed.state["config"], order.steps_per_epoch, self.end
            )
            self.position = Position(**run.resumed.state["position"])
            if self.step > self.end:
                raise ConfigError(
                    f"the run has taken {self.step:,} steps, more than the {self.end:,} at which it should "
                    "now end; set a later end, or start again in a new --workdir"
                )
            if run.resumes_in_place:
                self._saved_at = self.step
            else:  # the best checkpoint so far is in the other directory: the search starts again here
                self.position.best, self.position.best_step, self.position.worse = None, 0, 0
        # How often each event happens, in steps; None or 0: never.
        epoch = order.steps_per_epoch or 0
        self._validations = (self.validate_every or train.evaluate_every_steps or epoch,)
        self._checkpoints = (checkpoint.every_steps, (checkpoint.every_epochs or 0) * epoch)
        self._drawings = (run.config.log.histograms_every,)
        self._first = self.step
        self._tried_at = self.position.validated_at  # the step of the last validation, perhaps interrupted
        self._drawn_at = -1 if run.resumed is None else self.step
        # Values since the last fetch: (first step, steps, values), perhaps still being computed on a device.
        self._pending: list[tuple[int, int, Mapping[str, Any]]] = []
        self._latest: dict[str, float] = {}  # means, for the console
        self._counts: dict[str, int] = {}
        self._clock: float | None = None
        total, seen = order.examples_before(self.end), order.examples_before(self.step)
        self._progress = Progress(total, seen, run.config.log.progress, unit=self.unit)
        if self.done and run.resumes_in_place:
            self.say(f"run already finished at step {self.step}; repeating the test evaluation")

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.position.step

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self.order.epoch(self.step)

    @property
    def done(self) -> bool:
        """Whether the end, the target (`stop_at`) or the limit of patience (`early_stopping`) is reached."""
        return self.step >= self.end or self._early_end() is not None

    def _early_end(self) -> str | None:
        """Why the run ends before its last step, if it does."""
        train, position, metric = self.run.config.train, self.position, self.run.config.checkpoint.metric
        value = position.validation.get(metric)
        target = train.stop_at if value is not None else None
        if target is not None and (value == target or self._better(value, target)):  # neither if NaN
            return f"{metric} has reached {target}"
        if train.early_stopping is not None and position.worse >= train.early_stopping:
            return f"{position.worse} validations without a better {metric}"
        return None

    def __iter__(self) -> Iterator[int]:
        return (step for step, _ in self.blocks(1))

    def blocks(self, limit: int) -> Iterator[tuple[int, int]]:
        """For compiled loops: (next step, how many steps to take until something is due, at most `limit`)."""
        self._limit = limit
        every = [n for n in (*self._validations, *self._checkpoints, *self._drawings) if n]
        self.run.begin()
        while self.between():
            step = self.step
            yield step, min([limit, self.end - step, *(n - step % n for n in every)])
            if self.step == step:
                raise RuntimeError(f"step {step} was not logged: call loop.log after each step")

    def log(self, values: Mapping[str, Any], **counts: int) -> None:
        """Counts the step, or block of steps, that was just taken; writes the training lines that are due.

        Args:
          values: by name, a number each, or an array [steps] each for a block. They may be on a device, and
            are fetched when a line or a checkpoint is due: until then they must not be overwritten in place.
          **counts: further things to give a rate of, such as ``tokens=4096``.

        Raises:
          RunError: a value is not finite; nothing of that step is saved.
          ValueError: the values have other shapes.
        """
        first, shapes = self.step, {n: tuple(getattr(v, "shape", ())) for n, v in values.items()}
        shape = next(iter(shapes.values()), ())
        steps = shape[0] if shape else 1
        if len(set(shapes.values())) > 1 or len(shape) > 1 or steps > self._limit:
            raise ValueError(
                f"log takes a number or an array [steps] by name, such as the mean loss, not {shapes}"
            )
        # Without the graph that a loss carries, which would keep every step's activations.
        values = {n: v.detach() if hasattr(v, "detach") else v for n, v in values.items()}
        self._pending.append((first, steps, values))
        self.position.step += steps
        seen = self.order.examples_before(self.step) - self.order.examples_before(first)
        for name, count in ({self.unit: seen} | counts if self.unit != "steps" else counts).items():
            self._counts[name] = self._counts.get(name, 0) + count
        every = self.run.config.log.every_steps
        if first // every != self.step // every or self.step >= self.end:
            self._fetch()
        if self._clock is None:
            # The first steps compile: rates and the time left are those of the steps after them.
            self._fetch()
            self._clock, self._counts = time.perf_counter(), {}
            self._progress.start(self.order.examples_before(self.step))
        shown = self._latest | self.position.validation
        self._progress.update(self.order.examples_before(self.step), self.step, self.epoch, shown)

    def between(self) -> bool:
        """Does what is due before the next step, once; returns whether there is one."""
        position, step = self.position, self.step
        due = self._due(self._validations) or step >= self.end if step else self.validate_first
        validated = due and self._tried_at != step and self._validate_now()
        if self.histograms and self._due(self._drawings) and self._drawn_at != step:
            self._drawn_at = step
            self._fetch()
            with self.paused():
                for name, values in self.histograms().items():
                    self.run.metrics.histogram(step, name, values)
        # Read once: a signal may come at any time.
        stop = bool(self.run.stop)
        due = step and self._due(self._checkpoints)
        best = self.run.config.checkpoint.keep_best and position.best_step == step > 0
        # Where the run starts or resumes, there is nothing to save but the result of a validation.
        new = (due or best or stop) and (step > self._first or validated)
        if (new or self.done) and (self._saved_at != step or validated):
            self.save_checkpoint()
        return not (self.done or stop)

    def discard(self) -> None:
        """Forgets the values logged since the last training line, where training started over."""
        self._pending, self.position.sums, self.position.summed = [], {}, 0

    def save_checkpoint(self) -> None:
        """Writes a checkpoint."""
        self._fetch()
        position = self.position
        # Attach validation metrics only if they were measured on these weights.
        current = position.validation if position.validated_at == self.step > 0 else {}
        with self.paused():
            self.run.save_checkpoint(self.step, dataclasses.asdict(position), self.save, current)
        self._saved_at = self.step

    def finish(
        self, test: Callable[[Saved], Mapping[str, Any] | None], result: Mapping[str, Any] | None = None
    ) -> int:
        """Tests the best checkpoint if training is done; writes and prints the result.

        `test` scores a checkpoint, or returns None if the run is to stop. Its numbers go to the metric
        stream, and all of it to `result.json`, after the experiment's own `result`. Returns the exit status:
        0, or 75 if the run was stopped and can be resumed.
        """
        run, position = self.run, self.position
        run.begin()
        self.between()
        self._progress.close()
        result = {
            "step": self.step,
            "epoch": round(self.epoch, 4),
            "best": {
                "metric": run.config.checkpoint.metric,
                "value": position.best,
                "step": position.best_step,
            },
            "final": dict(position.validation),
            **(result or {}),
        }
        if self.step < self.end and (reason := self._early_end()):
            result["ended_early"] = reason
            self.say(f"ended early at step {self.step}: {reason}")
        saved = run.checkpoints.best_or_newest() if self.done else None
        tested = test(saved) if saved else None
        if tested is None:
            return run.stopped(result)
        # Also numbers of NumPy and of frameworks, on any device.
        tested = {k: v.item() if getattr(v, "shape", None) == () else v for k, v in tested.items()}
        numbers = {k: v for k, v in tested.items() if isinstance(v, float) and not is_timed(k)}
        run.metrics.write(self.step, self.epoch, "test", numbers)
        run.finish("done", {**result, "tested_checkpoint": saved.path.name, "test": tested})
        print(f"test {show(numbers)} ({saved.path.name}, {run.metrics.seconds:.1f} s)")
        report = run.directory / "report.html"
        if report.exists():
            print(report)
        return 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent meanwhile out of the rates and of the time left."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if self._clock is not None:
            self._clock += seconds
        self._progress.exclude(seconds)

    def say(self, line: str) -> None:
        """Prints one line on the console without tearing the progress bar."""
        self._progress.say(line)

    def _due(self, intervals: Iterable[int | None]) -> bool:
        """Whether what happens at these intervals, in steps, happens now."""
        return any(n and self.step % n == 0 for n in intervals)

    def _better(self, value: float, other: float) -> bool:
        checkpoint = self.run.config.checkpoint
        return value < other if direction(checkpoint.metric, checkpoint.mode) == "min" else value > other

    def _validate_now(self) -> bool:
        """Validates; returns False if there is no validation set or the run is to stop."""
        self._tried_at = self.step
        if self.validate is None:
            return False
        # Outside of the pause: waiting for the steps taken so far is training time.
        self._fetch()
        try:
            with self.paused():
                means = self.validate()
        except NotFinite as error:
            if not self.step:
                raise
            newest = self.run.checkpoints.describe_newest()
            raise RunError(f"validation at step {self.step}: {error}; {newest}; {_CURE}") from error
        if means is None:
            return False
        position, metric = self.position, self.run.config.checkpoint.metric
        self.run.metrics.write(self.step, self.epoch, "val", means)
        position.validation = {f"val_{name}": float(value) for name, value in means.items()}
        position.validated_at = self.step
        if metric not in position.validation:
            near, allowed = closest(metric, position.validation), ", ".join(position.validation)
            raise ConfigError(f"Checkpoint.metric = {metric!r}: this experiment validates {allowed}{near}")
        if self.step:  # the weights before the first step are no candidate for the best checkpoint
            value = position.validation[metric]
            if math.isfinite(value) and (position.best is None or self._better(value, position.best)):
                position.best, position.best_step, position.worse = value, self.step, 0
            else:
                position.worse += 1
        return True

    def _fetch(self) -> None:
        """Fetches the pending values, adds them up and writes the training lines that are due."""
        position, every = self.position, self.run.config.log.every_steps
        pending, self._pending = self._pending, []
        arrays = [(first, steps, _on_host(values)) for first, steps, values in pending]
        seconds = time.perf_counter() - self._clock if self._clock is not None else None
        wrote = False
        for first, steps, values in arrays:
            if not values:
                continue
            self._check_finite(first, values)
            if position.sums and position.sums.keys() != values.keys():
                raise RuntimeError(
                    "log the same values at every step: they are averaged over the steps of a line"
                )
            lists = {name: array.tolist() for name, array in values.items()}
            for i in range(steps):
                for name, numbers in lists.items():
                    position.sums[name] = position.sums.get(name, 0.0) + numbers[i]
                position.summed += 1
                step = first + i + 1
                if step % every == 0 or step == self.end:
                    means = self._means()
                    line = dict(self.summarize(means))  # a copy: the console shows the means alone
                    if self.learning_rate is not None:
                        line["learning_rate"] = float(self.learning_rate(step - 1))
                    if seconds is not None:
                        line |= {f"{n}_per_second": c / max(seconds, 1e-9) for n, c in self._counts.items()}
                    self.run.metrics.write(step, self.order.epoch(step), "train", line)
                    position.sums, position.summed, wrote = {}, 0, True
            if position.summed:
                means = self._means()
            self._latest = means
        if wrote and self._clock is not None:
            self._clock, self._counts = time.perf_counter(), {}

    def _means(self) -> dict[str, float]:
        return {name: total / self.position.summed for name, total in self.position.sums.items()}

    def _check_finite(self, first: int, values: Mapping[str, np.ndarray]) -> None:
        finite = np.all([np.isfinite(array) for array in values.values()], axis=0)
        if finite.all():
            return
        at = int(np.argmin(finite))
        shown = " and ".join(f"{name} {array[at]}" for name, array in values.items())
        examples = f" ({self.examples_of(first + at)})" if self.examples_of else ""
        cure = _CURE
        if first + at == self._first:  # no step of this process has changed the weights yet
            cure = "the weights that it started with, or these examples, are the reason"
        newest = self.run.checkpoints.describe_newest()
        raise RunError(f"{shown} at step {first + at + 1}{examples}; {newest}; {cure}")


def _on_host(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Values of a step or block as float64 [steps], whichever framework and device they are from."""
    # On the host before float64, which not every device has, nor NumPy bfloat16.
    arrays = {n: v.cpu().double() if hasattr(v, "cpu") else v for n, v in values.items()}
    return {name: np.atleast_1d(np.asarray(array, np.float64)) for name, array in arrays.items()}


def show(values: Mapping[str, float]) -> str:
    """Metrics for the console: ``loss 0.1273, accuracy 96.10%``."""
    return ", ".join(
        f"{name} {value:.2%}" if name.endswith("accuracy") else f"{name} {value:.4f}"
        for name, value in values.items()
    )
