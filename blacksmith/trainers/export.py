"""A Keras model as files that other programs load, for any batch size."""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from blacksmith.errors import RunError, first_line

# The largest difference of an exported file's outputs, as a fraction of the largest output.
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 5e-2  # where layers compute in bfloat16


def export_model(model: keras.Model, directory: Path, inputs: np.ndarray, outputs: np.ndarray) -> list[str]:
    """Writes a model of one input as ``model.keras`` and in its backend's own format.

    Each file is loaded back: of `inputs` [samples, ...] it has to make the model's `outputs` [samples, ...].

    Returns:
      The names of the files. The second is ``model.stablehlo`` for `jax.export.deserialize`, or ``model.pt2``
      for `torch.export.load`.

    Raises:
      RunError: a file cannot be loaded, or computes something else than the model.
    """
    own_layers = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
    # In Keras's safe mode, which runs no code from the file.
    loaders = {
        "model.keras": lambda path: keras.saving.load_model(path, custom_objects=own_layers),
    }
    model.save(directory / "model.keras")
    if keras.config.backend() == "jax":
        (directory / "model.stablehlo").write_bytes(_stablehlo(model))
        loaders["model.stablehlo"] = _load_stablehlo
    else:
        _export_torch(model, directory / "model.pt2")
        loaders["model.pt2"] = _load_torch
    precise = all(layer.compute_dtype == "float32" for layer in model._flatten_layers())
    tolerance = TOLERANCE if precise else LOW_PRECISION_TOLERANCE
    x = ops.convert_to_tensor(inputs, model.inputs[0].dtype)
    cure = "a layer of one's own needs a get_config that returns all its arguments; nothing is exported"
    for name, load in loaders.items():
        try:
            found = ops.convert_to_numpy(ops.cast(load(directory / name)(x), "float32"))
        except Exception as error:  # of three libraries
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise RunError(f"{name} cannot be loaded back ({reason}); {cure}") from error
        difference = np.abs(found - outputs).max() / max(np.abs(outputs).max(), np.finfo(np.float32).tiny)
        if not difference <= tolerance:
            raise RunError(
                f"{name} computes something else than the evaluated model: its outputs differ by "
                f"{difference:.2g} of the largest, allowed {tolerance:g}; {cure}"
            )
    return list(loaders)


def _load_stablehlo(path: Path) -> Callable:
    from jax import export

    return export.deserialize(path.read_bytes()).call


def _load_torch(path: Path) -> Callable:
    import torch

    return torch.export.load(path).module()


def _stablehlo(model: keras.Model) -> bytes:
    import jax
    from jax import export

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]

    def forward(x: jax.Array) -> jax.Array:
        return model.stateless_call(trainable, fixed, x, training=False)[0]

    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
    # For every platform, so that a model trained on a GPU can be served on a CPU.
    return export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(shape).serialize()


def _export_torch(model: keras.Model, path: Path) -> None:
    import torch

    device = model.trainable_variables[0].value.device
    dtype = getattr(torch, model.inputs[0].dtype)
    example = torch.zeros((2, *model.inputs[0].shape[1:]), dtype=dtype, device=device)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=((({0: batch},)),), strict=False)
    torch.export.save(program, path)
