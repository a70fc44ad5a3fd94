"""Interrupts a training at random moments and compares it with an uninterrupted one.

Used by `reliability.py` many times and by the tests once.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from blacksmith.files import TEMPORARY
from blacksmith.run import metrics
from blacksmith.run.checkpoint import Checkpoints

# Checkpoints, training lines and epochs fall on different steps, so that running means and the position in
# the epoch have to survive.
COMMON = {
    "Checkpoint.every_epochs": "None",
    "Log.every_steps": "3",
    "Log.progress": "'off'",
    "Log.tensorboard": "False",
}
# Small blocks, so that signals come in the middle of the training. An epoch has 28 steps.
MNIST = {
    "mnist.Data.source": "'mnist5k'",
    "mnist.Model.hidden": "(16,)",
    "mnist.Model.dropout": "0.3",
    "mnist.Train.steps": "400",
    "mnist.Train.block_steps": "4",
    "Checkpoint.every_steps": "20",
}
NERF = {
    "nerf.Data.downscale": "4",
    "nerf.Grid.resolutions": "(12, 18, 28)",
    "nerf.Grid.upsample_at": "(0.2, 0.5)",
    "nerf.Grid.refresh_at": "(0.4, 0.7)",
    "nerf.Grid.occupancy_resolution": "32",
    "nerf.Train.steps": "150",
    "nerf.Train.samples": "8192",
    "nerf.Train.evaluate_every_steps": "40",
    "nerf.Train.validation_views": "1",
    "nerf.Results.video_frames": "0",
    "Schedule.warmup_steps": "5",
    "Checkpoint.every_steps": "20",
}
LLAMA = {
    "llama.Model.hidden_size": "32",
    "llama.Model.intermediate_size": "48",
    "llama.Train.epochs": "None",
    "llama.Train.steps": "150",
    "llama.Train.batch_size": "8",
    "llama.Train.accumulate": "2",
    "llama.Train.average": "0.9",
    "llama.Train.evaluate_every_steps": "40",
    "llama.Evaluation.generate": "3",
    "llama.Lora.rank": "4",
    "llama.Lora.dropout": "0.2",
    "Checkpoint.every_steps": "20",
}
CASES = {
    "mnist_jax": MNIST | {"Schedule.name": "'constant'", "mnist.Data.shift": "2.0"},
    "mnist_torch": MNIST | {"Schedule.name": "'cosine'"},
    "mnist_lightning": MNIST | {"Optimizer.name": "'sgd'", "Optimizer.momentum": "0.9"},
    "nerf_blender": NERF,
    "llama_sst2_tiny": LLAMA,
}


def end(case: str) -> int:
    """The last step of a case."""
    return int(next(value for name, value in CASES[case].items() if name.endswith("Train.steps")))


def command(case: str, directory: Path, *flags: str, **changed: str) -> list[str]:
    """The launcher's command for a case; `changed` are settings with `__` for the dots."""
    settings = COMMON | CASES[case] | {name.replace("__", "."): value for name, value in changed.items()}
    bindings = [f"--gin_param={name} = {value}" for name, value in settings.items()]
    files = [f"--gin_file=gin/{case}.gin", f"--workdir={directory}", "--device=cpu"]
    return [sys.executable, "-m", "blacksmith.launch", *files, *bindings, *flags]


def run(case: str, directory: Path, *flags: str, **changed: str) -> subprocess.CompletedProcess:
    """Runs a case to its end."""
    line = command(case, directory, *flags, **changed)
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


