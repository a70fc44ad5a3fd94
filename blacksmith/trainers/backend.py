"""What the epoch loop asks of a backend, and what both backends do alike.

A backend keeps the training data on the device and runs blocks of steps as one compiled call. Its state goes
in and out as named NumPy arrays, under the same names on every backend.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import keras
import numpy as np
from keras import ops

from blacksmith.run.order import Block, seed_words
from blacksmith.trainers.initial_weights import variable_name
from blacksmith.trainers.losses import PerSample
from blacksmith.trainers.optimizers import named_variables


class Augmentation(Protocol):
    """A random change of the training inputs: parameters from NumPy, applied inside the compiled step."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random parameters float32 [count, parameters]."""

    def apply(self, inputs: object, parameters: object) -> object:
        """Changed inputs, in `keras.ops`: [batch, ...], [batch, parameters] -> [batch, ...]."""


@dataclass(frozen=True)
class Task:
    """What is learned and how, without the data.

    Attributes:
      model: any Keras 3 model with named layers, from inputs [batch, ...] to outputs [batch, ...].
      optimizer: a Keras optimiser.
      loss: from (labels, outputs) to one value per sample.
      metrics: further per-sample values by name.
      augmentation: applied to training inputs, or None.
      accumulate: parts in which a batch is computed.
      seed: of everything random in a step.
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
            raise ValueError("accumulate in the trainer (Task.accumulate), not in the Keras optimiser")
        if optimizer.use_ema:
            raise ValueError("Keras's exponential moving average of weights is not supported")
        if optimizer.loss_scale_factor is not None:
            raise ValueError("Keras's loss scaling is not supported; mixed_bfloat16 needs none")
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)


class Backend(Protocol):
    """One framework's way of running a `Task`."""

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Runs the steps of `block`, the first being number `step`.

        Returns:
          ``loss`` and each metric, float32 [steps]: weighted means over the batch.
        """

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Per-sample loss and metrics [samples], and the outputs [samples, ...]."""

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """Weights, and gradients of the block's first batch, by name; changes nothing."""

    def state(self) -> dict[str, np.ndarray]:
        """Model weights (``model/...``) and optimiser slots (``optimizer/...``)."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over a `state`."""

    def sync(self) -> None:
        """Puts the current weights into the Keras model and optimiser."""


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the seed generators of the model's layers."""
    return [v for v in model.non_trainable_variables if v.path.endswith("seed_generator_state")]


def named_state(task: Task) -> dict[str, keras.Variable]:
    """The variables of a checkpoint by backend-neutral name; seed states are left out.

    They are set again at each step from (seed, step).
    """
    model = task.model
    seeds = {id(v) for v in seed_states(model)}
    named = {f"model/{variable_name(model, v)}": v for v in model.variables if id(v) not in seeds}
    named |= {f"optimizer/{n}": v for n, v in named_variables(task.optimizer, model).items()}
    return named


def read_state(task: Task) -> dict[str, np.ndarray]:
    """`named_state` as NumPy arrays."""
    return {name: np.array(ops.convert_to_numpy(variable)) for name, variable in named_state(task).items()}


def assign_state(task: Task, state: Mapping[str, np.ndarray]) -> None:
    """Assigns a `read_state` to the Keras variables.

    Raises:
      ValueError: names or shapes are not those of the task; says the first.
    """
    variables = named_state(task)
    missing, foreign = sorted(set(variables) - set(state)), sorted(set(state) - set(variables))
    if missing or foreign:
        wrong = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which is not known here"
        raise ValueError(f"the checkpoint {wrong}")
    for name, variable in variables.items():
        if tuple(variable.shape) != state[name].shape:
            raise ValueError(
                f"the checkpoint's {name} has the shape {state[name].shape}, not {tuple(variable.shape)}"
            )
        variable.assign(state[name].astype(str(variable.dtype)))


def check_parts(accumulate: int, batch: int) -> None:
    """Checks that a batch can be cut into `accumulate` equal parts.

    Raises:
      ValueError: it cannot.
    """
    if batch % accumulate:
        raise ValueError(f"accumulate = {accumulate} does not divide the batch of {batch} samples")


def added_loss(added: Sequence[object]) -> object:
    """What the model's layers add to the loss of a batch (regularisers, `add_loss`), as one float32."""
    return sum(ops.cast(loss, "float32") for loss in added)


def step_seeds(seed: int, first: int, count: int) -> np.ndarray:
    """Seeds of `count` steps from step `first` on: uint64 [count], well mixed (splitmix64)."""
    base = np.uint64(seed_words(seed, "step"))
    with np.errstate(over="ignore"):
        x = base + np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_augmentation(task: Task, first: int, steps: int, batch: int) -> np.ndarray | None:
    """The augmentation's parameters for some steps: float32 [steps, batch, parameters]."""
    if task.augmentation is None:
        return None
    return np.stack(
        [
            task.augmentation.draw(np.random.Generator(np.random.PCG64(int(seed))), batch)
            for seed in step_seeds(task.seed ^ 0x5EED, first, steps)
        ]
    )
