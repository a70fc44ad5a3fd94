"""Makes one backend ready on one device before any experiment code is imported.

The launcher calls `check_installed` and `activate`; frameworks are imported here, inside the functions,
once the configuration is known to be good.
"""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from blacksmith import files
from blacksmith.errors import ConfigError
from blacksmith.registry import Experiment


def check_installed(experiment: Experiment, backend: str) -> None:
    """Checks that the packages of `backend` are installed, without importing them.

    Raises:
      ConfigError: one is missing; names the extra that brings it.
    """
    needs = experiment.backends[backend]
    missing = [m for m in needs.modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ConfigError(
            f"{experiment.name} on {backend} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install '.[{needs.extra}]' in blacksmith's directory"
        )


def check_keras(backend: str) -> None:
    """Checks that nothing contradicts the Keras backend that the configuration names.

    Raises:
      ConfigError: ``KERAS_BACKEND`` says otherwise, or Keras is already imported on another backend.
    """
    wanted = os.environ.get("KERAS_BACKEND")
    if wanted and wanted != backend:
        raise ConfigError(
            f"KERAS_BACKEND={wanted} in the environment contradicts Run.backend = {backend!r}; "
            "unset it, or change Run.backend"
        )
    if "keras" in sys.modules:
        imported = sys.modules["keras"].config.backend()
        if imported != backend:
            raise ConfigError(
                f"Keras is already imported with the backend {imported!r} and cannot change to "
                f"{backend!r}; start a new process"
            )


def activate(experiment: Experiment, backend: str, device: str) -> str:
    """Imports the framework and chooses the device.

    Args:
      experiment: what will run.
      backend: ``jax`` or ``torch``.
      device: ``auto``, ``cpu``, ``gpu``, ``tpu``, or a JAX platform or torch device by name, with an
        optional index (``cuda:1``).

    Returns:
      The device in the framework's words, ``cpu`` or ``cuda:0`` for example.

    Raises:
      ConfigError: there is no such device; names those there are.
    """
    if experiment.uses_keras:
        check_keras(backend)
        os.environ["KERAS_BACKEND"] = backend
        # Keras writes a keras.json into its home when imported; a run must not depend on the user's.
        os.environ.setdefault("KERAS_HOME", str(files.cache_dir() / "keras"))
    name = _activate_jax(device) if backend == "jax" else _activate_torch(device)
    if device == "auto" and name == "cpu" and _gpu_present():
        how = "the extra jax-cuda" if backend == "jax" else "a CUDA build of PyTorch, see pytorch.org"
        print(
            f"note: this machine has an NVIDIA GPU that the installed {backend} does not use; install {how}",
            file=sys.stderr,
        )
    if device == "auto" and name == "cpu" and backend == "torch" and _mps_present():
        print("note: this machine has an Apple GPU; --device=mps uses it", file=sys.stderr)
    return name


def _activate_jax(device: str) -> str:
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    try:
        present = jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        raise ConfigError(
            f"JAX finds no device (JAX_PLATFORMS={asked}): {str(error).partition(chr(10))[0]}"
        ) from error
    if device == "auto":
        chosen = present[0]
    else:
        platform, _, index = device.partition(":")
        try:
            chosen = {str(i): d for i, d in enumerate(jax.devices(platform))}[index or "0"]
        except (RuntimeError, KeyError) as error:
            here = sorted({_jax_name(d) for d in present} | {"cpu"})
            raise ConfigError(
                f"--device={device}: JAX has no such device here; there is {', '.join(here)}"
            ) from error
        jax.config.update("jax_default_device", chosen)
    return _jax_name(chosen)


def _jax_name(device: Any) -> str:
    name = f"{device.platform}:{device.id}"
    return "cpu" if name == "cpu:0" else name


def _activate_torch(device: str) -> str:
    # PyTorch's threads spin while they wait for one another. On cores that something else uses too, that cost
    # a factor of 20 on a small model; sleeping costs up to a factor of 2 on idle ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    import torch

    asked = device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "gpu":
        present = [
            name
            for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("xpu", torch.xpu))
            if backend.is_available()
        ]
        device = present[0] if present else "cuda"
    try:
        # Read back, since the meta device has shapes without values.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            here.append("mps")
        raise ConfigError(
            f"--device={asked}: PyTorch has no such device here; there is {', '.join(here)}"
        ) from error
    os.environ["KERAS_TORCH_DEVICE"] = device
    return device


def _keep_freed_memory() -> None:
    """Has glibc's allocator hold on to large blocks instead of handing each back to the kernel.

    A step makes and frees the same large tensors again and again; mapping and zeroing their pages anew each
    time cost a third of it. Other C libraries have no `mallopt`; settings of the environment stay.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, map_most = -1, -4  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(map_most, 0)


def _mps_present() -> bool:
    import torch

    return torch.backends.mps.is_available()


def _gpu_present() -> bool:
    return Path("/proc/driver/nvidia/gpus").is_dir() or shutil.which("nvidia-smi") is not None
