"""How a run ends: refused, failed, stopped, on a full disk; and the lock that ends with it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from numpy_toy import Info, result_of, take_steps

from blacksmith.errors import CheckpointError, ConfigError, DataError, RunError
from blacksmith.run import metrics, signals
from blacksmith.run import run as runs
from blacksmith.run.checkpoint import Checkpoints


def _ends_with(run, error, *, begin=False):
    """Opens a run that ends with an error."""

    def fail():
        with run.opened():
            if begin:
                run.begin()
            raise error

    with pytest.raises(type(error)):
        fail()


# Refused and failed


@pytest.mark.parametrize("error", [ConfigError, DataError, CheckpointError])
def test_a_refused_run_removes_the_directories_that_it_made(make, tmp_path, error):
    (tmp_path / "runs").mkdir()
    _ends_with(make(directory=tmp_path / "runs" / "some" / "now"), error("no"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_a_refused_run_leaves_directories_that_others_use(make, tmp_path):
    def write_into(run):
        with run.opened():
            (run.directory / "notes.txt").write_text("mine")
            raise DataError("no")

    run = make()
    with pytest.raises(DataError):
        write_into(run)
    assert {p.name for p in run.directory.iterdir()} == {"notes.txt", ".lock", "manifest.jsonl"}

    def refused_beside_another():
        with make(directory=tmp_path / "all" / "new" / "now").opened():
            (tmp_path / "all" / "other").mkdir()
            raise DataError("no")

    with pytest.raises(DataError):
        refused_beside_another()
    assert list((tmp_path / "all").rglob("*")) == [tmp_path / "all" / "other"]


def test_a_run_that_has_a_checkpoint_is_never_removed(make):
    run = make()

    def train_and_find_it_broken():
        with run.opened():
            take_steps(run, 1)
            raise CheckpointError("found at the end of the training")

    with pytest.raises(CheckpointError):
        train_and_find_it_broken()
    assert run.checkpoints.newest().step == 1
    assert result_of(run.directory)["status"] == "failed"


def test_a_failed_run_records_why(make):
    reports = []
    run = make(write_report=reports.append)

    def fail():
        with run.opened():
            run.use_data(Info())
            run.metrics.write(7, 0.5, "train", {"loss": 0.123456})
            raise ZeroDivisionError("what went wrong")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert result_of(run.directory) == {
        "status": "failed",
        "experiment": "toy",
        "backend": "jax",
        "device": "cpu",
        "error": "ZeroDivisionError: what went wrong",
        "step": 7,
        "data": run.data,
    }
    assert reports == [run.directory]


def test_a_failure_to_begin_is_recorded(make, monkeypatch):
    run = make("Log.tensorboard = True")
    with make().opened():
        pass

    def refuse(*_):
        raise OSError("no events")

    monkeypatch.setattr(metrics, "TensorBoardWriter", refuse)
    with pytest.raises(OSError), run.opened():
        pass
    assert result_of(run.directory)["status"] == "failed"


def test_a_failure_before_begin_is_not_recorded_in_a_resumed_run(make, tree):
    with make().opened() as run:
        take_steps(run, 1)
        run.finish("done", {})
    before = tree(run.directory)
    _ends_with(make(resumed=run.checkpoints.newest()), ZeroDivisionError())
    assert tree(run.directory) == before
    _ends_with(make(resumed=run.checkpoints.newest()), ZeroDivisionError(), begin=True)
    assert result_of(run.directory)["step"] == 1


def test_a_directory_that_cannot_be_made_is_one_line(make, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"--workdir: cannot make .*file/run"),
        make(directory=tmp_path / "file" / "run").opened(),
    ):
        pass


# Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_sets_the_flag_and_a_second_interrupts(make, capfd, monkeypatch, number):
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0)
    before = signal.getsignal(number)
    with make().opened() as run:
        assert not run.stop
        os.kill(os.getpid(), number)
        assert run.stop
        assert run.stop.signal == number.name
        assert f"{number.name}: finishing this step and saving a checkpoint" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_one_of_each_signal_does_not_interrupt(make):
    """A launcher above may pass SIGTERM on when its user presses Ctrl-C, which reaches the run as well."""
    with make().opened() as run:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_aborted_run_records_which_signal_it_was(make, monkeypatch, number):
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0)
    run = make()

    def signalled_twice():
        with run.opened():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        signalled_twice()
    assert result_of(run.directory)["error"] == f"aborted by {number.name}"


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        (["launch"], "launch --workdir={run}", "launch --workdir={run}"),
        (["launch", "--workdir=a b"], "launch '--workdir=a b'", "launch '--workdir=a b'"),
        # Once the run has a checkpoint of its own, another's is no longer what it resumes from.
        (
            ["launch", "--workdir=x", "--resume=old"],
            "launch --workdir=x --resume=old",
            "launch --workdir=x --resume=old --resume=auto",
        ),
        (["launch", "--resume", "never"], "launch --resume never --workdir={run}", None),
    ],
)
def test_a_stopped_run_prints_how_to_resume(make, capsys, command, before, after):
    with make(command=command).opened() as run:
        assert run.stopped() == runs.STOPPED
        again = f"To start again: {before.format(run=run.directory)}"
        assert capsys.readouterr().out == f"stopped before anything was saved. {again}\n"
        take_steps(run, 1)
        assert run.stopped({"step": 1}) == runs.STOPPED
    expected = (after or before + " --resume=auto").format(run=run.directory)
    assert capsys.readouterr().out == f"stopped at step 1. To resume: {expected}\n"
    result = result_of(run.directory)
    assert (result["status"], result["step"]) == ("stopped", 1)


def test_a_stop_before_begin_takes_the_directory(make):
    with make().opened() as run:
        take_steps(run, 1)
        run.finish("done", {})
    with make(resumed=run.checkpoints.newest()).opened() as run:
        run.stopped()
    assert result_of(run.directory)["status"] == "stopped"


# The lock


def test_a_second_run_in_a_directory_is_refused_but_no_viewer(make, tree):
    with make().opened() as run:
        take_steps(run, 1)
        before = tree(run.directory)
        for mode in ("train", "eval"):
            second = make(mode=mode, resumed=run.checkpoints.newest())
            message = rf"in use by another run \(process {os.getpid()} on .* since "
            with pytest.raises(ConfigError, match=message), second.opened():
                pass
        with make(mode="view", resumed=run.checkpoints.newest()).opened(run.checkpoints.steps()):
            pass
        assert tree(run.directory) == before


def test_a_directory_changed_since_it_was_listed_is_refused(make):
    with make().opened() as run:
        take_steps(run, 1)
    with pytest.raises(ConfigError, match="just changed by another run"), make().opened(checkpoints=[]):
        pass


def test_the_lock_ends_with_its_process(make):
    child = os.fork()
    if not child:
        with make().opened():
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with make().opened() as run:
        assert json.loads((run.directory / ".lock").read_text())["pid"] == os.getpid()
    assert (run.directory / ".lock").read_text() == ""


def test_a_directory_whose_lock_cannot_be_written_is_one_line(make, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match=r"--workdir: cannot write in .*: Is a directory"),
        make().opened(),
    ):
        pass


# A full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # libraries hide the OSError in a message
def test_a_full_disk_names_the_checkpoint_before_it(make, number, kind):
    run, reason = make(), os.strerror(number)

    def fill_the_disk():
        with run.opened():
            take_steps(run, 1)
            raise OSError(number, reason) if kind is OSError else RuntimeError(f"write failed: {reason}")

    with pytest.raises(RunError) as raised:
        fill_the_disk()
    assert str(raised.value) == (
        f"the disk is full ({reason}); the newest checkpoint is {run.checkpoints.steps()[-1]}; "
        "make room and run the same command again"
    )
    assert result_of(run.directory)["status"] == "failed"


def test_another_error_of_the_disk_is_a_crash(make):
    _ends_with(make(), OSError(errno.EIO, os.strerror(errno.EIO)))


def test_a_disk_too_full_to_start_is_one_line(make, monkeypatch):
    def full(path, text, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"the disk is full .*; there is no checkpoint yet"), make().opened():
        pass


REALLY_FULL = """
import sys
from pathlib import Path
from numpy_toy import Toy, train
from blacksmith.errors import RunError

class Large(Toy):
    def save(self, directory):
        (directory / "padding").write_bytes(bytes(150_000))
        return super().save(directory)

try:
    train(Path(sys.argv[1]), "toy.Train.steps = 100", "Checkpoint.keep_last = 100", toy=Large)
except RunError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_is_really_full_leaves_whole_checkpoints(tmp_path):
    """Runs on a disk in memory that holds five checkpoints of 150 kB, mounted where nobody else sees it."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=800k none {disk}"
    if not shutil.which("unshare") or subprocess.run([*mounted, mount], capture_output=True).returncode:
        pytest.skip("this system does not let us mount a small disk")
    script = f'{mount}; status=0; "$@" || status=$?; cp -r {disk / "run"} {copy}; exit $status'
    train = [sys.executable, "-c", REALLY_FULL, str(disk / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([*mounted, script, "sh", *train], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    kept = Checkpoints(copy / "checkpoints")
    assert [p.name for p in (copy / "checkpoints").iterdir() if p not in kept.steps()] == []
    assert len(kept.steps()) >= 3
    message = "the disk is full (No space left on device); the newest checkpoint is "
    assert done.stderr.splitlines()[-1].startswith(message)
    assert kept.newest().path.name in done.stderr.splitlines()[-1]
