"""Where a model stops being finite: in its own weights, in those of an adapter, or in what it computes."""

import torch
from torch import Tensor

from blacksmith.errors import DataError
from blacksmith.models.pytorch.llama.prefix import Batch, target_logits

_ADAPTER = (".lora_", ".modules_to_save.", ".token_adapter.")


def check_weights(model: torch.nn.Module, source: str) -> None:
    """Raises DataError if a weight, loaded from `source`, is not finite."""
    if found := _weight(model):
        raise DataError(f"{source}: the model has weights that are not finite: {found}")


def first_not_finite(model: torch.nn.Module, batch: Batch) -> str:
    """Names the first thing that is not finite when a model computes a batch; empty: all is finite."""
    return _weight(model) or _activation(model, batch)


def _weight(model: torch.nn.Module) -> str:
    # The rotary frequencies are buffers, made from numbers in `config.json`.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            kind = "adapter" if any(part in name for part in _ADAPTER) else "base weights"
            return f"{kind}, {name.removeprefix('base_model.model.')}"
    return ""


@torch.no_grad()
def _activation(model: torch.nn.Module, batch: Batch) -> str:
    names: list[str] = []

    def look(name: str, output: object) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else []
        if not all(torch.isfinite(t).all() for t in tensors if isinstance(t, Tensor)):
            names.append(name)

    # The parts of a module return before it does, so the first name is the innermost.
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        target_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return f"activations, {names[0].removeprefix('base_model.model.')}" if names else ""
