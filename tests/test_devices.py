"""Process settings made before an experiment starts."""

import os
import subprocess
import sys

import pytest

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
