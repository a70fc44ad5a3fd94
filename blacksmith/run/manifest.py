"""Which files in a run directory were written by its runs: only those are ever overwritten or removed.

`manifest.jsonl` gets a line before a file is written and another when it is removed. Everything else in the
directory is the user's: it stays, or is renamed with a warning if it is in the way.
"""

import fnmatch
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from blacksmith.errors import ConfigError, note
from blacksmith.files import TEMPORARY, atomic_file, parse_json, remove

NAME = "manifest.jsonl"
LOCK = ".lock"
_FIRST = {"blacksmith": "run directory", "version": 1}
_SHOWN = 4  # foreign files in an error message


class Manifest:
    """The manifest of a run directory, read or newly made; only while the directory is locked.

    Raises:
      ConfigError: the directory is not empty and was not made by a run.
    """

    def __init__(self, directory: Path) -> None:
        check_ours(directory)
        self.directory = directory
        self.names = _read(directory / NAME)  # relative, with slashes
        if not _is_ours(directory / NAME):
            self.rewrite()

    def rewrite(self) -> None:
        """Leaves out the lines of what is no longer there, so that the file stays short."""
        lines = [_FIRST, *({"wrote": name} for name in sorted(self.names))]
        with atomic_file(self.directory / NAME) as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def owns(self, path: Path) -> bool:
        """Whether a run wrote this file, or anything in this directory."""
        name = self._name(path)
        return name in self.names or any(other.startswith(f"{name}/") for other in self.names)

    def add(self, *paths: Path | str) -> None:
        """Records files that are about to be written."""
        new = [name for name in map(self._name, paths) if name not in self.names]
        self.names.update(new)
        self._append("wrote", new)

    def forget(self, directory: Path) -> None:
        """Records that a directory is no longer there."""
        within = f"{self._name(directory)}/"
        self._removed([name for name in self.names if name.startswith(within)])

    def claim(self, path: Path | str) -> Path:
        """The path of a file that is about to be written; makes its directory.

        Whatever is in the way and not a run's is set aside: a user's file or directory, or a link, through
        which something outside would be overwritten.
        """
        path = self._path(path)
        below = [p for p in reversed(path.parents) if self.directory in p.parents]
        for parent in below:
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                set_aside(parent)
            parent.mkdir(exist_ok=True)
        if os.path.lexists(path):
            if self._name(path) not in self.names or (path.is_dir() and not path.is_symlink()):
                set_aside(path)
            elif path.is_symlink():
                path.unlink()
        self.add(path)
        return path

    def clear(self, *patterns: str, where: Callable[[Path], bool] = lambda path: True) -> None:
        """Removes files that runs wrote, and directories that this leaves empty.

        Args:
          *patterns: relative names, as in `fnmatch`; that of a directory stands for all in it.
          where: removes only paths for which this is true.
        """
        gone = []
        for name in sorted(self.names):
            path = self.directory / name
            if not any(fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}/") for p in patterns):
                continue
            if not where(path):
                continue
            gone.append(name)
            # Nothing is removed through a link, nor a directory that took the file's name.
            parents = [p for p in path.parents if self.directory in p.parents]
            if any(p.is_symlink() for p in parents) or (path.is_dir() and not path.is_symlink()):
                continue
            if os.path.lexists(path):
                path.unlink()
                for parent in parents:
                    if any(parent.iterdir()):
                        break
                    parent.rmdir()
        self._removed(gone)

    def rescue(self, directory: Path) -> None:
        """Moves what runs did not write out of a directory that is to be removed, into `NAME.kept`."""
        for path in sorted(directory.rglob("*")):
            if (path.is_symlink() or not path.is_dir()) and self._name(path) not in self.names:
                kept = directory.with_name(f"{directory.name}.kept") / path.relative_to(directory)
                kept.parent.mkdir(parents=True, exist_ok=True)
                path.rename(_free(kept))
                note(f"warning: {path} was not written by a run: moved to {kept}")

    def clean(self) -> None:
        """Removes the temporary files and directories of a killed run."""
        for directory in {self.directory, *((self.directory / name).parent for name in self.names)}:
            if directory.is_dir() and not directory.is_symlink():
                for path in directory.iterdir():
                    if (found := TEMPORARY.fullmatch(path.name)) and found["kind"] == "tmp":
                        remove(path)

    def dispose(self) -> None:
        """Removes all that runs wrote, and the directory itself if nothing else is in it."""
        self.clean()
        self.clear("*")
        if not _foreign(self.directory, {NAME}):
            for name in (NAME, LOCK):
                (self.directory / name).unlink(missing_ok=True)
            self.directory.rmdir()

    def _name(self, path: Path | str) -> str:
        return self._path(path).relative_to(self.directory).as_posix()

    def _path(self, path: Path | str) -> Path:
        """A string is a name in the directory, a `Path` is the path itself: both may be relative."""
        return self.directory / path if isinstance(path, str) else path

    def _removed(self, names: list[str]) -> None:
        self.names.difference_update(names)
        self._append("removed", names)

    def _append(self, what: str, names: list[str]) -> None:
        if names:
            with (self.directory / NAME).open("r+b") as stream:  # not "a": never makes a new manifest
                stream.seek(-1, os.SEEK_END)
                start = "" if stream.read() == b"\n" else "\n"  # after a line that a kill cut short
                lines = "".join(json.dumps({what: name}) + "\n" for name in names)
                stream.write((start + lines).encode())


