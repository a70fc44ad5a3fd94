"""What the Keras trainer trains (`Task`) and what it needs from a framework (`Backend`).

A backend keeps the training data on the device and runs a block of steps per call. The arrays of its state
have the same names on every backend, so that a checkpoint fits all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import keras
import numpy as np

from blacksmith.run.order import Block
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.losses import PerSample


@dataclass(frozen=True)
class Task:
    """A model and how it is trained; raises ValueError if a setting of the optimizer is not supported."""

    model: keras.Model  # any with named layers, from inputs [batch, ...] to outputs [batch, ...]
    optimizer: keras.optimizers.Optimizer  # built here if necessary
    loss: PerSample  # from (labels, outputs) to one value per sample
    metrics: Mapping[str, PerSample] = field(default_factory=dict)  # more values per sample by name
    augmentation: ShiftAndRotate | None = None  # of training inputs; any object with the same two methods
    accumulate: int = 1  # how many equal parts a batch is computed in
    seed: int = 0  # determines everything random in a step

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation_steps", "use_ema", "loss_scale_factor"):
            if getattr(self.optimizer, name):
                cure = "; set Task.accumulate" if name == "gradient_accumulation_steps" else ""
                raise ValueError(f"{name} of a Keras optimizer is not supported{cure}")
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
    """One framework's way of running a `Task` on training inputs [samples, ...] and labels [samples]."""

    task: Task

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Runs the steps of `block`, the first of which has the number `step`.

        Returns ``loss`` and each metric as weighted means over the batch, float32 [steps].
        """

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Per-sample loss and metrics [samples] by name, and the outputs [samples, ...]."""

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Weights and gradients of the only batch of `block`, by name; changes nothing."""

    def state(self) -> dict[str, np.ndarray]:
        """Model weights (``model/...``) and optimizer slots (``optimizer/...``)."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Loads what `state` returned on any backend; raises ValueError if names or shapes differ."""

    def sync(self) -> None:
        """Copies the current state into the Keras model and optimizer."""
