"""A run directory holds the user's files, too: only what runs wrote is ever overwritten or removed."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pydantic
import pytest
from numpy_toy import Info, result_of, save, take_steps
from safetensors.numpy import save_file

from blacksmith.errors import CheckpointError, ConfigError, DataError, RunError
from blacksmith.files import temporary_name
from blacksmith.run import checkpoint
from blacksmith.run import run as runs
from blacksmith.run.lock import Owner


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


# Whose directory it is


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("manifest", [None, '{"audio": "a.wav"}\n', "", "[" * 100_000])
def test_a_directory_that_no_run_made_is_refused_and_untouched(make, tree, tmp_path, mode, manifest):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("config.json", "result.json", "model.bin", "a", "b"):
        (directory / name).write_text("precious")
    if manifest is not None:
        (directory / "manifest.jsonl").write_text(manifest)
    before = tree(directory)
    with pytest.raises(ConfigError, match=r"not made by a run .* contains a, b, config.json, .* [12] more"):
        make(mode=mode).opened().__enter__()
    assert tree(directory) == before
    assert ".lock" not in _names(directory)


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".manifest.jsonl.1-0123abcd.blacksmith-tmp"]])
def test_an_empty_directory_or_one_of_a_killed_start_is_taken(make, tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    with make().opened() as run:
        take_steps(run, 1)
    assert not list(run.directory.glob(".manifest*"))


@pytest.mark.parametrize(
    ("workdir", "how"), [("data", "is"), ("data/runs/1", "lies in"), (".", "contains"), ("link/1", "lies in")]
)
def test_a_directory_that_is_contains_or_lies_in_the_data_is_refused(tmp_path, workdir, how):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    with pytest.raises(ConfigError, match=f"--workdir: .* {how} the data, "):
        runs.check_apart(tmp_path / workdir, tmp_path / "data", "the data")
    runs.check_apart(tmp_path / "run", tmp_path / "data", "the data")
    runs.check_apart(tmp_path / workdir, "glue/sst2", "the data")


def test_data_that_the_settings_do_not_name_is_kept_apart_as_well(make, tmp_path):
    (tmp_path / "data").mkdir()
    run = make(directory=tmp_path / "data" / "run")
    with pytest.raises(ConfigError, match="lies in the data"), run.opened():
        run.use_data(Info(), path=str(tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []


# What is a run's


def test_only_files_that_runs_wrote_are_removed(make):
    with make().opened() as run:
        for name in ("test/a.png", "test/b.png", "test/deep/c.png", "images/val_3.png"):
            run.claim(name).write_text("ours")
        (run.directory / "test" / "mine.png").write_text("mine")
        (run.directory / "test" / "b.png").unlink()
        run.clear("test", "images/val_*", where=lambda path: path.name != "a.png")
        assert _names(run.directory / "test") == ["a.png", "mine.png"]
        assert not (run.directory / "images").exists()
        (run.directory / "test" / "b.png").write_text("mine")  # a name that is no longer a run's
    with make().opened() as run:
        run.clear("test")
        assert _names(run.directory / "test") == ["b.png", "mine.png"]


def test_what_is_in_the_way_is_kept_with_a_warning(make, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "r.png").write_text("precious")
    with make().opened() as run:
        (run.directory / "eval.json").write_text("mine")
        (run.directory / "eval.json.1").write_text("mine, too")
        (run.directory / "images").write_text("mine")
        (run.directory / "report.html").mkdir()
        (run.directory / "test").symlink_to(outside)
        (run.directory / "link.json").symlink_to(outside / "r.png")
        run.claim("ours.json").symlink_to(outside / "r.png")
        for name in ("eval.json", "images/a.png", "report.html", "test/r.png", "link.json", "ours.json"):
            run.claim(name).write_text("ours")
    kept = ["eval.json.1", "eval.json.2", "images.1", "link.json.1", "report.html.1", "test.1"]
    assert [name for name in _names(run.directory) if name[-1].isdigit()] == kept
    assert (run.directory / "eval.json.2").read_text() == "mine"
    assert (outside / "r.png").read_text() == "precious"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 5
    assert f"{run.directory / 'eval.json'} was not written by a run: kept as eval.json.2" in warnings[0]


def test_a_new_directory_appears_beside_what_the_user_put_there(make):
    def export(run, names):
        with run.new_directory("export") as temporary:
            for name in names:
                (temporary / name).write_text("ours")
            assert _names(run.directory).count("export") == made

    with make().opened() as run:
        made = 0
        export(run, ["a", "b"])
        made = 1
        export(run, ["b", "c"])
        assert _names(run.directory / "export") == ["b", "c"]
        (run.directory / "export" / "d").write_text("mine")
        (run.directory / "export" / "notes").write_text("mine")
        export(run, ["c", "d"])
        assert _names(run.directory / "export") == ["c", "d", "d.1", "notes"]
        assert (run.directory / "export" / "d.1").read_text() == "mine"
        with pytest.raises(ZeroDivisionError), run.new_directory("export"):
            raise ZeroDivisionError
        assert _names(run.directory / "export") == ["c", "d", "d.1", "notes"]


@pytest.mark.parametrize(
    "line",
    [
        '{"wrote": "../precious"}',
        '{"wrote": "/etc/hostname"}',
        '{"wrote": "link/precious"}',
        '{"wrote": ["precious"]}',
        "[" * 100_000,
        '{"wrote": "',
    ],
)
def test_no_manifest_makes_a_run_remove_files_elsewhere(make, tmp_path, line):
    (tmp_path / "precious").write_text("mine")
    with make().opened() as run:
        pass
    (run.directory / "link").symlink_to(tmp_path)
    with (run.directory / "manifest.jsonl").open("a") as stream:
        stream.write(line)  # without its end, as after a kill
    with make().opened() as run:
        run.claim("more").write_text("ours")
        run.clear("*")
    assert (tmp_path / "precious").read_text() == "mine"
    assert "more" not in _names(run.directory)


def test_a_relative_directory_is_the_same(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with make(directory=Path("run")).opened() as run:
        take_steps(run, 1)
        assert run.claim("eval.json") == run.claim(run.directory / "eval.json") == Path("run/eval.json")
        run.claim("eval.json").touch()
        run.clear("*")
    assert _names(run.directory) == [".lock", "manifest.jsonl"]


def test_a_copied_run_is_still_a_run(make, tmp_path):
    with make().opened() as run:
        take_steps(run, 2)
    (tmp_path / "copy").mkdir()
    for path in run.directory.glob("*"):  # as `cp -r run/* copy`
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "copy" / path.name)
    resumed = runs.checkpoints_of(tmp_path / "copy" / "checkpoints", run.config).newest()
    with make(directory=tmp_path / "copy", resumed=resumed).opened() as copy:
        take_steps(copy, 3, first=2)
    assert _names(copy.directory / "checkpoints") == ["step_00000004", "step_00000005"]


def test_temporaries_of_a_killed_run_are_removed_at_the_next_start(make):
    with make().opened() as run:
        take_steps(run, 3)
        run.claim("images/orbit.mp4").write_text("ours")
    found = [
        run.directory / name for name in ("result.json", "images/orbit.mp4", "checkpoints/step_00000009")
    ]
    for path in found:
        temporary_name(path).mkdir()
    temporary_name(run.directory / "export").write_text("")
    mine = run.directory / ".result.json.1-0123abcd.tmp"
    mine.write_text("not ours")
    with make(resumed=run.checkpoints.newest()).opened():
        assert list(run.directory.rglob(".*tmp")) == [mine]


def test_checkpoints_a_kill_left_are_removed_at_the_next_start(make):
    with make("Checkpoint.keep_last = 4").opened() as run:
        take_steps(run, 4)
    with make(resumed=run.checkpoints.newest()).opened() as again:
        again.begin()
        assert [path.name for path in run.checkpoints.steps()] == ["step_00000003", "step_00000004"]


# Checkpoints


def test_a_linked_checkpoint_is_unlinked_and_nothing_outside_touched(make, tmp_path):
    with make().opened() as run:
        take_steps(run, 2)
    oldest = run.checkpoints.steps()[0]
    oldest.rename(tmp_path / "big")
    oldest.symlink_to(tmp_path / "big")
    with make(resumed=run.checkpoints.newest()).opened() as run:
        take_steps(run, 1, first=2)
    assert [path.name for path in run.checkpoints.steps()] == ["step_00000002", "step_00000003"]
    assert checkpoint.load(tmp_path / "big").step == 1


def test_a_checkpoint_saved_in_place_of_a_link_leaves_its_target(make, tmp_path):
    with make().opened() as run:
        take_steps(run, 1)
        (saved,) = run.checkpoints.steps()
        saved.rename(tmp_path / "big")
        saved.symlink_to(tmp_path / "big")
        save(run, 1)
        assert not saved.is_symlink()
    assert _names(tmp_path / "big") == ["a", "state.json"]


def test_users_files_among_the_checkpoints_survive(make, capsys):
    with make().opened() as run:
        take_steps(run, 1)
        first = run.checkpoints.steps()[0]
        (first / "notes.txt").write_text("mine")
        foreign = shutil.copytree(first, first.with_name("step_00000000"))
        state = json.loads((foreign / "state.json").read_text())
        assert state["step"] == 1
        (first.parent / "step_00000003").write_text("mine")
        take_steps(run, 4, first=1)
    left = _names(run.directory / "checkpoints")
    names = ["step_00000000", "step_00000001.kept", "step_00000003.1", "step_00000004", "step_00000005"]
    assert left == names
    assert _names(first.with_name("step_00000001.kept")) == ["notes.txt"]
    assert "notes.txt was not written by a run: moved to" in capsys.readouterr().err


def _rewrite(path, **changes):
    state = json.loads((path / "state.json").read_text())
    del state["state_sha256"]
    state |= changes
    state["state_sha256"] = checkpoint._content_sha256(state)
    (path / "state.json").write_text(json.dumps(state))


def _nested(path):
    (path / "state.json").write_text('{"a":' * 100_000)


HOSTILE = {
    "nested": _nested,
    "nan step": lambda path: _rewrite(path, step=float("nan")),
    "another step": lambda path: _rewrite(path, step=7),
    "list of metrics": lambda path: _rewrite(path, metrics=[1]),
    "text as offset": lambda path: _rewrite(path, metrics_offset="5"),
    "flat config": lambda path: _rewrite(path, config={"run": 5}),
    "unknown position": lambda path: _rewrite(path, position={"steps": 5}),
    "position that is text": lambda path: _rewrite(path, position={"step": "5"}),
    "files that are a list": lambda path: _rewrite(path, sha256=["a"]),
    "endless seconds": lambda path: _rewrite(path, seconds=float("inf")),
    "no version": lambda path: _rewrite(path, format_version=None),
    "absolute path": lambda path: _rewrite(path, sha256={"/etc/hostname": "0" * 64}),
    "path above": lambda path: _rewrite(path, sha256={"../step_00000001/a": "0" * 64}),
    "null byte": lambda path: _rewrite(path, sha256={"a\0b": "0" * 64}),
    "long name": lambda path: _rewrite(path, sha256={"a" * 5000: "0" * 64}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_intact_checkpoint_is_found_behind_a_hostile_one(make, change, capsys):
    with make().opened() as run:
        take_steps(run, 2)
    change(run.checkpoints.steps()[1])
    capsys.readouterr()
    assert run.checkpoints.newest().step == run.checkpoints.best_or_newest().step == 1
    warnings = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings)
    assert 1 <= len(warnings) <= 2
    run.checkpoints.retain()


@pytest.mark.parametrize("value", [None, "5", 5.5, -1, [5], {"rows": 5}])
def test_a_value_of_the_wrong_type_is_a_checkpoint_error(tmp_path, value):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, {}, lambda d: {"rows": value, "right": {"step": 5}})
    saved = checkpoints.newest()
    assert saved.value("right", dict[str, int]) == {"step": 5}
    for name in ("rows", "missing"):
        with pytest.raises(CheckpointError, match=rf"state\.json: own\.{name} is not valid: Input should"):
            saved.value(name, pydantic.NonNegativeInt)


def test_an_intact_checkpoint_is_found_behind_one_of_unreadable_weights(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, {}, lambda d: save_file({"w": np.ones(2)}, d / "w.safetensors"))
    checkpoints.save(2, {}, lambda d: (d / "w.safetensors").write_bytes(b"no header") and None)
    with pytest.raises(CheckpointError, match=r"w\.safetensors cannot be read"):
        checkpoint.load(tmp_path / "step_00000002")
    assert checkpoints.newest().step == 1


@pytest.mark.parametrize("name", ["a", "state.json"])
def test_a_checkpoint_reads_no_file_through_a_link(make, tmp_path, name):
    with make().opened() as run:
        take_steps(run, 1)
    (path,) = run.checkpoints.steps()
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"not a file of its directory|{name} cannot be read .a link"):
        checkpoint.load(path)


# The metric stream


def _flip(content):
    return content.replace(b"1.0", b"2.0", 1)


@pytest.mark.parametrize("damage", [_flip, lambda content: b"x" + content[1:], lambda content: content[:-1]])
def test_a_damaged_metric_stream_is_noticed_on_resume(tmp_path, make, tree, damage):
    with make().opened() as run:
        take_steps(run, 2)
    path = run.directory / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    before = tree(run.directory)
    again = make(resumed=run.checkpoints.newest())
    with pytest.raises(CheckpointError, match=r"lost or changed lines since step_00000002"), again.opened():
        again.begin()
    assert tree(run.directory) == before


def test_lines_after_the_checkpoint_may_be_damaged(make):
    with make().opened() as run:
        take_steps(run, 2)
    with (run.directory / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 3, "lo\0\0')
    with make(resumed=run.checkpoints.newest()).opened() as again:
        take_steps(again, 1, first=2)
    with make(resumed=run.checkpoints.newest()).opened() as again:
        again.begin()


# A directory that goes away


def test_a_checkpoint_that_is_removed_while_it_is_evaluated_is_one_line(make, tmp_path):
    with make().opened() as run:
        take_steps(run, 1)
    saved = run.checkpoints.newest()
    other = make(resumed=saved, mode="eval", directory=tmp_path / "other")
    shutil.rmtree(saved.path)
    with pytest.raises(CheckpointError, match="was removed meanwhile"), other.opened():
        (saved.path / "arrays").read_bytes()


def _replace(run):
    shutil.rmtree(run.directory)
    run.directory.mkdir()
    (run.directory / "precious").write_text("mine")


def _remove_metrics(run):
    (run.directory / "metrics.jsonl").unlink()


AWAY = {
    "removed": lambda run: shutil.rmtree(run.directory),
    "replaced": _replace,
    "moved": lambda run: run.directory.rename(run.directory.with_name("moved")),
    "lock removed": lambda run: (run.directory / ".lock").unlink(),
    "metrics removed": _remove_metrics,
    "metrics replaced": lambda run: (
        shutil.copy(run.directory / "metrics.jsonl", run.directory / "m")
        and os.replace(run.directory / "m", run.directory / "metrics.jsonl")
    ),
}


@pytest.mark.parametrize("go", AWAY.values(), ids=AWAY)
@pytest.mark.parametrize("then", [lambda run: save(run, 2), lambda run: run.finish("done", {})])
def test_a_directory_that_goes_away_is_noticed_at_once(make, go, then):
    def run_on(run):
        with run.opened():
            take_steps(run, 1)
            go(run)
            then(run)

    run = make()
    with pytest.raises(RunError, match="was removed"):
        run_on(run)
    if run.directory.exists():
        assert "result.json" not in _names(run.directory) or result_of(run.directory)["status"] == "failed"
        if "precious" in _names(run.directory):
            assert _names(run.directory) == ["precious"]


def test_a_file_that_cannot_be_written_is_one_line(make):
    def run_on(run):
        with run.opened():
            take_steps(run, 1)
            (run.directory / "images").mkdir()
            (run.directory / "images" / "a.png" / "b").write_text("")

    with pytest.raises(RunError, match=r"a\.png/b: No such file or directory; the newest checkpoint is "):
        run_on(make())


# No locks


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_run_warns_and_a_second_one_reads_its_owner(make, no_locks, capsys):
    with make().opened() as run:
        assert "has no locks (No locks available)" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* since .* remove .*\.lock"):
            make().opened().__enter__()
        take_steps(run, 1)
    with make(resumed=run.checkpoints.newest()).opened():
        pass


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"pid": 2**22 + 1}, False),
        ({"pid": 2**70}, False),
        ({"process_start": "before the last boot"}, False),
        ({"host": "another"}, True),
        ({}, True),
        ({"pid": "x"}, False),
    ],
)
def test_without_locks_a_dead_owner_is_passed_over(make, no_locks, change, refused):
    with make().opened() as run:
        owner = json.loads((run.directory / ".lock").read_text())
        assert Owner(**owner).may_run()
    (run.directory / ".lock").write_text(json.dumps(owner | change))
    if refused:
        with pytest.raises(ConfigError, match="in use by another run"):
            make().opened().__enter__()
    else:
        with make().opened():
            pass


def test_the_lock_never_writes_through_a_link(make, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with make().opened() as run:
        pass
    (run.directory / ".lock").unlink()
    (run.directory / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot write in"):
        make().opened().__enter__()
    assert (tmp_path / "precious").read_text() == "mine"


# Data that moved


def test_the_same_data_from_elsewhere_resumes(make):
    with make().opened() as run:
        take_steps(run, 1)
    with make(resumed=run.checkpoints.newest()).opened() as run:
        run.use_data(Info("elsewhere"))
    with pytest.raises(DataError), make(resumed=run.checkpoints.newest()).opened() as run:
        run.use_data(Info("rows", "f" * 64))
