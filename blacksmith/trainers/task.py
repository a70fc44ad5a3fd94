"""What the Keras trainer trains (`Task`) and what it needs from a framework (`Backend`).

A backend keeps the training data on the device and runs a block of steps per call. Its state is read and
loaded as NumPy arrays with the same names on every backend, so that a checkpoint fits all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import keras
import numpy as np

from blacksmith.run.order import Block
from blacksmith.trainers.losses import PerSample


class Augmentation(Protocol):
    """A random change of the training inputs: NumPy draws the parameters, the compiled step applies them."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random parameters, float32 [count, parameters]."""

    def apply(self, inputs: object, parameters: object) -> object:
        """The changed inputs, in `keras.ops`: [batch, ...], [batch, parameters] -> [batch, ...]."""


@dataclass(frozen=True)
class Task:
    """A model and how it is trained, without the data.

    Attributes:
      model: any Keras 3 model with named layers, from inputs [batch, ...] to outputs [batch, ...].
      optimizer: a Keras optimizer; built here if necessary.
      loss: from (labels, outputs) to one value per sample.
      metrics: more per-sample values by name.
      augmentation: changes the training inputs.
      accumulate: how many equal parts a batch is computed in.
      seed: determines everything random in a step.

    Raises:
      ValueError: the optimizer has a setting that the trainer does not support.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    loss: PerSample
    metrics: Mapping[str, PerSample] = field(default_factory=dict)
    augmentation: Augmentation | None = None
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation_steps", "use_ema", "loss_scale_factor"):
            if getattr(self.optimizer, name):
                raise ValueError(f"{name} of a Keras optimizer is not supported; see Task.accumulate")
        if not self.optimizer.built:
            self.optimizer.build(self.model.trainable_variables)

    @property
    def value_names(self) -> tuple[str, ...]:
        """``loss`` and the names of the metrics."""
        return ("loss", *self.metrics)

    def per_sample(self, labels: object, outputs: object) -> dict[str, object]:
        """Loss and metrics by name, one value per sample."""
        return {"loss": self.loss(labels, outputs)} | {
            name: metric(labels, outputs) for name, metric in self.metrics.items()
        }


class Backend(Protocol):
    """One framework's way of running a `Task`."""

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Runs the steps of `block`, the first of which has the number `step`.

        Returns:
          ``loss`` and each metric, float32 [steps]: weighted means over the batch. The host waits for the
          device once per block.
        """

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Per-sample loss and metrics [samples] by name, and the outputs [samples, ...]."""

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Weights and gradients of the only batch of `block`, by name; changes nothing."""

    def state(self) -> dict[str, np.ndarray]:
        """Model weights (``model/...``) and optimizer slots (``optimizer/...``)."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the state by one that `state` returned, on any backend.

        Raises:
          ValueError: names or shapes differ.
        """

    def sync(self) -> None:
        """Copies the current state into the Keras model and optimizer."""
