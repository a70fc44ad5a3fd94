"""Reads and validates a run directory for the report: missing files are empty, broken ones a `DataError`."""

import base64
import datetime
import functools
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from blacksmith.errors import ConfigError, DataError, first_line
from blacksmith.files import MAX_JSON_BYTES, read_json
from blacksmith.run import metrics
from blacksmith.run.checkpoint import direction

AXES = ("step", "epoch", "seconds")
SPLITS = ("train", "val", "test")
FIRST_METRICS = ("accuracy", "loss")
MAX_TEXT = 300  # characters of a title or a line of a caption, lines of a caption
MAX_IMAGE_BYTES = 32 * 2**20  # all images of a run together
MAX_NUMBER = 2**63  # of counts and sums
TILE_PIXELS = 100  # images up to this size are shown as small tiles

Count = Annotated[int, pydantic.Field(ge=0, le=MAX_NUMBER)]


class Config(pydantic.BaseModel):
    """What the report uses of `config.json`."""

    run: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}


class Environment(pydantic.BaseModel):
    """What the report uses of `environment.json`."""

    started: datetime.datetime | None = None
    command: list[Any] = []
    device: str | None = None
    data: dict[str, Any] = {}
    git: dict[str, Any] | None = None  # None for an installed package


class Test(pydantic.BaseModel, extra="allow"):
    """`test` in `result.json`: any number of scores, and per-class tables."""

    class_names: list[str] = []
    confusion_matrix: list[list[Annotated[float, pydantic.Field(ge=0, le=MAX_NUMBER)]]] = []
    per_class_accuracy: list[pydantic.FiniteFloat | None] = []

    @pydantic.field_validator("confusion_matrix")
    @classmethod
    def _check_square(cls, matrix: list[list[float]]) -> list[list[float]]:
        if any(len(row) != len(matrix) for row in matrix):
            raise ValueError("it is not square")
        return matrix

    @pydantic.model_validator(mode="after")
    def _check_scores(self) -> "Test":
        if name := next(
            (n for n, v in self.model_extra.items() if isinstance(v, int) and abs(v) > MAX_NUMBER), ""
        ):
            raise ValueError(f"{name} is too large")
        return self

    @property
    def scores(self) -> dict[str, float]:
        """All numbers, accuracy and loss first."""
        numbers = {name: value for name, value in self.model_extra.items() if isinstance(value, (int, float))}
        return {name: numbers[name] for name in [*FIRST_METRICS, *numbers] if name in numbers}


class Result(pydantic.BaseModel):
    """What the report uses of `result.json`."""

    status: str = "unfinished"
    error: str = ""
    step: Count | None = None
    epoch: pydantic.FiniteFloat | None = None
    seconds: pydantic.FiniteFloat | None = None
    parameters: Count | None = None
    trained_parameters: Count | None = None
    initial_weights_sha256: str | None = None
    order_sha256: str | None = None
    tested_checkpoint: str = ""
    test: Test = Test()


@dataclass(frozen=True)
class Series:
    """One metric of one split: values, perhaps not finite, and x values by axis name, float64 [points]."""

    values: np.ndarray
    axes: dict[str, np.ndarray]


@dataclass(frozen=True)
class Picture:
    """An image of a run: heading, caption lines, data URI, and layout (`tile`, `wide` or empty)."""

    title: str
    caption: list[str]
    uri: str
    layout: str


