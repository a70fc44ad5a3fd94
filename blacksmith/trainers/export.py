"""A Keras model as files that other programs load, for any batch size."""

from pathlib import Path

import keras


def export_model(model: keras.Model, directory: Path) -> list[str]:
    """Writes a model of one input as ``model.keras`` and in its backend's own format.

    Returns:
      The names of the files. The second is ``model.stablehlo`` for `jax.export.deserialize`, or ``model.pt2``
      for `torch.export.load`.
    """
    model.save(directory / "model.keras")
    if keras.config.backend() == "jax":
        (directory / "model.stablehlo").write_bytes(_stablehlo(model))
        return ["model.keras", "model.stablehlo"]
    _export_torch(model, directory / "model.pt2")
    return ["model.keras", "model.pt2"]


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
