"""What the tests of the trainers run on a Keras backend: functions from JSON values to arrays and values.

`run_case.py` calls them in a process per backend. The tests check the results.
"""

import dataclasses
import os
from pathlib import Path

import keras
import numpy as np
from backend_setup import (
    BATCH,
    CLASSES,
    ONE,
    SAMPLES,
    Setup,
    make_backend,
    make_data,
    make_ones_task,
    make_task,
)
from keras import layers, ops

from blacksmith.config.settings import OptimizerConfig, ScheduleConfig
from blacksmith.run.order import Order
from blacksmith.trainers import losses
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.backend_state import read_state, step_seeds
from blacksmith.trainers.initial_weights import initialize, variable_name, weights_sha256
from blacksmith.trainers.optimizers import make_optimizer
from blacksmith.trainers.task import Task

# Training


def train(lengths, start=0, **setup):
    """Losses and metrics [steps], the state before and after, and what the backend printed."""
    made = Setup(**setup)
    before = {f"before/{name}": array for name, array in made.backend.state().items()}
    return made.run(lengths, start) | before | made.state() | {"lines": made.lines}


def train_eagerly(steps, **setup):
    """On PyTorch, the traced gradients applied by Keras's own eager `optimizer.apply`."""
    made = Setup(**setup)
    loss = []
    for step in range(steps):
        row = made.backend.rows(made.order.block(step, 1), step)[0]
        taken, gradients = made.backend.gradients(row)
        made.task.optimizer.apply(gradients, made.task.model.trainable_variables)
        loss.append(taken.loss.item())
    # Not the backend's state, which would write its own step count into the optimizer.
    state = {f"state/{name}": array for name, array in read_state(made.task).items()}
    return {"loss": np.array(loss, np.float32), **state}


def first_loss_by_hand(**setup):
    """The first batch's loss and what the model `vector` adds to it, computed with NumPy."""
    made = Setup(**setup)
    rows = made.order.block(0, 1).indices[0]
    values, _ = made.backend.evaluate(made.inputs[rows], made.labels[rows])
    state = made.backend.state()
    kernel, bias = state["model/hidden/kernel"], state["model/hidden/bias"]
    hidden = np.tanh(made.inputs[rows] @ kernel + bias)
    added = 0.1 * np.sum(kernel**2) + 0.05 * np.sum(hidden**2) / BATCH
    return {"loss": float(values["loss"].mean()), "added": float(added)}


def constant_gradient_changes(steps, seed=0, **settings):
    """The change of a weight in each step, [steps], with a loss whose gradient is always 1."""
    made = make_ones_task(seed=seed, **settings)
    backend, _ = make_backend(made, np.ones((1, 1), np.float32), np.zeros(1, np.int32))
    weights = [np.ones(16, np.float32)]
    for step in range(steps):
        backend.train_block(ONE, step)
        weights.append(backend.state()["model/scale_1/scale"])
    changes = np.diff(np.array(weights), axis=0)
    return {"change": changes[:, 0], "spread": np.ptp(changes, axis=1)}


def ragged_loss(accumulate=1, **setup):
    """The ragged last batch's loss from the backend, and per-sample losses of its real samples."""
    made = Setup(accumulate=accumulate, **setup)
    last = made.order.steps_per_epoch - 1
    block = made.order.block(last, 1)
    real = block.indices[0, : SAMPLES - last * BATCH]
    values, _ = made.backend.evaluate(made.inputs[real], made.labels[real])
    return {
        "by_hand": values["loss"],
        "accuracy_by_hand": values["accuracy"],
        "weights": block.weights[0],
        **made.backend.train_block(block, last),
    }


def traces(steps, **setup):
    """On PyTorch, how many functions have been traced after each step."""
    from blacksmith.trainers import torch_backend, torch_optimizer

    counted = []

    def counting(*arguments):
        counted.append(arguments)
        return trace(*arguments)

    trace = torch_backend.trace
    torch_backend.trace = torch_optimizer.trace = counting
    try:
        made = Setup(**setup)
        found = []
        for step in range(steps):
            made.run([1], step)
            found.append(len(counted))
    finally:
        torch_backend.trace = torch_optimizer.trace = trace
    return {"traced": found}