def interrupt(
    case: str, directory: Path, number: int, moment: str, rng: random.Random, **changed: str
) -> tuple[int, str]:
    """Starts a case and sends it a signal; returns its status and standard error.

    Args:
      case: of `CASES`.
      directory: its run directory.
      number: the signal.
      moment: ``start``: within the time that a run takes to its first step; ``training``: when the metric
        stream has grown by a random number of lines; ``save``: while a checkpoint is being written.
      rng: draws what is random.
      changed: settings, as in `command`.
    """
    before = _lines(directory)
    enough = before + rng.randint(1, end(case) // 3 // 5)
    line = command(case, directory, **changed)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if moment == "start":
        time.sleep(rng.uniform(0, 4))
    else:
        while process.poll() is None:
            lines = _lines(directory)
            if lines >= enough and (moment == "training" or _saving(directory)):
                break
            # A resume first cuts off what follows the last checkpoint.
            before, enough = min(before, lines), enough - max(before - lines, 0)
            time.sleep(0.001)
        if moment == "training":
            time.sleep(rng.uniform(0, 0.01))
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    _, error = process.communicate(timeout=600)
    return process.returncode, error


def _lines(directory: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (directory / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _saving(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(map(TEMPORARY.fullmatch, os.listdir(directory / "checkpoints")))
    return False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What two equal runs have in common; `saved` are the checkpoint's tensors and loop state by name."""

    result: dict
    stream: list
    saved: dict


def outcome(directory: Path) -> Outcome:
    """What a run left in its directory."""
    newest = Checkpoints(directory / "checkpoints").newest()
    paths = [path for path in newest.path.iterdir() if path.suffix in (".safetensors", ".ckpt")]
    files = {path.name: _tensors(path) for path in paths}
    saved = files | {name: newest.state[name] for name in ("step", "position", "own", "metrics")}
    result = json.loads((directory / "result.json").read_text())
    stream = [_untimed(line) for line in metrics.read(directory / "metrics.jsonl")]
    return Outcome(_untimed(result), stream, saved)


def _untimed(value: Any) -> Any:
    """JSON without what differs between two equal runs."""
    if isinstance(value, list):
        return [_untimed(item) for item in value]
    if isinstance(value, dict):
        timed = lambda name: metrics.is_timed(name) or name == "peak_memory_bytes"  # noqa: E731
        return {k: _untimed(v) for k, v in value.items() if not timed(k)}
    return value


def _tensors(path: Path) -> bytes | dict[str, Any]:
    """The bytes of a checkpoint file; of Lightning's, the tensors and other values that training reads."""
    if path.name != "lightning.ckpt":
        return path.read_bytes()
    import torch

    content = torch.load(path, weights_only=True)
    return {
        "weights": {name: value.numpy().tobytes() for name, value in content["state_dict"].items()},
        "moments": [
            {name: value.numpy().tobytes() for name, value in slots.items()}
            for slots in content["optimizer_states"][0]["state"].values()
        ],
        "schedules": content["lr_schedulers"],
    }


def torture(case: str, directory: Path, cycles: int, seed: int) -> dict:
    """Interrupts runs of a case `cycles` times; returns what was counted, and `failures` in words.

    A cycle is an interruption and the start after it. Counted are kills (SIGKILL that reached a training),
    checkpoints that were `lost`, `mismatches` with an uninterrupted run, `hangs`, and `partial_directories`:
    leftovers of saves that were interrupted, after the run has ended.
    """
    rng = random.Random(f"{case} {seed}")
    counted = dict.fromkeys(("cycles", "kills", "lost", "mismatches", "hangs", "partial_directories"), 0)
    failures: list[str] = []

    def count(name: str, message: str) -> None:
        counted[name] += 1
        failures.append(f"{case}: {name}: {message}")

    whole = directory / "whole"
    done = run(case, whole)
    if done.returncode:
        raise RuntimeError(f"{case} does not run: {done.stderr}")
    expected = outcome(whole)
    chain = 0
    while counted["cycles"] < cycles:
        chain += 1
        work = directory / f"chain_{chain}"
        checkpoints = Checkpoints(work / "checkpoints")
        ended = False
        for _ in range(min(10, cycles - counted["cycles"])):
            number = rng.choice(
                [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
            )
            moment = rng.choice(["start", "training", "save"])
            before = _newest_step(checkpoints)
            try:
                status, error = interrupt(case, work, number, moment, rng)
            except subprocess.TimeoutExpired:
                count("hangs", f"{number.name} during {moment} in {work}")
                break
            counted["cycles"] += 1
            counted["kills"] += status == -signal.SIGKILL
            after = _newest_step(checkpoints)
            if after < before:
                count("lost", f"step {before} became {after} by {number.name} during {moment} in {work}")
            # In its first second a process has no handler yet; a run may also have ended before the signal.
            if number != signal.SIGKILL and moment != "start" and status not in (0, 75):
                count("lost", f"{number.name} during {moment} ended with status {status} in {work}: {error}")
            if ended := status == 0:
                break
        if not ended:
            done = run(case, work)
            if done.returncode:
                count("lost", f"{work} does not resume: {done.stderr}")
                continue
        found = outcome(work)
        for part in ("result", "stream", "saved"):
            if getattr(found, part) != getattr(expected, part):
                count("mismatches", f"the {part} of {work} differs from {whole}")
        if left := [path for path in work.rglob(".*") if TEMPORARY.fullmatch(path.name)]:
            count("partial_directories", f"{left} in {work}")
    return counted | {"failures": failures}


def _newest_step(checkpoints: Checkpoints) -> int:
    steps = checkpoints.steps()
    return int(steps[-1].name.removeprefix("step_")) if steps else 0
