"""Sentences from the Hugging Face hub, or from the library's cache when the hub cannot be reached."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from blacksmith import assets
from blacksmith.datasets.sst2 import library
from blacksmith.datasets.sst2.examples import Table
from blacksmith.errors import DataError

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(\w[\w.-]*))?", re.ASCII)


def is_id(source: str) -> bool:
    """Whether this has the form of an id, `owner/name`, or `owner/name:configuration`."""
    return _ID.fullmatch(source) is not None


def load(source: str, columns: Sequence[str]) -> dict[str, Table]:
    """The splits of a dataset by name, with the values of `columns`.

    The dataset is downloaded into the library's own cache (`HF_HOME`). If the hub does not answer within a
    few seconds, or `HF_HUB_OFFLINE` is set, it is taken from there.

    Args:
      source: an id for which `is_id` holds.
      columns: names of the columns wanted.

    Raises:
      DataError: the dataset does not exist or cannot be loaded, or it is neither in reach nor in the cache.
    """
    path, configuration = _ID.fullmatch(source).groups()
    with library.opened() as datasets:
        if datasets.config.HF_HUB_OFFLINE:
            unreachable = "HF_HUB_OFFLINE is set"
        else:
            unreachable = assets.why_unreachable(datasets.config.HF_ENDPOINT)
        try:
            with _offline(datasets, unreachable is not None):
                splits = datasets.load_dataset(path, configuration)
            return {
                name: library.table(split, f"{source}, split {name}", columns)
                for name, split in splits.items()
            }
        except Exception as error:  # of the library, its HTTP client, pyarrow and the file system
            if unreachable is None:
                raise DataError(
                    f"{source}: cannot be loaded from the Hugging Face hub ({library.reason(error)})"
                ) from error
            # A connection error only says that the cache does not have it.
            detail = "" if isinstance(error, ConnectionError) else f" ({library.reason(error)})"
            raise DataError(
                f"{source}: no such file or directory here, and as a Hugging Face dataset it is not in the "
                f"cache{detail} and cannot be downloaded ({unreachable}); without a network, name a "
                "directory, a file or 'sample'"
            ) from error


@contextmanager
def _offline(datasets: ModuleType, offline: bool) -> Iterator[None]:
    """Sends the library to its cache at once; it would retry a hub that does not answer, for minutes."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
