"""Checkpoints ``step_XXXXXXXX/`` that are complete or absent: ``state.json`` and the experiment's files.

This module writes them atomically, verifies their hashes and decides which to keep.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from safetensors import SafetensorError, safe_open

from blacksmith.errors import CheckpointError, ConfigError, first_line, note
from blacksmith.files import (
    TEMPORARY,
    file_sha256,
    fsync,
    read_json,
    remove,
    settle,
    temporary_directory,
    temporary_name,
)
from blacksmith.run.manifest import Manifest, set_aside

FORMAT_VERSION = 3
_MAX_STATE_BYTES = 2**26
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


@pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(extra="forbid", strict=True))
class Position:
    """Where a run stands; saved as JSON with every checkpoint."""

    step: int = 0  # optimizer steps taken
    # Of the `summed` steps since the last training line: the logged values added up, by name.
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    validation: dict[str, float] = field(default_factory=dict)  # the latest, named ``val_*``
    validated_at: int = -1  # the step at which it was measured
    best: float | None = None  # best value of `Checkpoint.metric` so far
    best_step: int = 0
    worse: int = 0  # validations without improvement since then


class _State(pydantic.BaseModel, strict=True):
    """What `state.json` must hold, apart from its own hash."""

    step: pydantic.NonNegativeInt
    own: dict[str, Any]
    metrics: dict[str, float]
    sha256: dict[str, str]
    # What a run adds, see `Run.save_checkpoint`.
    experiment: str = ""
    checkpoint_format: str = ""
    config: dict[str, dict[str, Any]] = {}
    data: dict[str, Any] = {}
    metrics_offset: pydantic.NonNegativeInt = 0
    metrics_sha256: str = ""
    seconds: pydantic.NonNegativeFloat = pydantic.Field(0.0, allow_inf_nan=False)
    position: dict[str, Any] = {}


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: its directory and what its ``state.json`` says."""

    path: Path
    state: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """The path of one of its files; raises CheckpointError if it was not verified."""
        if name not in self.state["sha256"]:
            raise CheckpointError(f"{self.path / 'state.json'} lists no {name}")
        return self.path / name

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.state["step"]

    @property
    def own(self) -> Mapping[str, Any]:
        """The JSON values that the experiment saved."""
        return self.state["own"]

    def value(self, name: str, kind: Any) -> Any:
        """One of `own`; raises CheckpointError if it is missing or not of the type `kind`."""
        return checked(self.own.get(name), kind, self.path / "state.json", "own", name)


