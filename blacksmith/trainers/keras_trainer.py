"""The training loop for any Keras 3 model, written once for every backend.

`KerasTrainer.fit` runs blocks of steps on a backend; what happens between blocks (metrics, evaluation,
checkpoints, early stopping) is here too, so that Lightning's loop can call the same `next_block` and
`after_block`. Nothing here knows a dataset.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors.numpy import load_file, save_file

from blacksmith.errors import CheckpointError, RunError
from blacksmith.run.checkpoint import Saved, direction
from blacksmith.run.order import EMPTY_DIGEST, Block, Order, chain_digest
from blacksmith.run.progress import Progress
from blacksmith.run.run import Run
from blacksmith.trainers.initial_weights import weights_sha256
from blacksmith.trainers.task import Backend, Task

ARRAYS = "arrays.safetensors"


@dataclass(frozen=True)
class Samples:
    """Prepared samples: `inputs` float32 [samples, ...], `labels` int32 [samples]."""

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Plan:
    """When the loop ends and what it does on the way; all counts are optimiser steps.

    Attributes:
      total_steps: where training ends.
      log_every: training metrics are averaged over so many steps.
      evaluate_every: None: after each epoch.
      checkpoint_every: None: not by steps.
      checkpoint_every_epochs: None: not by epochs.
      histograms_every: None: never.
      block_steps: the most steps between two looks at the stop flag.
      early_stopping: evaluations without improvement that end the run; None: never.
      stop_at: value of the watched metric that ends the run; None: none does.
      metric: the watched validation metric, ``val_loss`` or ``val_accuracy``.
      mode: ``min`` or ``max``.
      keep_best: whether a checkpoint is written whenever the watched metric is better than ever.
      progress: style of the console progress, see `Progress`.
    """

    total_steps: int
    log_every: int = 50
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_every_epochs: int | None = 1
    histograms_every: int | None = None
    block_steps: int = 128
    early_stopping: int | None = None
    stop_at: float | None = None
    metric: str = "val_loss"
    mode: str = "min"
    keep_best: bool = True
    progress: str = "auto"


@dataclass
class LoopState:
    """Everything that a resumed loop has to know besides the arrays; saved as JSON.

    Attributes:
      step: optimiser steps taken.
      order_sha256: running hash of the batches seen.
      initial_weights_sha256: hash of the weights at step 0.
      sums: what has been summed for the next training line, by metric; ``steps`` counts.
      validation: the latest validation metrics.
      validated_at: the step they were measured at.
      best: best value of the watched metric so far.
      best_step: the step it was reached at.
      worse: evaluations since.
    """

    step: int = 0
    order_sha256: str = EMPTY_DIGEST
    initial_weights_sha256: str = ""
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    validated_at: int = -1
    best: float | None = None
    best_step: int = 0
    worse: int = 0


class KerasTrainer:
    """Trains one model in one run directory.

    Args:
      task: what is learned.
      backend: runs the steps.
      order: the batches.
      plan: when things happen.
      validation: evaluated on the way; may be empty.
      run: the run; `run.resumed` is gone on from.

    Raises:
      CheckpointError: the checkpoint to go on from does not fit the model or optimiser.
      ValueError: a layer would see the padding of the last batch of an epoch.
    """

    def __init__(
        self,
        task: Task,
        backend: Backend,
        order: Order,
        plan: Plan,
        validation: Samples,
        run: Run,
    ) -> None:
        self.task = task
        self.backend = backend
        self.order = order
        self.plan = plan
        self.validation = validation
        self.run = run
        self.state = LoopState()
        self._saved_at = -1
        if run.resumed is not None:
            self.state = LoopState(**run.resumed.state["loop"])
            load_checkpoint(backend, run.resumed)
            if run.goes_on:
                self._saved_at = self.state.step
            else:
                # The best checkpoint so far stays where it is: here the search for one starts anew.
                self.state.best, self.state.best_step, self.state.worse = None, 0, 0
        else:
            self.state.initial_weights_sha256 = weights_sha256(
                {k: v for k, v in backend.state().items() if k.startswith("model/")}
            )
        _check_ragged(task, order)
        self._seen_since, self._seconds_since = 0, 0.0
        self._block_start = 0.0
        self.progress = Progress(
            order.samples_before(plan.total_steps),
            order.samples_before(self.state.step),
            plan.progress,
        )

    @property
    def finished(self) -> bool:
        """Whether the planned end, the target or early stopping has been reached."""
        plan, state = self.plan, self.state
        value = state.validation.get(plan.metric)
        reached = (
            plan.stop_at is not None
            and value is not None
            and (value <= plan.stop_at if plan.mode == "min" else value >= plan.stop_at)
        )
        patience = plan.early_stopping is not None and state.worse >= plan.early_stopping
        return state.step >= plan.total_steps or reached or patience

    def fit(self) -> str:
        """Trains to the end, or until the run is to stop.

        Returns:
          ``done`` or ``stopped``; in both cases the state is in a checkpoint.

        Raises:
          RunError: the loss is not finite.
        """
        while (block := self.next_block()) is not None:
            self.after_block(block, self.backend.train_block(block, self.state.step))
        return self.close()

    def next_block(self) -> Block | None:
        """The next steps to take, or None when the loop is to end."""
        if self.run.stop or self.finished:
            return None
        step, plan = self.state.step, self.plan
        if step == 0:
            self._histograms()
        ends = [plan.total_steps, step + plan.block_steps]
        for every in (plan.evaluate_every, plan.checkpoint_every, plan.histograms_every):
            if every:
                ends.append((step // every + 1) * every)
        self._block_start = time.perf_counter()
        return self.order.block(step, min(ends) - step)

    def after_block(self, block: Block, values: Mapping[str, np.ndarray]) -> None:
        """Books the steps of `block`: writes what is due, evaluates, saves.

        Args:
          block: from `next_block`.
          values: loss and metrics of its steps, float32 [steps].

        Raises:
          RunError: the loss is not finite; nothing of this block is saved.
        """
        self._seconds_since += time.perf_counter() - self._block_start
        # First of all, so that a failure of this block is written down in the directory as it is now.
        _ = self.run.metrics
        plan, state = self.plan, self.state
        first, count = state.step, len(block.indices)
        self._check_finite(block, values["loss"], first)
        self._log(values, first, count)
        state.step += count
        state.order_sha256 = chain_digest(state.order_sha256, block.indices)
        epoch, cursor = self.order.position(state.step)
        end = state.step >= plan.total_steps
        if plan.evaluate_every:
            evaluate = state.step % plan.evaluate_every == 0
        else:
            evaluate = cursor == 0
        if (evaluate or end) and len(self.validation):
            self._evaluate()
        self._histograms()
        due = (plan.checkpoint_every and state.step % plan.checkpoint_every == 0) or (
            plan.checkpoint_every_epochs and cursor == 0 and epoch % plan.checkpoint_every_epochs == 0
        )
        improved = plan.keep_best and state.best_step == state.validated_at == state.step
        if due or improved or self.finished:
            self.save()
        shown = {name: float(v[-1]) for name, v in values.items()}
        self.progress.update(
            self.order.samples_before(state.step),
            state.step,
            self._epoch(state.step),
            shown | state.validation,
        )

    def close(self) -> str:
        """Ends the loop: saves what is not saved; returns ``done`` or ``stopped``."""
        if self._saved_at != self.state.step:
            self.save()
        self.progress.close()
        return "done" if self.finished else "stopped"

    def save(self) -> Path:
        """Writes a checkpoint of the present state."""
        path = save_checkpoint(self.run, self.backend, self.state)
        self._saved_at = self.state.step
        return path

    def _log(self, values: Mapping[str, np.ndarray], first: int, count: int) -> None:
        """Adds the steps' values to the running means and writes the lines that fall due."""
        state, every = self.state, self.plan.log_every
        seen = self.order.samples_before(first + count) - self.order.samples_before(first)
        self._seen_since += seen
        lists = {name: v.astype(np.float64).tolist() for name, v in values.items()}
        rate = self._seen_since / max(self._seconds_since, 1e-9)
        wrote = False
        for i in range(count):
            for name, numbers in lists.items():
                state.sums[name] = state.sums.get(name, 0.0) + numbers[i]
            state.sums["steps"] = state.sums.get("steps", 0) + 1
            step = first + i + 1
            if step % every == 0 or step == self.plan.total_steps:
                steps = state.sums.pop("steps")
                means = {name: total / steps for name, total in state.sums.items()}
                means["learning_rate"] = self._learning_rate(step - 1)
                means["examples_per_second"] = rate
                self.run.metrics.write(step, self._epoch(step), "train", means)
                state.sums = {}
                wrote = True
        if wrote:
            self._seen_since, self._seconds_since = 0, 0.0

    def _evaluate(self) -> None:
        plan, state = self.plan, self.state
        means = evaluate(self.backend, self.validation)[0]
        self.run.metrics.write(state.step, self._epoch(state.step), "val", means)
        state.validation = {f"val_{name}": value for name, value in means.items()}
        state.validated_at = state.step
        value = state.validation[plan.metric]
        better = state.best is None or (value < state.best if plan.mode == "min" else value > state.best)
        if better:
            state.best, state.best_step, state.worse = value, state.step, 0
        else:
            state.worse += 1

    def _histograms(self) -> None:
        """Writes those that are due; before a checkpoint, since a resume keeps what was written up to it."""
        step, every = self.state.step, self.plan.histograms_every
        if every and step % every == 0:
            for name, values in self.backend.distributions(self.order.block(step, 1), step).items():
                self.run.metrics.histogram(step, name, values)

    def _check_finite(self, block: Block, losses: np.ndarray, first: int) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            rows = ", ".join(map(str, block.indices[bad[0]][:4]))
            kept = self.run.checkpoints.steps()
            raise RunError(
                f"the loss is {losses[bad[0]]} at step {first + bad[0] + 1} (training samples {rows}, "
                f"...); the last checkpoint is {kept[-1].name if kept else 'none'}; a lower "
                "Optimizer.learning_rate or gradient clipping may help"
            )

    def _epoch(self, step: int) -> float:
        epoch, cursor = self.order.position(step)
        return epoch + cursor / self.order.steps_per_epoch

    def _learning_rate(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        rate = self.task.optimizer._learning_rate
        return float(rate(step)) if callable(rate) else float(rate)


def make_backend(
    task: Task,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    block_steps: int = 128,
    say: Callable[[str], None] = print,
) -> Backend:
    """The backend for the framework that Keras runs on.

    Args:
      task: what to train.
      inputs: training inputs float32 [samples, ...].
      labels: int32 [samples].
      block_steps: the most steps that one block will have.
      say: takes lines for the user.
    """
    if keras.config.backend() == "jax":
        from blacksmith.trainers.jax_backend import JaxBackend

        return JaxBackend(task, inputs, labels, block_steps)
    if keras.config.backend() == "torch":
        from blacksmith.trainers.torch_backend import TorchBackend

        return TorchBackend(task, inputs, labels, say)
    raise ValueError(f"no trainer for the Keras backend {keras.config.backend()!r}: jax or torch")


def _check_ragged(task: Task, order: Order) -> None:
    """Padding has no weight in the loss, but a layer that mixes the samples of a batch would see it."""
    if order.size % order.batch == 0:
        return
    for layer in task.model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) or layer.activity_regularizer is not None:
            raise ValueError(
                f"the layer {layer.name!r} would see the padding of the last batch: {order.size} samples are "
                f"no multiple of the batch of {order.batch}; give Order(..., drop_last=True)"
            )


