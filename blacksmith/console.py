"""A console that may fail: closed, full or gone, it never ends a command and never changes its exit status.

Every command starts with `protect`, through `errors.one_line_errors`, and so does every run.
"""

import contextlib
import io
import os
import select
import sys


def protect() -> None:
    """From now on what is printed to a standard stream that fails is dropped.

    Replaces this process's `sys.stdout` and `sys.stderr`, unless somebody else has already done so, and opens
    standard descriptors that are closed on /dev/null. Else the next file that is opened, a checkpoint for
    example, would take the number of standard error, and C code would print into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _silence(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(stream, _Text):
            continue
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        setattr(sys, name, _text(descriptor, name, stream))
        setattr(sys, f"__{name}__", getattr(sys, name))


def write(text: str) -> None:
    """Writes to standard error from a signal handler or a thread, where a stream may not be used."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


class _Raw(io.FileIO):
    """A descriptor whose output goes to /dev/null once it fails: for C code and child processes, too."""

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                count = super().write(view[done:])
                if count is None:  # it does not block and is full: wait, as for any other console
                    select.select([], [self], [])
            except OSError:
                _silence(self.fileno())
                break
            done += count or 0
        return len(view)


class _Text(io.TextIOWrapper):
    """A standard stream that is protected."""


def _text(descriptor: int, name: str, like: io.TextIOWrapper | None) -> _Text:
    """A text stream on `descriptor` with the settings of the stream that it replaces."""
    raw = _Raw(descriptor, "w", closefd=False)
    raw.name = f"<{name}>"
    direct = like is not None and like.write_through  # python -u
    return _Text(
        raw if direct else io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",  # a character that the console lacks must not end a run either
        line_buffering=like is None or like.line_buffering,
        write_through=direct,
    )


def _silence(descriptor: int) -> None:
    """Puts /dev/null in the place of a descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
