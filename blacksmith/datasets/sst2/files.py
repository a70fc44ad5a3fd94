"""Sentences from files: tsv, csv, json, jsonl or parquet, one of them or a directory of them.

Reading leaves nothing behind: the library's cache is a temporary directory.
"""

import csv
import glob
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blacksmith.datasets.sst2 import library
from blacksmith.datasets.sst2.examples import Table
from blacksmith.errors import DataError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".tsv", ".csv", ".json", ".jsonl", ".parquet")

# The second part is how the hub names the only file of a split.
_SPLIT = re.compile(r"(train|validation|dev|test)(-00000-of-00001)?")


def find(directory: Path) -> dict[str, Path]:
    """The files of a directory that are a split, by its name: `train`, `validation`, `dev` or `test`.

    Raises:
      DataError: the directory cannot be read, or has no or two files of a split.
    """
    try:
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"{directory}: cannot be read ({error.strerror})") from error
    found: dict[str, Path] = {}
    for path in map(directory.joinpath, names):
        match = _SPLIT.fullmatch(path.stem)
        if match is None or path.suffix not in SUFFIXES:
            continue
        if (other := found.setdefault(match[1], path)) is not path:
            raise DataError(f"{directory}: {other.name} and {path.name} are both there; remove one of them")
    if "train" not in found:
        raise DataError(
            f"{directory}: no training file; needed is train with one of {' '.join(SUFFIXES)}, and there "
            f"{'are: ' + ', '.join(names[:10]) if names else 'is no file at all'}"
        )
    return found


def read(path: Path, columns: Sequence[str]) -> Table:
    """The rows of a file, with the values of `columns`.

    A tsv file has no quoting, as in GLUE: a quote character is part of the sentence.

    Raises:
      DataError: the file is empty, broken, not UTF-8, or of another format than its suffix says.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown format; allowed: {', '.join(SUFFIXES)}")
    try:
        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty")
        with library.opened() as datasets, tempfile.TemporaryDirectory() as cache:
            table = library.table(_dataset(datasets.Dataset, path, columns, cache), str(path), columns)
    except DataError:
        raise
    except Exception as error:  # of pandas, pyarrow, the library itself and the file system
        reason = library.reason(error)
        if reason.endswith("corresponds to no data!"):
            raise DataError(f"{path}: the file has no rows") from error
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from error
    # Pandas makes an index of the first column when rows have more fields than the header.
    if path.suffix in (".tsv", ".csv") and "__index_level_0__" in table.column_names:
        raise DataError(f"{path}: the rows have more fields than the header")
    return table


def _dataset(reader: "type[datasets.Dataset]", path: Path, columns: Sequence[str], cache: str) -> Any:
    # `datasets.load_dataset` would do the same, but reports every use to the hub.
    pattern = glob.escape(str(path))
    options = {"cache_dir": cache, "keep_in_memory": True}
    if path.suffix == ".parquet":
        # Without a batch size, a file without rows is an error of its own.
        return reader.from_parquet(pattern, batch_size=10_000, **options)
    if path.suffix in (".json", ".jsonl"):
        return reader.from_json(pattern, **options)
    if path.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    # As text, or the sentence "1987" would be a number and the sentence "null" would be missing.
    options |= {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
    return reader.from_csv(pattern, **options)
