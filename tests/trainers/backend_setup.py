"""Models, data and tasks for `backend_cases.py`: tiny, seeded, and smooth (SiLU).

A ReLU flips at ties, where rounding differs between backends.
"""

import keras
import numpy as np
from keras import layers, ops

from blacksmith.config.settings import OptimizerConfig, ScheduleConfig
from blacksmith.models.keras.mnist.mlp import mlp
from blacksmith.run.order import Block, Order
from blacksmith.trainers import losses
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.initial_weights import initialize
from blacksmith.trainers.optimizers import make_optimizer
from blacksmith.trainers.task import Task

CLASSES = 4
SAMPLES, BATCH = 52, 8  # seven batches an epoch, the last one of four samples
WHOLE_SAMPLES = 56  # seven whole batches, for models that mix the samples of a batch and would see padding


# Models


def _mlp(dropout, hidden=(8, 8)):
    return mlp(hidden, activation="silu", dropout=dropout, num_classes=CLASSES, image_shape=(6, 6))


def _small(dropout):
    return _mlp(dropout, hidden=(8,))


def _cnn(dropout):
    """Convolution, batch normalization and pooling over [6, 6, 1]."""
    inputs = keras.Input((6, 6, 1), name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv_1")(inputs)
    x = layers.BatchNormalization(momentum=0.9, name="norm_1")(x)
    x = layers.Activation("silu", name="silu_1")(x)
    x = layers.MaxPooling2D(2, name="pool_1")(x)
    x = layers.Conv2D(8, 2, activation="silu", kernel_initializer="he_normal", name="conv_2")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout_1")(x)
    x = layers.GlobalAveragePooling2D(name="pool_2")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="cnn")


def _text(dropout):
    """Embedded tokens [5] through a recurrent layer."""
    inputs = keras.Input((5,), dtype="int32", name="tokens")
    x = layers.Embedding(20, 8, name="embedding")(inputs)
    x = layers.GRU(8, recurrent_initializer="glorot_uniform", name="gru")(x)
    x = layers.LayerNormalization(name="norm")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout_1")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="text")


def _vector(dropout):
    """Twelve features; a kernel regularizer and an activity regularizer add losses."""
    inputs = keras.Input((12,), name="features")
    x = layers.Dense(8, "tanh", kernel_regularizer=keras.regularizers.L2(0.1), name="hidden")(inputs)
    x = layers.ActivityRegularization(l2=0.05, name="activity")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="vector")


class Scale(layers.Layer):
    """Multiplies by a factor that `get_config` forgets."""

    def __init__(self, factor=1.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, inputs):
        """The product."""
        return inputs * self.factor

    def get_config(self):
        """Without the factor."""
        return super().get_config()


def _forgetful(dropout):
    """Is loaded with another factor than it was saved with."""
    inputs = keras.Input((3,), name="features")
    return keras.Model(inputs, Scale(2.0)(layers.Dense(CLASSES, name="logits")(inputs)), name="forgetful")


MODELS = {
    "mlp": _mlp,
    "small": _small,
    "cnn": _cnn,
    "text": _text,
    "vector": _vector,
    "forgetful": _forgetful,
}


def make_data(model, samples, seed=0):
    """Inputs of the model's shape and type, and labels that they decide."""
    rng = np.random.default_rng(seed)
    shape, kind = tuple(model.inputs[0].shape[1:]), model.inputs[0].dtype
    if kind == "int32":
        inputs = rng.integers(0, 20, (samples, *shape)).astype(np.int32)
    else:
        inputs = rng.standard_normal((samples, *shape)).astype(np.float32)
    projection = np.random.default_rng(1).standard_normal((int(np.prod(shape)), CLASSES))
    return inputs, (inputs.reshape(samples, -1) @ projection).argmax(axis=1).astype(np.int32)


def _regression(labels, outputs):
    """Squared error of the first output to a label between integers: float [batch]."""
    return ops.square(labels - outputs[:, 0])