def distributions_between(steps, **setup):
    """Training with and without reading the distributions in the middle, and what was read."""
    plain, read = Setup(**setup), Setup(**setup)
    first = plain.run([steps]), read.run([steps])
    before = read.backend.state()
    seen = read.backend.distributions(read.order.block(steps, 1), steps)
    after = read.backend.state()
    second = plain.run([steps], steps), read.run([steps], steps)
    return {
        **{f"before/{n}": a for n, a in before.items()},
        **{f"after/{n}": a for n, a in after.items()},
        **{f"seen/{n}": a for n, a in seen.items()},
        "plain": np.concatenate([first[0]["loss"], second[0]["loss"]]),
        "read": np.concatenate([first[1]["loss"], second[1]["loss"]]),
    }


def directional_derivatives(width, directions, **setup):
    """Slopes of the batch loss along random directions: from the gradients, and by central differences."""
    made = Setup(**setup)
    block = made.order.block(0, 1)
    rows = block.indices[0]
    seen = made.backend.distributions(block, 0)
    state = made.backend.state()
    variables = made.task.model.trainable_variables
    gradients = {f"model/{variable_name(made.task.model, v)}": seen[f"gradients/{v.path}"] for v in variables}
    rng = np.random.default_rng(0)
    slopes, differences = [], []
    for _ in range(directions):
        direction = {name: rng.standard_normal(g.shape) for name, g in gradients.items()}
        norm = np.sqrt(sum((d**2).sum() for d in direction.values()))
        direction = {name: d / norm for name, d in direction.items()}
        ends = []
        for sign in (1, -1):
            moved = {n: (state[n] + sign * width * d).astype(np.float32) for n, d in direction.items()}
            made.backend.load_state(state | moved)
            values, _ = made.backend.evaluate(made.inputs[rows], made.labels[rows])
            ends.append(values["loss"].astype(np.float64).mean())
        slopes.append(sum((gradients[n].astype(np.float64) * d).sum() for n, d in direction.items()))
        differences.append((ends[0] - ends[1]) / (2 * width))
    return {"slopes": np.array(slopes), "differences": np.array(differences)}


def evaluate(sizes, steps=0, **setup):
    """`evaluate` on some numbers of samples, and Keras's own call on the same ones."""
    made = Setup(**setup)
    if steps:
        made.run([steps])
    made.backend.sync()
    found = {}
    for size in sizes:
        inputs, labels = make_data(made.task.model, size, seed=2)
        values, outputs = made.backend.evaluate(inputs, labels)
        expected = ops.convert_to_numpy(ops.cast(made.task.model(inputs, training=False), "float32"))
        found |= {
            f"{size}/loss": values["loss"],
            f"{size}/accuracy": values["accuracy"],
            f"{size}/labels": labels,
            f"{size}/outputs": outputs,
            f"{size}/expected": np.array(expected),
        }
    return found


def dropout_masks(steps, seed=0, rate=0.5, repeat=1):
    """Which units two dropout layers keep: bool [repetition, step, layer, unit].

    They are inferred from the gradients, see `make_ones_task`; each repetition has its own model and backend.
    """
    masks = []
    for _ in range(repeat):
        made = make_ones_task(dropout=rate, seed=seed)
        backend, _ = make_backend(made, np.ones((1, 1), np.float32), np.zeros(1, np.int32))
        for step in range(steps):
            seen = backend.distributions(ONE, step)
            masks.append([seen[f"gradients/scale_{n}/scale"] > 0 for n in (1, 2)])
    return {"masks": np.array(masks).reshape(repeat, steps, 2, 16)}


# Initial weights


def initial_weights(model="mlp", seed=0):
    """The weights of a fresh model and their hash."""
    state = Setup(model=model, seed=seed).backend.state()
    weights = {n.removeprefix("model/"): a for n, a in state.items() if n.startswith("model/")}
    return {**weights, "sha256": weights_sha256(weights)}


def initializer_samples(configs, shape):
    """Many draws of each initializer: ours (of a Dense or Conv kernel) and Keras's own."""
    found = {}
    for number, config in enumerate(configs):
        initializer = keras.initializers.get(config)
        if len(shape) == 2:
            inputs = keras.Input((shape[0],))
            layer = layers.Dense(shape[1], kernel_initializer=initializer, name="layer")
        else:
            inputs = keras.Input((*shape[:2], shape[2]))
            layer = layers.Conv2D(shape[3], shape[:2], kernel_initializer=initializer, name="layer")
        model = keras.Model(inputs, layer(inputs), name="one")
        initialize(model, 0)
        found[f"{number}/ours"] = np.array(ops.convert_to_numpy(layer.kernel))
        keras_own = keras.initializers.get({**config, "config": config["config"] | {"seed": 1}})
        found[f"{number}/keras"] = np.array(ops.convert_to_numpy(keras_own(shape)))
    return found


