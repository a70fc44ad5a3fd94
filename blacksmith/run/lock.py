"""One run at a time in a directory: a lock on its file `.lock`, which names the process that holds it.

On a file system without locks that name alone decides: a second run reads it and looks for the process.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from blacksmith.errors import ConfigError, note
from blacksmith.files import parse_json
from blacksmith.run.manifest import LOCK


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that uses a directory."""

    host: str
    pid: int
    process_start: str  # tells the process from a later one with its number; empty if unknown
    since: str

    def may_run(self) -> bool:
        """Whether the process is alive, or on another host, where nobody can tell."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        start = _process_start(self.pid)
        return not (start and self.process_start) or start == self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Callable[[], bool]]:
    """Keeps other runs out of a directory; yields a function that says whether it is still the same one.

    Raises:
      ConfigError: another run uses the directory, or it cannot be written.
    """
    path = directory / LOCK
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", errors="replace")
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write in {directory}: {error.strerror}") from error
    with file:
        there = os.stat(directory), os.fstat(file.fileno())
        owner = _read(file)
        has_locks = _lock(file, directory, owner)
        me = Owner(
            socket.gethostname(),
            os.getpid(),
            _process_start(os.getpid()),
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        _write(file, me)
        if not has_locks:
            time.sleep(0.2)  # of two runs that start at once, the last that wrote its name stays
            if (other := _read(file)) != me:
                raise ConfigError(_in_use(directory, other))

        def in_place() -> bool:
            try:
                return all(map(os.path.samestat, there, (os.stat(directory), os.stat(path))))
            except OSError:
                return False

        try:
            yield in_place
        finally:
            with contextlib.suppress(OSError):
                _write(file, None)


def _lock(file: TextIO, directory: Path, owner: Owner | None) -> bool:
    """Locks the file; returns False if its file system has no locks and no other run is known."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        raise ConfigError(_in_use(directory, owner)) from error
    except OSError as error:
        if owner is not None and owner.may_run():
            raise ConfigError(
                f"{_in_use(directory, owner)}. This file system has no locks ({error.strerror}): if that "
                f"process has ended, remove {directory / LOCK}"
            ) from error
        note(
            f"warning: the file system of {directory} has no locks ({error.strerror}): do not start two runs "
            "there at the same moment"
        )
        return False


def _in_use(directory: Path, owner: Owner | None) -> str:
    who = owner or "unknown process"
    return f"{directory} is in use by another run ({who}); wait for it or choose another --workdir"


def _read(file: TextIO) -> Owner | None:
    file.seek(0)
    try:
        owner = Owner(**parse_json(file.read(4096)))
        return owner if type(owner.pid) is int and owner.pid > 0 else None
    except (TypeError, ValueError):  # nobody, or cut short
        return None


def _write(file: TextIO, owner: Owner | None) -> None:
    file.seek(0)
    file.truncate()
    if owner is not None:
        file.write(json.dumps(dataclasses.asdict(owner)))
    file.flush()
    os.fsync(file.fileno())


def _process_start(pid: int) -> str:
    """When a process started, in ticks since this host did; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name of the process, in brackets, may contain spaces.
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
