"""Files that appear whole or not at all, their hashes, and the cache directory."""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def cache_dir() -> Path:
    """Returns the cache directory, which may not exist yet.

    `$BLACKSMITH_CACHE`, else `$XDG_CACHE_HOME/blacksmith`, else `~/.cache/blacksmith`.
    """
    if own := os.environ.get("BLACKSMITH_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path there is to be ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache").expanduser()
    return base / "blacksmith"


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a temporary sibling for writing that becomes `target` when the block ends well.

    The content is flushed to the disk before the rename. When the block raises, `target` is left as
    it was and the temporary file is removed.

    Raises:
        OSError: the directory cannot be written.
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
    """Makes a temporary directory to fill that is renamed to `target` when the block succeeds.

    All files are flushed to disk before the rename. They get the permissions of ordinary new files, since
    some libraries write private ones. If the block raises, the temporary directory is removed.

    Args:
      target: the directory to make.

    Raises:
      OSError: the parent cannot be written, or `target` exists and is not an empty directory.
    """
    temporary = _temporary_name(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            file.chmod(mode)
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(target: Path) -> Path:
    # A sibling, so that the rename stays within one file system.
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically; numbers that are not finite become null."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
