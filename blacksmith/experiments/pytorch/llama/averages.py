"""Moving averages of the trained weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Averages:
    """Exponential moving averages of named weights; with `decay` None there are none, and nothing happens.

    The decay of step t, from 1, is ``min(decay, t / (t + 9))``, as in TensorFlow's ExponentialMovingAverage.
    `values` are the averages by name; within `applied`, the weights themselves.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float | None) -> None:
        self._weights = {} if decay is None else weights
        self._decay = decay
        self.values = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Includes the weights after step number `step`, from 1."""
        if self.values:
            move = get_ema_multi_avg_fn(min(self._decay, step / (step + 9)))
            move(list(self.values.values()), list(self._weights.values()), step)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Lets the model compute with the averages inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self.values[name] = self.values[name], weight.data
