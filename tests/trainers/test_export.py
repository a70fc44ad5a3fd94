"""Exported models, loaded back by the frameworks' own readers in fresh processes."""

import os
import subprocess
import sys

import numpy as np
import pytest

BATCHES = [1, 2, 7]

READERS = {
    "jax": """
import jax.export
exported = jax.export.deserialize(open("model.exported", "rb").read())
assert "keras" not in sys.modules
call = exported.call
""",
    "torch": """
import torch
program = torch.export.load("model.exported").module()
assert "keras" not in sys.modules
call = lambda x: program(torch.from_numpy(x)).detach()
""",
}
READ = """
import sys
import numpy as np
{reader}
import keras
model = keras.saving.load_model("model.keras")
assert "blacksmith" not in sys.modules
for batch in {batches}:
    with np.load(f"batch_{{batch}}.npz") as arrays:
        x = arrays["inputs"]
    np.savez(
        f"read_{{batch}}.npz",
        exported=np.asarray(call(x)),
        keras=keras.ops.convert_to_numpy(model(x, training=False)),
    )
"""


@pytest.mark.parametrize("model", ["cnn", "text"])
def test_exported_models_are_read_back_without_us_and_give_the_same_outputs(backends, tmp_path, model):
    readers = {}
    for name in ("jax", "torch"):
        directory = tmp_path / name
        files = backends.on(
            name, "export", directory=str(directory), steps=5, batches=BATCHES, model=model, dropout=0.3
        )["files"]
        assert {"model.keras", "model.exported"} < set(files)
        readers[name] = subprocess.Popen(
            [sys.executable, "-c", READ.format(reader=READERS[name], batches=BATCHES)],
            cwd=directory,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"KERAS_BACKEND": name, "KERAS_HOME": str(directory), "KERAS_TORCH_DEVICE": "cpu"}
            | {"JAX_PLATFORMS": "cpu"},
        )
    for name, reader in readers.items():
        _, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors
        for batch in BATCHES:
            with np.load(tmp_path / name / f"batch_{batch}.npz") as wanted:
                expected = wanted["outputs"]
            assert expected.shape == (batch, 4)
            with np.load(tmp_path / name / f"read_{batch}.npz") as read:
                # The same float32 operations, compiled again for another batch: rounding.
                np.testing.assert_allclose(read["exported"], expected, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(read["keras"], expected, rtol=1e-5, atol=1e-6)
