"""Reads labeled sentences from files, directories and the Hugging Face hub with the library `datasets`.

The library takes more than half a second to import, so it is imported on first use.
"""

import csv
import glob
import logging
import os
import re
import reprlib
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from blacksmith import network
from blacksmith.datasets.sst2.examples import Examples
from blacksmith.datasets.sst2.splits import Source
from blacksmith.errors import DataError

_SAMPLE = Path(__file__).with_name("sample.tsv")

# Readers of `datasets.Dataset` and their options. In GLUE's TSV a quote character is part of the sentence. By
# default, pandas would turn the sentence "null" into a missing value.
_CSV = {"keep_default_na": False}
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".tsv": ("from_csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".csv": ("from_csv", _CSV),
    ".json": ("from_json", {}),
    ".jsonl": ("from_json", {}),
    # Without a batch size, a file without rows is a division by zero.
    ".parquet": ("from_parquet", {"batch_size": 10_000}),
}

_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(\w[\w.-]*))?", re.ASCII)  # owner/name[:configuration]

_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read(source: str = "sample", *, sentence_column: str = "sentence", label_column: str = "label") -> Source:
    """Reads sentences with two classes.

    The test set is the source's `test` if it has labels, else its `validation` or `dev`, as in SST-2.
    Validation examples are always held out of the training examples.

    Args:
      source: "sample", which is 320 bundled sentences, 240 for training and 80 for testing; a file (tsv, csv,
        json, jsonl or parquet); a directory with such files `train` and `test`, `validation` or `dev`, as in
        GLUE; or a Hugging Face dataset id such as `stanfordnlp/sst2`, or `nyu-mll/glue:sst2` with a
        configuration, which is downloaded into the library's own cache.
      sentence_column: the column with the sentences.
      label_column: the column with the labels, 0 or 1.

    Raises:
      DataError: the source is unknown, missing or broken.
    """
    columns = (sentence_column, label_column)
    path = Path(os.path.expanduser(source)).absolute()
    if source == "sample":
        table = _read_file(_SAMPLE, (*columns, "split"))
        examples, splits = table.examples(*columns), np.array(table.columns["split"])
        train, test = (examples.take(np.flatnonzero(splits == name)) for name in ("train", "test"))
        return Source("sample", "sample", None, _SAMPLE.name, [], table.place, train, test)
    if os.path.isdir(path):
        tables = {split: _read_file(file, columns) for split, file in _find_splits(path).items()}
        return _choose_splits("directory", path.name, str(path), tables, columns)
    if os.path.isfile(path):
        table = _read_file(path, columns)
        examples = table.examples(*columns)
        return Source("file", path.stem, str(path), "the file", [], table.place, examples, None)
    if _HUB_ID.fullmatch(source) and path.suffix not in _FORMATS:
        return _choose_splits("hub", source, None, _read_hub(source, columns), columns)
    raise DataError(
        f"{source!r}: no such file or directory; allowed: 'sample', a directory, a file "
        f"({' '.join(_FORMATS)}) or a Hugging Face dataset id such as stanfordnlp/sst2"
    )


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows as read, not yet checked."""

    place: str  # the file, or dataset and split, for messages
    name: str  # of the file or split
    column_names: list[str]
    columns: dict[str, list[Any]]  # the values of those requested columns that exist

    @classmethod
    def of(cls, dataset: Any, place: str, name: str, columns: Sequence[str]) -> "_Table":
        values = {column: dataset[column][:] for column in columns if column in dataset.column_names}
        return cls(place, name, dataset.column_names, values)

    def has_labels(self, label_column: str) -> bool:
        # GLUE's test set has no such column, and on the hub it has -1 in all rows.
        labels = self.columns.get(label_column, [])
        return any(not _missing(label) and str(label).strip() != "-1" for label in labels)

    def examples(self, sentence_column: str, label_column: str) -> Examples:
        """Checks the rows and returns them as examples."""
        for setting, column in (("sentence_column", sentence_column), ("label_column", label_column)):
            if column not in self.columns:
                raise DataError(
                    f"{self.place}: no column {column!r}; there are: {', '.join(self.column_names)}; set "
                    f"{setting} to a column that all files have"
                )
        sentences, labels = [], []
        rows = zip(self.columns[sentence_column], self.columns[label_column])
        for row, (sentence, label) in enumerate(rows, 1):
            if _missing(sentence) or _missing(label):
                column = sentence_column if _missing(sentence) else label_column
                problem = f"column {column!r} is empty"
            elif not isinstance(sentence, str):
                problem = f"column {sentence_column!r} is {reprlib.repr(sentence)}, which is not text"
            elif str(label).strip() not in _LABELS:
                value = reprlib.repr(label)
                problem = f"column {label_column!r} is {value}; allowed: 0 (negative) and 1 (positive)"
            else:
                sentences.append(sentence.strip())
                labels.append(_LABELS[str(label).strip()])
                continue
            raise DataError(f"{self.place}, row {row}: {problem}")
        return Examples(tuple(sentences), np.array(labels, np.int32), np.arange(1, len(labels) + 1))


def _missing(value: Any) -> bool:
    return value is None or value != value or not str(value).strip()  # NaN is not equal to itself


def _find_splits(directory: Path) -> dict[str, Path]:
    """Returns the file of each split in a directory."""
    found: dict[str, Path] = {}
    for split in ("dev", "test", "train", "validation"):
        # The hub calls the only file of a split train-00000-of-00001.parquet.
        names = [stem + suffix for stem in (split, f"{split}-00000-of-00001") for suffix in _FORMATS]
        files = [directory / name for name in names if os.path.isfile(directory / name)]
        if len(files) > 1:
            raise DataError(f"{directory}: has both {files[0].name} and {files[1].name}; remove one of them")
        if files:
            found[split] = files[0]
    return found


def _choose_splits(
    source: str, name: str, path: str | None, tables: dict[str, _Table], columns: tuple[str, str]
) -> Source:
    """Chooses the test set among the tables `test`, `validation` and `dev`; `train` must be there."""
    place, there = path or name, f"there are: {', '.join(tables) or 'none'}"
    if "train" not in tables:
        raise DataError(f"{place}: no split train ({' '.join(_FORMATS)}); {there}")
    others = [split for split in ("validation", "dev") if split in tables]
    if "test" in tables and tables["test"].has_labels(columns[1]):
        others = ["test"]
    if len(others) > 1:
        raise DataError(f"{place}: has both validation and dev; remove the one not to test on")
    if not others:
        needs = f"needs test, validation or dev with a column {columns[1]!r}"
        raise DataError(f"{place}: no test data; {needs}; {there}")
    train, test = tables["train"], tables[others[0]]
    unused = [table.name for table in tables.values() if table not in (train, test)]
    examples = (train.examples(*columns), test.examples(*columns))
    return Source(source, name, path, test.name, unused, train.place, *examples)


def _read_file(path: Path, columns: Sequence[str]) -> _Table:
    if path.suffix not in _FORMATS:
        raise DataError(f"{path}: unknown format; allowed: {', '.join(_FORMATS)}")
    reader, options = _FORMATS[path.suffix]
    if reader == "from_csv":  # as text, because the sentence "1987" would become a number
        options = {**options, "converters": dict.fromkeys(columns, str)}
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty")
    try:
        # `datasets.load_dataset` does the same, but reports each use to the hub. The library always writes to
        # a cache; a temporary one leaves nothing behind.
        with _library() as library, tempfile.TemporaryDirectory() as cache:
            open_file = getattr(library.Dataset, reader)
            dataset = open_file(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True, **options)
            table = _Table.of(dataset, str(path), path.name, columns)
    except Exception as error:  # of pandas, pyarrow, the library itself and the file system
        reason = _reason(error)
        if reason.endswith("corresponds to no data!"):
            raise DataError(f"{path}: the file has no rows") from error
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from error
    # If all rows have more fields than the header, pandas makes the first column an index.
    if reader == "from_csv" and "__index_level_0__" in table.column_names:
        raise DataError(f"{path}: the rows have more fields than the header")
    return table


def _read_hub(source: str, columns: Sequence[str]) -> dict[str, _Table]:
    path, configuration = _HUB_ID.fullmatch(source).groups()
    with _library() as library:
        unreachable = "HF_HUB_OFFLINE is set"
        if not library.config.HF_HUB_OFFLINE:
            unreachable = network.why_unreachable(library.config.HF_ENDPOINT)
        # The library retries for minutes when the hub does not answer. Offline, it goes to its cache at once.
        library.config.HF_HUB_OFFLINE = unreachable is not None
        try:
            return {
                name: _Table.of(dataset, f"{source}, split {name}", name, columns)
                for name, dataset in library.load_dataset(path, configuration).items()
            }
        except Exception as error:  # of the library, its HTTP client, pyarrow and the file system
            reason = _reason(error)
            if unreachable is not None:
                # A connection error only means that the cache does not have it.
                reason = "not in the cache" if isinstance(error, ConnectionError) else reason
                reason += f", and the hub is unreachable: {unreachable}"
            raise DataError(
                f"{source}: no such file or directory, and cannot be loaded from the Hugging Face hub "
                f"({reason}); without a network, use a directory, a file or 'sample'"
            ) from error


@contextmanager
def _library() -> Iterator[ModuleType]:
    """Imports `datasets`, without progress bars and log messages; afterwards its settings are restored."""
    import datasets

    bars, offline = datasets.are_progress_bars_disabled(), datasets.config.HF_HUB_OFFLINE
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """The message of the original error, on one line: the library wraps errors in errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error), 300, placeholder=" ...").rstrip(".") or type(error).__name__
