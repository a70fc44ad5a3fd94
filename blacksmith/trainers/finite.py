"""Refuses outputs that are not finite, before they become a score or a file."""

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from blacksmith.errors import NotFinite
from blacksmith.trainers.task import Backend


def check_finite(
    backend: Backend, inputs: np.ndarray, outputs: np.ndarray, values: Mapping[str, np.ndarray]
) -> None:
    """Raises `NotFinite` that names the first sample without a finite output, and the reason.

    Args:
      backend: which computed the outputs, with its present weights.
      inputs: [samples, ...].
      outputs: [samples, ...].
      values: loss and metrics by name, [samples] each.
    """
    columns = [array.reshape(len(inputs), -1) for array in (outputs, *values.values())]
    finite = np.all([np.isfinite(column).all(axis=1) for column in columns], axis=0)
    if not finite.all():
        sample = int(np.argmin(finite))
        backend.sync()
        reason = _reason(backend.task.model, inputs[sample : sample + 1])
        raise NotFinite(
            f"the outputs of {np.sum(~finite):,} of {len(inputs):,} samples are not finite, first those of "
            f"sample {sample}: {reason}; nothing is scored or exported"
        )


def _reason(model: keras.Model, inputs: np.ndarray) -> str:
    """Where numbers first became infinite or NaN: weights, inputs [1, ...], or after which layer."""
    for variable in model.variables:
        if not _is_finite(variable):
            return f"the weights {variable.path} are not finite"
    if not _is_finite(inputs):
        return "its input is not finite"
    where = "the activations"
    for layer in model.layers:
        try:
            activations = keras.Model(model.inputs, layer.output)([inputs], training=False)
        except Exception:  # only a model of the functional kind can be cut after a layer
            break
        if not all(_is_finite(a) for a in keras.tree.flatten(activations)):
            where = f"the activations after the layer {layer.name}"
            break
    return f"the weights and its input are finite, but not {where}"


def _is_finite(values: object) -> bool:
    array = np.asarray(ops.convert_to_numpy(values))
    return not np.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())
