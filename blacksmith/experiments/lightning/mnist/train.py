"""The MNIST MLP of `keras/mnist`, the same Keras 3 model, inside Lightning's Trainer.

Lightning owns the loop: its Trainer fetches batches and calls `training_step`, where the backend's traced
forward and backward, and then the optimiser, run under manual optimisation. Batches, metrics, checkpoints and
the final test are those of the other two MNIST experiments, so that the three can be compared step by step.
"""

import logging
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from blacksmith.experiments.keras.mnist import pipeline
from blacksmith.run.order import Block
from blacksmith.run.run import Run
from blacksmith.trainers.keras_trainer import KerasTrainer
from blacksmith.trainers.torch_backend import TorchBackend


def main(run: Run) -> int:
    """Runs the experiment in the given mode; returns the exit status."""
    if run.mode == "eval":
        return pipeline.evaluate_checkpoint(run)
    if run.mode == "export":
        return pipeline.export(run)
    prepared = pipeline.prepare(run)
    style = run.config.log.progress
    bar = style == "bar" or (style == "auto" and sys.stderr.isatty())
    loop = pipeline.make_trainer(run, prepared, progress="off" if bar else style)
    batches = Batches(loop, prepared.backend)
    module = MnistModule(loop, prepared.backend, batches)
    if not loop.finished:
        fit(module, batches, run, bar=bar)
    return pipeline.conclude(run, prepared, loop, loop.close())


def fit(module: "MnistModule", batches: "Batches", run: Run, *, bar: bool) -> None:
    """Runs Lightning's Trainer until the loop says that it is finished or stopped."""
    # Its hints (more workers, a logger) do not fit: the data is on the device and metrics are ours.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device = torch.device(run.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        trainer = L.Trainer(
            accelerator={"cpu": "cpu", "mps": "mps"}.get(device.type, "gpu"),
            devices=1 if device.index is None else [device.index],
            max_epochs=batches.epochs_left,
            # Lightning asks for a loader's length once; after a resume the first epoch is a shorter one.
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=bar,
            callbacks=[EpochBar(module)] if bar else [],
            default_root_dir=run.directory,
        )
        trainer.fit(module, batches)


class Batches:
    """The training batches, one epoch an iteration, from the loop's position on.

    Yields what `TorchBackend.gradients` takes for one step. Its length is that of the rest of the epoch: a
    loader of known length is not read ahead, so that each block is asked for when the one before is booked.
    """

    def __init__(self, loop: KerasTrainer, backend: TorchBackend) -> None:
        self._loop = loop
        self._backend = backend
        self.block: Block | None = None

    @property
    def epochs_left(self) -> int:
        """Epochs, begun ones counted whole, until the planned end."""
        order, state = self._loop.order, self._loop.state
        epoch, _ = order.position(state.step)
        return math.ceil(self._loop.plan.total_steps / order.steps_per_epoch) - epoch

    def __len__(self) -> int:
        order, step = self._loop.order, self._loop.state.step
        _, cursor = order.position(step)
        return min(order.steps_per_epoch - cursor, self._loop.plan.total_steps - step)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        epoch = self._loop.order.position(self._loop.state.step)[0]
        while self._loop.order.position(self._loop.state.step)[0] == epoch:
            self.block = self._loop.next_block()
            if self.block is None:
                return
            yield from self._backend.rows(self.block, self._loop.state.step)


class MnistModule(L.LightningModule):
    """The Keras model as a Lightning module with manual optimisation.

    Args:
      loop: books the steps.
      backend: the traced gradients and the optimiser step.
      batches: the loader, which holds the block that the steps belong to.
    """

    def __init__(self, loop: KerasTrainer, backend: TorchBackend, batches: Batches) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = loop.task.model
        self.loop = loop
        self._backend = backend
        self._batches = batches
        self._done: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._plan: list[Any] = []
        self.shown: dict[str, float] = {}

    def on_train_start(self) -> None:
        """Takes SIGTERM back: Lightning's own handler would end the run in the middle of a block."""
        self.loop.run.stop.listen()

    def configure_optimizers(self) -> None:
        """None for Lightning: the optimiser is Keras's, stepped in `training_step`."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> None:
        """One optimiser step on the next batch.

        Taking the iterator itself is Lightning's way to spare the hooks that move a batch to the device,
        where this one already is.
        """
        row, _, _ = next(dataloader_iter)
        if not self._done:
            self._plan = self._backend.plan(self.loop.state.step, len(self._batches.block.indices))
        with torch.no_grad():
            loss, outputs, labels, gradients = self._backend.gradients(row)
            self._backend.apply(gradients, self._plan[len(self._done)])
        self._done.append((loss, outputs, labels))
        if len(self._done) == len(self._plan):
            self._book()

    def _book(self) -> None:
        block, done = self._batches.block, self._done
        self._done = []
        values = self._backend.values(*map(list, zip(*done)), block.weights)
        self.loop.after_block(block, values)
        self.shown = {name: float(v[-1]) for name, v in values.items()} | self.loop.state.validation
        if self.loop.finished or self.loop.run.stop:
            self.trainer.should_stop = True


class EpochBar(TQDMProgressBar):
    """Lightning's progress bar with our numbers, refreshed once a block."""

    def __init__(self, module: MnistModule) -> None:
        super().__init__(refresh_rate=module.loop.plan.block_steps)
        self._module = module

    def get_metrics(self, *_: Any) -> dict[str, str]:
        """Loss and metrics of the last step, and the latest validation metrics."""
        return {name: f"{value:.4f}" for name, value in self._module.shown.items()}