def make_task(
    model,
    *,
    dropout=0.0,
    optimizer=None,
    schedule=None,
    total_steps=30,
    loss="cross_entropy",
    accumulate=1,
    seed=0,
    policy="float32",
    augment=None,
):
    keras.config.set_dtype_policy(policy)
    try:
        built = MODELS[model](dropout)
    finally:
        keras.config.set_dtype_policy("float32")
    initialize(built, seed)
    settings = {"name": "adam", "learning_rate": 0.01} | (optimizer or {})
    return Task(
        model=built,
        optimizer=make_optimizer(
            OptimizerConfig(**settings), ScheduleConfig(**(schedule or {})), total_steps
        ),
        loss=_regression if loss == "regression" else losses.LOSSES[loss],
        metrics={"accuracy": losses.accuracy},
        augmentation=None if augment is None else ShiftAndRotate(**augment),
        accumulate=accumulate,
        seed=seed,
    )


def make_backend(task, inputs, labels, block_steps=16):
    """This process's backend, and the list of lines that it prints."""
    if keras.config.backend() == "jax":
        from blacksmith.trainers.jax_backend import JaxBackend

        return JaxBackend(task, inputs, labels, block_steps), []
    from blacksmith.trainers.torch_backend import TorchBackend

    lines = []
    return TorchBackend(task, inputs, labels, lines.append), lines


class Setup:
    """A task on this process's backend with its data and order; `lines` is what the backend prints."""

    def __init__(self, *, model="mlp", batch=BATCH, samples=None, block_steps=16, load=None, **task):
        self.task = make_task(model, **task)
        if samples is None:
            samples = WHOLE_SAMPLES if model in ("cnn", "vector") else SAMPLES
        self.inputs, self.labels = make_data(self.task.model, samples)
        if task.get("loss") == "regression":
            self.labels = self.labels.astype(np.float32) + np.float32(0.5)
        self.order = Order(samples, batch, 0)
        self.backend, self.lines = make_backend(self.task, self.inputs, self.labels, block_steps)
        if load is not None:
            with np.load(load) as arrays:
                self.backend.load_state(
                    {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
                )

    def run(self, lengths, start=0):
        """Trains in blocks of `lengths`, cut further at ends of epochs; metrics by name, [steps]."""
        found, step = [], start
        for length in lengths:
            end = step + length
            while step < end:
                block = self.order.block(step, end - step)
                found.append(self.backend.train_block(block, step))
                step += len(block.indices)
        return {name: np.concatenate([values[name] for values in found]) for name in found[0]}

    def state(self):
        return {f"state/{name}": array for name, array in self.backend.state().items()}


ONE = Block(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 0, 0)


def make_ones_task(*, dropout=0.0, seed=0, optimizer=None, schedule=None, total_steps=1):
    """Two branches of sixteen ones with dropout and weights; the loss is the sum of all outputs.

    The gradient of a weight is therefore positive, or 0 if its unit is dropped; without dropout it is 1.
    """
    inputs = keras.Input((1,), name="one")
    branches = []
    for number in (1, 2):
        x = layers.RepeatVector(16, name=f"repeat_{number}")(inputs)
        x = layers.Flatten(name=f"flatten_{number}")(x)
        x = layers.Dropout(dropout, name=f"dropout_{number}")(x)
        branches.append(_Scale(name=f"scale_{number}")(x))
    model = keras.Model(inputs, layers.Concatenate(name="joined")(branches), name="ones")
    initialize(model, 0)
    settings = OptimizerConfig(**({"name": "sgd"} | (optimizer or {})))
    return Task(
        model=model,
        optimizer=make_optimizer(settings, ScheduleConfig(**(schedule or {})), total_steps),
        loss=lambda labels, outputs: ops.sum(outputs, axis=-1),
        seed=seed,
    )


class _Scale(layers.Layer):
    """One weight per unit, all ones."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[1:], initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale
