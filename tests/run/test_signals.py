"""Signals and consoles that fail: work is saved, and the exit status is right."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from numpy_toy import Toy, result_of, train

from blacksmith.run import signals

# A run of the toy under the command's own frame. `MOMENT` is called once, in the third step.
RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from blacksmith.errors import one_line_errors
from numpy_toy import train
calls = []
def at():
    calls.append(1)
    print("in a step", flush=True)
    print("in a step", file=sys.stderr)
    os.write(1, b"from C") if {c_code} else None
    if len(calls) == 3:
        {moment}
@one_line_errors
def main():
    return train(Path({directory!r}), "Log.progress = 'lines'", at=at).status
sys.exit(main())
"""
OUTPUTS = {
    "no pipe reader": "2>&1 | true",
    "only standard output": "| true",
    "a full device": "> /dev/full 2> /dev/full",
    "closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "unbuffered": "2>&1 | true",
}


def _run(directory, output="", moment="pass", c_code=False, before=""):
    """The status of a run whose console is redirected by the shell."""
    tests = str(Path(__file__).parent)
    script = RUN.format(tests=tests, directory=str(directory), moment=moment, c_code=c_code)
    command = f'{before} "$PYTHON" -c "$SCRIPT" {output}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHON": sys.executable, "SCRIPT": script}
    return subprocess.run(["bash", "-c", command], env=environment, timeout=60).returncode


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_console_that_fails_changes_nothing(tmp_path, monkeypatch, case):
    if case == "unbuffered":
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    run = tmp_path / "run"
    stop = "os.kill(os.getpid(), signal.SIGINT)"
    assert _run(run, OUTPUTS[case], stop, c_code="closed" not in case) == 75
    assert result_of(run)["status"] == "stopped"
    assert (run / "checkpoints" / f"step_{result_of(run)['step']:08d}").is_dir()
    assert _run(run, OUTPUTS[case]) == 0
    assert result_of(run)["test"]["loss"] > 0
    # Nothing that was printed went into a file that took the number of a closed descriptor.
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_character_that_the_console_lacks_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert _run(tmp_path / "run", moment='print("→ \\ud800")') == 0


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_every_signal_that_ends_jobs_saves_first(tmp_path, number):
    def stop():
        signal.raise_signal(number)

    run = tmp_path / "run"
    assert train(run, at=stop).status == 75
    assert result_of(run)["status"] == "stopped"
    assert len(list((run / "checkpoints").glob("step_*"))) == 1


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    moment = "os.kill(os.getpid(), signal.SIGHUP)"
    assert _run(tmp_path / "run", "> /dev/null", moment, before="nohup") == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_in_a_moment_is_one(tmp_path, number):
    """`timeout` signals its child and then the group of both; a shell passes SIGHUP on."""

    def stop():
        signal.raise_signal(number)
        signal.raise_signal(number)

    assert train(tmp_path / "run", at=stop).status == 75


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_schedulers_may_repeat_their_signals(tmp_path, monkeypatch, number):
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0)

    def stop():
        signal.raise_signal(number)
        signal.raise_signal(number)

    assert train(tmp_path / "run", at=stop).status == 75


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    before = [signal.getsignal(number) for number in signals.NUMBERS]
    seen, statuses = [], []

    class Listening(Toy):
        def step(self, step):
            self.run.stop.listen()  # as Lightning's hooks do
            seen.append([signal.getsignal(number) for number in signals.NUMBERS])
            return super().step(step)

    thread = threading.Thread(
        target=lambda: statuses.append(train(tmp_path / "run", "toy.Train.steps = 2", toy=Listening).status)
    )
    thread.start()
    thread.join()
    assert statuses == [0]
    assert seen == [before, before]


STARTING = """
import ctypes, os, signal, sys
from blacksmith.run import signals
signals.stop_at_once()
if {in_c_code}:
    print("ready", flush=True)
    lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)  # waits for itself
with signals.StopFlag() as stop:
    pass
os.kill(os.getpid(), signal.SIGTERM)  # after the run
sys.exit(3)
"""


def test_a_signal_while_the_launcher_starts_ends_it_even_in_c_code():
    script = STARTING.format(in_c_code=True)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert error == "\nSIGINT: stopped before the run began\n"


def test_a_signal_after_the_run_does_not_change_its_status():
    assert subprocess.run([sys.executable, "-c", STARTING.format(in_c_code=False)]).returncode == 3


def test_the_launcher_hears_signals_before_it_imports_anything_else():
    script = """
import runpy, sys
from blacksmith.run import signals
def installed():
    print(*sorted(name for name in sys.modules if name.split(".")[0] in ("absl", "gin", "blacksmith")))
    sys.exit()
signals.stop_at_once = installed
runpy.run_module("blacksmith.launch", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [
        "blacksmith",
        "blacksmith.console",
        "blacksmith.run",
        "blacksmith.run.signals",
    ]


def test_c_code_that_never_returns_ends_after_the_grace_time():
    script = """
import ctypes, sys
from blacksmith.run import signals
signals.GRACE_SECONDS = 0.2
with signals.StopFlag():
    print("ready", flush=True)
    lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)  # waits for itself
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "SIGTERM: the run has not ended in" in error


def test_the_grace_time_ends_with_the_run(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(signals, "_end", lambda name: ended.set())
    with signals.StopFlag():
        signal.raise_signal(signal.SIGTERM)
    assert not ended.wait(0.5)


def test_a_forked_worker_is_terminated_without_the_run():
    with signals.StopFlag() as stop:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, b"ready")
            time.sleep(60)
            os._exit(1)
        os.read(read, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    # The thread that watches has ended: it saw nothing.
    assert not stop
    assert stop._deadline is None
