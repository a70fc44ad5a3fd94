"""What the JAX and PyTorch backends share: named state, seeds of steps, evaluation in batches."""

from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from blacksmith.run.order import seed_int
from blacksmith.trainers.initial_weights import variable_name
from blacksmith.trainers.optimizers import named_variables
from blacksmith.trainers.task import Task

EVALUATION_BATCH = 1000


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the seed generators in the model's layers."""
    return [v for v in model.non_trainable_variables if v.path.endswith("seed_generator_state")]


def named_state(task: Task) -> dict[str, keras.Variable]:
    """The variables in a checkpoint by backend-neutral name; no seed states, which each step sets again."""
    model = task.model
    seeds = {id(v) for v in seed_states(model)}
    named = {f"model/{variable_name(model, v)}": v for v in model.variables if id(v) not in seeds}
    named |= {f"optimizer/{n}": v for n, v in named_variables(task.optimizer, model).items()}
    return named


def read_state(task: Task) -> dict[str, np.ndarray]:
    """`named_state` as NumPy arrays."""
    return {name: np.array(ops.convert_to_numpy(variable)) for name, variable in named_state(task).items()}


def assign_state(task: Task, state: Mapping[str, np.ndarray]) -> None:
    """Assigns what `read_state` returned; raises ValueError if names or shapes differ from the task's."""
    variables = named_state(task)
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    found = {name: array.shape for name, array in state.items()}
    if found != expected:
        name, _ = min(found.items() ^ expected.items())
        raise ValueError(
            f"{name} has the shape {found.get(name, '(missing)')} in the checkpoint, "
            f"{expected.get(name, '(missing)')} in this model and optimizer"
        )
    for name, variable in variables.items():
        variable.assign(state[name].astype(str(variable.dtype)))


def added_loss(added: Sequence[object]) -> object:
    """The sum of what layers add to the loss of a batch (regularizers, `add_loss`), in float32."""
    return sum(ops.cast(loss, "float32") for loss in added)


def step_seeds(seed: int, first: int, count: int) -> np.ndarray:
    """Seeds of `count` steps starting at step `first`, functions of (seed, step) alone: uint64 [count]."""
    base = np.uint64(seed_int(seed, "step"))
    # splitmix64 (Steele, Lea and Flood 2014), whose neighboring outputs are unrelated. It wraps by design.
    with np.errstate(over="ignore"):
        x = base + np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_augmentation(task: Task, first: int, steps: int, batch: int) -> np.ndarray:
    """The augmentation's parameters for `steps` steps: float32 [steps, batch, parameters]."""
    return np.stack(
        [
            task.augmentation.draw(np.random.Generator(np.random.PCG64(int(seed))), batch)
            # Not the seed of the same step's dropout masks.
            for seed in step_seeds(task.seed ^ 0x5EED, first, steps)
        ]
    )


def evaluate_in_batches(
    forward: Callable[[np.ndarray, np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]],
    inputs: np.ndarray,
    labels: np.ndarray,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Joins what `forward`, see `Backend.evaluate`, returns for `EVALUATION_BATCH` samples at a time."""
    size = EVALUATION_BATCH
    parts = [forward(inputs[i : i + size], labels[i : i + size]) for i in range(0, len(inputs), size)]
    values, outputs = zip(*parts)
    return {name: np.concatenate([v[name] for v in values]) for name in values[0]}, np.concatenate(outputs)
