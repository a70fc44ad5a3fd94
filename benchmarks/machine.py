"""What every benchmark's header says of the machine that it ran on."""

import os
import platform
import time
from pathlib import Path


def machine() -> dict:
    """The date, the processor, its cores and the installed versions."""
    from blacksmith.run.provenance import versions

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
    }
