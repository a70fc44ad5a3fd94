"""Checkpoints: complete or absent, verified, retained; a full disk or a kill at any moment breaks none."""

import ast
import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import blacksmith
from blacksmith.errors import CheckpointError
from blacksmith.files import temporary_name
from blacksmith.run import checkpoint
from blacksmith.run.checkpoint import Checkpoints, find, load


def _write(content):
    """A `write` callback that makes one file in the directory and one below it."""

    def write(directory):
        (directory / "arrays.bin").write_bytes(content * 100)
        (directory / "adapter").mkdir()
        (directory / "adapter" / "lora.bin").write_bytes(content)
        return {"rows": len(content)}

    return write


def _save(checkpoints, step, content=b"weights", metrics=None, **state):
    return checkpoints.save(step, state, _write(content), metrics)


def _names(checkpoints):
    return [path.name for path in checkpoints.steps()]


def _flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep_last=3)


# Saving and loading


def test_a_saved_checkpoint_loads_with_its_state_and_files(checkpoints):
    state = {"position": {"sums": {"loss": 0.1 + 0.2}, "best": None}, "seed": 2**63 - 1, "name": "é"}
    path = _save(checkpoints, 40, metrics={"val_loss": np.float32(0.5)}, **state)
    assert path == checkpoints.directory / "step_00000040"
    saved = checkpoints.newest()
    assert saved.path == path
    assert saved.step == 40
    assert {name: saved.state[name] for name in state} == state
    assert saved.own == {"rows": 7}
    assert saved.state["metrics"] == {"val_loss": 0.5}
    assert sorted(saved.state["sha256"]) == ["adapter/lora.bin", "arrays.bin"]
    assert (path / "adapter" / "lora.bin").read_bytes() == b"weights"


def test_before_the_first_save_there_is_nothing(checkpoints):
    assert checkpoints.newest() is checkpoints.best_or_newest() is None
    assert checkpoints.describe_newest() == "there is no checkpoint yet"
    checkpoints.clean()
    assert not checkpoints.directory.exists()


def test_a_write_callback_may_return_nothing(checkpoints):
    checkpoints.save(1, {}, lambda directory: None)
    assert checkpoints.newest().own == {}


def test_steps_are_ordered_by_number_also_beyond_eight_digits(checkpoints):
    for step in (100_000_000, 99_999_999, 5):
        _save(checkpoints, step)
    assert [load(p).step for p in checkpoints.steps()] == [5, 99_999_999, 100_000_000]


def test_other_directories_beside_the_checkpoints_are_left_alone(checkpoints):
    for name in ("step_1", "step_00000001.bak", "notes"):
        (checkpoints.directory / name).mkdir(parents=True)
    (checkpoints.directory / "step_00000009").write_text("a file")
    for step in range(10, 20):
        _save(checkpoints, step)
    checkpoints.clean()
    assert _names(checkpoints) == ["step_00000017", "step_00000018", "step_00000019"]
    others = {p.name for p in checkpoints.directory.iterdir()} - set(_names(checkpoints))
    assert others == {"step_1", "step_00000001.bak", "notes", "step_00000009"}  # and nothing temporary


