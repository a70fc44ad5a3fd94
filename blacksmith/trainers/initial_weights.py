"""Initial weights from NumPy: the same bytes on every backend, for any Keras model.

Keras's own initializers draw different numbers on each backend.
"""

import hashlib
import math

import keras
import numpy as np

from blacksmith.run.order import generator

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal truncated at two standard deviations


def initialize(model: keras.Model, seed: int) -> None:
    """Draws the random weights of `model` again, from (seed, variable name); constants stay.

    Raises:
      ValueError: a variable's initializer has no NumPy counterpart here, or two variables share a name.
    """
    names = [variable_name(model, v) for v in model.variables]
    if duplicates := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"variables share a name: {sorted(duplicates)}; name every layer")
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables:
            value = _draw(
                _initializer(layer, variable),
                tuple(variable.shape),
                generator(seed, "weights", variable_name(model, variable)),
                f"{layer.name}/{variable.name}",
            )
            if value is not None:
                variable.assign(value)


def variable_name(model: keras.Model, variable: keras.Variable) -> str:
    """A variable's name without the model's name: ``hidden_1/kernel``."""
    return variable.path.removeprefix(f"{model.name}/")


def weights_sha256(state: dict[str, np.ndarray]) -> str:
    """One hash over named arrays, by sorted name: ``name, dtype, shape, bytes``."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _initializer(layer: keras.Layer, variable: keras.Variable) -> object | None:
    """The layer's initializer for one of its variables, or None if the variable is a constant."""
    # Separable layers have a `depthwise_initializer` for a variable `depthwise_kernel` or `kernel`.
    names = [variable.name, variable.name.removesuffix("_kernel")]
    if variable.name == "kernel":
        names.append("depthwise")
    for name in names:
        if (initializer := getattr(layer, f"{name}_initializer", None)) is not None:
            return initializer
    values = np.ravel(keras.ops.convert_to_numpy(variable))
    if (values != values[:1]).any():
        raise ValueError(
            f"{layer.name}/{variable.name} is random, but the layer has no {variable.name}_initializer"
        )
    return None


def _draw(
    initializer: object | None, shape: tuple[int, ...], rng: np.random.Generator, name: str
) -> np.ndarray | None:
    """A float32 sample from `initializer`'s distribution, or None if it is a constant."""
    kinds = keras.initializers
    if initializer is None or isinstance(initializer, (kinds.Zeros, kinds.Ones, kinds.Constant)):
        return None
    if isinstance(initializer, kinds.VarianceScaling):
        fan_in, fan_out = _fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
        variance = initializer.scale / max(1.0, fan[initializer.mode])
        match initializer.distribution:
            case "uniform":
                limit = math.sqrt(3 * variance)
                return rng.uniform(-limit, limit, shape).astype(np.float32)
            case "untruncated_normal":
                return (rng.standard_normal(shape) * math.sqrt(variance)).astype(np.float32)
            case _:
                return _truncated(rng, shape, math.sqrt(variance) / _TRUNCATED_STD)
    if isinstance(initializer, kinds.RandomUniform):
        return rng.uniform(initializer.minval, initializer.maxval, shape).astype(np.float32)
    if isinstance(initializer, kinds.TruncatedNormal):
        return (initializer.mean + _truncated(rng, shape, initializer.stddev)).astype(np.float32)
    if isinstance(initializer, kinds.RandomNormal):
        return rng.normal(initializer.mean, initializer.stddev, shape).astype(np.float32)
    raise ValueError(
        f"{name}: the initializer {type(initializer).__name__} has no NumPy counterpart here; use a "
        "variance-scaling, uniform, normal or constant initializer"
    )


def _truncated(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """A normal sample whose values beyond two standard deviations are drawn again, as in Keras."""
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return (values * std).astype(np.float32)


def _fans(shape: tuple[int, ...]) -> tuple[float, float]:
    """Fan-in and fan-out as Keras counts them: the last two axes times the receptive field."""
    if len(shape) < 2:
        size = float(shape[0]) if shape else 1.0
        return size, size
    field = math.prod(shape[:-2])
    return float(shape[-2] * field), float(shape[-1] * field)
