"""The errors a user can cause, each with the exit status of the launcher.

The launcher prints their message, one readable line, without a traceback.
"""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


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


class RunError(UserError):
    """The run cannot continue, for a reason outside the program: a full disk, a loss that is not finite."""

    exit_status = 1


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates the `main` of a command: a `UserError` becomes one line and its exit status."""

    @functools.wraps(main)
    def run(*arguments: object, **options: object) -> int:
        try:
            return main(*arguments, **options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status
        except KeyboardInterrupt:
            print("aborted", file=sys.stderr)
            return 130

    return run


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def closest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the name most similar to `name`, or an empty string."""
    by_lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.55)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""
