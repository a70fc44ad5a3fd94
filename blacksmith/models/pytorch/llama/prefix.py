"""Batches of sequences with a common prefix, which is computed once per batch, with gradients.

Attention is causal, so the keys and values of an instruction that starts every row do not depend on what
follows it: `hidden_states` runs the prefix through the model once and lets all rows attend to the result.
Loss and gradients equal those of the ordinary padded batch up to rounding; with dropout, all rows share the
prefix's masks. No real token attends to the padding on its right, so the causal mask is enough.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

IGNORED = -100
"""The target of a position without a loss, as in the labels of transformers."""


class Batch(NamedTuple):
    """Sequences with a common prefix."""

    prefix: Tensor  # the tokens that all sequences start with, int64 [prefix]; may be empty
    tokens: Tensor  # the rest of each sequence, padded on the right, int64 [batch, length]
    targets: Tensor  # the token to predict after each of `tokens`, or `IGNORED`, int64 [batch, length]

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch on a device."""
        return Batch(*(part.to(device) for part in self))


class _Recorded(DynamicLayer):
    """A layer's cache that keeps the prefix's keys and values: [1, key_value_heads, prefix, head_width]."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        # Not detached: through these tensors, the losses of all rows reach the layers that computed them.
        # A checkpointed layer runs again in the backward pass. The rows were computed from the tensors of its
        # first run, so those must stay.
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Shared(DynamicLayer):
    """A layer's cache that puts the prefix's keys and values before those of each row.

    transformers derives the rows' positions and the causal mask from the cache's length, here the prefix's.
    An ordinary cache would append the rows' keys; this one never changes, so a layer can run twice.
    """

    def __init__(self, recorded: _Recorded) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = recorded.keys, recorded.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _after(self.keys, key_states), _after(self.values, value_states)


def _after(first: Tensor, rows: Tensor) -> Tensor:
    # [1, heads, prefix, width] and [batch, heads, length, width] -> [batch, heads, prefix + length, width].
    # The backward pass of `expand` sums over the batch, which gives the prefix the gradients of all rows.
    return torch.cat([first.expand(len(rows), -1, -1, -1), rows], dim=2)


def causal_model(model: torch.nn.Module) -> LlamaForCausalLM:
    """Returns the Llama model inside a PEFT model, adapters included, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: torch.nn.Module, prefix: Tensor, tokens: Tensor) -> Tensor:
    """Returns the last layer's output at a batch's `tokens`: [batch, length, width]."""
    decoder = causal_model(model).model
    if not len(prefix):
        return decoder(input_ids=tokens, use_cache=False).last_hidden_state
    # The prefix's own output is not needed: it has no targets. Rows use only its keys and values.
    recorded = [_Recorded() for _ in decoder.layers]
    decoder(input_ids=prefix[None], cache=Cache(layers=recorded), use_cache=True)
    shared = Cache(layers=[_Shared(layer) for layer in recorded])
    return decoder(input_ids=tokens, cache=shared, use_cache=True).last_hidden_state


def target_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Returns the logits at the targets, row by row: float32 [targets, vocabulary]."""
    hidden = hidden_states(model, batch.prefix, batch.tokens)
    # At all positions the head's output, [batch, length, vocabulary], would be the largest tensor by far, and
    # almost all of it unused: an answer is one or two tokens.
    return causal_model(model).lm_head(hidden[batch.targets != IGNORED]).float()


def token_losses(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Returns the cross-entropy of each target in nats, row by row: float32 [targets]."""
    logits = target_logits(model, batch)
    return F.cross_entropy(logits, batch.targets[batch.targets != IGNORED], reduction="none")


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Returns the longest run of tokens that all sequences start with."""
    # In lexicographic order, what the first and the last sequence share is shared by all between them.
    pairs = zip(min(sequences), max(sequences))
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Recomputes every decoder layer in the backward pass instead of storing its activations, to save memory.

    The gradient checkpointing of transformers would turn off the cache, and with it the shared prefix. The
    caches here do not change when a layer runs again. Other calls with gradients need ``use_cache=False``.
    """

    def recomputed(forward: Callable, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        # `checkpoint` also restores the random state, so a recomputed layer draws the same dropout masks.
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    for layer in causal_model(model).model.layers:
        layer.forward = functools.partial(recomputed, layer.forward)
