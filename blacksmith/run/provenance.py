"""What a run was made by: command, machine, versions, commit, environment variables."""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Environment variables that change what is computed, or how fast.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "XLA_FLAGS")


def describe(directory: Path, **facts: Any) -> dict[str, Any]:
    """The content of a new `environment.json`: `facts`, the machine, and earlier starts in this directory."""
    previous = []
    with contextlib.suppress(OSError, ValueError):
        old = json.loads((directory / "environment.json").read_text())
        kept = ("started", "command", "backend", "device", "resumed_from")
        previous = [*old.pop("previous", []), {key: old.get(key) for key in kept}]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "versions": versions(),
        "git": git_state(),
        "previous": previous,
    }


def versions() -> dict[str, str]:
    """The version of every installed package, by name."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower)}


def git_state() -> dict[str, Any] | None:
    """The commit of the source tree that runs; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    commit, *lines = done.stdout.splitlines()
    dirty = any(not line.startswith("#") for line in lines)
    return {"commit": commit.removeprefix("# branch.oid "), "dirty": dirty}


def peak_memory() -> int:
    """The most memory that this process has used on the host, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
