"""The errors a user can cause, each with the exit status of the launcher.

The launcher prints their message, one readable line, without a traceback.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable

from blacksmith import console

# What an error shows at most, in characters; its beginning says where, and its end what to do.
LONGEST_LINE = 1000
LONGEST_VALUE = 200

_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)


class UserError(Exception):
    """Base of the errors that end a command with one line instead of a traceback."""

    exit_status = 2


class ConfigError(UserError):
    """A flag, a Gin file or a binding is wrong."""


class DataError(UserError):
    """A dataset is missing, corrupt or of the wrong kind."""

    exit_status = 3


class CheckpointError(UserError):
    """A checkpoint is missing, corrupt or does not fit the run."""

    exit_status = 3


class NotFinite(CheckpointError, DataError):
    """Outputs are not finite, because of the weights or of the data that they come from."""


class RunError(UserError):
    """The run cannot continue, for a reason outside the program: a full disk, a loss that is not finite."""

    exit_status = 1


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates the `main` of a command: a `UserError` becomes one line and its exit status.

    So does running out of memory. A console that fails is ignored.
    """

    @functools.wraps(main)
    def run(*arguments: object, **options: object) -> int:
        console.protect()
        try:
            return main(*arguments, **options)
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return error.exit_status
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            reason = one_line(f"{type(error).__name__}: {first_line(error)}")
            print(f"error: not enough memory or stack for this ({reason})", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("aborted", file=sys.stderr)
            return 130

    return run


def _lacks_memory(error: Exception) -> bool:
    """Whether memory or stack ran out; PyTorch and JAX say so in a `RuntimeError`."""
    return isinstance(error, (MemoryError, RecursionError)) or bool(_OUT_OF_MEMORY.search(str(error)))


def one_line(message: object) -> str:
    """A message as one line without control characters, long words and a long middle left out."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in str(message))
    return cut(" ".join(cut(word, LONGEST_VALUE) for word in text.split(" ")), LONGEST_LINE)


def note(message: object) -> None:
    """Prints one line on standard error, without control characters: it may name things from files."""
    print(one_line(message), file=sys.stderr)


def shown(value: object) -> str:
    """The `repr` of a user's value for an error message, a long middle left out."""
    return cut(repr(value), LONGEST_VALUE)


def cut(text: str, length: int) -> str:
    """`text` with its middle left out if it is longer than `length` characters."""
    return text if len(text) <= length else f"{text[: length * 2 // 3]} ... {text[-length // 3 :]}"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def closest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the name most similar to `name`, or an empty string."""
    by_lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.55)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""
