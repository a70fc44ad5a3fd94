"""Files and directories that appear complete or not at all, file hashes, and the cache directory."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
    temporary = _temporary_name(target)
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
    temporary = _temporary_name(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            file.chmod(mode)  # some libraries create files that only their owner can read
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(target: Path) -> Path:
    # A sibling, so that the rename stays within one file system.
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically. NaN and infinite numbers become null, since JSON has neither."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with atomic_file(path) as stream:
        stream.write((json.dumps(finite, indent=1) + "\n").encode())
