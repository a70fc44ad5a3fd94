"""PyTorch's own optimizers from the `Optimizer` section, for training without Keras."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from blacksmith.config.settings import TorchOptimizerConfig

_CLASSES = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}


def make_optimizer(
    config: TorchOptimizerConfig, parameters: Iterable[Tensor] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The configured optimizer, fused if PyTorch supports that on this device.

    `parameters` are tensors, or PyTorch's parameter groups, which may have their own learning rates.
    """
    kind, parameters = _CLASSES[config.name], list(parameters)
    # PyTorch's names; its RMSprop calls rho alpha.
    renamed = {"epsilon": "eps", "rho": "alpha" if config.name == "rmsprop" else "rho"}
    options = {renamed.get(name, name): value for name, value in config.own_settings().items()}
    if options.keys() & {"beta_1", "beta_2"}:
        beta_1, beta_2 = inspect.signature(kind).parameters["betas"].default
        options["betas"] = (options.pop("beta_1", beta_1), options.pop("beta_2", beta_2))
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    # Only these: with bfloat16 parameters PyTorch's fused SGD on the CPU reads memory that was never written.
    if config.name in ("adam", "adamw") and first.device.type in ("cpu", "cuda"):
        options["fused"] = True
    optimizer = kind(parameters, lr=config.learning_rate, **options)
    for group in optimizer.param_groups:
        group["rate_ratio"] = group["lr"] / config.learning_rate  # for `set_learning_rate`
    return optimizer


def clip_gradients(config: TorchOptimizerConfig, parameters: Iterable[Tensor]) -> Tensor:
    """Clips the gradients as configured; returns their global norm before clipping, float32 []."""
    parameters = list(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.global_clip_norm or math.inf)
    if config.clip_norm is not None:
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], config.clip_norm)
    if config.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, config.clip_value)
    return norm
