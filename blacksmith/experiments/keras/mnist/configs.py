"""The configuration of the MNIST experiments on JAX, PyTorch and Lightning. Loads no framework."""

import dataclasses
from typing import Literal

from blacksmith.config.sections import section, setting
from blacksmith.config.settings import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    check_log,
    check_optimizer,
)
from blacksmith.errors import ConfigError


@section("mnist.Data")
class Data:
    """Where the digits come from and how they are prepared."""

    source: Literal["auto", "idx", "tfds", "mnist5k"] = setting(
        "auto",
        "where the images come from; auto: the first that needs no download",
        evaluation_may_change=True,
    )
    path: str | None = setting(
        None, "directory of the idx files, or TFDS's data_dir; None: the cache", evaluation_may_change=True
    )
    name: str = setting(
        "mnist",
        "the TFDS set: any 28x28 greyscale one (fashion_mnist, kmnist)",
        min_length=1,
        evaluation_may_change=True,
    )
    validation: int | Literal["test"] = setting(
        5000,
        "training samples held out for validation (5000 is 500 on mnist5k); 'test' takes the test set",
    )
    scale: float = setting(255.0, "pixels are divided by this", gt=0)
    mean: float = setting(0.0, "subtracted from the scaled pixels (MNIST's mean is 0.1307)")
    std: float = setting(1.0, "the scaled pixels are divided by this (MNIST's is 0.3081)", gt=0)
    shift: float = setting(0.0, "training images are moved by up to this many pixels each way", ge=0, le=14)
    rotate: float = setting(
        0.0, "training images are turned by up to this many degrees each way", ge=0, le=180
    )


@section("mnist.Model")
class Model:
    """The multi-layer perceptron."""

    hidden: tuple[int, ...] = setting((256, 256), "widths of the hidden layers")
    activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid", "elu", "leaky_relu"] = setting(
        "silu", "activation of the hidden layers"
    )
    dropout: float = setting(0.0, "probability of dropping a hidden unit in training", ge=0, lt=1)
    bias: bool = setting(True, "whether the layers have a bias")


@section("mnist.Train")
class Train:
    """The training loop."""

    epochs: int = setting(10, "passes over the training set", gt=0, resume_may_change=True)
    steps: int | None = setting(None, "optimiser steps, instead of `epochs`", gt=0, resume_may_change=True)
    batch_size: int = setting(128, "samples of one optimiser step", gt=0)
    accumulate: int = setting(
        1, "parts that a batch is computed in, one after another; divides batch_size", gt=0
    )
    loss: Literal["cross_entropy", "mse"] = setting("cross_entropy", "the loss; mse is on one-hot labels")
    precision: Literal["float32", "mixed_bfloat16"] = setting(
        "float32", "precision of the layers; weights and optimiser stay float32"
    )
    evaluate_every_steps: int | None = setting(
        None, "evaluate on the validation set every so many steps; None: after each epoch", gt=0
    )
    early_stopping: int | None = setting(
        None, "stop after so many evaluations without a better Checkpoint.metric", gt=0
    )
    stop_at: float | None = setting(None, "stop once Checkpoint.metric is this good", resume_may_change=True)
    block_steps: int = setting(
        128,
        "steps that run as one compiled call; a stop signal waits for one",
        gt=0,
        le=4096,
        resume_may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that one of the MNIST experiments is given."""

    run: RunConfig
    data: Data
    model: Model
    train: Train
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def check(self) -> None:
        """The rules that span fields.

        Raises:
          ConfigError: the first that is broken.
        """
        train, optimizer = self.train, self.optimizer
        if train.batch_size % train.accumulate:
            raise ConfigError(
                f"mnist.Train.accumulate = {train.accumulate} does not divide "
                f"mnist.Train.batch_size = {train.batch_size}"
            )
        if isinstance(self.data.validation, int) and self.data.validation < 0:
            raise ConfigError(f"mnist.Data.validation = {self.data.validation}: must be 0 or more, or 'test'")
        if any(width < 1 for width in self.model.hidden):
            raise ConfigError(f"mnist.Model.hidden = {self.model.hidden}: widths must be positive")
        check_optimizer(optimizer, self.schedule)
        check_log(self.log)
        if train.steps is not None and self.schedule.warmup_steps >= train.steps:
            raise ConfigError(
                f"Schedule.warmup_steps = {self.schedule.warmup_steps} is not less than "
                f"mnist.Train.steps = {train.steps}"
            )
        metrics = ("val_loss", "val_accuracy")
        if self.checkpoint.metric not in metrics:
            raise ConfigError(
                f"Checkpoint.metric = {self.checkpoint.metric!r}: this experiment has {' and '.join(metrics)}"
            )
        if self.data.validation == 0:
            for name in ("early_stopping", "stop_at"):
                if getattr(train, name) is not None:
                    raise ConfigError(
                        f"mnist.Train.{name} needs validation samples; mnist.Data.validation is 0"
                    )
        if self.data.name != "mnist" and self.data.source != "tfds":
            raise ConfigError(
                f"mnist.Data.name = {self.data.name!r} is read through TFDS: set mnist.Data.source = "
                '"tfds" (idx files of any set are read by mnist.Data.path)'
            )

    def parity_bindings(self, steps: int) -> dict[str, object]:
        """What a comparison of backends changes: random masks off, one data source, every step logged.

        Args:
          steps: optimiser steps of the comparison.

        Returns:
          Values by Gin name. Dropout and augmentation are off because their masks differ between backends
          by nature; an ``auto`` source is resolved here, once for all runs.

        Raises:
          DataError: the data is not there or broken.
        """
        from blacksmith.datasets import mnist

        data = self.data
        info = mnist.load(
            data.source, data.path, name=data.name, validation=data.validation, seed=self.run.seed
        ).info
        return {
            "mnist.Data.source": info.source,
            "mnist.Data.path": info.path if info.source == "idx" else data.path,
            "mnist.Data.shift": 0.0,
            "mnist.Data.rotate": 0.0,
            "mnist.Model.dropout": 0.0,
            "mnist.Train.steps": steps,
            "mnist.Train.early_stopping": None,
            "mnist.Train.stop_at": None,
        }