@dataclass(frozen=True)
class Run:
    """The contents of a run directory."""

    name: str  # distinguishes it from the other runs on the page
    files: dict[str, dict[str, Any]]  # the JSON files that exist, by name
    config: Config
    environment: Environment
    result: Result
    rows: list[dict[str, Any]]  # the lines of `metrics.jsonl`, by step
    pictures: list[Picture]  # the images in `images/`, by name
    notes: list[str]  # what was left out

    @property
    def experiment(self) -> str:
        """The experiment's name in the registry."""
        return str(self.config.run.get("experiment", self.name))

    @functools.cached_property
    def series(self) -> dict[str, dict[str, Series]]:
        """Metric -> split -> series; the test is drawn where the tested checkpoint was validated."""
        places = {f"step_{row['step']:08d}": row for row in self.rows if row["split"] == "val"}
        tested = places.get(self.result.tested_checkpoint)
        points: dict[str, dict[str, list]] = {}
        for row in self.rows:
            place = tested if tested and row["split"] == "test" else row
            for name, value in row.items():
                if name not in (*AXES, "split") and isinstance(value, (int, float)):
                    column = points.setdefault(name, {}).setdefault(row["split"], [])
                    column.append((value, *(place[axis] for axis in AXES)))
        series: dict[str, dict[str, Series]] = {name: {} for name in points}
        for name, splits in points.items():
            for split in in_order(splits):
                values, *axes = np.array(splits[split], np.float64).T
                series[name][split] = Series(values, dict(zip(AXES, axes)))
        return series

    def reached(self, axis: str) -> float | None:
        """The last step, epoch or second of the run."""
        value = getattr(self.result, axis)
        return max((row[axis] for row in self.rows), default=None) if value is None else value

    def best(self, metric: str) -> tuple[float, float] | None:
        """(value, step) of the best validation by a metric, the first if several are equal."""
        series = self.series.get(metric.removeprefix("val_"), {}).get("val")
        if series is None or not np.isfinite(series.values).any():
            return None
        own = self.config.checkpoint
        try:
            mode = direction(metric, own.get("mode", "auto") if metric == own.get("metric") else "auto")
        except ConfigError:
            return None  # neither a low nor a high value is known to be better
        at = (np.nanargmax if mode == "max" else np.nanargmin)(series.values)
        return float(series.values[at]), float(series.axes["step"][at])

    def rate(self) -> tuple[str, float] | None:
        """(unit, median per second) of the first logged rate."""
        for name, splits in self.series.items():
            if name.endswith("_per_second") and "train" in splits:
                return name.removesuffix("_per_second"), float(np.median(splits["train"].values))
        return None


def load(directory: Path, name: str) -> Run:
    """Reads a run directory; any file may be missing, but a broken one raises `DataError`."""
    if not directory.is_dir():
        raise DataError(f"there is no run directory {directory}")
    files, sections, notes = {}, {}, []
    try:
        for kind in (Config, Result, Environment):
            path = directory / f"{kind.__name__.lower()}.json"
            if path.exists():
                files[path.name] = read_json(path, MAX_JSON_BYTES)
            sections[path.stem] = kind.model_validate(files.get(path.name, {}))
        path = directory / "metrics.jsonl"
        rows = metrics.read(path) if path.exists() else []
        pictures = _read_pictures(directory / "images", notes)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {error.filename or directory}: {error.strerror or error}") from error
    rows.sort(key=lambda row: row["step"])
    return Run(name, files, **sections, rows=rows, pictures=pictures, notes=notes)


def _read_pictures(directory: Path, notes: list[str]) -> list[Picture]:
    """The PNG and GIF files; heading and caption are the PNG's `Title` and `Description`."""
    from PIL import Image

    pictures, size = [], 0
    for file in sorted(f for f in directory.glob("*") if f.suffix.lower() in (".png", ".gif")):
        if not file.is_file():
            continue
        size += file.stat().st_size
        if size > MAX_IMAGE_BYTES:
            notes.append(
                f"Only {MAX_IMAGE_BYTES >> 20} MiB of images are shown: {file.name} and later are left out."
            )
            break
        content = file.read_bytes()
        try:
            image = Image.open(io.BytesIO(content), formats=["PNG", "GIF"])  # reads only the header
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            notes.append(f"{file.name} is not a PNG or GIF file and is left out: {first_line(error)}.")
            continue
        width, height = image.size
        caption = str(image.info.get("Description", file.name)).splitlines()
        pictures.append(
            Picture(
                title=str(image.info.get("Title", "Images"))[:MAX_TEXT],
                caption=[line[:MAX_TEXT] for line in caption[:MAX_TEXT]],
                uri=f"data:{image.get_format_mimetype()};base64,{base64.b64encode(content).decode()}",
                layout="tile" if max(width, height) <= TILE_PIXELS else "wide" if width > 2 * height else "",
            )
        )
    return pictures


def shared_directory(directories: Sequence[Path]) -> Path:
    """The innermost directory that contains all of the directories."""
    return Path(os.path.commonpath([path.resolve().parent for path in directories]))


def in_order(splits: Iterable[str]) -> list[str]:
    """Train, val and test first, then any other split by name."""
    return sorted(splits, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))


def splits_of(runs: Sequence[Run]) -> list[str]:
    """All logged splits."""
    return in_order({split for run in runs for splits in run.series.values() for split in splits})


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """All logged metrics: loss and accuracy first, learning rate and rates last."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    places = {"loss": 0, "accuracy": 1, "learning_rate": 3}
    return sorted(names, key=lambda name: 4 if name.endswith("_per_second") else places.get(name, 2))
