"""The Hugging Face library `datasets`: imported when it is needed, kept quiet, its errors made one line.

It takes more than half a second to import, so nothing here imports it before `opened` is entered.
"""

import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from blacksmith.datasets.sst2.examples import Table
from blacksmith.errors import DataError

if TYPE_CHECKING:
    import datasets


@contextmanager
def opened() -> Iterator[ModuleType]:
    """Gives the library, without its progress bars and its log, both of which are as before afterwards.

    Raises:
      DataError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading sentences needs a package that is not installed ({error}); run pip install '.[llama]'"
        ) from error
    log = datasets.logging
    bars, verbosity = datasets.are_progress_bars_disabled(), log.get_verbosity()
    datasets.disable_progress_bars()
    log.set_verbosity(logging.CRITICAL)
    try:
        yield datasets
    finally:
        log.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def table(dataset: "datasets.Dataset", place: str, columns: Sequence[str]) -> Table:
    """The rows of a dataset; only the values of `columns` are taken."""
    names = tuple(dataset.column_names)
    return Table(place, names, {name: dataset[name][:] for name in columns if name in names})


def reason(error: BaseException) -> str:
    """What the error that began it says, on one line; the library wraps one in another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error), 300, placeholder=" ...").rstrip(".") or type(error).__name__