def test_every_file_is_synced_before_the_checkpoint_appears(checkpoints, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_rename(source, target):
        events.append("rename")
        return rename(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to see what is synced")
    monkeypatch.setattr(checkpoint.os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    _save(checkpoints, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"arrays.bin", "lora.bin", "state.json"} <= set(before)
    assert after == ["checkpoints"]


# Retention


@pytest.mark.parametrize(
    ("metric", "mode", "best"),
    [
        ("val_loss", "auto", [3, 2]),
        ("val_loss", "min", [3, 2]),
        ("val_loss", "max", [1, 5]),
        ("val_accuracy", "auto", [1, 5]),
        ("val_accuracy", "max", [1, 5]),
        ("val_accuracy", "min", [3, 2]),
    ],
)
def test_the_best_are_kept_as_well_as_the_last(tmp_path, metric, mode, best):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2, metric=metric, mode=mode)
    for step, value in enumerate((0.9, 0.2, 0.1, 0.5, 0.7, 0.6), start=1):
        _save(checkpoints, step, metrics={metric: value})
    assert _names(checkpoints) == [f"step_{step:08d}" for step in sorted({*best, 6})]
    assert checkpoints.best_or_newest().step == best[0]


@pytest.mark.parametrize(("keep_best", "step"), [(1, 2), (0, 3)])
def test_chosen_is_the_best_if_the_best_are_kept(tmp_path, keep_best, step):
    checkpoints = Checkpoints(tmp_path, keep_last=3, keep_best=keep_best)
    for number, value in ((1, 0.2), (2, 0.1), (3, 0.3)):
        _save(checkpoints, number, metrics={"val_loss": value})
    assert checkpoints.best_or_newest().step == step


def test_of_equally_good_ones_the_earlier_is_the_best(tmp_path):
    for mode in ("min", "max"):
        checkpoints = Checkpoints(tmp_path / mode, keep_last=1, keep_best=2, metric="score", mode=mode)
        for step in (1, 2, 3, 4):
            _save(checkpoints, step, metrics={"score": 0.5})
        assert _names(checkpoints) == ["step_00000001", "step_00000002", "step_00000004"]
        assert checkpoints.best_or_newest().step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_one_without_a_finite_metric_is_never_the_best(tmp_path, value):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1, metric="val_loss")
    without = {} if value is None else {"val_loss": value}
    _save(checkpoints, 1, metrics=without)
    assert checkpoints.best_or_newest().step == 1
    _save(checkpoints, 2, metrics={"val_loss": 5.0})
    _save(checkpoints, 3, metrics=without)
    assert _names(checkpoints) == ["step_00000002", "step_00000003"]
    assert checkpoints.best_or_newest().step == 2
    assert checkpoints.newest().step == 3


def test_a_broken_one_does_not_disturb_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, value in ((1, 0.1), (2, 0.2)):
        _save(checkpoints, step, metrics={"val_loss": value})
    (tmp_path / "step_00000001" / "state.json").write_text("{")
    _save(checkpoints, 3, metrics={"val_loss": 0.3})
    assert _names(checkpoints) == ["step_00000002", "step_00000003"]


def test_remove_after_removes_what_is_newer_and_nothing_else(checkpoints):
    for step in (10, 20, 30):
        _save(checkpoints, step)
    checkpoints.remove_after(20)
    assert _names(checkpoints) == ["step_00000010", "step_00000020"]


# Falling back


def _truncate(path):
    os.truncate(path / "arrays.bin", 350)


DAMAGES = {
    "truncated array": _truncate,
    "flipped bit of an array": lambda path: _flip(path / "arrays.bin", 1234),
    "missing file": lambda path: (path / "adapter" / "lora.bin").unlink(),
    "flipped bit of the state": lambda path: _flip(path / "state.json", 8 * 30 + 2),
    "truncated state": lambda path: os.truncate(path / "state.json", 50),
    "empty state": lambda path: os.truncate(path / "state.json", 0),
    "missing state": lambda path: (path / "state.json").unlink(),
    "state that is a list": lambda path: (path / "state.json").write_text("[]"),
    "state that is binary": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(checkpoints, capsys, damage):
    for step in (1, 2, 3):
        newest = _save(checkpoints, step)
    damage(newest)
    with pytest.raises(CheckpointError, match="step_00000003"):
        load(newest)
    assert checkpoints.newest().step == 2
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert "step_00000003" in warning


def test_if_all_are_damaged_there_is_an_error(checkpoints, capsys):
    for step in (1, 2, 3):
        _truncate(_save(checkpoints, step))
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*step_00000003"):
        checkpoints.newest()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_if_the_best_is_broken_the_next_is_chosen(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    _truncate(_save(checkpoints, 1, metrics={"val_loss": 0.1}))
    _save(checkpoints, 2)
    assert checkpoints.best_or_newest().step == 2
    _truncate(_save(checkpoints, 3))
    assert checkpoints.best_or_newest().step == 2
    assert "step_00000001" in capsys.readouterr().err
    _truncate(tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoints.best_or_newest()


def test_no_flipped_bit_of_the_state_goes_unnoticed(checkpoints):
    path = _save(checkpoints, 1, metrics={"val_loss": 0.25}, position={"best": 1e-05}, name="é")
    file = path / "state.json"
    content, state = file.read_bytes(), load(path).state
    for bit in np.random.default_rng(0).choice(8 * len(content), 100, replace=False):
        _flip(file, bit)
        with contextlib.suppress(CheckpointError):
            # The case of a hexadecimal digit or of an exponent's e: another spelling of the same value.
            assert load(path).state == state
        file.write_bytes(content)


def test_another_format_version_is_refused_by_name(checkpoints, monkeypatch):
    path, version = _save(checkpoints, 1), checkpoint.FORMAT_VERSION
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", version + 1)
    with pytest.raises(
        CheckpointError, match=f"format version {version}, this blacksmith reads {version + 1}"
    ):
        load(path)


# A full disk


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fails_on_call(function, number):
    """`function`, which raises `FULL` the `number`-th time that it is called."""
    calls = 0

    def wrapper(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            raise FULL
        return function(*arguments)

    return wrapper


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [*((os, "fsync", number) for number in (1, 2, 3, 4)), (Path, "rename", 1), (Path, "write_bytes", 2)],
)
def test_a_full_disk_at_any_call_leaves_earlier_ones_alone(
    checkpoints, tree, monkeypatch, owner, name, number
):
    _save(checkpoints, 1)
    before = tree(checkpoints.directory)
    monkeypatch.setattr(owner, name, _fails_on_call(getattr(owner, name), number))
    with pytest.raises(OSError, match="No space left"):
        _save(checkpoints, 2)
    assert tree(checkpoints.directory) == before


@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_rename_of_a_step_saved_again_leaves_the_first(checkpoints, tree, monkeypatch, number):
    _save(checkpoints, 1, b"first")
    before = tree(checkpoints.directory)
    monkeypatch.setattr(Path, "rename", _fails_on_call(Path.rename, number))
    with pytest.raises(OSError, match="No space left"):
        _save(checkpoints, 1, b"second")
    assert tree(checkpoints.directory) == before


def test_an_interrupt_while_writing_leaves_no_temporary(checkpoints):
    def write(directory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(1, {}, write)
    assert list(checkpoints.directory.iterdir()) == []


def test_state_that_is_not_json_is_refused_and_leaves_nothing(checkpoints):
    with pytest.raises(TypeError):
        checkpoints.save(1, {"loss": np.zeros(2)}, _write(b"x"))
    assert list(checkpoints.directory.iterdir()) == []


# Saving again, and what a kill leaves


def test_saving_a_step_again_replaces_it(checkpoints):
    _save(checkpoints, 1, b"first", note="a")
    _save(checkpoints, 1, b"second", note="b")
    saved = checkpoints.newest()
    assert saved.state["note"] == "b"
    assert (saved.path / "adapter" / "lora.bin").read_bytes() == b"second"
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step_00000001"]


def _save_in_a_process_killed_at(deadly, directory, step):
    """Saves in a child that kills itself at a call that changes the disk; whether it ended before that."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    calls = iter(range(1, 100))

    def watched(function):
        def wrapper(*arguments, **options):
            if next(calls) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"), (Path, "mkdir")):
        setattr(owner, name, watched(getattr(owner, name)))
    with contextlib.suppress(BaseException):
        _save(Checkpoints(directory, keep_last=2), step, note="new")
        os._exit(0)
    os._exit(1)


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_at_any_point_of_a_save_leaves_whole_checkpoints(tmp_path, step):
    """Step 3 is new and pushes out step 1; step 2 is saved again."""
    old = Checkpoints(tmp_path / "old", keep_last=2)
    for number in (1, 2):
        _save(old, number, note="old")
    for deadly in range(1, 100):
        directory = shutil.copytree(old.directory, tmp_path / str(deadly))
        complete = _save_in_a_process_killed_at(deadly, directory, step)
        checkpoints = Checkpoints(directory, keep_last=2)
        # Whatever is listed is whole, before and after the leftovers are cleaned away.
        assert [load(p).step for p in checkpoints.steps()] != []
        checkpoints.clean()
        assert not list(directory.glob(".*"))
        found = {load(p).step: load(p).state["note"] for p in checkpoints.steps()}
        assert found in (
            {1: "old", 2: "old"},
            {1: "old", 2: "new"},
            {1: "old", 2: "old", 3: "new"},
            {2: "old", 3: "new"},
        )
        if complete:
            break
    assert 8 < deadly < 99, "the kills have not gone through the whole save"
    assert found[step] == "new"


def test_clean_brings_back_a_checkpoint_that_was_being_replaced(checkpoints):
    path = _save(checkpoints, 1, b"first")
    path.rename(temporary_name(path, "old"))
    temporary_name(path).mkdir()
    checkpoints.clean()
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step_00000001"]
    assert (checkpoints.newest().path / "adapter" / "lora.bin").read_bytes() == b"first"


def test_clean_removes_a_checkpoint_that_was_replaced(checkpoints):
    path = _save(checkpoints, 1, b"first")
    path.rename(temporary_name(path, "old"))
    _save(checkpoints, 1, b"second")
    checkpoints.clean()
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step_00000001"]
    assert (checkpoints.newest().path / "adapter" / "lora.bin").read_bytes() == b"second"


# Finding what a user's path means


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step_00000002"])
def test_find_takes_a_run_or_its_checkpoints_or_a_step(tmp_path, checkpoints, below):
    for step in (1, 2):
        _save(checkpoints, step)
    saved = find(tmp_path / below)
    assert (saved.path, saved.step) == (checkpoints.directory / "step_00000002", 2)


def test_find_takes_the_step_that_is_named_or_none(checkpoints):
    for step in (1, 2):
        _save(checkpoints, step)
    assert find(checkpoints.directory / "step_00000001").step == 1
    _truncate(checkpoints.directory / "step_00000002")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        find(checkpoints.directory / "step_00000002")


def test_find_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run directory"):
        find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected a run directory"):
        find(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a run directory"):
        find(tmp_path / "file")


# Safety


def test_nothing_in_the_package_can_load_a_pickle():
    """No pickle module is imported, and no loader that can unpickle may do so."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in Path(blacksmith.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.partition(".")[0] for alias in node.names}, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("allow_pickle", "False") == "False", where
                assert options.get("safe_mode", "True") == "True", where
                if node.func.attr == "load_from_checkpoint" or ast.unparse(node.func) == "torch.load":
                    assert options.get("weights_only") == "True", where
