"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch."""

import dataclasses

import keras

from blacksmith.datasets import mnist
from blacksmith.models.keras.mnist.mlp import mlp
from blacksmith.run.run import Run
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.classification import make_setup, score_classifier
from blacksmith.trainers.keras_trainer import KerasTrainer, Samples, Setup


def train(run: Run) -> int:
    """Trains the model and tests the best checkpoint; returns the exit status."""
    setup = prepare(run)
    trainer = KerasTrainer(run, setup)
    trainer.fit()
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
