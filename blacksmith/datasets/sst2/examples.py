"""Labeled sentences, the splits that a run uses, and what is recorded about them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

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


def content_sha256(*parts: Examples) -> str:
    """Hashes the JSON text `[[sentences, labels], ...]`, one pair per part, whatever the file format was."""
    content = [[part.sentences, part.labels.tolist()] for part in parts]
    return sha256(json.dumps(content).encode()).hexdigest()


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
