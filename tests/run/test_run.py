"""A run's directory: locked, removed or left alone when refused, and honest about how the run ended."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from blacksmith import launch as launcher
from blacksmith import registry, report
from blacksmith.errors import CheckpointError, ConfigError, DataError, RunError
from blacksmith.run import metrics
from blacksmith.run import run as runs

DATA = {"source": "mnist5k", "sha256": "0123456789abcdef" * 4}
TINY = ["Run.experiment='keras/mnist'", "Run.backend='jax'", "Log.tensorboard=False"]


@pytest.fixture
def make(tmp_path):
    """Makes a run of the tiny configuration, with further bindings and arguments of `Run`."""

    def make(directory=None, *bindings, **arguments):
        directory = directory or tmp_path / "run"
        resolved = launcher.resolve([], [*TINY, *bindings])
        arguments = {"backend": "jax", "device": "cpu", "bindings": resolved.bindings} | arguments
        return runs.Run(directory, resolved.config, resolved.experiment, **arguments)

    return make


def _train(run, steps, *, first=0):
    """Takes `steps` steps in the manner of an experiment: metrics, a checkpoint, a result."""
    run.use_data(DATA, "data: made up")
    for step in range(first + 1, first + steps + 1):
        run.metrics.write(step, step / 10, "train", {"loss": 1 / step})
        _checkpoint(run, step)


def _checkpoint(run, step):
    return run.save_checkpoint(step, {"step": step}, lambda d: (d / "a").write_bytes(b"a" * step), {})


def _tree(directory):
    """Every path below `directory` with its bytes; the lock, which every start writes, left out."""
    paths = [p for p in directory.rglob("*") if p.name != ".lock"]
    return {str(p.relative_to(directory)): p.is_file() and p.read_bytes() for p in paths}


def _json(directory, name):
    return json.loads((directory / name).read_text())


# What a run leaves


def test_a_finished_run_leaves_its_files(make):
    with make(command=["launch", "--x"]).opened() as run:
        _train(run, 2)
        run.finish("done", {"step": 2})
    names = {p.name for p in run.directory.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.gin",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "operative.gin",
        "report.html",
        "result.json",
    }
    result = _json(run.directory, "result.json")
    assert (result["status"], result["step"], result["data"]) == ("done", 2, DATA)
    assert 20e6 < result["peak_memory_bytes"] < 1e12


def test_a_new_start_leaves_nothing_of_what_an_earlier_one_said(make):
    run = make()
    run.directory.mkdir()
    (run.directory / "images").mkdir()
    stale = ("result.json", "report.html", "eval_results.json", "images/test_1.png")
    for name in stale:
        (run.directory / name).write_text("old")
    with run.opened():
        assert not any((run.directory / name).exists() for name in stale)


def test_the_saved_gin_files_give_the_same_configuration_again(make):
    with make(None, "mnist.Train.epochs=3").opened() as run:
        pass
    for name in ("config.gin", "operative.gin"):
        again = launcher.resolve([str(run.directory / name)], [])
        assert again.config == run.config


def test_the_environment_says_what_ran_where_and_on_which_data(make, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with make(command=["launch", "--gin_file=a.gin"]).opened() as run:
        run.use_data(DATA, "data: made up")
        environment = _json(run.directory, "environment.json")
    assert environment["command"] == ["launch", "--gin_file=a.gin"]
    assert environment["variables"]["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in environment["variables"]
    assert environment["experiment"] == "keras/mnist"
    assert (environment["backend"], environment["device"]) == ("jax", "cpu")
    assert environment["data"] == DATA
    assert environment["resumed_from"] is None
    assert environment["previous"] == []
    assert environment["versions"]["numpy"]
    assert environment["python"] == sys.version.partition(" ")[0]
    assert environment["cpu_count"] == os.cpu_count()
    root = Path(runs.__file__).parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", root, "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        assert environment["git"]["commit"] == head
        assert environment["git"]["dirty"] in (True, False)


def test_the_environment_of_a_resumed_run_keeps_those_before(make):
    with make(command=["first"]).opened() as run:
        _train(run, 1)
    newest = run.checkpoints.newest()
    with make(command=["second"], resumed=newest, backend="torch").opened() as run:
        _train(run, 1, first=1)
    environment = _json(run.directory, "environment.json")
    assert environment["resumed_from"] == str(newest.path)
    (previous,) = environment["previous"]
    assert (previous["command"], previous["backend"]) == (["first"], "jax")
    assert (environment["command"], environment["backend"]) == (["second"], "torch")


def test_an_environment_file_that_cannot_be_read_does_not_stop_a_resume(make):
    with make().opened() as run:
        _train(run, 1)
    for content in ("{}", "{"):
        (run.directory / "environment.json").write_text(content)
        with make(resumed=run.checkpoints.newest()).opened() as again:
            _train(again, 1, first=1)


def test_a_new_directory_is_made_with_its_parents(make, tmp_path):
    with make(tmp_path / "a" / "b" / "run").opened():
        pass
    assert (tmp_path / "a" / "b" / "run" / "config.json").exists()


def test_a_directory_that_cannot_be_made_is_one_line(make, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"--workdir: cannot make .*file/run"),
        make(tmp_path / "file" / "run").opened(),
    ):
        pass


def test_evaluation_leaves_the_record_of_the_training_alone(make):
    with make().opened() as run:
        _train(run, 2)
        run.finish("done", {"step": 2})
    before = _tree(run.directory)
    with make(mode="eval", resumed=run.checkpoints.newest()).opened() as run:
        run.use_data(DATA | {"sha256": "other"}, "data: other, which evaluation may use")
        with pytest.raises(RuntimeError, match="--mode=eval has no metric stream"):
            run.metrics.write(1, 0, "train", {})
    assert _tree(run.directory) == before


# Going on


def test_going_on_truncates_the_metrics_and_removes_later_checkpoints(make):
    with make().opened() as run:
        _train(run, 3)
    (run.checkpoints.newest().path / "a").unlink()
    with make(resumed=run.checkpoints.newest()).opened() as again:
        assert again.resumed.step == 2
        again.metrics.write(3, 0.3, "train", {"loss": 9.0})
    assert [p.name for p in again.checkpoints.steps()] == ["step_00000002"]
    lines = metrics.read(run.directory / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_going_on_counts_the_seconds_further(make, monkeypatch):
    with make().opened() as run:
        run.use_data(DATA, "")
        monkeypatch.setattr(type(run.metrics), "seconds", property(lambda _: 1000.0))
        _checkpoint(run, 1)
    monkeypatch.undo()
    with make(resumed=run.checkpoints.newest()).opened() as run:
        assert run.metrics.seconds > 1000


def test_a_run_from_a_checkpoint_elsewhere_leaves_that_run_alone(make, tmp_path):
    with make().opened() as first:
        _train(first, 2)
    before = _tree(first.directory)
    with make(tmp_path / "second", resumed=first.checkpoints.newest()).opened() as run:
        _train(run, 1, first=2)
        run.finish("done", {})
    assert _tree(first.directory) == before
    lines = metrics.read(tmp_path / "second" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3]


def test_metrics_cut_shorter_than_the_checkpoint_knows_are_refused(make):
    with make().opened() as run:
        _train(run, 2)
    os.truncate(run.directory / "metrics.jsonl", 10)
    before = _tree(run.directory)
    with (
        pytest.raises(CheckpointError, match=r"metrics.jsonl is shorter .* --resume=PATH"),
        make(resumed=run.checkpoints.newest()).opened() as run,
    ):
        _train(run, 1, first=2)
    assert _tree(run.directory) == before


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Run.seed=1", "Run.seed was 0, now 1"),
        ("mnist.Model.hidden=(7,)", r"mnist.Model.hidden was \[256, 256\], now \[7\]"),
        ("Optimizer.clip_norm=1.0", "Optimizer.clip_norm was None, now 1.0"),
    ],
)
def test_going_on_with_another_setting_is_refused_naming_it(make, binding, message):
    with make().opened() as run:
        _train(run, 1)
    other = make(run.directory, binding)
    with pytest.raises(ConfigError, match=message) as raised:
        runs.check_resume(run.checkpoints.newest(), other.config, other.experiment)
    assert "step_00000001 with other settings" in str(raised.value)
    assert "set them back, or start in a new --workdir" in str(raised.value)


def test_the_message_names_four_differences_at_most(make):
    with make().opened() as run:
        _train(run, 1)
    changed = [f"Optimizer.{name}=0.5" for name in ("beta_1", "beta_2", "epsilon", "learning_rate")]
    other = make(run.directory, "Run.seed=1", *changed)
    with pytest.raises(ConfigError) as raised:
        runs.check_resume(run.checkpoints.newest(), other.config, other.experiment)
    assert str(raised.value).count(" was ") == 4
    assert "; and 1 more; set them back" in str(raised.value)


@pytest.mark.parametrize(
    "binding",
    ["mnist.Train.steps=9", "Checkpoint.keep_last=7", "Log.progress='off'", "mnist.Train.block_steps=1"],
)
def test_going_on_with_a_setting_that_may_change_is_allowed(make, binding):
    with make().opened() as run:
        _train(run, 1)
    other = make(run.directory, binding)
    runs.check_resume(run.checkpoints.newest(), other.config, other.experiment)


def test_another_backend_and_another_experiment_of_the_same_format_are_allowed(make):
    with make().opened() as run:
        _train(run, 1)
    other = make(run.directory, "Run.experiment='lightning/mnist'", "Run.backend='torch'")
    runs.check_resume(run.checkpoints.newest(), other.config, other.experiment)


def test_a_checkpoint_of_another_format_is_refused(make):
    with make().opened() as run:
        _train(run, 1)
    foreign = dataclasses.replace(run.experiment, name="test/other", checkpoint_format="other-1")
    with pytest.raises(
        CheckpointError, match=r"was written by keras/mnist in the format keras-.* does not fit test/other"
    ):
        runs.check_resume(run.checkpoints.newest(), run.config, foreign)


# Refused, failed, stopped


@pytest.mark.parametrize("error", [ConfigError, DataError, CheckpointError])
def test_a_refused_run_removes_the_directory_that_it_made(make, error):
    run = make()
    with pytest.raises(error), run.opened():
        raise error("no")
    assert not run.directory.exists()


def test_a_refused_run_removes_the_directories_above_as_far_as_it_made_them(make, tmp_path):
    run = make(tmp_path / "runs" / "some" / "now")
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError), run.opened():
        raise DataError("no")
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    other = tmp_path / "all" / "other"

    def refused_beside_another():
        with make(tmp_path / "all" / "new" / "now").opened():
            other.mkdir()
            raise DataError("no")

    with pytest.raises(DataError):
        refused_beside_another()
    assert list((tmp_path / "all").rglob("*")) == [other]


def test_a_refused_run_does_not_remove_a_directory_that_was_there(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(DataError), make().opened():
        raise DataError("no")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_run_that_has_a_checkpoint_is_never_removed(make):
    run = make()

    def train_and_find_it_broken():
        with run.opened():
            _train(run, 1)
            raise CheckpointError("found at the end of the training")

    with pytest.raises(CheckpointError):
        train_and_find_it_broken()
    assert run.checkpoints.newest().step == 1
    assert _json(run.directory, "result.json")["status"] == "failed"


@pytest.mark.parametrize("info", [DATA | {"sha256": "f" * 64}, {"source": "idx", "sha256": "0" * 64}])
def test_going_on_with_other_data_is_refused_and_leaves_the_run_as_it_was(make, info):
    with make().opened() as run:
        _train(run, 2)
        run.finish("done", {"step": 2})
    before = _tree(run.directory)
    message = f"changed since step_00000002: it was mnist5k 0123456789ab, now it is {info['source']}"
    with pytest.raises(DataError, match=message), make(resumed=run.checkpoints.newest()).opened() as run:
        run.use_data(info, "data: another")
    assert _tree(run.directory) == before


def test_a_failed_run_says_so_in_its_result_and_report(make):
    run = make()

    def fail():
        with run.opened():
            run.use_data(DATA, "data: made up")
            run.metrics.write(7, 0.5, "train", {"loss": 0.123456})
            raise ZeroDivisionError("what went wrong")

    with pytest.raises(ZeroDivisionError):
        fail()
    result = _json(run.directory, "result.json")
    assert result["status"] == "failed"
    assert result["error"] == "ZeroDivisionError: what went wrong"
    assert result["step"] == 7
    assert result["data"] == DATA
    page = (run.directory / "report.html").read_text()
    assert "failed" in page
    assert "what went wrong" in page


def test_a_broken_metrics_file_does_not_hide_why_a_run_failed(make):
    run = make()

    def fail():
        with run.opened():
            run.metrics.write(7, 0.5, "train", {"loss": 0.1})
            (run.directory / "metrics.jsonl").write_text("broken\nlines\n")
            raise ZeroDivisionError("what went wrong")

    with pytest.raises(ZeroDivisionError):
        fail()
    result = _json(run.directory, "result.json")
    assert (result["error"], result["step"]) == ("ZeroDivisionError: what went wrong", 0)


def test_a_run_that_fails_before_its_first_metric_says_so_too(make):
    run = make()
    with pytest.raises(ZeroDivisionError), run.opened():
        raise ZeroDivisionError
    assert _json(run.directory, "result.json") | {"error": ""} == {
        "status": "failed",
        "error": "",
        "experiment": "keras/mnist",
        "backend": "jax",
        "device": "cpu",
        "step": 0,
        "data": {},
    }
    assert (run.directory / "report.html").exists()


def test_the_result_of_an_earlier_attempt_does_not_survive_a_new_one(make):
    run = make()
    with pytest.raises(ZeroDivisionError), run.opened():
        raise ZeroDivisionError
    with make().opened() as run:
        assert not (run.directory / "result.json").exists()
        assert not (run.directory / "report.html").exists()


def test_a_report_that_fails_is_a_warning_and_keeps_the_result(make, monkeypatch, capsys):
    def broken(directory):
        raise ValueError("no plot")

    monkeypatch.setattr(report, "write", broken)
    with make().opened() as run:
        run.finish("done", {})
    assert _json(run.directory, "result.json")["status"] == "done"
    assert capsys.readouterr().err == "warning: no report: ValueError: no plot\n"


def test_json_is_written_whole_or_not_at_all_and_is_strict(tmp_path):
    path = tmp_path / "result.json"
    runs.write_json(path, {"loss": float("nan"), "nested": [float("inf"), (1.5, {"a": -0.0})]})
    assert json.loads(path.read_text()) == {"loss": None, "nested": [None, [1.5, {"a": 0.0}]]}
    with pytest.raises(TypeError):
        runs.write_json(path, {"object": object()})
    assert json.loads(path.read_text())["loss"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_sets_the_flag_and_the_same_again_interrupts(make, capfd, number):
    before = signal.getsignal(number)
    with make().opened() as run:
        assert not run.stop
        os.kill(os.getpid(), number)
        assert run.stop
        assert run.stop.signal == number.name
        assert f"{number.name}: finishing the step and saving; again to abort" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_one_of_each_signal_does_not_interrupt(make):
    """A launcher above may pass SIGTERM on when its user presses Ctrl-C, which reaches the run as well."""
    with make().opened() as run:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop


def test_an_interrupted_run_says_so_in_its_result(make):
    run = make()
    with pytest.raises(KeyboardInterrupt), run.opened():
        raise KeyboardInterrupt
    assert _json(run.directory, "result.json")["error"] == "aborted by SIGINT"


def test_a_run_that_a_scheduler_ended_does_not_say_that_its_user_did(make):
    run = make()

    def signalled_twice():
        with run.opened():
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stop
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        signalled_twice()
    assert _json(run.directory, "result.json")["error"] == "aborted by SIGTERM"


# The lock


def test_a_viewer_looks_at_a_run_in_training_and_changes_nothing(make):
    with make().opened() as run:
        _train(run, 1)
        before = _tree(run.directory)
        viewer = runs.Run(run.directory, run.config, run.experiment, backend="jax", device="cpu", mode="view")
        with viewer.opened(checkpoints=run.checkpoints.steps()):
            pass
        assert _tree(run.directory) == before
        evaluation = runs.Run(
            run.directory, run.config, run.experiment, backend="jax", device="cpu", mode="eval"
        )
        with pytest.raises(ConfigError, match="in use by another run"), evaluation.opened():
            pass


def test_a_second_run_in_the_same_directory_is_refused_and_changes_nothing(make, launch):
    with make().opened() as run:
        _train(run, 1)
        before = _tree(run.directory)
        bindings = [f"--gin_param={b}" for b in TINY]
        done = launch(*bindings, f"--workdir={run.directory}", "--device=cpu")
        assert done.returncode == 2
        assert _tree(run.directory) == before
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {run.directory} is in use by another run (process {os.getpid()})")
    assert "Traceback" not in done.stderr


def test_the_lock_ends_with_its_process_however_that_ends(make, tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from blacksmith import launch
        from blacksmith.run import run
        resolved = launch.resolve([], {TINY!r})
        one = run.Run(Path({str(tmp_path / "run")!r}), resolved.config, resolved.experiment,
                      backend="jax", device="cpu")
        with one.opened():
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL
    with make().opened() as run:
        assert (run.directory / ".lock").read_text() == str(os.getpid())


def test_a_directory_whose_lock_cannot_be_written_is_one_line(make, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match=r"--workdir: cannot write in .*: Is a directory"),
        make().opened(),
    ):
        pass


# The launcher's ending

EXPERIMENT = """
import errno, os
from blacksmith import registry
from blacksmith.run.run import Run

