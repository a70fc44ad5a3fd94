"""Progress on the console."""

import dataclasses
import sys
import time
from collections.abc import Mapping

from blacksmith.errors import one_line


@dataclasses.dataclass
class Progress:
    """A live bar on a terminal, plain lines elsewhere."""

    total: int  # examples, or what `unit` says in the plural, of the whole run
    done: int = 0  # how many have been seen, also before a resume
    style: str = "auto"  # ``auto``, ``bar``, ``lines`` or ``off``
    every_seconds: float = 5.0  # between two plain lines
    unit: str = "examples"

    def __post_init__(self) -> None:
        style = self.style
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self._bar = None
        self._lines = style == "lines"
        self._first = self.done
        self._start = self._last = time.perf_counter()
        if style == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                unit="ex" if self.unit == "examples" else self.unit.removesuffix("s"),
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            )

    def update(self, done: int, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Shows that `done` examples have been seen, with the latest values."""
        advance, self.done = done - self.done, done
        shown = {k: f"{v:.4f}" if abs(v) < 100 else f"{v:,.0f}" for k, v in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(advance)
        now = time.perf_counter()
        if self._lines and now - self._last >= self.every_seconds:
            self._last = now
            parts = [f"step {step}", f"epoch {epoch:.2f}", *(f"{k} {v}" for k, v in shown.items())]
            if done > self._first:
                rate = (done - self._first) / max(now - self._start, 1e-9)
                speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
                parts += [f"{speed} {self.unit}/s", f"{(self.total - done) / rate:.0f} s left"]
            self.say("  ".join(parts))

    def start(self, done: int) -> None:
        """Makes the rate and the time left count from now on, when `done` examples have been seen."""
        self._first, self._start = done, time.perf_counter()
        if self._bar is not None:
            self.done = self._bar.n = self._bar.initial = self._bar.last_print_n = done
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
        line = one_line(line)
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
