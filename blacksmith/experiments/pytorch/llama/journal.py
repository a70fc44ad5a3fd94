"""What a run has to remember and to tell: its place, its sums, its metrics and its progress."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from blacksmith.errors import RunError
from blacksmith.experiments.pytorch.llama.batches import LengthOrder
from blacksmith.experiments.pytorch.llama.evaluation import Scores
from blacksmith.run.checkpoint import direction
from blacksmith.run.progress import Progress
from blacksmith.run.run import Run


@dataclasses.dataclass
class Loop:
    """Everything that a resumed loop has to know besides weights and optimiser; saved as JSON.

    Attributes:
      step: optimiser steps taken.
      sums: what has been added up for the next training line, by metric; ``steps`` counts.
      validation: the latest validation metrics.
      validated_at: the step they were measured at.
      best: best value of ``Checkpoint.metric`` so far.
      best_step: the step it was reached at.
    """

    step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    validated_at: int = -1
    best: float | None = None
    best_step: int = -1


class Journal:
    """Books the steps of one run.

    Args:
      run: gets the metrics.
      order: the batches.
      examples: the source's numbers of what the order counts, see `sst2.Examples`: int64 [examples].
      end: the last step.
      loop: where the run stands.
    """

    def __init__(self, run: Run, order: LengthOrder, examples: np.ndarray, end: int, loop: Loop) -> None:
        self.loop = loop
        self._run, self._order, self._numbers, self._end = run, order, examples, end
        self._examples = self._tokens = 0
        self._began = time.perf_counter()
        self._done = order.examples_before(loop.step)
        self._progress = Progress(order.examples_before(end), self._done, run.config.log.progress)

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        epoch, cursor = self._order.position(self.loop.step)
        return epoch + cursor / self._order.steps_per_epoch

    def stepped(self, loss: Tensor, norm: Tensor, rate: float, *, examples: int, tokens: int) -> None:
        """Books one optimiser step.

        Args:
          loss: mean over the batch's answer tokens, before the step.
          norm: of the gradients, before they were cut.
          rate: the learning rate.
          examples: how many the batch had.
          tokens: that went through the model, padding too.

        Raises:
          RunError: loss or norm is not finite; nothing of this step is saved.
        """
        loop = self.loop
        values = {"loss": float(loss), "gradient_norm": float(norm)}
        if not all(math.isfinite(value) for value in values.values()):
            raise self._not_finite(values)
        loop.step += 1
        loop.sums["steps"] = loop.sums.get("steps", 0) + 1
        for name, value in values.items():
            loop.sums[name] = loop.sums.get(name, 0.0) + value
        self._done += examples
        self._examples += examples
        self._tokens += tokens
        log = loop.step % self._run.config.log.every_steps == 0 or loop.step == self._end
        speed = {"tokens/s": self._tokens / max(time.perf_counter() - self._began, 1e-9)}
        if log:
            self._write(rate)
        shown = {"loss": values["loss"]} | loop.validation | speed
        self._progress.update(self._done, loop.step, self.epoch, shown)

    def validated(self, scores: Scores) -> None:
        """Books a look at the validation set."""
        loop, checkpoint = self.loop, self._run.config.checkpoint
        means = {"loss": scores.loss, "accuracy": scores.accuracy}
        self._run.metrics.write(loop.step, self.epoch, "val", means)
        loop.validation = {f"val_{name}": value for name, value in means.items()}
        loop.validated_at = loop.step
        if not loop.step:
            return  # the model as it came is no candidate for the best checkpoint
        value = loop.validation[checkpoint.metric]
        less = direction(checkpoint.metric, checkpoint.mode) == "min"
        if loop.best is None or (value < loop.best if less else value > loop.best):
            loop.best, loop.best_step = value, loop.step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is done meanwhile out of the rates."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._began += seconds
        self._progress.leave_out(seconds)

    def say(self, line: str) -> None:
        """Prints one line on the console."""
        self._progress.say(line)

    def close(self) -> None:
        """Leaves the progress bar as it stands."""
        self._progress.close()

    def _write(self, rate: float) -> None:
        """Writes a training line: means over the steps since the one before."""
        sums = self.loop.sums
        steps = sums.pop("steps")
        seconds = max(time.perf_counter() - self._began, 1e-9)
        values: Mapping[str, float] = {
            **{name: total / steps for name, total in sums.items()},
            "learning_rate": rate,
            "examples_per_second": self._examples / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._run.metrics.write(self.loop.step, self.epoch, "train", values)
        sums.clear()
        self._examples = self._tokens = 0
        self._began = time.perf_counter()

    def _not_finite(self, values: Mapping[str, float]) -> RunError:
        step = self.loop.step
        rows = ", ".join(map(str, sorted(self._numbers[self._order.rows(step)])))
        kept = self._run.checkpoints.steps()
        told = " and ".join(f"{name} {value}" for name, value in values.items())
        return RunError(
            f"{told} at step {step + 1}, rows {rows} of the training data; the last checkpoint is "
            f"{kept[-1].name if kept else 'none'}; lower Optimizer.learning_rate"
        )
