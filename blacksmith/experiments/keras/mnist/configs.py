"""The configuration of the MNIST experiments on JAX, PyTorch and Lightning. Loads no framework."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveInt

from blacksmith.config.conditions import Is
from blacksmith.config.sections import section, setting
from blacksmith.config.settings import CheckpointConfig, KerasConfig, KerasTrainConfig, check_warmup
from blacksmith.errors import ConfigError

if TYPE_CHECKING:
    from blacksmith.datasets import mnist

_FLOAT32_MAX = 3.4e38
_VALIDATION = {"mnist.Data.validation": Is("not 0", lambda samples: samples != 0)}


@section("mnist.Data")
class Data:
    """Where the images come from and how they are prepared."""

    source: Literal["auto", "idx", "tfds", "mnist5k"] = setting(
        "auto",
        "where the images come from; auto: the first that is there without a download",
        resume_may_change=True,
    )
    path: str | None = setting(
        None,
        "directory of the idx files, or the data_dir of TFDS; None: the cache",
        resume_may_change=True,
        location=True,
    )
    name: str = setting(
        "mnist",
        "the TFDS dataset, any with 28x28 grayscale images (fashion_mnist, kmnist)",
        min_length=1,
        resume_may_change=True,
        only_with={"mnist.Data.source": "tfds"},
    )
    validation: NonNegativeInt | Literal["test"] = setting(
        5000,
        "training samples held out for validation (500 instead of 5000 on mnist5k); 'test': the test set",
    )
    scale: float = setting(255.0, "pixels are divided by this", gt=0)
    mean: float = setting(0.0, "subtracted from the scaled pixels (MNIST's mean is 0.1307)")
    std: float = setting(1.0, "the scaled pixels are divided by this (MNIST's is 0.3081)", gt=0)
    shift: float = setting(0.0, "shift training images randomly by up to this many pixels", ge=0, le=14)
    rotate: float = setting(0.0, "rotate training images randomly by up to this many degrees", ge=0, le=180)

    def load(self, seed: int) -> "mnist.Mnist":
        """Reads the images and holds out validation images by the seed; `DataError` if that fails."""
        from blacksmith.datasets import mnist

        return mnist.load(self.source, self.path, name=self.name, validation=self.validation, seed=seed)


@section("mnist.Model")
class Model:
    """The multi-layer perceptron."""

    hidden: tuple[PositiveInt, ...] = setting((256, 256), "widths of the hidden layers")
    activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid", "elu", "leaky_relu"] = setting(
        "silu", "activation of the hidden layers"
    )
    dropout: float = setting(0.0, "probability of dropping a hidden unit during training", ge=0, lt=1)
    bias: bool = setting(True, "whether the layers have a bias")


@section("mnist.Train")
class Train(KerasTrainConfig):
    """The training loop."""

    early_stopping: int | None = setting(
        None,
        "stop after this many validations in a row without a better `Checkpoint.metric`",
        gt=0,
        only_with=_VALIDATION,
    )
    stop_at: float | None = setting(
        None,
        "stop as soon as `Checkpoint.metric` is this good",
        resume_may_change=True,
        only_with=_VALIDATION,
    )


@section("Checkpoint")
class Checkpoint(CheckpointConfig):
    """When checkpoints are written and which are kept."""

    metric: Literal["val_accuracy", "val_loss"] = setting(
        "val_accuracy", "the validation metric that decides which is best"
    )


@dataclasses.dataclass(frozen=True)
class Config(KerasConfig):
    """All settings of the MNIST experiments."""

    data: Data
    model: Model
    train: Train
    checkpoint: Checkpoint

    def check(self) -> None:
        """Raises ConfigError if the warm-up is longer than the run, or prepared pixels cannot be numbers."""
        check_warmup(self.schedule, self.train.steps)
        data = self.data
        largest = 255 / data.scale / data.std + abs(data.mean) / data.std
        if not largest < _FLOAT32_MAX:
            raise ConfigError(
                f"mnist.Data.scale = {data.scale}, mean = {data.mean} and std = {data.std} give pixels up to "
                f"{largest:.3g}, which float32 cannot hold"
            )

    def parity_bindings(self) -> dict[str, object]:
        """The settings that a comparison of backends changes, by Gin name.

        Dropout and augmentation are off, because their random masks differ between backends. An ``auto``
        source is resolved once for all runs.
        """
        info = self.data.load(self.run.seed).info
        return {
            "mnist.Data.source": info.source,
            "mnist.Data.path": info.path if info.source == "idx" else self.data.path,
            "mnist.Data.shift": 0.0,
            "mnist.Data.rotate": 0.0,
            "mnist.Model.dropout": 0.0,
        }
