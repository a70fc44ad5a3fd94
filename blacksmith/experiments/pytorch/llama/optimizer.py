"""The optimizer's state as named tensors, and averages of weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from blacksmith.errors import CheckpointError


def state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An optimiser's state: tensors by ``parameter/slot``, and the slots that are plain numbers."""
    tensors, numbers = {}, {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            name = f"{names[parameter]}/{slot}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach().cpu().contiguous()
            elif value is not None:
                numbers[name] = value
    return tensors, numbers


def load_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, float],
) -> None:
    """Puts the state of `state_tensors` back.

    Raises:
      CheckpointError: it belongs to other parameters.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in {**tensors, **numbers}.items():
        name, _, slot = key.rpartition("/")
        parameter = by_name.get(name)
        if parameter is None:
            raise CheckpointError(f"the optimiser's state for {name} does not fit this model")
        if isinstance(value, Tensor):
            # Counters of steps stay where PyTorch keeps them.
            value = value.to(parameter.device) if value.dim() or _on_device(optimizer) else value.clone()
        optimizer.state[parameter][slot] = value


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether counters are kept beside the parameters, as fused and capturable optimisers do."""
    group = optimizer.param_groups[0]
    return bool(group.get("fused") or group.get("capturable"))


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
