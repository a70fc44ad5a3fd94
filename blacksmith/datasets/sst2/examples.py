"""Sentences with their labels, checked row by row: what every source of `sst2` ends in.

A source gives a `Table`, in which anything may stand; `checked` makes `Examples` of it or says which row is
wrong.
"""

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from blacksmith.errors import DataError

CLASSES = ("negative", "positive")
"""What the labels 0 and 1 mean."""

_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


@dataclass(frozen=True, eq=False)
class Examples:
    """Sentences with a sentiment.

    Attributes:
      sentences: without white space around them.
      labels: 0 negative, 1 positive: int32 [examples].
      numbers: of their rows in what they were read from, counted from 1, without a header and without blank
        lines: int64 [examples].
    """

    sentences: tuple[str, ...]
    labels: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Sequence[int]) -> "Examples":
        """The examples of these rows, in this order."""
        rows = list(rows)
        return Examples(tuple(self.sentences[row] for row in rows), self.labels[rows], self.numbers[rows])

    def class_counts(self) -> dict[str, int]:
        """How many examples each of `CLASSES` has."""
        return {name: int((self.labels == label).sum()) for label, name in enumerate(CLASSES)}


@dataclass(frozen=True, eq=False)
class Table:
    """Rows as they were read.

    Attributes:
      place: a file, or a split of a dataset; for messages.
      column_names: of all columns.
      columns: the values of those that were asked for and are there.
    """

    place: str
    column_names: tuple[str, ...]
    columns: dict[str, list[Any]]

    def has_labels(self, label_column: str) -> bool:
        """Whether any row is labelled: the test set of GLUE has no labels, on the hub they are -1."""
        labels = self.columns.get(label_column, [])
        return any(not _missing(label) and str(label).strip() != "-1" for label in labels)


def checked(table: Table, sentence_column: str, label_column: str) -> Examples:
    """The rows as examples, in their order.

    Raises:
      DataError: a column is missing, or a row has no sentence or no label of 0 or 1; rows are counted from 1,
        without a header and without blank lines.
    """
    for setting, column in (("sentence_column", sentence_column), ("label_column", label_column)):
        if column not in table.columns:
            raise DataError(
                f"{table.place}: no column {column!r}; there are: {', '.join(table.column_names)}; name one "
                f"of them as {setting}"
            )
    sentences, labels = [], []
    rows = zip(table.columns[sentence_column], table.columns[label_column])
    for row, (sentence, label) in enumerate(rows, 1):
        try:
            sentences.append(_sentence(sentence))
            labels.append(_label(label))
        except ValueError as error:
            raise DataError(f"{table.place}, row {row}: {error}") from error
    return Examples(tuple(sentences), np.array(labels, np.int32), np.arange(1, len(labels) + 1))


def content_sha256(*parts: Examples) -> str:
    """The hash of sentences and labels in their order, whatever files they came from.

    It is that of the JSON text `[[sentences, labels], ...]`, one pair for each part, as Python's `json.dumps`
    writes it.
    """
    content = [[part.sentences, part.labels.tolist()] for part in parts]
    return sha256(json.dumps(content).encode()).hexdigest()


def _missing(value: Any) -> bool:
    return value is None or value == "" or value != value  # the last: not a number


def _sentence(value: Any) -> str:
    if _missing(value):
        raise ValueError("no sentence")
    if not isinstance(value, str):
        raise ValueError(f"sentence {reprlib.repr(value)} is not text")
    if not (sentence := value.strip()):
        raise ValueError("the sentence is empty")
    return sentence


def _label(value: Any) -> int:
    if _missing(value):
        raise ValueError("no label")
    label = _LABELS.get(str(value).strip())
    if label is None:
        raise ValueError(f"label {reprlib.repr(value)}; allowed: 0 (negative) and 1 (positive)")
    return label