def check_ours(directory: Path) -> None:
    """Raises `ConfigError` for a directory that has files and was not made by a run."""
    try:
        foreign = _foreign(directory, set()) if directory.is_dir() and not _is_ours(directory / NAME) else []
    except OSError as error:
        raise ConfigError(f"--workdir: cannot read {directory}: {error.strerror}") from error
    if foreign:
        hint = ""
        if (directory / "checkpoints").is_dir():
            hint = f", and start from its checkpoints with --resume={directory}"
        more = f" and {len(foreign) - _SHOWN:,} more" if len(foreign) > _SHOWN else ""
        raise ConfigError(
            f"--workdir: {directory} is not empty and was not made by a run (no {NAME} of this program): it "
            f"contains {', '.join(foreign[:_SHOWN])}{more}; choose a new or empty directory{hint}"
        )


def check_apart(directory: Path, data: Path | str, what: str) -> None:
    """Raises `ConfigError` if a run directory is, contains or lies in what the run reads."""
    try:
        own, data = directory.resolve(), Path(data).expanduser().resolve()
        if not data.exists():
            return
    except (OSError, RuntimeError, ValueError):  # not a path: the id of a dataset, say
        return
    for related, how in (
        (own == data, "is"),
        (own in data.parents, "contains"),
        (data in own.parents, "lies in"),
    ):
        if related:
            raise ConfigError(
                f"--workdir: {directory} {how} {what}, {data}; choose a directory for the run alone"
            )


def set_aside(path: Path) -> None:
    """Renames what is in the way to `NAME.1`, or the first free number, with a warning."""
    kept = _free(path, first=1)
    path.rename(kept)
    note(f"warning: {path} was not written by a run: kept as {kept.name}")


def _free(path: Path, first: int = 0) -> Path:
    names = (f"{path.name}.{number}" if number else path.name for number in itertools.count(first))
    return next(free for free in map(path.with_name, names) if not os.path.lexists(free))


def _foreign(directory: Path, ours: set[str]) -> list[str]:
    names = {path.name for path in directory.iterdir()} - ours - {LOCK}
    return sorted(name for name in names if not TEMPORARY.fullmatch(name))


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        return _line(stream.readline(1000)) == _FIRST


def _read(path: Path) -> set[str]:
    """The names in a manifest. Broken lines, and names outside the directory, count as not written."""
    names: set[str] = set()
    if path.is_file():
        with path.open("rb") as stream:
            for line in stream:
                entry = _line(line)
                if isinstance(entry, dict) and isinstance(name := entry.get("wrote"), str):
                    parts = PurePosixPath(name)
                    if parts.parts and not parts.is_absolute() and ".." not in parts.parts:
                        names.add(parts.as_posix())
                elif isinstance(entry, dict) and isinstance(name := entry.get("removed"), str):
                    names.discard(name)
    return names


def _line(line: bytes) -> object:
    try:
        return parse_json(line)
    except ValueError:
        return None
