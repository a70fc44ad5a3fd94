"""Exported models, loaded by the frameworks' own readers in fresh processes."""

import os
import subprocess
import sys

import numpy as np
import pytest

BATCHES = [1, 2, 7]

MODELS = ["cnn", "text"]  # float images with batch normalization; integer tokens

READERS = {
    "jax": """
import jax.export
def load(path):
    return jax.export.deserialize(open(path, "rb").read()).call
""",
    "torch": """
import torch
def load(path):
    program = torch.export.load(path).module()
    return lambda x: program(torch.from_numpy(x)).detach()
""",
}
EXPORTED = {"jax": "model.stablehlo", "torch": "model.pt2"}
READ = """
import sys
import numpy as np
{reader}
exported = {{name: load(name + "/{exported}") for name in {models}}}
assert "keras" not in sys.modules
import keras
for name in {models}:
    model = keras.saving.load_model(name + "/model.keras")
    for batch in {batches}:
        with np.load(name + f"/batch_{{batch}}.npz") as arrays:
            x = arrays["inputs"]
        np.savez(
            name + f"/read_{{batch}}.npz",
            exported=np.asarray(exported[name](x)),
            keras=keras.ops.convert_to_numpy(model(x, training=False)),
        )
assert "blacksmith" not in sys.modules
"""


@pytest.fixture(scope="module")
def exports(backends, tmp_path_factory):
    """Trained, exported and read models: ``BACKEND/MODEL/{batch,read}_SIZE.npz``."""
    root = tmp_path_factory.mktemp("exports")
    for model in MODELS:
        for name, worker in backends.workers.items():
            arguments = {"steps": 5, "batches": BATCHES, "model": model, "dropout": 0.3}
            worker.send("export", arguments | {"directory": str(root / name / model)})
    readers = {}
    for name in ("jax", "torch"):
        for model in MODELS:
            arguments = {"steps": 5, "batches": BATCHES, "model": model, "dropout": 0.3}
            backends.on(name, "export", **arguments, directory=str(root / name / model))
        readers[name] = subprocess.Popen(
            [
                sys.executable,
                "-c",
                READ.format(reader=READERS[name], exported=EXPORTED[name], models=MODELS, batches=BATCHES),
            ],
            cwd=root / name,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"KERAS_BACKEND": name, "KERAS_HOME": str(root / name), "KERAS_TORCH_DEVICE": "cpu"}
            | {"JAX_PLATFORMS": "cpu"},
        )
    for reader in readers.values():
        _, errors = reader.communicate(timeout=300)
        assert reader.returncode == 0, errors
    return root


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_exported_models_work_without_blacksmith(exports, name, model, batch):
    with np.load(exports / name / model / f"batch_{batch}.npz") as wanted:
        expected = wanted["outputs"]
    assert expected.shape == (batch, 4)
    with np.load(exports / name / model / f"read_{batch}.npz") as read:
        # The same float32 operations, compiled for another batch size: rounding.
        np.testing.assert_allclose(read["exported"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(read["keras"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_an_export_that_computes_something_else_is_refused(backends, tmp_path, name):
    """Keras loads a layer of one's own with its defaults if `get_config` does not return its arguments."""
    arguments = {"directory": str(tmp_path), "steps": 1, "batches": [], "model": "forgetful"}
    with pytest.raises(backends.Error, match=r"RunError: model\.keras computes something else .* by 0\.5 of"):
        backends.on(name, "export", **arguments)
