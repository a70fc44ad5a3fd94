"""PyTorch's optimisers by name, their state as named tensors, the learning rate, and averages of weights."""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from blacksmith.config.settings import ScheduleConfig
from blacksmith.errors import ConfigError, closest
from blacksmith.experiments.pytorch.llama.configs import Train
from blacksmith.trainers.torch_state import load_optimizer_state, optimizer_state


def make_optimizer(train: Train, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimiser that the configuration names, fused where it can be.

    Args:
      train: its name and settings.
      parameters: what it is to train.

    Raises:
      ConfigError: PyTorch has none of that name, or it lacks a setting or takes other values.
    """
    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    if train.optimizer not in classes:
        hint = closest(train.optimizer, classes)
        raise ConfigError(f"llama.Train.optimizer: torch.optim has no {train.optimizer!r}{hint}")
    if train.optimizer in ("LBFGS", "SparseAdam"):
        raise ConfigError(f"llama.Train.optimizer = {train.optimizer!r} does not fit this loop; AdamW does")
    if train.optimizer == "Rprop":
        raise ConfigError(
            'llama.Train.optimizer = "Rprop" has step sizes of its own, on which the schedule has no effect'
        )
    kind = classes[train.optimizer]
    taken = inspect.signature(kind).parameters
    options: dict[str, Any] = {"lr": train.learning_rate}
    for name, setting in (("weight_decay", "weight_decay"), ("momentum", "momentum"), ("eps", "epsilon")):
        value = getattr(train, setting)
        if value is not None and (name in taken or value):
            options[name] = value
            _check_taken(train, name, setting, taken)
    if train.beta_1 is not None or train.beta_2 is not None:
        _check_taken(train, "betas", "beta_1 and llama.Train.beta_2", taken)
        first, second = taken["betas"].default
        options["betas"] = (
            first if train.beta_1 is None else train.beta_1,
            second if train.beta_2 is None else train.beta_2,
        )
    tensors = list(parameters.values())
    if "fused" in taken and tensors[0].device.type in ("cpu", "cuda"):
        options["fused"] = True
    try:
        return kind(tensors, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"llama.Train.optimizer = {train.optimizer!r}: {error}") from error


def _check_taken(train: Train, name: str, setting: str, taken: Mapping[str, Any]) -> None:
    if name not in taken:
        raise ConfigError(f"llama.Train.{setting} has no effect on {train.optimizer}; leave it at None")


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """The rate of step number `step`, from 0, of a run of `total` steps.

    With warm-up over W steps, step t < W has ``peak * (t + 1) / W``; the decay then runs to the end of
    the run, or over ``Schedule.decay_steps``, to ``peak * Schedule.final_fraction``.
    """
    warm = schedule.warmup_steps
    if step < warm:
        return peak * (step + 1) / warm
    if schedule.name == "constant":
        return peak
    progress = min(1.0, (step - warm) / (schedule.decay_steps or max(1, total - warm)))
    left = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)


def state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`optimizer_state` of parameters with these names."""
    return optimizer_state(optimizer, {name: parameter for parameter, name in names.items()})


def load_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, float],
) -> None:
    """`load_optimizer_state` of parameters with these names."""
    parameters = {name: parameter for parameter, name in names.items()}
    load_optimizer_state(optimizer, parameters, tensors, numbers)


class Averages:
    """Exponential moving averages of weights, beside the weights.

    After step t, from 1, they move by ``1 - min(decay, t / (t + 9))`` of the way to the weights: the first
    steps are forgotten soon, as with TensorFlow's ``ExponentialMovingAverage(decay, num_updates)``.

    Args:
      weights: by name; they are the first averages.
      decay: below 1; with None there are no averages, and nothing happens.

    Attributes:
      values: the averages by name; within `applied`, the weights themselves.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float | None) -> None:
        self._weights = {} if decay is None else weights
        self._decay = decay
        self.values = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Books the weights after step number `step`, from 1."""
        if self.values:
            move = get_ema_multi_avg_fn(min(self._decay, step / (step + 9)))
            move(list(self.values.values()), list(self._weights.values()), step)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile the model computes with the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self.values[name] = self.values[name], weight.data
