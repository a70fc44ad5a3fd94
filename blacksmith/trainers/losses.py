"""Losses and metrics of the Keras trainer: one value per sample, in `keras.ops`, for every backend."""

from collections.abc import Callable

import keras
from keras import ops

PerSample = Callable[[object, object], object]


def cross_entropy(labels: object, logits: object) -> object:
    """Softmax cross entropy: labels int [batch], logits [batch, classes] -> [batch]."""
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def mse(labels: object, outputs: object) -> object:
    """Mean squared error to the one-hot label: labels int [batch], outputs [batch, classes] -> [batch]."""
    # Not `ops.one_hot`, which on PyTorch reads the labels on the host; a trace cannot do that.
    classes = ops.arange(outputs.shape[-1], dtype="int32")
    target = ops.cast(ops.equal(ops.cast(labels, "int32")[:, None], classes), outputs.dtype)
    return ops.mean(ops.square(outputs - target), axis=-1)


def accuracy(labels: object, outputs: object) -> object:
    """1 where the largest output is at the label: [batch], [batch, classes] -> [batch]."""
    predicted = ops.cast(ops.argmax(outputs, axis=-1), "int32")
    return ops.cast(ops.equal(predicted, ops.cast(labels, "int32")), "float32")


LOSSES: dict[str, PerSample] = {"cross_entropy": cross_entropy, "mse": mse}
