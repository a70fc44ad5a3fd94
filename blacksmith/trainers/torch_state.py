"""Saves and restores any PyTorch model and optimizer as safetensors, bit for bit and without pickle.

An experiment that stores weights in its own files uses only `optimizer_state` and `load_optimizer_state`.
Hyperparameters of an optimizer are not saved, since they come from the configuration.
"""

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from blacksmith.errors import CheckpointError
from blacksmith.run.checkpoint import checked

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
NUMBERS = "optimizer.json"

# Of a matrix, Adafactor keeps two factors of the second moment, which have length 1 along this axis.
_FACTORS = {"row_var": -1, "col_var": -2}


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The content of `NUMBERS`."""

    optimizer: str  # its class
    numbers: dict[str, bool | int | float]


def save_state(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Writes a model, shared weights once, and its optimizer; raises TypeError as `optimizer_state` does."""
    save_model(model, str(directory / MODEL))
    if optimizer is not None:
        tensors, numbers = optimizer_state(optimizer, dict(model.named_parameters()))
        save_file(tensors, directory / OPTIMIZER)
        record = {"optimizer": type(optimizer).__name__, "numbers": numbers}
        (directory / NUMBERS).write_text(json.dumps(record, indent=2), encoding="utf-8")


def load_state(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Loads what `save_state` wrote, on any device; raises CheckpointError if it does not fit."""
    path = directory / MODEL
    try:
        load_model(model, path)
    except RuntimeError as error:
        difference = textwrap.shorten(str(error), 400)  # PyTorch lists each on its own line
        raise CheckpointError(f"{path} does not fit the model: {difference}") from error
    if optimizer is None:
        return
    content = json.loads((directory / NUMBERS).read_text(encoding="utf-8"))
    record = checked(content, _Numbers, directory / NUMBERS)
    kind = type(optimizer).__name__
    if record.optimizer != kind:
        raise CheckpointError(f"{directory} has the state of the optimizer {record.optimizer}, not of {kind}")
    tensors = load_file(directory / OPTIMIZER)
    load_optimizer_state(optimizer, dict(model.named_parameters()), tensors, record.numbers)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state of an optimizer by ``parameter/slot``: its tensors, on the CPU, and its plain numbers.

    Raises TypeError if it keeps anything else, as LBFGS does.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    tensors, numbers = {}, {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            key = f"{names[parameter]}/{slot}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().contiguous()
            elif isinstance(value, (int, float)):
                numbers[key] = value
            elif value is not None:
                kind, found = type(optimizer).__name__, type(value).__name__
                raise TypeError(f"{kind} keeps {slot!r} as a {found}, which cannot be saved")
    return tensors, numbers


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, float],
) -> None:
    """Replaces an optimizer's state by that of `optimizer_state`; CheckpointError if it does not fit."""
    # Not by `Optimizer.load_state_dict`, which casts every slot to the dtype of its parameter and so rounds
    # float32 slots of bfloat16 parameters.
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for key, value in {**tensors, **numbers}.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters.get(name)
        if id(parameter) not in groups:
            raise CheckpointError(f"the state has a parameter {name!r}, which the optimizer does not train")
        if isinstance(value, Tensor):
            value = _placed(value, slot, parameter, groups[id(parameter)])
        optimizer.state[parameter][slot] = value


def slot_fits(slot: str, value: object, parameter: Tensor) -> bool:
    """Whether PyTorch's own optimizers could keep this value for a parameter.

    A fused kernel reads and writes beyond the end of a slot that is too small.
    """
    shape = list(parameter.shape)
    if slot in _FACTORS:
        shape[_FACTORS[slot]] = 1
    return isinstance(value, Tensor) and (not value.dim() or list(value.shape) == shape)


def _placed(value: Tensor, slot: str, parameter: Tensor, group: Mapping[str, object]) -> Tensor:
    """A copy of a slot on the device and in the memory layout that the optimizer itself would use."""
    if value.shape == parameter.shape and value.dim():
        # Fused kernels walk parameter and slots in memory order and ignore strides.
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    # PyTorch keeps scalar counters on the CPU, unless a kernel on the device reads them.
    on_host = slot in ("step", "mu_product") and not (group.get("fused") or group.get("capturable"))
    return value.to("cpu" if on_host else parameter.device, copy=True)


def weights_and_gradients(parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns named parameters and, after the first step, their gradients as float32, for histograms."""
    arrays = {f"weights/{name}": parameter.detach() for name, parameter in parameters.items()}
    arrays |= {f"gradients/{name}": p.grad for name, p in parameters.items() if p.grad is not None}
    return {name: array.float().cpu().numpy() for name, array in arrays.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate; parameter groups of `make_optimizer` keep their ratios to each other."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)
