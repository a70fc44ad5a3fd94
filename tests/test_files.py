"""Atomic files and directories, JSON without NaN, and the cache directory."""

import json
import os
import pwd

import pytest

from blacksmith import files


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BLACKSMITH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/blacksmith"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/x/.cache/blacksmith"),
        ({"BLACKSMITH_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/x/.cache/blacksmith"),
        ({"BLACKSMITH_CACHE": "~/own"}, "/home/x/own"),
        ({}, "/home/x/.cache/blacksmith"),
    ],
)
def test_cache_dir_prefers_its_own_variable_then_xdg(monkeypatch, environment, expected):
    for variable in ("BLACKSMITH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert str(files.cache_dir()) == expected


def test_a_user_without_a_home_has_no_cache_but_no_error_either(monkeypatch):
    def no_such_user(_):
        raise KeyError("getpwuid(): uid not found")

    for variable in ("BLACKSMITH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    assert str(files.cache_dir()) == "/nonexistent/.cache/blacksmith"


def test_the_home_of_an_unknown_user_stays_as_it_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert files.absolute("~no-such-user/x") == tmp_path / "~no-such-user" / "x"


def test_atomic_file_replaces_the_old_content(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with files.atomic_file(tmp_path / "file") as stream:
        stream.write(b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert _names(tmp_path) == ["file"]


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path):
    (tmp_path / "file").write_bytes(b"old")

    def interrupted():
        with files.atomic_file(tmp_path / "file") as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


def test_atomic_directory_appears_complete(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), fsync(number)))
    with files.atomic_directory(tmp_path / "made") as made:
        (made / "sub").mkdir()
        (made / "sub" / "public").write_text("x")
        (made / "private").touch(mode=0o600)
        assert not (tmp_path / "made").exists()
    assert _names(tmp_path) == ["made"]
    assert _names(tmp_path / "made") == ["private", "sub"]
    assert len(synced) == 2
    modes = {path.stat().st_mode for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "made" / "sub" / "public").stat().st_mode}


def test_atomic_directory_leaves_nothing_on_failure(tmp_path):
    def interrupted():
        with files.atomic_directory(tmp_path / "made") as made:
            (made / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _names(tmp_path) == []


def test_atomic_directory_never_replaces_existing_files(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    with pytest.raises(OSError), files.atomic_directory(tmp_path / "made") as made:
        (made / "new").touch()
    assert _names(tmp_path) == ["made"]
    assert _names(tmp_path / "made") == ["old"]


def test_write_json_writes_non_finite_numbers_as_null(tmp_path):
    content = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), "é")}}
    files.write_json(tmp_path / "file.json", content)
    written = json.loads((tmp_path / "file.json").read_bytes())
    assert written == {"a": None, "b": [1.5, None], "c": {"d": [None, "é"]}}
    assert _names(tmp_path) == ["file.json"]


def test_a_pipe_has_no_hash(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="not a file"):
        files.file_sha256(tmp_path / "pipe")