def main(run: Run) -> int:
    run.use_data({"source": "none", "sha256": "0" * 64}, "data: none")
    for step in (1, 2):
        run.metrics.write(step, 0.5, "train", {"loss": 1.0})
        run.save_checkpoint(step, {}, lambda d: write(d, step), {})
    return 0

def write(directory, step):
    (directory / "a").write_bytes(b"x")
    if step == 2:
        raise OSError(errno.%s, os.strerror(errno.%s))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch, own_registry):
    """Registers `test/full`, which fails in its second checkpoint with the given error number."""

    def register(number):
        (tmp_path / "full_disk.py").write_text(EXPERIMENT % (number, number))
        monkeypatch.delitem(sys.modules, "full_disk", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        registry.add(
            registry.Experiment(
                name="test/full",
                summary="a disk that fills up",
                configs="blacksmith.experiments.keras.mnist.configs",
                modes={"train": "full_disk:main"},
                backends={"jax": registry.Needs("jax", ())},
                checkpoint_format="test",
            )
        )
        monkeypatch.setattr("blacksmith.devices.activate", lambda *_: "cpu")
        arguments = [f"--gin_param={b}" for b in ("Run.experiment='test/full'", "Log.tensorboard=False")]
        return launcher.main(["launch", *arguments, f"--workdir={tmp_path / 'run'}"])

    return register


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_ends_with_one_line_and_the_checkpoint_before_it(plugin, tmp_path, capsys, number):
    assert plugin(number) == 1
    error = capsys.readouterr().err
    lines = error.splitlines()[2:]  # after those that say what runs on which data
    reason = os.strerror(getattr(errno, number))
    kept = tmp_path / "run" / "checkpoints" / "step_00000001"
    assert lines == [
        f"error: the disk is full ({reason}); the last checkpoint is {kept}; "
        "make room and run the same command again"
    ]
    assert runs.Checkpoints(kept.parent).newest().step == 1
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    assert _json(tmp_path / "run", "result.json")["status"] == "failed"


def test_another_error_of_the_disk_is_a_crash_with_its_traceback(plugin, tmp_path):
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        plugin("EIO")
    assert _json(tmp_path / "run", "result.json")["status"] == "failed"


def test_a_disk_that_is_really_full_ends_with_one_line_and_leaves_whole_checkpoints(tmp_path):
    """Runs on a disk in memory that holds five checkpoints of 150 kB, mounted where nobody else sees it."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=800k none {disk}"
    if not shutil.which("unshare") or subprocess.run([*mounted, mount], capture_output=True).returncode:
        pytest.skip("this system does not let us mount a small disk")
    bindings = [
        *TINY,
        "mnist.Data.source='mnist5k'",
        "mnist.Model.hidden=(16,)",
        "mnist.Train.steps=100",
        "Checkpoint.every_steps=10",
        "Checkpoint.keep_last=100",
        "Log.progress='off'",
    ]
    train = [sys.executable, "-m", "blacksmith.launch", f"--workdir={disk / 'run'}", "--device=cpu"]
    train += [f"--gin_param={b}" for b in bindings]
    script = f'{mount}; status=0; "$@" || status=$?; cp -r {disk / "run"} {copy}; exit $status'
    done = subprocess.run([*mounted, script, "sh", *train], capture_output=True, text=True)
    assert done.returncode == 1
    kept = runs.Checkpoints(copy / "checkpoints")
    newest = kept.newest()
    assert [p.name for p in (copy / "checkpoints").iterdir() if p not in kept.steps()] == []
    assert len(kept.steps()) >= 3
    line = done.stderr.splitlines()[2]  # after those that say what runs on which data
    assert line.startswith("error: the disk is full (No space left on device); the last checkpoint is ")
    assert newest.path.name in line
    assert len(done.stderr.splitlines()) == 3


def test_a_disk_too_full_to_start_is_one_line(make, monkeypatch):
    def full(path, text, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"the disk is full .*; there is no checkpoint yet"), make().opened():
        pass


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    find_spec = launcher.importlib.util.find_spec
    monkeypatch.setattr(
        launcher.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    bindings = [f"--gin_param={b}" for b in (*TINY, "Log.wandb='offline'")]
    assert launcher.main(["launch", *bindings, f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == (
        "error: Log.wandb = 'offline' needs wandb, which is not installed: pip install '.[wandb]'\n"
    )
    assert not (tmp_path / "run").exists()
