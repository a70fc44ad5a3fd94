"""Where a run comes from: versions, commit, environment variables."""

import contextlib
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "accelerate",
    "av",
    "blacksmith",
    "datasets",
    "gguf",
    "gin-config",
    "h5py",
    "jax",
    "jaxlib",
    "keras",
    "lightning",
    "numpy",
    "peft",
    "pillow",
    "pydantic",
    "safetensors",
    "scikit-image",
    "tensorboard",
    "tensorflow-datasets",
    "tokenizers",
    "torch",
    "torchmetrics",
    "transformers",
    "viser",
)

# Environment variables that change what is computed, or how fast.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "XLA_FLAGS")


def versions() -> dict[str, str]:
    """Versions of the installed packages that can influence a run."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def variables() -> dict[str, str]:
    """The environment variables that are set of those that change what is computed, or how fast."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def git_state() -> dict[str, Any] | None:
    """The commit of the source tree that runs, or None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