def evaluate(backend: Backend, samples: Samples) -> tuple[dict[str, float], np.ndarray]:
    """Mean loss and metrics over `samples`, and the outputs [samples, ...]."""
    values, outputs = backend.evaluate(samples.inputs, samples.labels)
    return {name: float(np.mean(v, dtype=np.float64)) for name, v in values.items()}, outputs


def save_checkpoint(run: Run, backend: Backend, state: LoopState) -> Path:
    """Writes weights, optimiser slots and loop state as a portable checkpoint."""
    arrays = backend.state()
    return run.save_checkpoint(
        state.step,
        dataclasses.asdict(state),
        lambda directory: save_file(arrays, directory / ARRAYS),
        # Those of older weights would make this checkpoint look as good as they were.
        state.validation if state.validated_at == state.step else {},
    )


def load_checkpoint(backend: Backend, saved: Saved) -> None:
    """Puts a checkpoint's weights and slots into the backend.

    Raises:
      CheckpointError: it holds other arrays than the model and optimiser have.
    """
    try:
        backend.load_state(load_arrays(saved.path))
    except ValueError as error:
        raise CheckpointError(f"{saved.path} does not fit this configuration: {error}") from error


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint directory by name: ``model/...`` and ``optimizer/...``.

    Raises:
      CheckpointError: the file cannot be read.
    """
    try:
        return load_file(path / ARRAYS)
    except Exception as error:
        raise CheckpointError(f"{path / ARRAYS} cannot be read: {error}") from error


def make_plan(total_steps: int, config: Any) -> Plan:
    """The plan of a configuration with `train`, `checkpoint` and `log` sections."""
    metric = config.checkpoint.metric
    return Plan(
        total_steps=total_steps,
        log_every=config.log.every_steps,
        evaluate_every=config.train.evaluate_every_steps,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_every_epochs=config.checkpoint.every_epochs,
        histograms_every=config.log.histograms_every,
        block_steps=config.train.block_steps,
        early_stopping=config.train.early_stopping,
        stop_at=config.train.stop_at,
        metric=metric,
        mode=direction(metric, config.checkpoint.mode),
        keep_best=config.checkpoint.keep_best > 0,
        progress=config.log.progress,
    )
