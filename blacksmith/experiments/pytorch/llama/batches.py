"""Encoded examples as batches of tensors, padded on the right."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blacksmith.experiments.pytorch.llama.prompts import Encoded
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that fills up shorter rows; nothing depends on which one it is."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def collate_whole(encoded: Encoded, rows: Sequence[int] | np.ndarray, pad: int) -> tuple[Tensor, Tensor]:
    """Returns examples as the models of transformers take them.

    Returns:
      input_ids and labels, int64 [batch, tokens] each; only the answers have labels that are not `IGNORED`.
    """
    length = max(len(encoded.tokens[row]) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    for place, row in enumerate(rows):
        tokens, answer = torch.tensor(encoded.tokens[row]), encoded.answers[row]
        input_ids[place, : len(tokens)] = tokens
        labels[place, answer : len(tokens)] = tokens[answer:]
    return input_ids, labels


def collate(encoded: Encoded, rows: Sequence[int] | np.ndarray, prefix: Sequence[int], pad: int) -> Batch:
    """Returns examples that all begin with `prefix`, which may be empty, as a batch that shares it."""
    input_ids, labels = collate_whole(encoded, rows, pad)
    # A token's target is the token after it; the last one has none.
    start = len(prefix)
    return Batch(torch.tensor(prefix, dtype=torch.int64), input_ids[:, start:-1], labels[:, start + 1 :])
