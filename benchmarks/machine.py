"""What the benchmarks share: the description of the machine, and a run of an experiment."""

import os
import platform
import time
from pathlib import Path


def machine() -> dict:
    """The date, the processor, its cores and the installed versions, for a results header."""
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


def open_run(gin_files: list[str], bindings: list[str], directory: str, device: str | None = None):
    """A training run as the launcher makes it; without `device` the process is left as it is."""
    from blacksmith import devices, launch
    from blacksmith.run.run import Run

    resolved = launch.resolve(gin_files, bindings)
    return Run(
        Path(directory),
        resolved.config,
        experiment=resolved.experiment.name,
        checkpoint_format=resolved.experiment.checkpoint_format,
        backend=resolved.backend,
        device=devices.activate(resolved.experiment, resolved.backend, device) if device else "cpu",
    )
