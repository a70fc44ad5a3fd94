"""The multi-layer perceptron for MNIST, written once on Keras 3 for every backend."""

from collections.abc import Sequence

import keras


def mlp(
    hidden: Sequence[int] = (256, 256),
    *,
    activation: str = "silu",
    dropout: float = 0.0,
    bias: bool = True,
    num_classes: int = 10,
    image_shape: tuple[int, int] = (28, 28),
) -> keras.Model:
    """An MLP from images, float [batch, height, width], to logits [batch, num_classes].

    `hidden` are the widths of the hidden layers; without any, it is a linear classifier. Model and layers are
    named, so that variables have the same names in every process.
    """
    inputs = keras.Input(image_shape, name="image")
    x = keras.layers.Flatten(name="flatten")(inputs)
    for number, width in enumerate(hidden, start=1):
        x = keras.layers.Dense(width, activation=activation, use_bias=bias, name=f"hidden_{number}")(x)
        if dropout:
            # No seed of its own, because the trainer reseeds at every step.
            x = keras.layers.Dropout(dropout, name=f"dropout_{number}")(x)
    logits = keras.layers.Dense(num_classes, use_bias=bias, name="logits")(x)
    return keras.Model(inputs, logits, name="mlp")
