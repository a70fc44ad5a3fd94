"""Encoded examples as batches of tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blacksmith.experiments.pytorch.llama.prompts import Encoded
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up shorter rows; which one it is has no effect on anything."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def collate(encoded: Encoded, rows: Sequence[int] | np.ndarray, prefix: Sequence[int], pad: int) -> Batch:
    """Some examples as a batch behind a prefix that they all begin with; it may be empty.

    Args:
      encoded: the examples.
      rows: which of them.
      prefix: the first tokens of each.
      pad: the token that fills up the shorter ones.
    """
    skipped = len(prefix)
    # The last token is predicted, and predicts nothing itself.
    length = max(len(encoded.tokens[row]) for row in rows) - 1 - skipped
    tokens = np.full((len(rows), length), pad, np.int64)
    targets = np.full((len(rows), length), IGNORED, np.int64)
    for place, row in enumerate(rows):
        ids, answer = encoded.tokens[row], encoded.answers[row]
        tokens[place, : len(ids) - 1 - skipped] = ids[skipped:-1]
        targets[place, answer - 1 - skipped : len(ids) - 1 - skipped] = ids[answer:]
    return Batch(torch.tensor(prefix, dtype=torch.int64), torch.from_numpy(tokens), torch.from_numpy(targets))


def collate_whole(encoded: Encoded, rows: Sequence[int] | np.ndarray, pad: int) -> tuple[Tensor, Tensor]:
    """Some examples as Transformers' models take them, padded to the longest.

    Returns:
      input_ids and labels, int64 [batch, tokens] each; `IGNORED` stands for all labels but the answer's.
    """
    length = max(len(encoded.tokens[row]) for row in rows)
    input_ids = np.full((len(rows), length), pad, np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    for place, row in enumerate(rows):
        ids, answer = encoded.tokens[row], encoded.answers[row]
        input_ids[place, : len(ids)] = ids
        labels[place, answer : len(ids)] = ids[answer:]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)
