"""Files and directories that appear complete or not at all, file hashes, JSON, and the cache directory."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# What a kill may leave: `.NAME.PID-RANDOM.blacksmith-tmp`, or `-old` where it still has to replace something.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.blacksmith-(?P<kind>tmp|old)", re.DOTALL)


MAX_JSON_BYTES = 2**24  # of the JSON files of a run directory


def cache_dir() -> Path:
    """`$BLACKSMITH_CACHE`, else `$XDG_CACHE_HOME/blacksmith`, else `~/.cache/blacksmith`; may not exist."""
    if own := os.environ.get("BLACKSMITH_CACHE"):
        return absolute(own)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path here.
    return (Path(xdg) if os.path.isabs(xdg) else in_home(".cache")) / "blacksmith"


def in_home(name: str) -> Path:
    """A path in the user's home; one that cannot be made for a user without a home, as in some containers."""
    home = os.path.expanduser("~")
    return Path(home if os.path.isabs(home) else "/nonexistent") / name


def absolute(path: str | os.PathLike[str]) -> Path:
    """An absolute path, with ``~`` and ``~user`` replaced where there is such a home."""
    # os.path, since Path.expanduser raises where there is none.
    return Path(os.path.expanduser(path)).absolute()


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `target` once the block succeeds and the content is on disk.

    If the block raises, `target` is unchanged. The directory must exist.
    """
    temporary = temporary_name(target)
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Makes a temporary directory that becomes `target` once the block succeeds and all files are on disk.

    Raises:
      OSError: the parent cannot be written, or `target` exists and is not an empty directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(target) as temporary:
        yield temporary
        settle(temporary)
        temporary.rename(target)


@contextmanager
def temporary_directory(target: Path) -> Iterator[Path]:
    """Makes an empty directory beside `target`, which is removed after the block if it is still there."""
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(target: Path, kind: str = "tmp") -> Path:
    """A new name beside `target`, so that a rename stays within one file system; see `TEMPORARY`."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.blacksmith-{kind}")


def settle(directory: Path) -> None:
    """Puts every file in a directory on disk, readable by whoever may read the directory."""
    mode = directory.stat().st_mode & 0o666
    for file in (path for path in directory.rglob("*") if path.is_file()):
        file.chmod(mode)  # some libraries create files that only their owner can read
        fsync(file)


def fsync(path: Path) -> None:
    """Puts a file, or the list of names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a directory with all in it, or a link, but never what a link points to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    _check_is_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, limit: int) -> Any:
    """The content of a JSON file; `ValueError` if it is not JSON, nested too deeply or over `limit` bytes."""
    _check_is_file(path)
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return parse_json(content)


def _check_is_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe, say, would never end
        raise FileNotFoundError(errno.ENOENT, "not a file", str(path))


def parse_json(content: str | bytes) -> Any:
    """`json.loads`, with a `ValueError` also for what is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically. NaN and infinite numbers become null, since JSON has neither."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with atomic_file(path) as stream:
        stream.write((json.dumps(finite, indent=1) + "\n").encode())
