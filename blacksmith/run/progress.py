"""Progress on the console."""

import sys
import time
from collections.abc import Mapping


class Progress:
    """A live bar on a terminal, plain lines elsewhere.

    Args:
      total: examples, or what `unit` says in the plural, of the whole run.
      done: how many have been seen already (a resumed run).
      style: ``auto``, ``bar``, ``lines`` or ``off``.
      every_seconds: how often plain lines appear.
      unit: what is counted.
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
        """Shows that `done` examples have been seen, with the latest values."""
        advance, self._done = done - self._done, done
        shown = {k: f"{v:.4f}" if abs(v) < 100 else f"{v:,.0f}" for k, v in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(advance)
        now = time.perf_counter()
        if self._lines and now - self._last >= self._every:
            self._last = now
            parts = [f"step {step}", f"epoch {epoch:.2f}", *(f"{k} {v}" for k, v in shown.items())]
            if done > self._first:
                rate = (done - self._first) / max(now - self._start, 1e-9)
                speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
                parts += [f"{speed} {self._unit}/s", f"{(self._total - done) / rate:.0f} s left"]
            self.say("  ".join(parts))

    def start(self, done: int) -> None:
        """Makes the rate and the time left count from now on, when `done` examples have been seen."""
        self._first, self._start = done, time.perf_counter()
        if self._bar is not None:
            self._done = self._bar.n = self._bar.initial = self._bar.last_print_n = done
            self._bar.start_t = self._bar.last_print_t = time.time()

    def exclude(self, seconds: float) -> None:
        """Excludes the last `seconds`, in which nothing was trained, from the rate and the time left."""
        self._start += seconds
        if self._bar is not None:
            # Not tqdm's unpause(): it excludes all the time since the bar was last drawn.
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

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
