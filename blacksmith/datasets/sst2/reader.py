"""Reads labeled sentences from files, directories and the Hugging Face hub with the library `datasets`.

The library takes more than half a second to import, so it is imported on first use.
"""

import csv
import glob
import json
import logging
import os
import re
import reprlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from blacksmith import network
from blacksmith.datasets.sst2.splits import Examples, Source
from blacksmith.errors import DataError, first_line

_SAMPLE = Path(__file__).with_name("sample.tsv")

# What is read at most: a few megabytes of compressed Parquet can hold billions of rows, or one long text a
# million times.
_MOST_ROWS = 5_000_000  # of Parquet
_MOST_BYTES = 1 << 30
_MOST_COLUMNS = 1000  # of text formats, where the library takes memory for each column of each row

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

_SPACE = re.compile(r"\s*")

_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read(source: str = "sample", *, sentence_column: str = "sentence", label_column: str = "label") -> Source:
    """Reads sentences with two classes.

    The test set is the source's `test` if it has labels, else its `validation` or `dev`, as in SST-2.
    Validation examples are always held out of the training examples.

    Args:
      source: "sample", the bundled sentences; a file (tsv, csv, json, jsonl or parquet); a directory with
        such files `train` and `test`, `validation` or `dev`, as in GLUE; or a Hugging Face dataset id such as
        `stanfordnlp/sst2`, or `nyu-mll/glue:sst2` with a configuration, which is downloaded on first use.

    Raises:
      DataError: the source is unknown, missing or broken.
    """
    columns = (sentence_column, label_column)
    path = Path(os.path.expanduser(source)).absolute()
    if source == "sample":
        table = _read_file(_SAMPLE, columns)
        examples, splits = table.examples(*columns), np.array(table.rows["split"][:])
        train, test = (examples.take(np.flatnonzero(splits == name)) for name in ("train", "test"))
        return Source("sample", "sample", None, _SAMPLE.name, [], train, test)
    if os.path.isdir(path):
        tables = {split: _read_file(file, columns) for split, file in _find_splits(path).items()}
        return _choose_splits("directory", path.name, str(path), tables, columns)
    if os.path.isfile(path):
        examples = _read_file(path, columns).examples(*columns)
        return Source("file", path.stem, str(path), "the file", [], examples, None)
    if _HUB_ID.fullmatch(source) and path.suffix not in _FORMATS:
        return _choose_splits("hub", source, None, _read_hub(source), columns)
    raise DataError(
        f"{source!r}: no such file or directory; allowed: 'sample', a directory, a file "
        f"({' '.join(_FORMATS)}) or a Hugging Face dataset id such as stanfordnlp/sst2"
    )


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows as read, not yet checked."""

    place: str  # the file, or dataset and split, for messages
    name: str  # of the file or split
    rows: Any  # a `datasets.Dataset`

    def has_labels(self, label_column: str) -> bool:
        # GLUE's test set has no such column, and on the hub it has -1 in all rows.
        labels = self.rows[label_column][:] if label_column in self.rows.column_names else []
        return any(str(label).strip() not in ("", "-1", "None", "nan") for label in labels)

    def examples(self, sentence_column: str, label_column: str) -> Examples:
        """Checks the rows and returns them as examples."""
        names = self.rows.column_names
        for setting, column in (("sentence_column", sentence_column), ("label_column", label_column)):
            if column not in names:
                raise DataError(
                    f"{self.place}: no column {column!r}; there are: {', '.join(names)}; set {setting} to a "
                    "column that all files have"
                )
        sentences, labels = self.rows[sentence_column][:], self.rows[label_column][:]
        for row, (sentence, label) in enumerate(zip(sentences, labels), 1):
            if not isinstance(sentence, str) or not sentence.strip() or str(label).strip() not in _LABELS:
                raise DataError(
                    f"{self.place}, row {row}: {sentence_column} = {reprlib.repr(sentence)}, "
                    f"{label_column} = {reprlib.repr(label)}; needed: text, and 0 (negative) or 1 (positive)"
                )
        numbers = [_LABELS[str(label).strip()] for label in labels]
        stripped = tuple(sentence.strip() for sentence in sentences)
        return Examples(stripped, np.array(numbers, np.int32), np.arange(1, len(numbers) + 1))


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
    if "test" in tables and tables["test"].has_labels(columns[1]):
        tests = ["test"]
    else:
        tests = [split for split in ("validation", "dev") if split in tables]
    if "train" not in tables or len(tests) != 1:
        raise DataError(
            f"{path or name}: needs train, and one test set: test with a column {columns[1]!r}, or else "
            f"validation or dev ({' '.join(_FORMATS)}); there are: {', '.join(tables) or 'none'}"
        )
    train, test = tables["train"], tables[tests[0]]
    unused = [table.name for table in tables.values() if table not in (train, test)]
    return Source(source, name, path, test.name, unused, train.examples(*columns), test.examples(*columns))


def _read_file(path: Path, columns: Sequence[str]) -> _Table:
    if path.suffix not in _FORMATS:
        raise DataError(f"{path}: unknown format; allowed: {', '.join(_FORMATS)}")
    reader, options = _FORMATS[path.suffix]
    if reader == "from_csv":  # as text, because the sentence "1987" would become a number
        options = {**options, "converters": dict.fromkeys(columns, str)}
    try:
        _check_size(path.stat().st_size)
        if reader == "from_csv":
            _check_header(path, columns, options)
        elif reader == "from_parquet":
            _check_parquet(path, columns)
        else:
            _check_json(path)
        # `datasets.load_dataset` does the same, but reports each use to the hub. The library always writes to
        # a cache; a temporary one leaves nothing behind.
        with _library() as library, tempfile.TemporaryDirectory() as cache:
            open_file = getattr(library.Dataset, reader)
            rows = open_file(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:  # of pandas, pyarrow, the library itself and the file system
        reason = first_line(error.__cause__ or error)
        raise DataError(f"{path}: no rows, or cannot be read as {path.suffix[1:]} ({reason})") from error
    # If all rows have more fields than the header, pandas makes the first column an index.
    if reader == "from_csv" and "__index_level_0__" in rows.column_names:
        raise DataError(f"{path}: the rows have more fields than the header")
    return _Table(str(path), path.name, rows)


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes of text")


def _check_header(path: Path, columns: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises ValueError for a header with too many columns, or with one of `columns` twice."""
    quoting = options.get("quoting", csv.QUOTE_MINIMAL)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, delimiter=options.get("sep", ","), quoting=quoting)
        header = next((row for row in rows if "".join(row).strip()), [])
    if len(header) > _MOST_COLUMNS:
        raise ValueError(f"more than {_MOST_COLUMNS:,} columns")
    if twice := [column for column in columns if header.count(column) > 1]:
        raise ValueError(f"the header has {twice[0]!r} twice")


