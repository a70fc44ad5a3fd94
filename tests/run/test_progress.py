"""Progress on the console: plain lines, or a bar on a terminal."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time

import pytest

from blacksmith.run.progress import Progress

VALUES = {"loss": 0.5, "accuracy": 0.25, "val_loss": 1.75}
SHOWN = "loss 0.5000  accuracy 0.2500  val_loss 1.7500"


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


# Lines


def test_lines_show_values_rate_and_time_left(clock, capsys):
    progress = Progress(10_000, 1000, "lines", every_seconds=1)
    for done, step, epoch in ((3000, 20, 0.5), (6000, 50, 1.25)):
        clock.now += 2
        progress.update(done, step, epoch, VALUES)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        f"step 20  epoch 0.50  {SHOWN}  1,000 examples/s  7 s left",
        f"step 50  epoch 1.25  {SHOWN}  1,250 examples/s  3 s left",
    ]


def test_lines_leave_out_what_came_before_start_and_is_excluded(clock, capsys):
    progress = Progress(10_000, 0, "lines", every_seconds=1, unit="rays")
    clock.now += 1000
    progress.start(500)
    for _ in range(3):
        clock.now += 60
        progress.exclude(60)
    clock.now += 2
    progress.update(2500, 20, 0.5, {"gradient_norm": 165.25})
    assert capsys.readouterr().err == "step 20  epoch 0.50  gradient_norm 165  1,000 rays/s  8 s left\n"


def test_lines_do_not_come_more_often_than_asked(clock, capsys):
    progress = Progress(100, 0, "lines", every_seconds=5)
    for step, seconds in enumerate((1, 3.9, 0.2, 0.9, 4.2), 1):
        clock.now += seconds
        progress.update(step, step, 0.0, VALUES)
    assert re.findall(r"step (\d+)", capsys.readouterr().err) == ["3", "5"]


@pytest.mark.parametrize(("style", "shown"), [("off", ""), ("auto", f"step 5  epoch 0.50  {SHOWN}")])
def test_off_shows_nothing_and_auto_lines_without_a_terminal(capsys, style, shown):
    progress = Progress(100, 0, style, every_seconds=0)
    progress.update(50, 5, 0.5, VALUES)
    progress.close()
    printed = capsys.readouterr().err
    assert printed.startswith(shown)
    assert bool(printed) == bool(shown)


# The bar


def _on_a_terminal(monkeypatch, show):
    """The lines that `show()` draws on a terminal of 80 columns."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    written = bytearray()

    def read():
        with contextlib.suppress(OSError):  # Linux's end of a terminal
            while part := os.read(terminal, 4096):
                written.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        show()
    reader.join()
    os.close(terminal)
    return [line.strip() for line in re.split(r"[\r\n]+", written.decode().strip())]


def test_auto_shows_a_bar_on_a_terminal(monkeypatch, clock):
    def show():
        progress = Progress(60_000, 6000, "auto")
        clock.now += 2
        progress.update(24_000, 20, 0.5, VALUES)
        progress.close()

    shown = _on_a_terminal(monkeypatch, show)
    assert all(len(line) <= 80 for line in shown)
    assert shown[0].startswith("10%|")
    assert "6.00k/60.0k" in shown[0]
    last = r"40%\|.*\| 24\.0k/60\.0k \[00:02<00:04, 9\.00kex/s, loss=0\.5000, acc"
    assert re.match(last, shown[-1])


def test_a_line_between_does_not_tear_the_bar(monkeypatch):
    def show():
        progress = Progress(100, 0, "bar")
        progress.update(50, 5, 0.5, {"loss": 0.5})
        progress.say("checkpoint written")
        progress.close()

    assert "checkpoint written" in _on_a_terminal(monkeypatch, show)


def test_the_bar_advances_and_counts_only_training(monkeypatch, clock):
    """As the loop calls it: a slow first step, then short steps and pauses, now and then a long one."""

    def show():
        progress = Progress(1000, 0, "bar")
        clock.now += 300
        progress.start(10)
        for step in range(1, 100):
            pause = 60 if step % 30 == 0 else 0.001
            clock.now += pause
            progress.exclude(pause)
            clock.now += 0.05
            progress.update(10 * (step + 1), step + 1, 0.0, {})
        progress.close()

    shown = _on_a_terminal(monkeypatch, show)
    # 99 steps of 10 examples took 0.05 s each; a bar is drawn about every 0.1 s.
    assert len(shown) > 20
    rates = [float(rate) for line in shown[3:] for rate in re.findall(r"([\d.]+)ex/s", line)]
    assert rates == pytest.approx([200] * len(rates), rel=0.05)
    assert "1.00k/1.00k [00:04<00:00" in shown[-1]
