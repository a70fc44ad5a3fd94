"""Signals as a flag that the loop reads."""

import os
import signal
from typing import Any


class StopFlag:
    """True once SIGTERM or SIGINT has come; the same signal again interrupts at once.

    `promise` says on the console what the run does about the first signal, whose name is in `signal`.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, promise: str = "finishing this step and saving a checkpoint") -> None:
        self.signal: str | None = None
        self._promise = promise
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopFlag":
        self._previous = {number: signal.getsignal(number) for number in self._NUMBERS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Installs the handlers, also again where a framework has replaced them by its own."""
        for number in self._NUMBERS:
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number).name
        again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
        # A plain write, not print: the signal may have come in the middle of a print, and a stream is not
        # re-entrant.
        os.write(2, f"\n{self.signal}: {self._promise} ({again} to quit at once)\n".encode())
        signal.signal(number, signal.default_int_handler)
