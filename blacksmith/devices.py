"""Imports one backend and chooses its device, before any experiment code is imported."""

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blacksmith import files
from blacksmith.errors import ConfigError, first_line, note
from blacksmith.registry import Experiment, Needs

# What would change results, or break the trainer, if it came from a user's environment.
_JAX_OPTIONS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_disable_jit": False,
    "jax_transfer_guard": "allow",
}


def check_installed(what: str, needs: Needs) -> None:
    """Raises a `ConfigError` with the extra to install if packages are missing; imports nothing."""
    missing = [m for m in needs.modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ConfigError(f"{what}: not installed: {', '.join(missing)}; pip install '.[{needs.extra}]'")


def activate(experiment: Experiment, backend: str, device: str) -> str:
    """Imports the framework and chooses the device; returns the framework's name of it, such as ``cuda:0``.

    `backend` is ``jax`` or ``torch``, and `device` is ``auto``, ``cpu``, ``gpu``, ``tpu`` or the framework's
    name. Raises `ConfigError` if there is no such device, or Keras is already set to a different backend.
    """
    if not device:
        raise ConfigError("--device is empty; allowed: auto, cpu, gpu, tpu, or a device by name")
    if experiment.uses_keras:
        _set_keras_backend(backend)
    name = _activate_jax(device) if backend == "jax" else _activate_torch(device)
    if experiment.uses_keras:
        _set_keras_defaults()
    if device == "auto" and name == "cpu":
        _note_unused_gpu(backend)
    return name


def _set_keras_backend(backend: str) -> None:
    if "keras" in sys.modules and (imported := sys.modules["keras"].config.backend()) != backend:
        raise ConfigError(
            f"Keras is already imported with the backend {imported!r} and cannot change to {backend!r}; "
            "start a new process"
        )
    os.environ["KERAS_BACKEND"] = backend
    # A run must not depend on the user's keras.json. On import Keras also writes one, if its home has none.
    os.environ["KERAS_HOME"] = str(files.cache_dir() / "keras")
    os.environ["KERAS_NNX_ENABLED"] = "false"


def _set_keras_defaults() -> None:
    """Makes Keras compute as if no user had configured it, even where a plugin imported it before."""
    with _refused_environment("Keras", "KERAS_"):
        import keras
    if keras.config.is_nnx_enabled():
        raise ConfigError("Keras is already imported with NNX, which the trainer cannot use; unset it")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")


@contextlib.contextmanager
def _refused_environment(framework: str, prefix: str) -> Iterator[None]:
    """Turns the error of a framework that does not accept one of its settings on import into one line."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"{framework} does not start: {first_line(error)}; see the environment variables {prefix}..."
        ) from error


def _activate_jax(device: str) -> str:
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("XLA_FLAGS"):
        _check_xla_flags()
    with _refused_environment("JAX", "JAX_"):
        import jax
    for option, value in _JAX_OPTIONS.items():
        if hasattr(jax.config, option):  # not every version of JAX has all of them
            jax.config.update(option, value)

    try:
        present = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        raise ConfigError(f"JAX finds no device (JAX_PLATFORMS={platforms}): {first_line(error)}") from error
    if device == "auto":
        return _jax_name(present[0])
    platform, _, index = device.partition(":")
    try:
        # Looked up as text: a negative index would count from the end.
        chosen = {str(i): d for i, d in enumerate(jax.devices(platform))}[index or "0"]
    except (RuntimeError, KeyError) as error:
        raise _no_device(device, "JAX", sorted({_jax_name(d) for d in present} | {"cpu"})) from error
    jax.config.update("jax_default_device", chosen)
    return _jax_name(chosen)


def _check_xla_flags() -> None:
    """Raises a `ConfigError` if XLA does not accept `XLA_FLAGS`, for which it would end this process."""
    parse = "import jaxlib.xla_client as xla; xla.CompileOptions().executable_build_options.debug_options"
    child = subprocess.run([sys.executable, "-c", parse], capture_output=True, text=True, errors="replace")
    # The first line of severity E or F: ``F1127 16:08:48.276031  6915 parse_flags.cc:234] Unknown flag ...``.
    reason = re.search(r"^[EF]\d{4} .*?\] (.*)", child.stderr, re.MULTILINE)
    if child.returncode and reason:
        raise ConfigError(f"the environment variable XLA_FLAGS is not accepted: {reason[1]}")


def _jax_name(device: Any) -> str:
    name = f"{device.platform}:{device.id}"
    return "cpu" if name == "cpu:0" else name


def _activate_torch(device: str) -> str:
    # PyTorch's threads spin while they wait for each other. On cores shared with another process, that made a
    # small model 20 times slower. Sleeping instead costs up to a factor of 2 on idle cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "gpu":
        name = accelerator.type if accelerator else "cuda"
    try:
        torch.zeros(1, device=name).item()  # read back, since the meta device has shapes without values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        count = torch.accelerator.device_count()
        raise _no_device(
            device, "PyTorch", ["cpu", *(f"{accelerator.type}:{i}" for i in range(count))]
        ) from error
    os.environ["KERAS_TORCH_DEVICE"] = name
    return name


def keep_freed_memory() -> None:
    """Makes glibc keep freed large blocks for reuse instead of returning each to the kernel.

    Every training step allocates and frees the same large tensors. Mapping and zeroing their pages each time
    took a third of the step. Other C libraries have no `mallopt`; the user's settings take precedence.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _no_device(device: str, framework: str, present: list[str]) -> ConfigError:
    return ConfigError(f"--device={device}: {framework} has no such device; available: {', '.join(present)}")


def _note_unused_gpu(backend: str) -> None:
    if Path("/proc/driver/nvidia/gpus").is_dir() or shutil.which("nvidia-smi") is not None:
        cure = "the extra jax-cuda" if backend == "jax" else "a CUDA build of PyTorch, see pytorch.org"
        note(f"note: this machine has an NVIDIA GPU that {backend} cannot use; install {cure}")
    if backend == "torch":
        import torch

        if torch.backends.mps.is_available():
            note("note: this machine has an Apple GPU; use it with --device=mps")
