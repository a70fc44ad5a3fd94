"""Labeled sentences, and how they are held out for validation and test so that no part is trained on.

SST-2 trains on the phrases of its sentences. An example held out at random would nearly always be trained on
as well: inside a longer phrase, or through its own phrases. So only whole sentences are held out, and phrases
that occur in no other sentence are left out of training.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from blacksmith.errors import DataError
from blacksmith.run import order

CLASSES = ("negative", "positive")
"""The meaning of the labels 0 and 1."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Sentences with their sentiment."""

    sentences: tuple[str, ...]  # without surrounding white space
    labels: np.ndarray  # 0 negative, 1 positive: int32 [examples]
    numbers: np.ndarray  # row numbers in the file or split, from 1, without header and blank lines, int64

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Returns the examples at the given indices, in that order."""
        rows = np.asarray(rows, np.int64)
        return Examples(tuple(self.sentences[row] for row in rows), self.labels[rows], self.numbers[rows])

    def class_counts(self) -> dict[str, int]:
        """Returns the number of examples of each class."""
        return {name: int((self.labels == label).sum()) for label, name in enumerate(CLASSES)}


@dataclass(frozen=True)
class Info:
    """What was read and how it was split, as recorded in run directories and checkpoints."""

    source: str  # sample, directory, file or hub
    name: str  # of the file or directory, or the dataset id
    path: str | None  # absolute; None for the sample and the hub
    test_from: str  # the file or split that the test examples come from
    unused: list[str]  # files or splits
    sha256: str  # of the source's training and test examples before they were split
    train: int  # number of examples
    validation: int
    test: int
    class_counts: dict[str, dict[str, int]]  # by split and class
    test_in_train: int  # test sentences that are training sentences, too
    parts_left_out: int  # phrases that are in no split because all sentences around them were held out

    def describe(self) -> str:
        """Returns one line for the console."""
        place = self.path or f"{self.name} from the Hugging Face hub"
        notes = []
        if self.source == "sample":
            place = "bundled sample"
            notes.append("not SST-2 itself, which is stanfordnlp/sst2 on the Hugging Face hub")
        if self.parts_left_out:
            notes.append(f"{self.parts_left_out:,} phrases of held-out sentences were left out")
        if self.test_in_train:
            notes.append(f"{self.test_in_train:,} of the test sentences are also in the training data")
        if self.unused:
            notes.append(f"not used: {', '.join(self.unused)}")
        training = f"{self.train:,} train, {self.validation:,} validation, " if self.train else ""
        tested = f"{self.test:,} test sentences from {self.test_from}"
        return "; ".join([f"data: {place}: {training}{tested}, sha256 {self.sha256[:12]}", *notes])


@dataclass(frozen=True, eq=False)
class Sst2:
    """Disjoint splits, each in the order of the source, and what is recorded about them."""

    train: Examples
    validation: Examples
    test: Examples
    info: Info


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
        """Hash of all examples, as the JSON text `[[sentences, labels], ...]`, whatever the file format."""
        parts = [self.train] if self.test is None else [self.train, self.test]
        content = [[part.sentences, part.labels.tolist()] for part in parts]
        return sha256(json.dumps(content).encode()).hexdigest()

    def split(self, validation: int | float | None = None, seed: int = 0) -> Sst2:
        """Returns train, validation and test examples; a tenth of a single file is its test set.

        `validation` is how many training examples to hold out: a count, or a fraction between 0 and 1; None:
        1,000, or 40 of the sample, which has only 240. `seed` decides which ones. Raises DataError if that
        leaves nothing to train on, or only one class.
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
        trained_on = set(train.sentences)
        info = Info(
            source=self.source,
            name=self.name,
            path=self.path,
            test_from=test_from,
            unused=self.unused,
            sha256=self.sha256,
            **{name: len(split) for name, split in splits.items()},
            class_counts={name: split.class_counts() for name, split in splits.items()},
            test_in_train=sum(sentence in trained_on for sentence in test.sentences),
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
                f"{self._place}: cannot hold out {size:,} of {available:,} whole sentences: some must be "
                "left, and equal ones stay together; give more data, or change llama.Data.validation"
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
