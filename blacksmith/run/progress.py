"""Progress on the console."""

import sys
import time
from collections.abc import Mapping


class Progress:
    """Progress on the console: a live bar on a terminal, plain lines elsewhere.

    Args:
      total: samples, or what `unit` says, of the whole run.
      done: those already seen (a resumed run).
      style: ``auto``, ``bar``, ``lines`` or ``off``.
      every_seconds: how often plain lines appear.
      unit: what is counted, in the plural.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        style: str = "auto",
        every_seconds: float = 5.0,
        unit: str = "examples",
    ) -> None:
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self._bar = None
        self._lines = style == "lines"
        self._every, self._unit = every_seconds, unit
        self._total, self._done, self._first = total, done, done
        self._start = self._last = time.perf_counter()
        if style == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                unit="ex" if unit == "examples" else unit.removesuffix("s"),
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            )

    def update(self, done: int, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Shows that `done` samples have been seen, with the latest values."""
        advance, self._done = done - self._done, done
        shown = {k: f"{v:.4f}" if abs(v) < 100 else f"{v:,.0f}" for k, v in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(advance)
        now = time.perf_counter()
        if self._lines and now - self._last >= self._every:
            self._last = now
            rate = (done - self._first) / max(now - self._start, 1e-9)
            left = (self._total - done) / max(rate, 1e-9)
            numbers = "  ".join(f"{k} {v}" for k, v in shown.items())
            speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            self.say(f"step {step}  epoch {epoch:.2f}  {numbers}  {speed} {self._unit}/s  {left:.0f} s left")

    def leave_out(self, seconds: float) -> None:
        """Leaves out of the rate the last so many seconds, in which nothing was trained."""
        self._start += seconds
        if self._bar is not None:
            self._bar.unpause()

    def say(self, line: str) -> None:
        """Prints one line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
