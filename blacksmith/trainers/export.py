"""A Keras model in its backend's own exchange format, with a dynamic batch size."""

from pathlib import Path

import keras


def export_stablehlo(model: keras.Model, path: Path) -> Path:
    """Writes a one-input model on JAX as StableHLO for `jax.export.deserialize`; returns `path`."""
    import jax
    from jax import export

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]

    def forward(x: jax.Array) -> jax.Array:
        return model.stateless_call(trainable, fixed, x, training=False)[0]

    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
    # For every platform, so that a model trained on a GPU can be served on a CPU.
    exported = export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(shape)
    path.write_bytes(exported.serialize())
    return path


def export_torch(model: keras.Model, path: Path) -> Path:
    """Writes a one-input model on PyTorch for `torch.export.load`; returns `path`."""
    import torch

    device = model.trainable_variables[0].value.device
    dtype = getattr(torch, model.inputs[0].dtype)
    example = torch.zeros((2, *model.inputs[0].shape[1:]), dtype=dtype, device=device)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=((({0: batch},)),), strict=False)
    torch.export.save(program, path)
    return path
