"""Batches of examples of about the same length, as a pure function of (seed, epoch, cursor)."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from blacksmith.experiments.pytorch.llama.prompts import Encoded
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch
from blacksmith.run.order import generator


class LengthOrder:
    """The stream of batches: each epoch visits every example once, and sorts within pools of some batches.

    An epoch's order is drawn from (seed, epoch); pools of `pool` batches are sorted by length and cut into
    batches, whose order is drawn again. The last batch of an epoch may be smaller.

    Args:
      lengths: tokens of each example.
      batch: examples of a batch.
      pool: batches that are sorted together.
      seed: of the order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch: int, pool: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self.batch, self._pool, self._seed = batch, pool, seed
        self.steps_per_epoch = -(-len(self._lengths) // batch)
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, cursor) of the batch that step number `step`, from 0, sees."""
        return divmod(step, self.steps_per_epoch)

    def examples_before(self, step: int) -> int:
        """How many examples the steps before `step` have seen."""
        epoch, cursor = self.position(step)
        seen = epoch * len(self._lengths)
        return seen + sum(len(rows) for rows in self._of(epoch)[:cursor]) if cursor else seen

    def rows(self, step: int) -> np.ndarray:
        """The examples of step number `step`, from 0, shortest first: int64 [batch]."""
        epoch, cursor = self.position(step)
        return self._of(epoch)[cursor]

    def _of(self, epoch: int) -> list[np.ndarray]:
        if epoch != self._epoch:
            random = generator(self._seed, "order", epoch)
            shuffled = random.permutation(len(self._lengths))
            batches = []
            for begin in range(0, len(shuffled), self._pool * self.batch):
                some = shuffled[begin : begin + self._pool * self.batch]
                by_length = some[np.argsort(self._lengths[some], kind="stable")]
                batches += [by_length[i : i + self.batch] for i in range(0, len(some), self.batch)]
            self._batches = [batches[i] for i in random.permutation(len(batches))]
            self._epoch = epoch
        return self._batches


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