def same_shape_layers(names, seed=0):
    """The kernels of equal layers with these names."""
    inputs = keras.Input((8,))
    x = inputs
    for name in names:
        x = layers.Dense(8, name=name)(x)
    model = keras.Model(inputs, x, name="equal")
    initialize(model, seed)
    return {name: np.array(ops.convert_to_numpy(model.get_layer(name).kernel)) for name in names}


def separable_weights():
    """The weights of layers whose initializers have other names than their variables."""
    inputs = keras.Input((6, 6, 2))
    x = layers.SeparableConv2D(4, 3, name="separable")(inputs)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    model = keras.Model(inputs, x, name="one")
    initialize(model, 0)
    return {variable_name(model, v): np.array(ops.convert_to_numpy(v)) for v in model.variables}


def initialize_layer(kind):
    """Initializes a model with a layer that cannot be."""
    inputs = keras.Input((6,))
    layer = {
        "orthogonal": lambda: layers.Dense(4, kernel_initializer="orthogonal", name="square"),
        "unknown": lambda: _Unknown(name="unknown"),
        "twins": lambda: _Twins(name="twins"),
    }[kind]()
    initialize(keras.Model(inputs, layer(inputs), name="one"), 0)
    return {}


class _Unknown(layers.Layer):
    """A random weight without an initializer attribute."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), initializer="glorot_uniform", name="w")

    def call(self, x):
        return x @ self.w


class _Twins(layers.Layer):
    """Two variables of one name."""

    def build(self, shape):
        self.a = self.add_weight(shape=shape[1:], initializer="ones", name="w")
        self.b = self.add_weight(shape=shape[1:], initializer="ones", name="w")

    def call(self, x):
        return x * self.a + self.b


# Losses, schedules, augmentation


def per_sample(labels, outputs):
    """Every loss and the accuracy of given outputs."""
    y = ops.convert_to_tensor(np.array(labels, np.int32))
    z = ops.convert_to_tensor(np.array(outputs, np.float32))
    functions = losses.LOSSES | {"accuracy": losses.accuracy}
    return {name: np.array(ops.convert_to_numpy(f(y, z))) for name, f in functions.items()}


def rates(schedule, peak, total_steps, steps):
    """The configured schedule's rate at `steps`, all at once and one by one."""
    optimizer = make_optimizer(
        OptimizerConfig(name="adam", learning_rate=peak), ScheduleConfig(**schedule), total_steps
    )
    rate = optimizer._learning_rate
    if not callable(rate):
        return {"vector": np.full(len(steps), float(rate)), "scalar": np.full(len(steps), float(rate))}
    tensor = ops.convert_to_tensor(np.array(steps, np.int32))
    return {
        "vector": np.array(ops.convert_to_numpy(rate(tensor))),
        "scalar": np.array([np.float32(ops.convert_to_numpy(rate(step))) for step in steps]),
    }


def optimizer_settings(**settings):
    """The class and the settings of the Keras optimizer that a configuration makes."""
    made = make_optimizer(OptimizerConfig(**settings), ScheduleConfig(), 30)
    return {"class": type(made).__name__, **made.get_config()}


def augment(images, parameters, background):
    """Images changed by given parameters."""
    change = ShiftAndRotate(1.0, 1.0, background)
    x = ops.convert_to_tensor(np.array(images, np.float32))
    p = ops.convert_to_tensor(np.array(parameters, np.float32))
    return {"images": np.array(ops.convert_to_numpy(change.apply(x, p)))}


def draw_augmentation(shift, rotate, count, seed=0):
    """Drawn parameters [count, 3]."""
    return {"parameters": ShiftAndRotate(shift, rotate).draw(np.random.default_rng(seed), count)}


def seeds_of_steps(seed, first, count):
    """The seeds of some steps."""
    return {"seeds": step_seeds(seed, first, count)}


# What is refused or chosen


def make_task_with(**settings):
    """A task whose Keras optimizer has these settings."""
    model = make_task("mlp").model
    Task(model, keras.optimizers.Adam(**settings), losses.cross_entropy)
    return {}


def train_random_layer(kind):
    """One step with a layer that draws random numbers."""
    inputs = keras.Input((12,), name="features")
    layer = {
        "noise": lambda: layers.GaussianNoise(0.1, name="noise"),
        "seeded": lambda: layers.Dropout(0.5, seed=3, name="seeded"),
        "shaped": lambda: layers.Dropout(0.5, noise_shape=(None, 1), name="shaped"),
        "hidden": lambda: _HiddenNoise(name="hidden"),
        "recurrent": lambda: _recurrent(0.2),
        "recurrent_without": lambda: _recurrent(0.0),
    }[kind]()
    outputs = layers.Dense(CLASSES, name="logits")(layer(inputs))
    model = keras.Model(inputs, outputs, name="random")
    initialize(model, 0)
    task = Task(model, make_optimizer(OptimizerConfig(), ScheduleConfig(), 2), losses.cross_entropy)
    data, labels = make_data(model, BATCH)
    backend, _ = make_backend(task, data, labels)
    return backend.train_block(Order(BATCH, BATCH, 0).block(0, 1), 0)


