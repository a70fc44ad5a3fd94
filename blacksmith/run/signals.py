"""Signals as a flag that the loop reads."""

import os
import signal
from typing import Any


class StopFlag:
    """Turns SIGTERM and SIGINT into a flag that the loop reads; the same signal again interrupts at once.

    Args:
      promise: what the user is told that happens now.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, promise: str = "finishing the step and saving") -> None:
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
        """Puts the handlers in place, also again where a framework has put its own over them."""
        for number in self._NUMBERS:
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one, and a stream is not re-entrant.
        os.write(2, f"\n{self.signal}: {self._promise}; again to abort\n".encode())
        signal.signal(number, signal.default_int_handler)
