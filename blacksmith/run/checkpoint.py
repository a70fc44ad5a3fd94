"""Checkpoints ``step_XXXXXXXX/`` that are complete or absent: ``state.json`` and the experiment's files.

This module writes them atomically, verifies their hashes and decides which to keep.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blacksmith.errors import CheckpointError, ConfigError
from blacksmith.files import file_sha256

FORMAT_VERSION = 2
LOWER_IS_BETTER = {"loss", "error", "mae", "mse", "rmse", "perplexity", "lpips", "nll", "wer", "cer", "fid"}
HIGHER_IS_BETTER = {
    "accuracy",
    "acc",
    "psnr",
    "ssim",
    "auc",
    "f1",
    "precision",
    "recall",
    "score",
    "bleu",
    "r2",
}
_STEP = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: its directory and what its ``state.json`` says."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.state["step"]

    @property
    def own(self) -> Mapping[str, Any]:
        """The JSON values that the experiment saved."""
        return self.state["own"]


@dataclass
class Checkpoints:
    """The checkpoints ``step_*`` in a directory, which is made with the first of them."""

    directory: Path
    keep_last: int = 2  # how many of the newest stay
    keep_best: int = 0  # how many of the best by `metric` also stay
    metric: str = "val_loss"  # a name in the metrics given to `save`
    mode: str = "auto"  # see `direction`

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        write: Callable[[Path], Mapping[str, Any] | None],
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Writes one checkpoint, then removes those that are no longer kept; returns its directory.

        If it cannot be written (a full disk, say), every older checkpoint is left as it was.

        Args:
          step: optimizer steps taken.
          state: JSON values to find again in `Saved.state`.
          write: puts the experiment's files into an empty directory; returns JSON values for `Saved.own`.
          metrics: validation metrics of these weights, for `keep_best`.
        """
        target = self.directory / f"step_{step:08d}"
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{target.name}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            own = write(temporary)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            for path in files:
                _fsync(path)
            content = {
                **state,
                "own": dict(own or {}),
                "format_version": FORMAT_VERSION,
                "step": step,
                "metrics": {k: float(v) for k, v in (metrics or {}).items()},
                "sha256": {str(p.relative_to(temporary)): file_sha256(p) for p in files},
            }
            content["state_sha256"] = _content_sha256(content)
            with (temporary / "state.json").open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            for path in files:
                shutil.copymode(temporary / "state.json", path)  # safetensors makes its files private
            _fsync(temporary)
            if target.exists():
                self._replace(target, temporary)
            else:
                temporary.rename(target)
            _fsync(self.directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._retain(newest=target)
        return target

    def steps(self) -> list[Path]:
        """All checkpoint directories, oldest first; not verified."""
        found = (p for p in self.directory.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir())
        return sorted(found, key=_step_of)

    def newest(self) -> Saved | None:
        """The newest intact checkpoint, with a warning for each broken newer one; None if there is none.

        Like `best_or_newest`, raises `CheckpointError` if there are checkpoints and none is intact.
        """
        return self._first_intact(list(reversed(self.steps())))

    def best_or_newest(self) -> Saved | None:
        """What is tested, evaluated and exported: the best checkpoint if any are kept, else the newest."""
        best = self._by_metric() if self.keep_best else []
        return self._first_intact([*best, *(path for path in reversed(self.steps()) if path not in best)])

    def describe_newest(self) -> str:
        """Which checkpoint is the newest, for a message."""
        steps = self.steps()
        return f"the newest checkpoint is {steps[-1]}" if steps else "there is no checkpoint yet"

    def clean(self) -> None:
        """Removes what an interrupted `save` left; call it only while the run's lock is held."""
        for old in self.directory.glob(".step_*.old-*"):
            target = self.directory / old.name[1:].partition(".old-")[0]
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(target)
        for temporary in self.directory.glob(".step_*.tmp-*"):
            shutil.rmtree(temporary, ignore_errors=True)

    def remove_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: they belong to a history that a resume gave up."""
        for path in self.steps():
            if _step_of(path) > step:
                self._remove(path)

    def _first_intact(self, candidates: list[Path]) -> Saved | None:
        problems = []
        for path in candidates:
            try:
                return load(path)
            except CheckpointError as error:
                problems.append(error)
                print(f"warning: {error}; trying another", file=sys.stderr)
        if problems:
            raise CheckpointError(f"no intact checkpoint in {self.directory}: {problems[0]}")
        return None

    def _by_metric(self) -> list[Path]:
        scored, lower = [], direction(self.metric, self.mode) == "min"
        for path in self.steps():
            try:
                value = json.loads((path / "state.json").read_text())["metrics"].get(self.metric)
            except (OSError, ValueError, KeyError):
                continue
            if value is not None and math.isfinite(value):
                scored.append((value if lower else -value, path))
        return [path for _, path in sorted(scored, key=lambda pair: pair[0])]

    def _retain(self, newest: Path) -> None:
        steps = self.steps()
        keep = {newest, *steps[-self.keep_last :], *self._by_metric()[: self.keep_best]}
        for path in steps:
            if path not in keep:
                self._remove(path)

    def _replace(self, target: Path, temporary: Path) -> None:
        """Puts `temporary` in the place of `target`, which stays if that fails; see `clean`."""
        replaced = self.directory / f".{target.name}.old-{os.getpid()}"
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        shutil.rmtree(replaced)

    def _remove(self, path: Path) -> None:
        """Removes a checkpoint at once for readers: a kill on the way must not leave half of it."""
        removed = self.directory / f".{path.name}.tmp-{os.getpid()}"
        path.rename(removed)
        shutil.rmtree(removed)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def direction(metric: str, mode: str) -> str:
    """``min`` or ``max``; the mode ``auto`` knows common metrics by the last word of their name.

    Raises:
      ConfigError: the mode is ``auto`` and the metric is not one of them.
    """
    word = re.split(r"[^a-z0-9]", metric.lower())[-1]
    if mode == "auto" and word not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
        raise ConfigError(
            f"Checkpoint.metric = {metric!r}: set Checkpoint.mode to 'min' or 'max' for this metric"
        )
    return mode if mode != "auto" else "min" if word in LOWER_IS_BETTER else "max"


def checkpoints_dir(path: Path) -> Path:
    """Where a path has its ``step_*``: itself, or in its ``checkpoints/``, if it is a run directory."""
    within = path / "checkpoints"
    return within if within.is_dir() and not Checkpoints(path).steps() else path


def find(path: Path) -> Saved:
    """The checkpoint at a user's path: itself, or the newest of a run directory; else a `CheckpointError`."""
    if (path / "state.json").is_file():
        return load(path)
    saved = Checkpoints(checkpoints_dir(path)).newest()
    if saved is None:
        raise CheckpointError(
            f"no checkpoint at {path}: expected a run directory, its checkpoints/ or one of its step_*"
        )
    return saved


def load(path: Path) -> Saved:
    """Reads one checkpoint directory; raises `CheckpointError` if it is not as it was written."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        recorded = state.pop("state_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__})") from error
    if recorded != _content_sha256(state):
        raise CheckpointError(f"{file} has changed since it was written")
    if state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {state['format_version']}, this blacksmith reads {FORMAT_VERSION}"
        )
    for name, expected in state["sha256"].items():
        part = path / name
        if not part.is_file() or file_sha256(part) != expected:
            raise CheckpointError(f"{part} is missing or has changed since it was written")
    return Saved(path, state)


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