def _recurrent(dropout):
    inner = [
        layers.Reshape((4, 3), name="steps"),
        layers.LSTM(4, dropout=dropout, recurrent_initializer="glorot_uniform", name="lstm"),
    ]
    return keras.Sequential(inner, name="recurrent")


class _HiddenNoise(layers.Layer):
    """Draws from a seed generator that is not called `seed_generator`."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.source = keras.random.SeedGenerator()

    def call(self, x, training=False):
        return x + keras.random.normal(ops.shape(x), seed=self.source) if training else x


def load_broken_state(kind):
    """Loads a state in which one array is missing, unknown or of the wrong shape."""
    backend = Setup().backend
    state = backend.state()
    name = "optimizer/hidden_1_kernel_momentum"
    if kind == "missing":
        del state[name]
    elif kind == "foreign":
        state["optimizer/hidden_9_kernel_momentum"] = state[name]
    else:
        state[name] = state[name][:-1]
    backend.load_state(state)
    return {}


def optimizer_line(optimizer=None, constraint=False, policy="float32", exclude=()):
    """The line that the backend prints for an optimizer."""
    inputs = keras.Input((6, 6), name="image")
    x = layers.Flatten(name="flatten")(inputs)
    kernel = keras.constraints.NonNeg() if constraint else None
    layer = layers.Dense(CLASSES, kernel_constraint=kernel, dtype=policy, name="logits")
    model = keras.Model(inputs, layer(x), name="one")
    initialize(model, 0)
    settings = {"name": "adamw", "learning_rate": 0.01} | (optimizer or {})
    made = make_optimizer(OptimizerConfig(**settings), ScheduleConfig(), 30)
    if exclude:
        made.exclude_from_weight_decay(var_names=exclude)
    data, labels = make_data(model, BATCH)
    _, lines = make_backend(Task(model, made, losses.cross_entropy), data, labels)
    return {"lines": lines}


class _Reading(keras.optimizers.Optimizer):
    """Reads its step count on the host, which tracing misses: its graph has the first step's rate."""

    def update_step(self, gradient, variable, learning_rate):
        step = float(ops.convert_to_numpy(self.iterations))
        self.assign_sub(variable, gradient * (0.1 / (1 + step)))


def train_untraceable(steps):
    """On PyTorch, the change of a weight in each step with an optimizer that cannot be traced."""
    task = dataclasses.replace(make_ones_task(), optimizer=_Reading(learning_rate=0.1, name="optimizer"))
    backend, lines = make_backend(task, np.ones((1, 1), np.float32), np.zeros(1, np.int32))
    weights = [1.0]
    for step in range(steps):
        backend.train_block(ONE, step)
        weights.append(float(backend.state()["model/scale_1/scale"][0]))
    return {"change": np.diff(weights), "lines": lines}


# Export


def export(directory, steps, batches, **setup):
    """Trains, exports in the backend's own format and as ``.keras``, and evaluates some batches."""
    from blacksmith.trainers.export import export_model

    made = Setup(**setup)
    made.run([steps])
    made.backend.sync()
    model = made.task.model
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    inputs, labels = make_data(model, 3)
    export_model(model, directory, inputs, made.backend.evaluate(inputs, labels)[1])
    for batch in batches:
        inputs, labels = make_data(model, batch, seed=batch)
        _, outputs = made.backend.evaluate(inputs, labels)
        np.savez(directory / f"batch_{batch}.npz", inputs=inputs, outputs=outputs)
    return {"files": sorted(os.listdir(directory))}


def evaluate_damaged(name, value, **setup):
    """Evaluates samples after the first number of the inputs, or of an array of the state, was replaced."""
    from blacksmith.trainers.keras_trainer import Samples, evaluate

    made = Setup(**setup)
    state, inputs = {key: array.copy() for key, array in made.backend.state().items()}, made.inputs.copy()
    (inputs[3] if name == "inputs" else state[name]).flat[0] = value
    made.backend.load_state(state)
    return evaluate(made.backend, Samples(inputs, made.labels))[0]
