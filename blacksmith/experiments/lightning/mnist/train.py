"""The MNIST MLP of `keras/mnist`, the same Keras 3 model, inside Lightning's Trainer.

Lightning's Trainer fetches batches and calls `training_step`, which takes a step of the PyTorch backend.
Batches, metrics, checkpoints and the final test are those of `keras/mnist`, so runs can be compared.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import keras
import lightning as L

from blacksmith.datasets import mnist
from blacksmith.models.keras.mnist.mlp import mlp
from blacksmith.run.order import Block
from blacksmith.run.run import Run
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.classification import make_setup, score_classifier
from blacksmith.trainers.keras_trainer import KerasTrainer, Samples, Setup
from blacksmith.trainers.lightning import make_trainer
from blacksmith.trainers.torch_backend import Row, Taken


def train(run: Run) -> int:
    """Trains the model and tests the best checkpoint; returns the exit status."""
    setup = prepare(run)
    trainer = KerasTrainer(run, setup)
    fit(trainer)
    return trainer.finish(lambda: score_classifier(trainer.backend, setup.test, run.claim))


def prepare(run: Run) -> Setup:
    """Data, model and optimizer."""
    config, settings = run.config, run.config.data
    data = settings.load(config.run.seed)
    run.use_data(data.info)
    splits = [
        Samples(*mnist.prepare(split, settings.scale, settings.mean, settings.std), split.images)
        for split in (data.train, data.validation, data.test)
    ]
    augmentation = None
    if settings.shift or settings.rotate:
        augmentation = ShiftAndRotate(settings.shift, settings.rotate, -settings.mean / settings.std)

    def build() -> keras.Model:
        return mlp(**dataclasses.asdict(config.model), num_classes=data.info.classes)

    return make_setup(config, build, splits, augmentation)


def fit(trainer: KerasTrainer) -> None:
    """Runs Lightning's Trainer until training is done or the run is stopped."""
    run, loop, order = trainer.run, trainer.loop, trainer.setup.order
    run.begin()
    if not loop.between():
        return
    batches = Batches(trainer)
    make_trainer(
        run.device,
        run.directory,
        max_epochs=math.ceil(loop.end / order.steps_per_epoch) - order.position(loop.step)[0],
        # Lightning asks for a loader's length only once, but the first epoch after a resume is shorter.
        reload_dataloaders_every_n_epochs=1,
    ).fit(MnistModule(trainer, batches), batches)


class Batches:
    """The training batches from the loop's position on, one epoch per iteration.

    Yields what `TorchBackend.step` takes. Lightning does not prefetch from a loader of known length, so it
    requests a block only after the previous one is logged.
    """

    def __init__(self, trainer: KerasTrainer) -> None:
        self._loop, self._order, self._backend = trainer.loop, trainer.setup.order, trainer.backend
        self._limit = trainer.run.config.train.block_steps
        self.block: Block | None = None

    def __len__(self) -> int:
        _, cursor = self._order.position(self._loop.step)
        return min(self._order.steps_per_epoch - cursor, self._loop.end - self._loop.step)

    def __iter__(self) -> Iterator[Row]:
        epoch, _ = self._order.position(self._loop.step)
        for step, steps in self._loop.blocks(self._limit):
            if self._order.position(step)[0] != epoch:
                return
            self.block = self._order.block(step, steps)
            yield from self._backend.rows(self.block, step)


class MnistModule(L.LightningModule):
    """The Keras model as a Lightning module with manual optimization."""

    def __init__(self, trainer: KerasTrainer, batches: Batches) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = trainer.setup.task.model
        self.keras_trainer, self._batches = trainer, batches
        self._done: list[Taken] = []

    def on_train_start(self) -> None:
        """Takes SIGTERM back: Lightning's own handler would end the run in the middle of a block."""
        self.keras_trainer.run.stop.listen()

    def configure_optimizers(self) -> None:
        """None for Lightning: the optimizer is Keras's, stepped in `training_step`."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> None:
        """One optimizer step on the next batch.

        Lightning passes the iterator itself because of the argument's name, and then skips the hooks that
        move a batch to the device; ours is already there.
        """
        row, _, _ = next(dataloader_iter)
        trainer, block = self.keras_trainer, self._batches.block
        self._done.append(trainer.backend.step(row))
        if len(self._done) == len(block.indices):
            values = trainer.backend.values(self._done, block.weights)
            self._done = []
            trainer.log(block, values)
            # Here, because Lightning does not ask the loader for a next batch after the last one of an epoch.
            self.trainer.should_stop = not trainer.loop.between()
