"""What the Keras trainer trains (`Task`) and what it needs from a framework (`Backend`).

A backend keeps the training data on the device and runs a block of steps per call. Its state goes in and out
as NumPy arrays that have the same names on every backend, so that a checkpoint fits all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import keras
import numpy as np

from blacksmith.run.order import Block
from blacksmith.trainers.losses import PerSample


class Augmentation(Protocol):
    """A random change of the training inputs: NumPy draws its parameters, the compiled step applies them."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random parameters, float32 [count, parameters]."""

    def apply(self, inputs: object, parameters: object) -> object:
        """The changed inputs, in `keras.ops`: [batch, ...], [batch, parameters] -> [batch, ...]."""


@dataclass(frozen=True)
class Task:
    """A model and how it is trained, without the data.

    Attributes:
      model: any Keras 3 model with named layers, from inputs [batch, ...] to outputs [batch, ...].
      optimizer: a Keras optimizer; built here if it is not.
      loss: from (labels, outputs) to one value per sample.
      metrics: more per-sample values by name.
      augmentation: changes the training inputs, or None.
      accumulate: equal parts that a batch is computed in, one after the other.
      seed: of everything random in a step.

    Raises:
      ValueError: the optimizer has a setting that the trainer replaces or does not support.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    loss: PerSample
    metrics: Mapping[str, PerSample] = field(default_factory=dict)
    augmentation: Augmentation | None = None
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        optimizer = self.optimizer
        if optimizer.gradient_accumulation_steps:
            raise ValueError(
                "gradient_accumulation_steps of a Keras optimizer is not supported; use Task.accumulate"
            )
        if optimizer.use_ema:
            raise ValueError("use_ema of a Keras optimizer (averaged weights) is not supported")
        if optimizer.loss_scale_factor is not None:
            raise ValueError(
                "loss_scale_factor of a Keras optimizer is not supported; mixed_bfloat16 does not need it"
            )
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)

    @property
    def value_names(self) -> tuple[str, ...]:
        """``loss`` and the names of the metrics."""
        return ("loss", *self.metrics)

    def per_sample(self, labels: object, outputs: object) -> dict[str, object]:
        """The loss and each metric by name, one value per sample."""
        return {"loss": self.loss(labels, outputs)} | {
            name: metric(labels, outputs) for name, metric in self.metrics.items()
        }


class Backend(Protocol):
    """One framework's way of running a `Task`."""

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Runs the steps of `block`, of which the first is step number `step`.

        Returns:
          ``loss`` and each metric, float32 [steps]: weighted means over the batch. The host waits for the
          device once per block, not once per step.
        """

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Per-sample loss and metrics [samples] by name, and the outputs [samples, ...]."""

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Weights, and gradients of the block's first batch, by name; changes nothing."""

    def state(self) -> dict[str, np.ndarray]:
        """Model weights (``model/...``) and optimizer slots (``optimizer/...``)."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the state by one that `state` returned, here or on another backend.

        Raises:
          ValueError: names or shapes differ.
        """

    def sync(self) -> None:
        """Puts the current weights into the Keras model and optimizer."""
