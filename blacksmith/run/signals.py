"""Signals: a flag that the loop reads, and a thread that ends a process which does not answer them.

Only the main thread can handle signals: a run that is started from another one is not stopped by them.
"""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from blacksmith import console

STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, resumable
# A closed terminal sends SIGHUP, and Slurm SIGUSR1 on request.
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A run that has not ended this long after a signal is ended: it is in C code that does not return.
GRACE_SECONDS = 600.0
# The same signal again within this time is the same request: `timeout` and launchers send it twice.
AGAIN_SECONDS = 0.5

_run_began = False  # a run of this process listens, or has listened


def stop_at_once() -> None:
    """Until a run listens, a signal ends this process with status 75, even in C code; afterwards none does.

    For the start of the launcher: importing frameworks takes seconds, in which there is nothing to save. A
    signal that comes after the run has ended changes no exit status.
    """

    def stop(number: int) -> None:
        if not _run_began:
            console.write(f"\n{signal.Signals(number).name}: stopped before the run began\n")
            os._exit(STOPPED)

    console.protect()
    _Watch(stop)
    for number in _heard():
        signal.signal(number, _leave_to_watch)


class StopFlag:
    """True once one of `NUMBERS` has come; SIGTERM or SIGINT again interrupts at once.

    `promise` is printed at the first signal, such as "finishing this step"; `signal` is that signal's name.
    """

    def __init__(self, promise: str = "finishing this step and saving a checkpoint") -> None:
        self.signal: str | None = None
        self._promise = promise
        self._came: dict[int, float] = {}
        self._previous: dict[int, Any] = {}
        self._watch: _Watch | None = None
        self._deadline: threading.Timer | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopFlag":
        global _run_began
        console.protect()  # also of a run that no command started
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in _heard()}
            self.listen()
            self._watch = _Watch(self._start_deadline)
            _run_began = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._deadline is not None:
            self._deadline.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Installs the handlers, also again where a framework has replaced them by its own."""
        for number in self._previous:
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: object) -> None:
        now, first = time.monotonic(), self._came.get(number)
        quits = number in (signal.SIGINT, signal.SIGTERM)
        if first is not None:
            if quits and now - first >= AGAIN_SECONDS:
                raise KeyboardInterrupt
            return
        self._came[number] = now
        self.signal = signal.Signals(number).name
        again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
        hint = f" ({again} to quit at once)" if quits else ""
        # Not print: the signal may have come in the middle of one, and a stream is not re-entrant.
        console.write(f"\n{self.signal}: {self._promise}{hint}\n")

    def _start_deadline(self, number: int) -> None:
        if self._deadline is None:
            self._deadline = threading.Timer(GRACE_SECONDS, _end, [signal.Signals(number).name])
            self._deadline.daemon = True
            self._deadline.start()


class _Watch:
    """Calls a function with each of `NUMBERS` that comes, from a thread, whatever the main thread does."""

    def __init__(self, act: Callable[[int], None]) -> None:
        _register_at_fork()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, args=[act], daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, once it has seen all signals that came."""
        signal.set_wakeup_fd(self._previous)
        os.close(self._write)
        self._thread.join()

    def _run(self, act: Callable[[int], None]) -> None:
        while number := os.read(self._read, 1):
            if number[0] in NUMBERS:
                act(number[0])
        os.close(self._read)


@functools.cache
def _register_at_fork() -> None:
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """Gives a forked child, such as a worker that loads data, the defaults: its signals are not the run's."""
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        handler = signal.getsignal(number)
        if getattr(handler, "__func__", handler) in (StopFlag._set, _leave_to_watch):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


def _heard() -> list[int]:
    """The signals to handle: not SIGHUP where `nohup` has switched it off."""
    return [n for n in NUMBERS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def _leave_to_watch(_number: int, _frame: object) -> None:
    """Takes the place of the default, which would end the process or raise KeyboardInterrupt."""


def _end(name: str) -> None:
    console.write(
        f"\n{name}: the run has not ended in {GRACE_SECONDS:.0f} s; aborted, its checkpoints are intact\n"
    )
    os._exit(STOPPED)
