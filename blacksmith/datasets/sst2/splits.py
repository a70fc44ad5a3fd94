"""Holds sentences out for validation and test, so that no part of them is trained on.

SST-2 trains on the phrases of its sentences. An example held out at random would nearly always be trained on
as well: inside a longer phrase, or through its own phrases. So only whole sentences are held out, and phrases
that occur in no other sentence are left out of training.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blacksmith.datasets.sst2.examples import CLASSES, Examples, Info, Sst2, content_sha256
from blacksmith.errors import DataError
from blacksmith.run import order


@dataclass(frozen=True, eq=False)
class Source:
    """Examples as read, before any are held out; see also `Info`."""

    source: str
    name: str
    path: str | None
    test_from: str
    unused: list[str]
    train: Examples  # all examples of a single file
    test: Examples | None  # None for a single file

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of all examples."""
        return content_sha256(self.train, *([] if self.test is None else [self.test]))

    def split(self, validation: int | float | None = None, seed: int = 0) -> Sst2:
        """Returns train, validation and test examples; a tenth of a single file is its test set.

        Args:
          validation: how many training examples to hold out: a count, or a fraction between 0 and 1; None:
            1,000, or 40 of the sample, which has only 240.
          seed: decides which ones.

        Raises:
          DataError: `validation` leaves nothing to train on, or only one class.
        """
        if validation is None:
            validation = 40 if self.source == "sample" else 1000
        place = self.path or self.name
        pool, total = Pool(self.train, place), len(self.train)
        test, test_from = self.test, self.test_from
        if test is None:
            # Not the run's seed: a checkpoint must not be tested on what another seed trained it on.
            test, test_from = pool.hold_out(0.1, order.generator(0, "test")), f"a tenth of {test_from}"
            total -= len(test)
        held_out = pool.hold_out(validation, order.generator(seed, "validation"))
        train = pool.remaining()
        if len(set(train.labels.tolist())) < len(CLASSES):
            label = CLASSES[train.labels[0]]
            raise DataError(f"{place}: all {len(train):,} training examples are {label}; needed: both labels")
        return self._splits(train, held_out, test, test_from, total - len(held_out) - len(train))

    def for_testing(self) -> Sst2:
        """Returns only test examples (all examples of a single file), for a model trained on other data."""
        none, test = self.train.take([]), self.train if self.test is None else self.test
        return self._splits(none, none, test, self.test_from, left_out=0)

    def _splits(
        self, train: Examples, validation: Examples, test: Examples, test_from: str, left_out: int
    ) -> Sst2:
        splits = {"train": train, "validation": validation, "test": test}
        info = Info(
            source=self.source,
            name=self.name,
            path=self.path,
            test_from=test_from,
            unused=self.unused,
            sha256=self.sha256,
            **{name: len(split) for name, split in splits.items()},
            class_counts={name: split.class_counts() for name, split in splits.items()},
            parts_left_out=left_out,
        )
        return Sst2(**splits, info=info)


class Pool:
    """Examples from which whole sentences are held out, once or more.

    An example is a whole sentence if no other example contains it, word by word. Equal sentences are held out
    together. A phrase stays in the pool as long as one of the whole sentences that contain it does.
    """

    def __init__(self, examples: Examples, place: str) -> None:
        self._examples, self._place = examples, place
        rows: dict[str, list[int]] = {}  # of each distinct sentence
        for row, sentence in enumerate(examples.sentences):
            rows.setdefault(" ".join(sentence.split()), []).append(row)
        self._rows = list(rows.values())
        self._around = whole_sentences_around(list(rows))
        self._out: set[int] = set()

    def hold_out(self, size: int | float, generator: np.random.Generator) -> Examples:
        """Takes random whole sentences out of the pool and returns them in their original order.

        `size` is a number of examples, or a fraction of the whole sentences. Fewer may be held out, since
        equal sentences stay together. Raises DataError if it leaves nothing on one side.
        """
        whole = [i for i, around in enumerate(self._around) if not around and i not in self._out]
        available = sum(len(self._rows[i]) for i in whole)
        count = max(1, round(size * available)) if isinstance(size, float) else size
        held: list[int] = []
        for i in generator.permutation(whole).tolist():
            if len(held) + len(self._rows[i]) <= count < available:
                held += self._rows[i]
                self._out.add(i)
        if not held:
            raise DataError(
                f"{self._place}: cannot hold out {size:,} of {available:,} whole sentences (equal ones stay "
                f"together); allowed: a number from 1 to {available - 1:,}, or a fraction between 0 and 1"
            )
        return self._examples.take(sorted(held))

    def remaining(self) -> Examples:
        """Returns what is left to train on, in its original order."""
        kept: list[int] = []
        for i, (rows, around) in enumerate(zip(self._rows, self._around)):
            # A phrase goes with the last whole sentence around it; a whole sentence has none around it.
            if not self._out.issuperset(around or [i]):
                kept += rows
        return self._examples.take(sorted(kept))


def whole_sentences_around(sentences: Sequence[str]) -> list[list[int]]:
    """Returns for each sentence the indices of the whole sentences that contain it, none for a whole one.

    The sentences must be distinct, with single spaces between their words.
    """
    # Comparing every sentence with every other would take hours for SST-2's 67,000 examples. A sentence that
    # contains another has all its pairs of adjacent words, so only those with its rarest pair are searched.
    # Single words have no pair, so those that are examples are indexed too.
    words = [sentence.split() for sentence in sentences]
    pairs = [[f"{first} {second}" for first, second in itertools.pairwise(some)] for some in words]
    single = {some[0] for some in words if len(some) == 1}
    having: dict[str, list[int]] = {}
    for i, some in enumerate(words):
        for key in {*pairs[i], *single.intersection(some)}:
            having.setdefault(key, []).append(i)
    padded = [f" {sentence} " for sentence in sentences]  # so that "art" is not found in "start"
    around = []
    for i, part in enumerate(padded):
        rarest = min((having[key] for key in pairs[i] or words[i]), key=len)
        around.append([j for j in rarest if j != i and part in padded[j]])
    return [[j for j in others if not around[j]] for others in around]