def _check_parquet(path: Path, columns: Sequence[str]) -> None:
    """Raises ValueError for a file whose few bytes stand for too many rows or too much text."""
    import pyarrow.compute
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    if metadata.num_rows > _MOST_ROWS:
        raise ValueError(f"more than {_MOST_ROWS:,} rows")
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    _check_size(sum(group.total_byte_size for group in groups))
    names = [column for column in columns if column in metadata.schema.to_arrow_schema().names]
    size = 0
    # A repeated text is stored once. Read as a dictionary it stays so until its size is known.
    with pyarrow.parquet.ParquetFile(path, read_dictionary=names) as file:
        for batch in file.iter_batches(10_000, columns=names):
            for array in batch.columns:
                if isinstance(array, pyarrow.DictionaryArray):
                    lengths = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
                    size += pyarrow.compute.sum(lengths).as_py() or 0
                    _check_size(size)


def _check_json(path: Path) -> None:
    """Raises an exception for JSON that is broken, or nested so deeply that pyarrow would crash."""
    text, decoder = path.read_text("utf-8-sig"), json.JSONDecoder(object_pairs_hook=_unique)
    position, columns = _SPACE.match(text).end(), set()
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        for row in value if isinstance(value, list) else [value]:
            columns.update(row if isinstance(row, dict) else ())
        if len(columns) > _MOST_COLUMNS:
            raise ValueError(f"more than {_MOST_COLUMNS:,} columns")
        position = _SPACE.match(text, position).end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _read_hub(source: str) -> dict[str, _Table]:
    path, configuration = _HUB_ID.fullmatch(source).groups()
    with _library() as library:
        unreachable = "HF_HUB_OFFLINE is set"
        if not library.config.HF_HUB_OFFLINE:
            unreachable = network.why_unreachable(library.config.HF_ENDPOINT)
        # The library retries for minutes when the hub does not answer. Offline, it goes to its cache at once.
        library.config.HF_HUB_OFFLINE = unreachable is not None
        try:
            splits = library.load_dataset(path, configuration)
        except Exception as error:  # of the library, its HTTP client, pyarrow and the file system
            offline = f"; the hub is unreachable: {unreachable}" if unreachable else ""
            raise DataError(
                f"{source}: no such file or directory, and cannot be loaded from the Hugging Face hub "
                f"({first_line(error)}{offline}); without a network, use a directory, a file or 'sample'"
            ) from error
    return {name: _Table(f"{source}, split {name}", name, rows) for name, rows in splits.items()}


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