@dataclass
class Checkpoints:
    """The checkpoints ``step_*`` in a directory, which is made with the first of them."""

    directory: Path
    keep_last: int = 2  # how many of the newest stay
    keep_best: int = 0  # how many of the best by `metric` also stay
    metric: str = "val_loss"  # a name in the metrics given to `save`
    mode: str = "auto"  # see `direction`
    manifest: Manifest | None = None  # the run directory's: what is not in it stays; None: all is ours

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
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            set_aside(self.directory)
        self.directory.mkdir(exist_ok=True)
        with temporary_directory(target) as temporary:
            own = write(temporary)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            content = {
                **state,
                "own": dict(own or {}),
                "format_version": FORMAT_VERSION,
                "step": step,
                "metrics": {k: float(v) for k, v in (metrics or {}).items()},
                "sha256": {str(p.relative_to(temporary)): file_sha256(p) for p in files},
            }
            content["state_sha256"] = _content_sha256(content)
            (temporary / "state.json").write_text(json.dumps(content, indent=1))
            settle(temporary)
            fsync(temporary)
            if os.path.lexists(target) and not (self._owns(target) and target.is_dir()):
                set_aside(target)
            if self.manifest is not None:
                names = (path.relative_to(temporary) for path in files)
                self.manifest.add(*(target / name for name in (*names, "state.json")))
            if target.is_symlink():
                target.unlink()
            if target.exists():
                self._replace(target, temporary)
            else:
                temporary.rename(target)
            fsync(self.directory)
        self.retain(target)
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
        for path in self.directory.glob(".step_*"):
            if found := TEMPORARY.fullmatch(path.name):
                target = self.directory / found["name"]
                if found["kind"] == "tmp" or target.exists():
                    remove(path)
                else:
                    path.rename(target)

    def remove_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: they belong to a history that a resume gave up."""
        for path in self.steps():
            if _step_of(path) > step and self._owns(path):
                self._remove(path)

    def retain(self, newest: Path | None = None) -> None:
        """Removes the checkpoints that are no longer to be kept."""
        steps = [path for path in self.steps() if self._owns(path)]
        keep = {newest, *steps[-self.keep_last :], *self._by_metric()[: self.keep_best]}
        for path in steps:
            if path not in keep:
                self._remove(path)

    def _owns(self, path: Path) -> bool:
        """Whether a run wrote this checkpoint; what a link in its place points to was moved by the user."""
        return self.manifest is None or self.manifest.owns(path)

    def _first_intact(self, candidates: list[Path]) -> Saved | None:
        problems = []
        for path in candidates:
            try:
                return load(path)
            except CheckpointError as error:
                problems.append(error)
                note(f"warning: {error}; trying another")
        if problems:
            raise CheckpointError(f"no intact checkpoint in {self.directory}: {problems[0]}")
        return None

    def _by_metric(self) -> list[Path]:
        scored, lower = [], direction(self.metric, self.mode) == "min"
        for path in self.steps():
            try:
                value = _read_state(path)["metrics"].get(self.metric)
            except CheckpointError:
                continue
            if value is not None and math.isfinite(value):
                scored.append((value if lower else -value, path))
        return [path for _, path in sorted(scored, key=lambda pair: pair[0])]

    def _replace(self, target: Path, temporary: Path) -> None:
        """Puts `temporary` in the place of `target`, which stays if that fails; see `clean`."""
        if self.manifest is not None:
            self.manifest.rescue(target)
        replaced = temporary_name(target, "old")
        target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        remove(replaced)

    def _remove(self, path: Path) -> None:
        """Removes a checkpoint at once for readers: a kill on the way must not leave half of it."""
        if path.is_symlink():
            path.unlink()  # what it points to is not ours
        else:
            if self.manifest is not None:
                self.manifest.rescue(path)
            removed = temporary_name(path)
            path.rename(removed)
            remove(removed)
        if self.manifest is not None:
            self.manifest.forget(path)


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
    state = _read_state(path)
    root = path.resolve()
    for name, expected in state["sha256"].items():
        try:
            part = root / name
            within = part.resolve() == part and root in part.parents
            intact = within and part.is_file() and file_sha256(part) == expected
            if intact and part.suffix == ".safetensors":
                with safe_open(part, framework="np"):  # its header, so that an older checkpoint is tried
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if not within:
            raise CheckpointError(
                f"{path / 'state.json'} names {name!r}, which is not a file of its directory"
            )
        if not intact:
            raise CheckpointError(f"{path / name} is missing or has changed since it was written")
    return Saved(path, state)


def _read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint's `state.json` says, verified; other files are not looked at."""
    file = path / "state.json"
    try:
        if file.is_symlink():
            raise OSError("a link")
        state = read_json(file, _MAX_STATE_BYTES)
        recorded = state.pop("state_sha256")
        intact = recorded == _content_sha256(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)})") from error
    if not intact:
        raise CheckpointError(f"{file} has changed since it was written")
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {state.get('format_version')}, this blacksmith reads {FORMAT_VERSION}"
        )
    checked(state, _State, file)
    checked(state.get("position", {}), Position, file, "position")
    named = _STEP.fullmatch(path.name)
    if named and _step_of(path) != state["step"]:
        raise CheckpointError(f"{file} is that of step {state['step']}")
    absent = {name: field.default for name, field in _State.model_fields.items() if not field.is_required()}
    return absent | state


def checked(value: Any, kind: Any, file: Path, *keys: str) -> Any:
    """Returns the JSON value that `file` has under `keys` as the type `kind`.

    Raises CheckpointError if it is not of that type.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*keys, *first["loc"])))
        raise CheckpointError(f"{file}: {where} is not valid: {first['msg']}") from error


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
