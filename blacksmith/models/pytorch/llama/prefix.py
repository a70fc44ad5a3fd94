"""Batches whose sequences all begin alike: what they share is computed once, with gradients.

An instruction that stands before every example is the same in each row of a batch, and so are its keys and
values in every layer, since attention looks back only. `hidden_states` runs the shared tokens through the
model once and lets all rows attend to what came out; `token_losses` applies the language-model head only
where there is something to predict. Loss and gradients are those of the ordinary padded batch up to rounding,
with dropout off; with dropout on, all rows share the prefix's masks.

Rows are padded on the right. Padding comes after every real token, so no real token attends to it and no mask
is needed beyond the causal one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

IGNORED = -100
"""A target that is not learnt."""


class Batch(NamedTuple):
    """Sequences that begin with the same tokens.

    Attributes:
      prefix: what they share, int64 [prefix]; may be empty.
      tokens: what follows in each, padded on the right, int64 [batch, length].
      targets: the token to be predicted after each of `tokens`, or `IGNORED`: int64 [batch, length].
    """

    prefix: Tensor
    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        return Batch(*(part.to(device) for part in self))


class _Recorded(DynamicLayer):
    """Keeps the keys and values of the prefix as they pass by, [1, heads, prefix, width] each.

    A checkpointed layer passes by again in the backward pass, when its keys have been taken already.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Shared(DynamicLayer):
    """Puts the prefix's keys and values before those of each row, and does not change."""

    def __init__(self, recorded: _Recorded) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = recorded.keys, recorded.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _after(self.keys, key_states), _after(self.values, value_states)


def _after(first: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([first.expand(len(rows), -1, -1, -1), rows], dim=2)


def causal_model(model: torch.nn.Module) -> LlamaForCausalLM:
    """The Llama model itself, out of a PEFT model that may be around it; adapters stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: torch.nn.Module, prefix: Tensor, tokens: Tensor) -> Tensor:
    """The last layer's output for `tokens` that follow `prefix` in every row: [batch, length, width].

    Args:
      model: a `LlamaForCausalLM`, or a PEFT model around one.
      prefix: int64 [prefix]; may be empty.
      tokens: int64 [batch, length], padded on the right.
    """
    decoder = causal_model(model).model
    if not len(prefix):
        return decoder(input_ids=tokens, use_cache=False).last_hidden_state
    recorded = [_Recorded() for _ in decoder.layers]
    decoder(input_ids=prefix[None], cache=Cache(layers=recorded), use_cache=True)
    shared = Cache(layers=[_Shared(layer) for layer in recorded])
    return decoder(input_ids=tokens, cache=shared, use_cache=True).last_hidden_state


def target_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The head's output where there is a target, row by row: float32 [targets, vocabulary]."""
    hidden = hidden_states(model, batch.prefix, batch.tokens)
    return causal_model(model).lm_head(hidden[batch.targets != IGNORED]).float()


def token_losses(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each target in nats, row by row: float32 [targets]."""
    logits = target_logits(model, batch)
    return F.cross_entropy(logits, batch.targets[batch.targets != IGNORED], reduction="none")


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest run of tokens that all sequences begin with; empty for no sequences."""
    if not sequences:
        return []
    first, last = min(sequences), max(sequences)
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return list(first[:shared])


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Has every decoder layer computed again in the backward pass instead of keeping what it needs for it.

    Transformers' own gradient checkpointing takes the cache away from the layers and cannot be combined with
    a shared prefix; this one can, since the caches here do not change when a layer runs a second time. Other
    calls with gradients have to be given ``use_cache=False``.
    """
    for layer in causal_model(model).model.layers:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Any) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return run
