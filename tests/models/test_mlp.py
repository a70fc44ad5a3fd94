"""The MNIST MLP: the layers that its settings ask for, and the function that they compute.

It is built in a process of its own, because Keras keeps the backend that it was first imported with; that the
weights are the same on every backend is tested with the trainers.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

BUILD = """
import json, sys
import numpy as np
from blacksmith.models.keras.mnist.mlp import mlp
settings, path = json.load(sys.stdin)
found, arrays = {}, {}
for name, arguments in settings.items():
    model = mlp(**arguments)
    found[name] = {
        "name": model.name,
        "layers": [type(layer).__name__ for layer in model.layers],
        "shapes": {v.path: list(v.shape) for v in model.variables if "seed" not in v.path},
        "input": list(model.inputs[0].shape[1:]),
        "output": list(model.outputs[0].shape[1:]),
    }
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(len(arrays)).normal(0, 0.5, variable.shape))
        arrays[f"{name}/{variable.path}"] = np.asarray(variable)
    shape = (5, *model.inputs[0].shape[1:])
    x = np.random.default_rng(0).normal(0, 1, shape).astype("float32")
    arrays[f"{name}/inputs"] = x
    arrays[f"{name}/outputs"] = np.asarray(model(x, training=False))
np.savez(path, **arrays)
json.dump(found, sys.stdout)
"""

SETTINGS = {
    "default": {},
    "small": {"hidden": [5, 3], "image_shape": [4, 6], "num_classes": 7, "activation": "relu"},
    "linear": {"hidden": [], "image_shape": [4, 6]},
    "dropout": {"hidden": [5, 3], "dropout": 0.5, "activation": "tanh", "image_shape": [4, 6]},
    "no bias": {"hidden": [5], "bias": False, "image_shape": [4, 6]},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What each of the settings gave, and the arrays with their random weights."""
    directory = tmp_path_factory.mktemp("mlp")
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        input=json.dumps([SETTINGS, str(directory / "arrays.npz")]),
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "jax", "KERAS_HOME": str(directory), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    with np.load(directory / "arrays.npz") as arrays:
        return json.loads(done.stdout), dict(arrays)


def test_the_default_is_784_256_256_10(built):
    model = built[0]["default"]
    assert model["name"] == "mlp"
    assert (model["input"], model["output"]) == ([28, 28], [10])
    assert model["shapes"] == {
        "hidden_1/kernel": [784, 256],
        "hidden_1/bias": [256],
        "hidden_2/kernel": [256, 256],
        "hidden_2/bias": [256],
        "logits/kernel": [256, 10],
        "logits/bias": [10],
    }


def test_widths_classes_and_image_shape_are_settings(built):
    model = built[0]["small"]
    assert (model["input"], model["output"]) == ([4, 6], [7])
    assert model["shapes"] == {
        "hidden_1/kernel": [24, 5],
        "hidden_1/bias": [5],
        "hidden_2/kernel": [5, 3],
        "hidden_2/bias": [3],
        "logits/kernel": [3, 7],
        "logits/bias": [7],
    }


def test_no_hidden_layer_makes_a_linear_classifier(built):
    assert built[0]["linear"]["shapes"] == {"logits/kernel": [24, 10], "logits/bias": [10]}


def test_no_layer_has_a_bias_if_it_is_off(built):
    assert built[0]["no bias"]["shapes"] == {"hidden_1/kernel": [24, 5], "logits/kernel": [5, 10]}


def test_dropout_follows_every_hidden_layer_if_set(built):
    layers = {name: model["layers"][1:] for name, model in built[0].items()}
    assert layers["dropout"] == ["Flatten", "Dense", "Dropout", "Dense", "Dropout", "Dense"]
    assert layers["small"] == ["Flatten", "Dense", "Dense", "Dense"]


def _silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("name", "activation"),
    [("small", lambda x: np.maximum(x, 0)), ("linear", None), ("dropout", np.tanh), ("no bias", _silu)],
    ids=["relu", "linear", "tanh", "silu"],
)
def test_outputs_equal_numpy(built, name, activation):
    arrays = {k.removeprefix(f"{name}/"): v for k, v in built[1].items() if k.startswith(f"{name}/")}
    x = arrays["inputs"].reshape(5, -1).astype(np.float64)
    layers = [f"hidden_{i}" for i in (1, 2) if f"hidden_{i}/kernel" in arrays] + ["logits"]
    for layer in layers:
        x = x @ arrays[f"{layer}/kernel"] + arrays.get(f"{layer}/bias", 0)
        x = x if layer == "logits" else activation(x)
    # Sums of 24 float32 products.
    np.testing.assert_allclose(arrays["outputs"], x, rtol=1e-5, atol=1e-5)
