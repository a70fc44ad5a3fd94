"""What a run was made by: command, machine, versions, commit, environment variables."""

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from blacksmith.files import MAX_JSON_BYTES, read_json

# Environment variables that change what is computed, or how fast, begin like this.
_VARIABLES = re.compile(
    "(JAX|XLA|KERAS|TORCH|TORCHINDUCTOR|PYTORCH|OMP|KMP|GOMP|MKL|OPENBLAS|CUBLAS|CUBLASLT|CUDA|CUDNN|"
    "NCCL|NVIDIA|TF|LIBTPU)_"
)
_SECRETS = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


def describe(directory: Path, **facts: Any) -> dict[str, Any]:
    """The content of a new `environment.json`: `facts`, the machine, and earlier starts in this directory."""
    previous = []
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # a damaged file is no history
        old = read_json(directory / "environment.json", MAX_JSON_BYTES)
        kept = ("started", "command", "backend", "device", "resumed_from")
        previous = [*old.get("previous", []), {key: old.get(key) for key in kept}]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cores": usable_cores(),
        "variables": variables(),
        "numerics": numerics(),
        "versions": versions(),
        "git": git_state(),
        "previous": previous,
    }


def usable_cores() -> list[int] | None:
    """The numbers of the cores that this process may use; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def variables() -> dict[str, str]:
    """The environment variables that change what is computed, without passwords."""
    kept = {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.match(k) and not _SECRETS.search(k)}
    return {name: re.sub("://[^/@]*@", "://***@", value) for name, value in kept.items()}


def numerics() -> dict[str, Any]:
    """How the frameworks that are loaded compute, as ``{framework: {setting: value}}``."""
    found = {}
    if keras := sys.modules.get("keras"):
        names = ("floatx", "epsilon", "image_data_format")
        found["keras"] = {name: getattr(keras.config, name)() for name in names}
        found["keras"]["dtype_policy"] = keras.config.dtype_policy().name
    if jax := sys.modules.get("jax"):
        names = ("enable_x64", "default_prng_impl", "threefry_partitionable", "default_matmul_precision")
        found["jax"] = {name: getattr(jax.config, f"jax_{name}", None) for name in names}
    if torch := sys.modules.get("torch"):
        found["torch"] = {
            "num_threads": torch.get_num_threads(),
            "default_dtype": str(torch.get_default_dtype()),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        }
    return found


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
