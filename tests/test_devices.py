"""Process settings made before an experiment starts."""

import json
import os
import subprocess
import sys

import pytest

from blacksmith import devices
from blacksmith.errors import ConfigError

FAULTS = """
import resource, sys
import numpy as np
from blacksmith import devices

if sys.argv[1] == "keep":
    devices.keep_freed_memory()

def faults_of(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        np.ones(8 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of(1)
print(faults_of(20))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_freed_blocks_are_reused_without_the_kernel():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    # Twenty blocks of 8 MiB: one fault per page of 4 KiB or of 2 MiB, or none.
    assert faults("leave") >= 20 * 4
    assert faults("keep") < 20


def test_malloc_settings_in_the_environment_are_kept():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", FAULTS, "keep"], env=environment, capture_output=True)
    assert int(done.stdout) >= 20 * 4


# What a user may have set for other programs; each changes results or raises somewhere in the trainer.
USERS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_ENABLE_CUSTOM_PRNG": "1",
    "JAX_LEGACY_PRNG_KEY": "error",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_JIT": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "KERAS_NNX_ENABLED": "1",
    "KERAS_BACKEND": "torch",
}
KERAS_JSON = {
    "floatx": "float16",
    "epsilon": 0.5,
    "image_data_format": "channels_first",
    "backend": "torch",
    "nnx_enabled": True,
}
CHOSEN = """
import json, sys
from blacksmith import devices, registry
from blacksmith.run import provenance
if sys.argv[1] == "imported before":
    import keras
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
devices.activate(registry.get("keras/mnist", where=""), "jax", "cpu")
import jax, keras
draw = jax.jit(lambda: jax.random.normal(jax.random.fold_in(jax.random.PRNGKey(3), 4), (5,)))()
found = provenance.numerics() | {"draw": draw.tolist(), "dtype": str(draw.dtype)}
print(json.dumps(found | {"backend": keras.config.backend(), "nnx": keras.config.is_nnx_enabled()}))
"""


def _chosen(how, environment):
    command = [sys.executable, "-c", CHOSEN, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_users_settings_of_jax_and_keras_change_nothing(tmp_path):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "KERAS_"))}
    (tmp_path / "keras.json").write_text(json.dumps(KERAS_JSON))
    expected = _chosen("as is", plain)
    assert expected["keras"] == {
        "floatx": "float32",
        "epsilon": 1e-7,
        "image_data_format": "channels_last",
        "dtype_policy": "float32",
    }
    assert (expected["backend"], expected["nnx"], expected["dtype"]) == ("jax", False, "float32")
    assert _chosen("as is", plain | USERS | {"KERAS_HOME": str(tmp_path)}) == expected
    assert _chosen("imported before", plain | {"KERAS_BACKEND": "jax"}) == expected


def test_a_setting_that_a_framework_refuses_is_one_line():
    with (
        pytest.raises(ConfigError, match=r"JAX does not start: invalid truth value 'x'; .* JAX_\.\.\."),
        devices._refused_environment("JAX", "JAX_"),
    ):
        raise ValueError("invalid truth value 'x'\nmore")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--xla_foo=1", "Unknown flag in XLA_FLAGS: --xla_foo=1"),
        ("--xla_cpu_enable_fast_math=perhaps", "Couldn't interpret value perhaps"),
        ("/none/flags", 'Could not open file "/none/flags"'),
    ],
)
def test_flags_for_which_xla_would_end_the_process_are_one_line(monkeypatch, flags, says):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ConfigError, match=f"XLA_FLAGS is not accepted: {says}"):
        devices._check_xla_flags()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    devices._check_xla_flags()
