"""A run, or several, as one HTML page with plots that needs nothing but a browser.

The launcher calls `write` at the end of every run, also one that stopped early or failed; the
parity command calls `write_parity`; by hand it is `python -m blacksmith.report RUN [RUN ...]`. The
page carries plotly.js, its data and its images inside itself and forbids itself every request, so
it can be opened from disk, attached to a message or archived.
"""

import argparse
import base64
import contextlib
import dataclasses
import datetime
import functools
import html
import itertools
import json
import math
import os
import re
import shlex
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith.errors import DataError, UserError

# Mid-tones that keep their contrast on the light and on the dark page.
PALETTE = (
    "#3b7dd8",
    "#e0803a",
    "#2f9e73",
    "#b657c4",
    "#d6455d",
    "#179fb5",
    "#b08a14",
    "#7a6ff0",
    "#7d8793",
)
FIRST_METRICS = ("loss", "accuracy")
LAST_METRICS = ("learning_rate", "examples_per_second", "tokens_per_second", "rays_per_second")
ACRONYMS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}
RATES = {"examples_per_second": "Examples/s", "tokens_per_second": "Tokens/s", "rays_per_second": "Rays/s"}
HIGHER_IS_BETTER = ("accuracy", "f1", "psnr", "ssim")
NOT_FINITE = ("nan", "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity")
AXES = ("step", "epoch", "seconds")
NO_METRICS = (*AXES, "split")
MAX_POINTS = 2000  # per curve; an SVG path with more is slow and shows nothing new
MAX_WORST = 60
WORST_ARRAYS = ("images", "labels", "predictions", "probabilities")
MAX_GALLERY_BYTES = 32 * 2**20
IMAGE_TYPES = {".png": ("image/png", b"\x89PNG\r\n"), ".gif": ("image/gif", b"GIF8")}
SPLIT_STYLES = {
    "train": {"mode": "lines"},
    "val": {"mode": "lines+markers", "dash": "dash", "symbol": "circle"},
    "test": {"mode": "markers", "symbol": "diamond"},
}
OTHER_SPLIT_STYLE = {"mode": "lines+markers", "dash": "dot", "symbol": "square"}


def write(run_directory: Path) -> Path:
    """Write `report.html` into a run directory, whatever of the run is there.

    Args:
        run_directory: the directory of one run; any of its files may be missing.

    Returns:
        The path of the page; it is replaced atomically.

    Raises:
        DataError: the directory does not exist, one of its files is broken, or it cannot be
            written to.
    """
    run_directory = Path(run_directory)
    page = _run_page(_load_run(run_directory, run_directory.resolve().name))
    return _write_page(run_directory / "report.html", page)


def write_comparison(output: Path, run_directories: Sequence[Path]) -> Path:
    """Write one page that overlays the curves of several runs and compares their results.

    Args:
        output: the file to write.
        run_directories: the directories of the runs, in the order of the table and the colours.

    Returns:
        `output`; it is replaced atomically.

    Raises:
        DataError: a directory does not exist, a file is broken, or `output` cannot be written.
    """
    paths = [Path(path) for path in run_directories]
    runs = [_load_run(path, name) for path, name in zip(paths, _run_names(paths), strict=True)]
    return _write_page(Path(output), _comparison_page(runs))


def write_parity(
    output: Path,
    rows: list[dict[str, Any]],
    curves: dict[str, list[float]],
    reference: str,
    summary: dict[str, Any],
) -> Path:
    """Write the page of a parity check: the verdict, the curves, their differences, the table.

    Args:
        output: the file to write.
        rows: the table, one dict a row with the same keys; a value is a str, number or bool.
        curves: run name -> loss at each step, the first element being that of step 1.
        reference: the run in `curves` that the others are held against.
        summary: `passed` (bool), `title` (str) and `notes` (list of str).

    Returns:
        `output`; it is replaced atomically.

    Raises:
        ValueError: `reference` is not in `curves`.
        DataError: `output` cannot be written.
    """
    if reference not in curves:
        raise ValueError(f"reference {reference!r} is not one of the curves: {sorted(curves)}")
    return _write_page(Path(output), _parity_page(rows, curves, reference, summary))


# ---------------------------------------------------------------------------------------------
# Reading a run directory
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Series:
    """One metric of one split.

    `values` and each of `axes` run in parallel, None where not finite, thinned to what a screen
    can show; `recorded` counts them before. `finite` (step, value) is complete, and so are the
    steps `not_finite_at`.
    """

    values: list[float | None]
    axes: dict[str, list[float | None]]
    recorded: int
    finite: list[tuple[float, float]]
    not_finite_at: list[float]


@dataclasses.dataclass
class _Run:
    """What a run directory holds, as far as it is there."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    worst: dict[str, np.ndarray] | None
    images: list[tuple[str, str]]
    present: list[str]
    missing: list[str]
    notes: list[str]

    @property
    def test(self) -> dict[str, Any]:
        return _section(self.result, "test")

    @property
    def experiment(self) -> str:
        return str(_section(self.config, "run").get("experiment") or self.name)

    @property
    def backend(self) -> str | None:
        return _text_or_none(_section(self.config, "run").get("backend"))

    @property
    def status(self) -> str:
        return str(self.result.get("status") or "unfinished")

    @functools.cached_property
    def series(self) -> dict[str, dict[str, _Series]]:
        """Metric -> split -> series; metrics as first recorded, train, val and test first."""
        recorded: dict[str, dict[str, tuple[list, list]]] = {}
        for row in self._placed():
            split = str(row.get("split", "train"))
            for key, value in row.items():
                if key not in NO_METRICS and (number := _number(value)) is not None:
                    rows, values = recorded.setdefault(key, {}).setdefault(split, ([], []))
                    rows.append(row)
                    values.append(number)
        return {
            metric: {split: _series(*splits[split]) for split in _in_order(splits)}
            for metric, splits in recorded.items()
        }

    def _placed(self) -> list[dict[str, Any]]:
        """The rows; the last of the test, which is written at the end, where the tested checkpoint was."""
        tested = re.fullmatch(r"step_(\d+)", str(self.result.get("tested_checkpoint")))
        tests = [index for index, row in enumerate(self.rows) if row.get("split") == "test"]
        if not tested or not tests:
            return self.rows
        there = {row.get("step"): row for row in self.rows if row.get("split") == "val"}.get(int(tested[1]))
        if there is None:
            return self.rows
        rows = list(self.rows)
        rows[tests[-1]] = rows[tests[-1]] | {axis: there[axis] for axis in AXES if axis in there}
        return rows

    def finite(self, split: str, metric: str) -> list[tuple[float, float]]:
        """(step, value) of the finite values of a metric, empty where there are none."""
        series = self.series.get(metric, {}).get(split)
        return series.finite if series else []


def _load_run(directory: Path, name: str) -> _Run:
    """Reads a run directory; what is missing is listed, what is broken raises DataError."""
    if not directory.is_dir():
        raise DataError(f"there is no run directory {directory}")
    notes: list[str] = []
    readers: dict[str, Callable[[Path], Any]] = {
        "config.json": _read_object,
        "environment.json": _read_object,
        "metrics.jsonl": lambda path: _read_metrics(path, notes),
        "result.json": _read_object,
        "worst.npz": _read_worst,
        "images": lambda path: _read_images(path, notes),
    }
    content = {}
    for file_name, reader in readers.items():
        path = directory / file_name
        if not path.exists():
            continue
        try:
            content[file_name] = reader(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return _Run(
        name=name,
        config=content.get("config.json", {}),
        environment={k: v for k, v in content.get("environment.json", {}).items() if k != "previous"},
        result=content.get("result.json", {}),
        rows=content.get("metrics.jsonl", []),
        worst=content.get("worst.npz"),
        images=content.get("images", []),
        present=[file_name for file_name in readers if file_name in content],
        missing=[file_name for file_name in readers if file_name not in content],
        notes=notes,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__} where a JSON object belongs")
    return value


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows in the order of their steps; a last line that was cut off is left out and noted."""
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == numbered[-1][0]:
                notes.append(f"The last line of {path.name} is cut off and was left out.")
                break
            raise DataError(f"{path} line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not _is_finite(_number(row.get("step"))):
            raise DataError(f"{path} line {number} is not an object with a number `step`")
        rows.append(row)
    return sorted(rows, key=lambda row: _number(row["step"]))


def _read_worst(path: Path) -> dict[str, np.ndarray]:
    """`images` [k, height, width] or [k, height, width, 3], and three arrays [k]."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in WORST_ARRAYS}
    except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not an archive of {', '.join(WORST_ARRAYS)}") from error
    images = arrays["images"]
    shape_is_right = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if images.dtype != np.uint8 or not shape_is_right or 0 in images.shape[1:]:
        raise DataError(f"{path}: images are {images.dtype} {images.shape}, must be uint8 [k, height, width]")
    for name in WORST_ARRAYS[1:]:
        kinds = "f" if name == "probabilities" else "iu"
        if arrays[name].shape != images.shape[:1] or arrays[name].dtype.kind not in kinds:
            raise DataError(
                f"{path}: {name} are {arrays[name].dtype} {arrays[name].shape}, must be "
                f"{'floats' if kinds == 'f' else 'integers'}, one for each of {len(images)} images"
            )
    return arrays


def _read_images(path: Path, notes: list[str]) -> list[tuple[str, str]]:
    """(file name, data URI) of every PNG and GIF in the directory, in natural order."""
    files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_TYPES]
    # Numbers padded, so that "step_9.png" comes before "step_10.png".
    files.sort(key=lambda file: re.sub(r"\d+", lambda number: number[0].zfill(12), file.name))
    images, size, left_out = [], 0, []
    for file in files:
        size += file.stat().st_size
        if size > MAX_GALLERY_BYTES:
            left_out.append(file.name)
            continue
        media_type, magic = IMAGE_TYPES[file.suffix.lower()]
        content = file.read_bytes()
        if not content.startswith(magic):
            raise DataError(f"{file} is not a {file.suffix[1:].upper()} file")
        images.append((file.name, _data_uri(media_type, content)))
    if left_out:
        notes.append(
            f"The gallery ends at {MAX_GALLERY_BYTES >> 20} MiB; "
            f"{len(left_out)} images are left out, from {left_out[0]} on."
        )
    return images


def _run_names(paths: Sequence[Path]) -> list[str]:
    """The paths without the part that all share: the shortest names that tell the runs apart."""
    resolved = [path.resolve() for path in paths]
    shared = Path(os.path.commonpath([path.parent for path in resolved]))
    return [path.relative_to(shared).as_posix() for path in resolved]


def _section(value: dict[str, Any], key: str) -> dict[str, Any]:
    section = value.get(key)
    return section if isinstance(section, dict) else {}


def _number(value: object) -> float | int | None:
    """The number that a JSON value stands for ("NaN" and "-Infinity" do too), or None."""
    if isinstance(value, bool | np.bool):
        return None
    if isinstance(value, int | float | np.number):
        return value
    if isinstance(value, str) and value.lower() in NOT_FINITE:
        return float(value)
    return None


def _is_finite(value: float | int | None) -> bool:
    return value is not None and math.isfinite(value)


def _metric_names(runs: Iterable[_Run]) -> list[str]:
    """Every metric of the runs: loss and accuracy first, rates last, as recorded in between."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    middle = [name for name in names if name not in FIRST_METRICS + LAST_METRICS]
    return [
        *(name for name in FIRST_METRICS if name in names),
        *middle,
        *(name for name in LAST_METRICS if name in names),
    ]


def _in_order(splits: Iterable[str]) -> list[str]:
    """Train, val and test first, then any other split by name."""
    known = list(SPLIT_STYLES)
    return sorted(splits, key=lambda s: (known.index(s) if s in known else len(known), s))


def _series(rows: list[dict[str, Any]], values: list[float]) -> _Series:
    kept = _thin(values, MAX_POINTS)
    axes = {axis: [_number(rows[index].get(axis)) for index in kept] for axis in AXES}
    axes = {axis: xs for axis, xs in axes.items() if any(map(_is_finite, xs))}
    steps = [_number(row["step"]) for row in rows]
    return _Series(
        values=[values[index] if math.isfinite(values[index]) else None for index in kept],
        axes={axis: [x if _is_finite(x) else None for x in xs] for axis, xs in axes.items()},
        recorded=len(values),
        finite=[(s, value) for s, value in zip(steps, values) if math.isfinite(value)],
        not_finite_at=[s for s, value in zip(steps, values) if not math.isfinite(value)],
    )


def _thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices of at most `limit` values that keep the ends and each stretch's extremes and gaps."""
    if len(values) <= limit:
        return list(range(len(values)))
    array = np.array(values, dtype=np.float64)
    finite = np.isfinite(array)
    kept = {0, len(values) - 1}
    bounds = np.linspace(0, len(values), limit // 3).astype(int)
    for start, stop in itertools.pairwise(bounds):
        known = start + np.flatnonzero(finite[start:stop])
        if len(known):
            kept |= {known[array[known].argmin()], known[array[known].argmax()]}
        if len(known) < stop - start:
            kept.add(start + finite[start:stop].argmin())
    return sorted(int(index) for index in kept)


# ---------------------------------------------------------------------------------------------
# Key numbers
# ---------------------------------------------------------------------------------------------


def _best_validation(run: _Run) -> tuple[str, float | None, float | None]:
    """(metric, value, step) of the best validation; loss where nothing better was measured."""
    for metric in HIGHER_IS_BETTER:
        if column := run.finite("val", metric):
            step, value = max(column, key=lambda point: point[1])
            return metric, value, step
    if column := run.finite("val", "loss"):
        step, value = min(column, key=lambda point: point[1])
        return "loss", value, step
    final = _section(run.result, "final")
    for metric in (*HIGHER_IS_BETTER, "loss"):
        if _is_finite(value := _number(final.get(f"val_{metric}"))):
            return metric, value, None
    return ("accuracy" if "accuracy" in run.series else "loss"), None, None


def _progress(run: _Run, key: str) -> float | int | None:
    """`step`, `epoch` or `seconds` that the run came to."""
    value = _number(run.result.get(key))
    if value is None:
        recorded = [number for row in run.rows if _is_finite(number := _number(row.get(key)))]
        value = max(recorded, default=None)
    return value


def _rate(run: _Run) -> tuple[str, float | None]:
    """How fast it trained: what is counted, and the result's number or the median of those logged."""
    for name, label in RATES.items():
        value = _number(run.result.get(name))
        if value is None and (column := run.finite("train", name)):
            value = float(np.median([rate for _, rate in column]))
        if value is not None:
            return label, value
    return "Examples/s", None


def _test_metrics(run: _Run) -> dict[str, float | None]:
    """Numbers of the test, accuracy and loss first; None each where there was no test."""
    names = [name for name in run.test if _number(run.test[name]) is not None]
    if not names:
        names = ["accuracy", "loss"] if "accuracy" in run.series else ["loss"]
    names.sort(key=lambda name: {"accuracy": 0, "loss": 1}.get(name, 2))
    return {name: _number(run.test.get(name)) for name in names}


def _key_numbers(run: _Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of each card."""
    checkpoint = _text_or_none(run.result.get("tested_checkpoint"))
    cards = [
        (f"Test {_words(name)}", _metric_text(name, value), checkpoint if run.test else "no test")
        for name, value in _test_metrics(run).items()
    ]
    metric, value, step = _best_validation(run)
    cards.append(
        (
            f"Best val {_words(metric)}",
            _metric_text(metric, value),
            f"at step {_number_text(step)}" if step is not None else "",
        )
    )
    epoch = _progress(run, "epoch")
    label, rate = _rate(run)
    cards += [
        (
            "Steps",
            _number_text(_progress(run, "step")),
            f"{epoch:.4g} epochs" if _is_finite(epoch) else "",
        ),
        ("Wall time", _duration_text(_progress(run, "seconds")), ""),
        (label, _rate_text(rate), ""),
        _parameters_card(run),
    ]
    return [(label, text, remark or "") for label, text, remark in cards]


def _parameters_card(run: _Run) -> tuple[str, str, str]:
    count, trained = (_number(run.result.get(name)) for name in ("parameters", "trained_parameters"))
    # Eight digits and more do not fit a card.
    text = f"{count / 1e6:,.1f}M" if _is_finite(count) and count >= 1e7 else _number_text(count)
    fewer = _is_finite(trained) and _is_finite(count) and trained < count
    return "Parameters", text, f"{_number_text(trained)} trained" if fewer else ""


def _remarks(run: _Run) -> list[str]:
    """What the reader must know before believing the page: what is missing, what went wrong."""
    remarks = []
    if "result.json" in run.missing:
        remarks.append("There is no result.json: the run is still going or ended without one.")
    elif run.status == "stopped":
        remarks.append("The run was stopped before its end; what follows is as far as it came.")
    if not run.test and "result.json" in run.present:
        remarks.append("result.json has no test: the test set was not evaluated.")
    if "metrics.jsonl" in run.present and not run.rows:
        remarks.append("metrics.jsonl is empty: nothing was logged, so there are no curves.")
    missing = [name for name in run.missing if name not in ("worst.npz", "images", "result.json")]
    if missing:
        remarks.append(f"Not in the run directory: {', '.join(missing)}.")
    for metric in _metric_names([run]):
        for split, series in run.series.get(metric, {}).items():
            if steps := series.not_finite_at:
                remarks.append(
                    f"{_title(metric)} ({split}): {len(steps):,} of "
                    f"{series.recorded:,} values are not finite, first at step "
                    f"{_number_text(steps[0])}; the curve has gaps there."
                )
    return remarks + run.notes


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def _escape(value: object) -> str:
    return html.escape(str(value))


def _text_or_none(value: object) -> str | None:
    return None if value is None or value == "" else str(value)


def _words(name: str) -> str:
    return " ".join(ACRONYMS.get(word, word) for word in name.split("_"))


def _title(name: str) -> str:
    words = _words(name)
    return words[:1].upper() + words[1:]


def _number_text(value: float | int | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(float(value))]
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:,.0f}"


def _is_share(metric: str, values: Iterable[float | None]) -> bool:
    """Whether a metric is better read as a percentage."""
    return "accuracy" in metric and all(0 <= value <= 1 for value in values if _is_finite(value))


def _metric_text(metric: str, value: float | None) -> str:
    if _is_finite(value) and _is_share(metric, [value]):
        return f"{100 * value:.2f} %"
    return _number_text(value)


def _rate_text(value: float | None) -> str:
    return f"{value:,.0f}" if _is_finite(value) and value >= 100 else _number_text(value)


def _duration_text(seconds: float | None) -> str:
    if not _is_finite(seconds):
        return _number_text(seconds)
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _setting_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _started_text(run: _Run) -> str | None:
    started = _text_or_none(run.environment.get("started"))
    if started is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


# ---------------------------------------------------------------------------------------------
# Figures: plotly's JSON, built as plain dicts
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Figure:
    """A panel with one plot. `axes` and `groups`, where given, run in parallel with `data`."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str = ""
    axes: list[dict[str, list[float | None]]] | None = None
    groups: list[list[str]] | None = None
    can_be_log: bool = False
    tall: bool = False


def _line(series: _Series, name: str, color: str, style: dict[str, str], solid: bool) -> dict[str, Any]:
    """One scatter trace; a curve of a single point gets a marker, or nothing would be seen."""
    known = sum(value is not None for value in series.values)
    mode = "lines+markers" if style["mode"] == "lines" and known < 2 else style["mode"]
    return {
        "type": "scatter",
        "mode": mode,
        "name": html.escape(name, quote=False),  # plotly reads a subset of HTML in names
        "y": series.values,
        "line": {"color": color, "width": 1.8, "dash": "solid" if solid else style.get("dash")},
        "marker": {
            "color": color,
            "size": 10 if style["mode"] == "markers" else 5,
            "symbol": style.get("symbol", "circle"),
        },
    }


def _metric_figures(runs: Sequence[_Run]) -> list[_Figure]:
    """One figure for each metric with every split of every run in it."""
    figures = []
    alone = len(runs) == 1
    splits = _splits(runs)
    for metric in _metric_names(runs):
        if not any(set(run.series.get(metric, {})) - {"test"} for run in runs):
            continue  # a number of the final test alone is among the key numbers
        data, axes, groups, values = [], [], [], []
        thinned = 0
        for run_index, run in enumerate(runs):
            for split, series in run.series.get(metric, {}).items():
                color = _color(splits.index(split) if alone else run_index)
                style = SPLIT_STYLES.get(split, OTHER_SPLIT_STYLE)
                name = split if alone else f"{run.name} · {split}"
                data.append(_line(series, name, color, style, solid=alone))
                axes.append(series.axes)
                groups.append([f"split {split}"] if alone else [f"run {run_index}", f"split {split}"])
                values += series.values
                if series.recorded > len(series.values):
                    thinned = max(thinned, series.recorded)
        figures.append(
            _Figure(
                title=_title(metric),
                data=data,
                layout={"yaxis": _value_axis(metric, values), "hovermode": _hover_mode(data)},
                caption=f"Drawn are the extremes of each stretch of {thinned:,} points." if thinned else "",
                axes=axes,
                groups=groups,
                can_be_log="loss" in metric and all(value > 0 for value in values if value is not None),
            )
        )
    return figures


def _splits(runs: Sequence[_Run]) -> list[str]:
    """The splits that were logged: train, val, test, then any other."""
    return _in_order({split for run in runs for splits in run.series.values() for split in splits})


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _hover_mode(data: list[dict[str, Any]]) -> str:
    """One box for every curve, until there are so many that the box would hide the plot."""
    if len(data) <= 6:
        return "x unified"
    for trace in data:
        trace["hovertemplate"] = "%{fullData.name}<br>%{y} at %{x}<extra></extra>"
    return "closest"


def _value_axis(metric: str, values: list[float | None]) -> dict[str, Any]:
    if _is_share(metric, values):
        return {"tickformat": "~%", "hoverformat": ".2%"}
    if "per_second" in metric:
        return {"tickformat": "~s", "hoverformat": ",.0f", "rangemode": "tozero"}
    return {"hoverformat": ".4~g", "exponentformat": "power", "minexponent": 5}


def _confusion_figure(run: _Run) -> _Figure | None:
    """Counts, with hits and errors on colour scales of their own so that errors are seen."""
    matrix = run.test.get("confusion_matrix")
    if not matrix:
        return None
    try:
        counts = np.array(matrix, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{run.name}: test.confusion_matrix in result.json: {error}") from error
    is_square = counts.ndim == 2 and counts.shape[0] == counts.shape[1]
    if not is_square or not np.isfinite(counts).all():
        raise DataError(f"{run.name}: test.confusion_matrix in result.json is not a square table of counts")
    size = len(counts)
    names, labels = _class_labels(run, size)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    is_hit = np.eye(size, dtype=bool)
    worst = float(share[~is_hit].max(initial=0)) or 1.0
    data = []
    for name, mask, color, top in (
        ("correct", is_hit, "59,125,216", 1.0),
        ("error", ~is_hit & (counts > 0), "224,112,40", worst),
    ):
        data.append(
            {
                "type": "heatmap",
                "name": name,
                "x": list(range(size)),
                "y": list(range(size)),
                "z": [[s if m else None for s, m in zip(*row)] for row in zip(share, mask)],
                "text": [[f"{c:,.0f}" if m else "" for c, m in zip(*r)] for r in zip(counts, mask)],
                "customdata": [[[t, p] for p in names] for t in names],
                "texttemplate": "%{text}" if size <= 25 else "",
                "hovertemplate": "true %{customdata[0]}, predicted %{customdata[1]}<br>"
                "%{text} (%{z:.2%} of the class)<extra></extra>",
                "hoverongaps": False,
                "zmin": 0,
                "zmax": top,
                "colorscale": [[0, f"rgba({color},0.10)"], [1, f"rgba({color},0.62)"]],
                "showscale": False,
                "xgap": 2,
                "ygap": 2,
            }
        )
    ticks = {
        "tickvals": list(range(size)),
        "ticktext": labels,
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }
    errors = int(counts[~is_hit].sum())
    return _Figure(
        title="Confusion matrix",
        data=data,
        layout={
            "xaxis": {"title": {"text": "predicted"}, **ticks},
            "yaxis": {"title": {"text": "true"}, "autorange": "reversed", **ticks},
            "hovermode": "closest",
        },
        caption=f"{errors:,} errors in {int(counts.sum()):,} examples. Orange is the share of "
        f"the true class that went astray; the strongest cell is {worst:.1%}."
        if errors
        else f"No errors in {int(counts.sum()):,} examples.",
        tall=True,
    )


def _class_labels(run: _Run, size: int) -> tuple[list[str], list[str]]:
    """The names of the classes, and the same cut to what an axis has room for."""
    names = run.test.get("class_names")
    if not isinstance(names, list) or len(names) != size:
        names = range(size)
    names = [str(name) for name in names]
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    return [html.escape(n, quote=False) for n in names], [html.escape(n, quote=False) for n in short]


def _per_class(run: _Run) -> list[float | None]:
    values = run.test.get("per_class_accuracy")
    if not isinstance(values, list):
        return []
    numbers = [_number(value) for value in values]
    return [value if _is_finite(value) else None for value in numbers]


def _axis_start(values: Iterable[float | None]) -> float:
    """Where an accuracy axis starts: cut where all are high, or their differences vanish."""
    lowest = min((value for value in values if value is not None), default=0.0)
    return math.floor((lowest - 0.02) * 20) / 20 if lowest > 0.6 else 0.0


def _per_class_figure(run: _Run) -> _Figure | None:
    values = _per_class(run)
    if not values:
        return None
    start = _axis_start(values)
    positions = list(range(len(values)))
    names, labels = _class_labels(run, len(values))
    return _Figure(
        title="Accuracy by class",
        data=[
            {
                "type": "bar",
                "orientation": "h",
                "x": values,
                "y": positions,
                "text": [f"{value:.1%}" if value is not None else "–" for value in values],
                "textposition": "outside",
                "cliponaxis": False,
                "customdata": names,
                "hovertemplate": "class %{customdata}: %{x:.2%}<extra></extra>",
                "marker": {"color": _color(0)},
            }
        ],
        layout={
            "xaxis": {"range": [start, 1.0001], "tickformat": "~%", "fixedrange": True},
            "yaxis": {
                "title": {"text": "class"},
                "tickvals": positions,
                "ticktext": labels,
                "autorange": "reversed",
                "showgrid": False,
                "zeroline": False,
            },
            "bargap": 0.25,
            "margin": {"r": 52},  # the label of a full bar
            "hovermode": "closest",
        },
        caption=f"The axis starts at {start:.0%}." if start else "",
        tall=True,
    )


def _per_class_comparison(runs: Sequence[_Run]) -> _Figure | None:
    """Dots instead of bars: with several runs only the differences matter."""
    tested = [(index, run, _per_class(run)) for index, run in enumerate(runs)]
    tested = [(index, run, values) for index, run, values in tested if values]
    if not tested:
        return None
    size = max(len(values) for _, _, values in tested)
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": html.escape(run.name, quote=False),
            "x": list(range(len(values))),
            "y": values,
            "marker": {"color": _color(index), "size": 9, "opacity": 0.85},
        }
        for index, run, values in tested
    ]
    return _Figure(
        title="Test accuracy by class",
        data=data,
        layout={
            "xaxis": {
                "title": {"text": "class"},
                "tickvals": list(range(size)),
                "ticktext": _class_labels(tested[0][1], size)[1],
            },
            "yaxis": {"tickformat": "~%", "hoverformat": ".2%"},
            "hovermode": _hover_mode(data),
        },
        groups=[[f"run {index}"] for index, _, _ in tested],
    )


def _parity_figures(curves: dict[str, list[float]], reference: str) -> list[_Figure]:
    """The losses, and on a logarithmic axis how far each run is from the reference."""
    rows = [{"step": step} for step in range(1, 1 + max(map(len, curves.values())))]
    losses = _Figure("Loss", [], {}, axes=[], groups=[])
    differences = _Figure(f"|difference| to {reference}", [], {}, axes=[], groups=[])
    # A step without a number in both is NaN here, so it is a gap and never counts as equal.
    gaps = {
        name: np.abs(np.subtract(*(np.array(c[: min(map(len, pair))], float) for c in pair)))
        for name, curve in curves.items()
        if name != reference and (pair := (curve, curves[reference]))
    }
    everything_is_equal = not any(gap.any() for gap in gaps.values())
    for index, (name, curve) in enumerate(curves.items()):
        style = {"mode": "lines", "dash": ("solid", "dash", "dot", "dashdot")[index % 4]}
        series = _series(rows, [float(value) for value in curve])
        losses.data.append(_line(series, name, _color(index), style, solid=False))
        losses.axes.append(series.axes)
        losses.groups.append([f"run {index}"])
        if name in gaps:
            gap = gaps[name]
            # A logarithmic axis has no zero: equal steps are gaps in it, and counted below.
            drawn = gap if everything_is_equal else np.where(gap == 0, np.nan, gap)
            series = _series(rows, drawn.tolist())
            trace = _line(series, name, _color(index), {"mode": "lines+markers"}, solid=True)
            trace["marker"]["size"] = 3
            trace["line"]["width"] = 1
            differences.data.append(trace)
            differences.axes.append(series.axes)
            differences.groups.append([f"run {index}"])
    finite = [value for trace in losses.data for value in trace["y"] if value is not None]
    losses.can_be_log = bool(finite) and min(finite) > 0
    losses.layout = {
        "yaxis": {"hoverformat": ".8~g", "exponentformat": "power"},
        "hovermode": _hover_mode(losses.data),
    }
    axis = {"hoverformat": ".3~e", "exponentformat": "e"}
    if not everything_is_equal:
        axis |= {"type": "log", "dtick": 1}
    differences.layout = {"yaxis": axis, "hovermode": _hover_mode(differences.data)}
    equal = [
        f"{name} is equal at {int((gap == 0).sum()):,} of {len(gap):,} steps" for name, gap in gaps.items()
    ]
    differences.caption = "; ".join(equal) + "."
    return [losses, differences] if gaps else [losses]


# ---------------------------------------------------------------------------------------------
# Markup: every function below returns HTML whose text is escaped
# ---------------------------------------------------------------------------------------------


class _Page:
    """Collects the body of a page and the figures its script has to draw."""

    def __init__(self) -> None:
        self.body: list[str] = []
        self.figures: list[dict[str, Any]] = []

    def add(self, *markup: str) -> None:
        self.body.extend(markup)

    def panels(self, figures: Iterable[_Figure | None]) -> None:
        """Adds a grid of panels, two columns where there is room."""
        self.add('<div class="grid">')
        for figure in figures:
            if figure is None:
                continue
            identifier = f"figure-{len(self.figures)}"
            self.figures.append(
                {
                    "id": identifier,
                    "data": figure.data,
                    "layout": figure.layout,
                    "axes": figure.axes,
                    "groups": figure.groups,
                    "canBeLog": figure.can_be_log,
                }
            )
            caption = f'<p class="caption">{_escape(figure.caption)}</p>' if figure.caption else ""
            size = " tall" if figure.tall else ""
            self.add(
                f'<figure class="panel"><figcaption><h3>{_escape(figure.title)}</h3>{caption}'
                f'</figcaption><div class="plot{size}" id="{identifier}" role="img" '
                f'aria-label="plot: {_escape(figure.title)}"></div></figure>'
            )
        self.add("</div>")

    def controls(self, legend: list[tuple[str, str, str]], runs: Sequence[_Run] = ()) -> None:
        """Adds the legend that all figures share, and what the axes show.

        Args:
            legend: (group, label, CSS class or colour of the swatch) of each button.
            runs: where given, an axis is offered if every row of every run has it.
        """
        self.add('<div class="controls"><div class="legend" role="group" aria-label="shown curves">')
        for group, label, look in legend:
            swatch = f'style="--swatch:{look}"' if look.startswith("#") else f'data-split="{look}"'
            self.add(
                f'<button type="button" class="key" data-group="{_escape(group)}" '
                f'aria-pressed="true"><i {swatch}></i>{_escape(label)}</button>'
            )
        self.add("</div>")
        rows = [row for run in runs for row in run.rows]
        offered = [axis for axis in AXES if all(_is_finite(_number(row.get(axis))) for row in rows)]
        self.add('<div class="choices">')
        if runs and len(offered) > 1:
            self.add('<div class="choice" role="group" aria-label="horizontal axis">')
            for axis in offered:
                pressed = "true" if axis == "step" else "false"
                self.add(f'<button type="button" data-axis="{axis}" aria-pressed="{pressed}">{axis}</button>')
            self.add("</div>")
        self.add(
            '<div class="choice"><button type="button" data-log aria-pressed="false" '
            'title="logarithmic axis for losses">log loss</button></div></div></div>'
        )

    def render(self, title: str) -> str:
        from plotly.io.json import to_json_plotly
        from plotly.offline import get_plotlyjs

        scripts = ""
        if self.figures:
            # This encoder writes <, > and / as escapes, so no string can end the script element.
            figures = to_json_plotly(self.figures, engine="json")
            scripts = (
                "<noscript><p>The plots of this page are drawn by JavaScript.</p></noscript>"
                f"<script>{get_plotlyjs()}</script>"
                f'<script type="application/json" id="figures">{figures}</script>'
                f"<script>{_SCRIPT}</script>"
            )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{_escape(title)}</title><style>{_STYLE}</style></head>"
            f"<body><main>{''.join(self.body)}</main>{scripts}</body></html>\n"
        )


def _badge(status: str, text: str | None = None) -> str:
    known = {"done": "good", "passed": "good", "stopped": "fair", "failed": "bad"}
    return f'<span class="badge {known.get(status, "unknown")}">{_escape(text or status)}</span>'


def _chips(items: Iterable[tuple[str, object]]) -> str:
    return "".join(
        f'<span class="chip"><b>{_escape(label)}</b> {_escape(value)}</span>'
        for label, value in items
        if value not in (None, "")
    )


def _header(eyebrow: str, title: str, badge: str, chips: str, date: str | None = None) -> str:
    when = f"<time>{_escape(date)}</time>" if date else ""
    return (
        f'<header><div class="eyebrow"><span>{_escape(eyebrow)}</span>{when}</div>'
        f'<h1>{_escape(title)} {badge}</h1><div class="chips">{chips}</div></header>'
    )


def _heading(title: str) -> str:
    return f"<h2>{_escape(title)}</h2>"


def _curves_heading() -> str:
    return "<h2>Curves <small>drag to zoom, double-click to reset</small></h2>"


def _notice(lines: Sequence[str], kind: str = "") -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_escape(line)}</li>" for line in lines)
    return f'<ul class="notice {kind}">{items}</ul>'


def _error(run: _Run) -> str:
    message = _text_or_none(run.result.get("error"))
    if message is None:
        return ""
    return f'<div class="notice bad"><b>The run failed</b><pre>{_escape(message)}</pre></div>'


def _cards(cards: Iterable[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<div class="card"><dt>{_escape(label)}</dt><dd>{_escape(value)}'
        f"<small>{_escape(remark)}</small></dd></div>"
        for label, value, remark in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _settings(sections: dict[str, Any]) -> str:
    """A small table for each section; settings outside a section come first, as `general`."""
    general = {key: value for key, value in sections.items() if not isinstance(value, dict)}
    tables = {"general": general} if general else {}
    tables |= {key: value for key, value in sections.items() if isinstance(value, dict) and value}
    markup = []
    for title, settings in tables.items():
        rows = "".join(
            f'<tr><th scope="row">{_escape(key)}</th><td>{_escape(_setting_text(value))}</td></tr>'
            for key, value in _flatten(settings).items()
        )
        markup.append(
            f'<section class="panel"><h3>{_escape(title)}</h3>'
            f'<table class="settings">{rows}</table></section>'
        )
    return f'<div class="columns">{"".join(markup)}</div>'


def _wide_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of ready markup that scrolls sideways within its panel; the first column stays."""
    head = "".join(f'<th scope="col">{_escape(title)}</th>' for title in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="panel scroll" tabindex="0"><table class="wide"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _worst_grid(run: _Run) -> str:
    if run.worst is None or not len(run.worst["images"]):
        return ""
    size = len(run.worst["images"])
    names = run.test.get("class_names")
    names = names if isinstance(names, list) else []

    def class_name(index: int) -> str:
        return _escape(names[index] if 0 <= index < len(names) else index)

    items = []
    for image, label, prediction, probability in zip(
        *(run.worst[name][:MAX_WORST] for name in WORST_ARRAYS), strict=True
    ):
        uri = _data_uri("image/png", _png(image))
        true, predicted = class_name(int(label)), class_name(int(prediction))
        small = 0 < probability < 0.001
        chance = f"{probability:.0e}" if small else f"{probability:.3f}"
        items.append(
            f'<figure class="digit"><img src="{uri}" alt="a {true} taken for {predicted}">'
            f'<figcaption><b>{true}</b> → <b class="wrong">{predicted}</b>'
            f"<small>p({true}) {chance}</small></figcaption></figure>"
        )
    shown = f"the first {MAX_WORST} of {size}; " if size > MAX_WORST else ""
    return (
        _heading("Worst-classified test examples")
        + f'<div class="panel"><p class="caption">True → predicted class, {shown}p is the '
        f'probability given to the true class.</p><div class="digits">{"".join(items)}</div></div>'
    )


def _gallery(run: _Run) -> str:
    if not run.images:
        return ""
    items = "".join(
        f'<figure class="panel{" wide" if _is_wide(uri) else ""}"><img src="{uri}" alt="{_escape(name)}">'
        f"<figcaption>{_escape(name)}</figcaption></figure>"
        for name, uri in run.images
    )
    return _heading("Images") + f'<div class="gallery">{items}</div>'


def _is_wide(uri: str) -> bool:
    """Whether a PNG is more than twice as wide as high, by its header."""
    header = base64.b64decode(uri.partition(",")[2][:32])
    if not header.startswith(b"\x89PNG") or len(header) < 24:
        return False
    width, height = struct.unpack(">II", header[16:24])
    return width > 2 * height


def _command(run: _Run) -> str:
    command = run.environment.get("command")
    if not command:
        return ""
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    return _heading("Command") + f'<pre class="panel command">{_escape(command)}</pre>'


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _png(image: np.ndarray) -> bytes:
    """Encodes uint8 [height, width] (grey) or [height, width, 3] (RGB) as PNG."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width = image.shape[:2]
    color_type = 0 if image.ndim == 2 else 2
    rows = image.reshape(height, -1)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)  # 0: the row is stored as it is
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(filtered, 9))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------


def _run_page(run: _Run) -> str:
    page = _Page()
    data = _section(run.environment, "data") or _section(run.result, "data")
    git = _section(run.environment, "git")
    commit = _text_or_none(git.get("commit"))
    if commit:
        commit = commit[:10] + (" (modified)" if git.get("dirty") else "")
    page.add(
        _header(
            f"blacksmith · {run.name}",
            run.experiment,
            _badge(run.status),
            _chips(
                [
                    ("backend", run.backend),
                    ("device", run.environment.get("device")),
                    ("data", data.get("source")),
                    ("seed", _section(run.config, "run").get("seed")),
                    ("commit", commit),
                ]
            ),
            _started_text(run),
        ),
        _error(run),
        _notice(_remarks(run)),
        _cards(_key_numbers(run)),
    )
    if figures := _metric_figures([run]):
        page.add(_curves_heading())
        legend = [(f"split {s}", s, _color(i)) for i, s in enumerate(_splits([run]))]
        page.controls(legend, [run])
        page.panels(figures)
    test_figures = [_confusion_figure(run), _per_class_figure(run)]
    if any(test_figures):
        page.add(_heading("Test"))
        page.panels(test_figures)
    page.add(_worst_grid(run), _gallery(run))
    if run.config:
        page.add(_heading("Configuration"), _settings(run.config))
    if run.result:
        page.add(_heading("Result"), _settings(_result_settings(run)))
    if run.environment:
        environment = {key: value for key, value in run.environment.items() if key != "command"}
        page.add(_heading("Environment"), _settings(environment), _command(run))
    absent = f" Not there: {', '.join(run.missing)}." if run.missing else ""
    read = f"Made from {', '.join(run.present)}." if run.present else "The directory was empty."
    page.add(f"<footer>{_escape(read + absent)}</footer>")
    title = f"{run.experiment} · {run.backend}" if run.backend else run.experiment
    return page.render(f"{title} · {run.name}")


def _result_settings(run: _Run) -> dict[str, Any]:
    """The result without what the page shows better elsewhere."""
    result = {key: value for key, value in run.result.items() if key not in ("error", "test")}
    if run.test:
        shown = ("confusion_matrix", "per_class_accuracy", "class_names")
        result["test"] = {key: value for key, value in run.test.items() if key not in shown}
    return result


def _comparison_page(runs: Sequence[_Run]) -> str:
    page = _Page()
    columns = _comparison_columns(runs)
    shared = [column for column in columns if column.values is None and len(set(column.texts)) == 1]
    page.add(
        _header(
            "blacksmith · comparison",
            f"{len(runs)} runs",
            "",
            _chips((column.title, column.texts[0]) for column in shared),
        ),
        _notice([f"{run.name} failed: {e}" for run in runs if (e := run.result.get("error"))], "bad"),
        _notice([f"{run.name}: {' '.join(notes)}" for run in runs if (notes := _remarks(run))]),
        _comparison_table(runs, [column for column in columns if column not in shared]),
    )
    if figures := _metric_figures(runs):
        page.add(_curves_heading())
        legend = [(f"run {i}", run.name, _color(i)) for i, run in enumerate(runs)]
        splits = _splits(runs)
        if len(splits) > 1:
            looks = [split if split in SPLIT_STYLES else "other" for split in splits]
            legend += [(f"split {s}", s, look) for s, look in zip(splits, looks, strict=True)]
        page.controls(legend, runs)
        page.panels([*figures, _per_class_comparison(runs)])
    configs = [_flatten(run.config) for run in runs]
    page.add(_differences("Configuration", runs, configs))
    environments = [
        _flatten({k: v for k, v in run.environment.items() if k not in ("command", "started")})
        for run in runs
    ]
    page.add(_differences("Environment", runs, environments))
    experiments = dict.fromkeys(run.experiment for run in runs)
    return page.render(f"{', '.join(experiments)} · {len(runs)} runs")


@dataclasses.dataclass
class _Column:
    """One column of the comparison; `values`, where given, are ranked and the best is marked."""

    title: str
    texts: list[str]
    values: list[float | None] | None = None
    higher_is_better: bool = True


def _comparison_columns(runs: Sequence[_Run]) -> list[_Column]:
    """Everything the runs are compared by, as far as it is known."""

    def metric_columns(kind: str, metrics: list[dict[str, float | None]]) -> list[_Column]:
        return [
            _Column(
                f"{kind} {_words(name)}",
                [_metric_text(name, values.get(name)) for values in metrics],
                [values.get(name) for values in metrics],
                name in HIGHER_IS_BETTER,
            )
            for name in dict.fromkeys(name for values in metrics for name in values)
        ]

    rates = [_rate(run)[1] for run in runs]
    columns = [
        _Column("experiment", [run.experiment for run in runs]),
        _Column("backend", [run.backend or "–" for run in runs]),
        _Column("device", [str(run.environment.get("device", "–")) for run in runs]),
        _Column("seed", [str(_section(run.config, "run").get("seed", "–")) for run in runs]),
        *metric_columns("test", [_test_metrics(run) for run in runs]),
        *metric_columns("best val", [dict([_best_validation(run)[:2]]) for run in runs]),
        _Column("steps", [_number_text(_progress(run, "step")) for run in runs]),
        _Column("wall time", [_duration_text(_progress(run, "seconds")) for run in runs]),
        _Column("examples/s", [_rate_text(rate) for rate in rates], rates),
    ]
    parameters = [_number_text(_number(run.result.get("parameters"))) for run in runs]
    columns.append(_Column("parameters", parameters))
    for title, key in (
        ("initial weights", "initial_weights_sha256"),
        ("batch order", "order_sha256"),
    ):
        columns.append(_Column(title, [str(run.result.get(key) or "–")[:12] for run in runs]))
    return [column for column in columns if any(text != "–" for text in column.texts)]


def _comparison_table(runs: Sequence[_Run], columns: Sequence[_Column]) -> str:
    """One row a run; the best of each column is marked where the runs differ."""
    rows = []
    for index, run in enumerate(runs):
        name = _escape(run.name).replace("/", "/<wbr>")
        name = f'<i style="--swatch:{_color(index)}"></i>{name}'
        cells = [name, _badge(run.status)]
        for column in columns:
            known = [value for value in column.values or [] if _is_finite(value)]
            best = (max if column.higher_is_better else min)(known, default=None)
            is_best = len(set(known)) > 1 and column.values[index] == best
            text = _escape(column.texts[index])
            cells.append(f"<b>{text}</b>" if is_best else text)
        rows.append(cells)
    return _wide_table(["run", "status", *(column.title for column in columns)], rows)


def _differences(title: str, runs: Sequence[_Run], settings: list[dict[str, Any]]) -> str:
    """What differs between the runs as a table, what does not behind a fold."""
    keys = list(dict.fromkeys(key for flat in settings for key in flat))
    if not keys:
        return ""
    texts = {key: [_setting_text(flat[key]) if key in flat else "–" for flat in settings] for key in keys}
    differing = [key for key in keys if len(set(texts[key])) > 1]
    same = {key: settings[0][key] for key in keys if key not in differing}
    markup = _heading(title)
    if differing:
        markup += _wide_table(
            ["differs", *(run.name for run in runs)],
            [[_escape(key), *map(_escape, texts[key])] for key in differing],
        )
    if same:
        sections: dict[str, Any] = {}
        for key, value in same.items():
            section, _, name = key.partition(".")
            if name:
                sections.setdefault(section, {})[name] = value
            else:
                sections[key] = value
        markup += (
            f"<details><summary>{len(same)} the same in all runs</summary>{_settings(sections)}</details>"
        )
    return markup


def _parity_page(
    rows: list[dict[str, Any]],
    curves: dict[str, list[float]],
    reference: str,
    summary: dict[str, Any],
) -> str:
    page = _Page()
    passed = bool(summary.get("passed"))
    title = str(summary.get("title") or "Parity")
    notes = [str(note) for note in summary.get("notes") or []]
    page.add(
        _header(
            "blacksmith · parity",
            title,
            _badge("passed" if passed else "failed"),
            _chips([("reference", reference), ("steps", max(map(len, curves.values())))]),
        ),
        _notice(notes, "calm" if passed else "bad"),
    )
    if rows:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_parity_cell(row.get(key)) for key in keys] for row in rows]
        page.add(_wide_table([_words(key) for key in keys], cells))
    page.add(_curves_heading())
    page.controls([(f"run {i}", name, _color(i)) for i, name in enumerate(curves)])
    page.panels(_parity_figures(curves, reference))
    return page.render(f"{title}: {'passed' if passed else 'failed'}")


def _parity_cell(value: object) -> str:
    if isinstance(value, bool | np.bool):
        return _badge("done" if value else "failed", "yes" if value else "no")
    if (number := _number(value)) is not None:
        return _number_text(number) if float(number).is_integer() else _escape(f"{number:.6g}")
    return _escape("–" if value is None else value)


def _write_page(output: Path, page: str) -> Path:
    """Replaces `output` at once, so that no reader ever sees half a page."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(temporary, output)
    except OSError as error:
        raise DataError(f"cannot write the report {output}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return output


# With this the browser itself sees to it that the page asks for nothing from elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--panel:#fff;--ink:#1c2430;--muted:#5d6978;
--line:#e2e6eb;--soft:#f0f2f5;--accent:#2f6fca;--good:#1d7a4f;--good-soft:#e2f3ea;--fair:#8a5a00;
--fair-soft:#fbf0d9;--bad:#b3263c;--bad-soft:#fbe6e9}
@media (prefers-color-scheme:dark){:root{--page:#12161c;--panel:#1a2029;--ink:#e4e9ef;
--muted:#9aa6b4;--line:#2b333e;--soft:#232b35;--accent:#6ea8f5;--good:#69d3a0;--good-soft:#173527;
--fair:#e8b85a;--fair-soft:#3a2e14;--bad:#ff8a9b;--bad-soft:#40191f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:28px 24px 40px}
h1{font-size:28px;line-height:1.25;letter-spacing:-.01em;margin:2px 0 10px;overflow-wrap:anywhere}
h2{font-size:18px;margin:34px 0 12px;letter-spacing:-.005em}
h3{font-size:14px;margin:0;font-weight:600}
.eyebrow{display:flex;flex-wrap:wrap;gap:2px 16px;justify-content:space-between;color:var(--muted);
font-size:13px;overflow-wrap:anywhere}
.chips{display:flex;flex-wrap:wrap;gap:6px}
.chip{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:2px 9px;
font-size:13px;overflow-wrap:anywhere}
.chip b{font-weight:400;color:var(--muted);margin-right:3px}
.badge{display:inline-block;border-radius:99px;padding:2px 11px;font-size:13px;font-weight:600;
line-height:1.5;letter-spacing:0;vertical-align:middle;background:var(--soft);color:var(--muted)}
.badge.good{background:var(--good-soft);color:var(--good)}
.badge.fair{background:var(--fair-soft);color:var(--fair)}
.badge.bad{background:var(--bad-soft);color:var(--bad)}
.notice{margin:16px 0 0;padding:10px 16px;list-style:none;border-radius:8px;font-size:14px;
background:var(--fair-soft);border-left:3px solid var(--fair);overflow-wrap:anywhere}
.notice.calm{background:var(--soft);border-color:var(--line)}
.notice.bad{background:var(--bad-soft);border-color:var(--bad)}
.notice pre{margin:6px 0 0;white-space:pre-wrap;max-height:320px;overflow:auto}
pre,code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px;
margin:0;min-width:0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(172px,1fr));gap:10px;
margin:18px 0 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;
padding:11px 14px 10px;min-width:0}
.card dt{color:var(--muted);font-size:13px}
.card dd{margin:1px 0 0;font-size:23px;font-weight:600;line-height:1.25;letter-spacing:-.01em;
font-variant-numeric:tabular-nums;white-space:nowrap}
.card small{display:block;font-weight:400;letter-spacing:0;white-space:normal}
.card small,.caption,h2 small,footer{color:var(--muted);font-size:12.5px;overflow-wrap:anywhere}
.caption{margin:1px 0 0}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}
.grid>:last-child:nth-child(odd){grid-column:1/-1}
.plot{height:290px;margin:6px -8px -6px}
.plot.tall{height:460px}
.controls{display:flex;flex-wrap:wrap;gap:8px 12px;align-items:center;margin:0 0 12px}
.legend{display:flex;flex-wrap:wrap;gap:6px;flex:1 1 auto;min-width:0}
button{font:inherit;font-size:13px;color:var(--ink);background:var(--panel);cursor:pointer;
border:1px solid var(--line);padding:3px 11px;text-align:left;overflow-wrap:anywhere}
button:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.key{border-radius:6px}
.key[aria-pressed=false]{color:var(--muted);text-decoration:line-through;background:none}
.key[aria-pressed=false] i{opacity:.25}
i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:8px;
vertical-align:middle;background:var(--swatch,var(--muted))}
i[data-split=val],i[data-split=other]{background:repeating-linear-gradient(90deg,var(--muted) 0 4px,
transparent 4px 6px)}
i[data-split=test]{width:9px;height:9px;border-radius:0;transform:rotate(45deg) scale(.8)}
.choices,.choice{display:flex}
.choices{gap:12px}
.choice button:first-child{border-radius:6px 0 0 6px}
.choice button:last-child{border-radius:0 6px 6px 0}
.choice button:only-child{border-radius:6px}
.choice button+button{border-left:0}
.choice [aria-pressed=true]{background:var(--accent);border-color:var(--accent);color:var(--panel)}
.columns{columns:3 300px;column-gap:12px}
.columns .panel{break-inside:avoid;margin-bottom:12px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th{font-weight:400;text-align:left}
.settings{margin-top:6px;table-layout:fixed}
.settings th,.settings td{border-top:1px solid var(--line);padding:4px 0;vertical-align:top;
overflow-wrap:anywhere}
.settings th{color:var(--muted);width:46%;padding-right:10px}
.scroll{overflow-x:auto;padding:4px 0;margin-top:18px}
h2+.scroll{margin-top:0}
.wide th,.wide td{padding:7px 14px;white-space:nowrap;border-top:1px solid var(--line)}
.wide thead th{color:var(--muted);border-top:0}
.wide tbody th{font-weight:600;max-width:46vw;white-space:normal;
overflow-wrap:break-word;min-width:130px}
.wide tr>:first-child{position:sticky;left:0;background:var(--panel)}
.wide th i{position:absolute;left:0;top:7px;bottom:7px;width:4px;height:auto;margin:0}
.wide td b{color:var(--good)}
details{margin-top:12px}
summary{cursor:pointer;color:var(--muted);font-size:14px;margin-bottom:12px}
.digits{display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:14px 12px;
margin-top:12px}
.digit{margin:0}
.digit img{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;
border-radius:6px;background:#000}
.digit figcaption{font-size:13px;margin-top:4px;overflow-wrap:anywhere}
.digit small{display:block;color:var(--muted);font-size:12px}
.wrong{color:var(--bad)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:12px}
.gallery .wide{grid-column:1/-1}
.gallery img{display:block;width:100%;height:auto;border-radius:6px}
.gallery figcaption{font-size:12.5px;color:var(--muted);margin-top:8px;overflow-wrap:anywhere}
.command{white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:28px;border-top:1px solid var(--line);padding-top:12px}
h2 small{font-weight:400;margin-left:6px}
@media (pointer:coarse){h2 small{display:none}}
noscript p{text-align:center}
@media (max-width:820px){main{padding:18px 14px 28px}.grid{grid-template-columns:minmax(0,1fr)}
.panel{padding:12px}.scroll{padding:4px 0}h1{font-size:23px}.card dd{font-size:20px}
.cards{grid-template-columns:repeat(auto-fit,minmax(128px,1fr))}.plot.tall{height:400px}
.digits{grid-template-columns:repeat(auto-fill,minmax(70px,1fr));gap:12px 9px}}
"""

_SCRIPT = """
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const state = {axis: "step", log: false, hidden: new Set()};

  // One range for all curves, so that the panels line up.
  const range = () => {
    const x = figures.flatMap((figure) => figure.axes || []).flatMap((axes) => axes[state.axis]);
    const known = x.filter((value) => value !== null);
    if (!known.length) return [0, 1];
    const low = known.reduce((a, b) => Math.min(a, b));
    const high = known.reduce((a, b) => Math.max(a, b));
    const margin = 0.02 * (high - low || 1);
    return [low - margin, high + margin];
  };

  const template = () => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"),
      tickcolor: color("--line"), automargin: true, title: {standoff: 8, font: {size: 12}},
      tickfont: {color: color("--muted")}, ticklabelstandoff: 4,
      spikecolor: color("--muted"), spikethickness: 1, spikedash: "dot",
    };
    const label = {bgcolor: color("--panel"), bordercolor: color("--line"), namelength: 40,
      font: {color: color("--ink"), size: 12}};
    return {layout: {
      font: {family: getComputedStyle(document.body).fontFamily, size: 11.5, color: color("--ink")},
      paper_bgcolor: color("--panel"), plot_bgcolor: color("--panel"), hoverlabel: label,
      xaxis: axis, yaxis: axis, margin: {l: 46, r: 14, t: 10, b: 40}, showlegend: false,
    }, data: {heatmap: [{textfont: {color: color("--ink")}}]}};
  };

  const draw = (figure) => {
    const data = figure.data.map((trace, index) => ({
      ...trace,
      ...(figure.axes ? {x: figure.axes[index][state.axis]} : {}),
      visible: !(figure.groups ? figure.groups[index] : []).some((g) => state.hidden.has(g)),
    }));
    const layout = {template: template(), dragmode: touch ? false : "zoom",
      uirevision: `${state.axis} ${state.log}`, ...structuredClone(figure.layout)};
    if (figure.axes) layout.xaxis = {title: {text: state.axis}, range: range()};
    if (figure.canBeLog && state.log)
      layout.yaxis = {...layout.yaxis, type: "log", tickformat: ".3~g"};
    return Plotly.react(figure.id, data, layout,
      {responsive: true, displayModeBar: false});
  };
  const drawAll = () => figures.forEach(draw);

  for (const button of document.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const {group, axis} = button.dataset;
      const press = (element, on) => element.setAttribute("aria-pressed", String(on));
      if (group !== undefined) {
        if (!state.hidden.delete(group)) state.hidden.add(group);
        press(button, !state.hidden.has(group));
      } else if (axis !== undefined) {
        state.axis = axis;
        document.querySelectorAll("[data-axis]").forEach((other) => press(other, other === button));
      } else {
        state.log = !state.log;
        press(button, state.log);
      }
      drawAll();
    });
  }
  dark.addEventListener("change", drawAll);
  drawAll();
})();
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m blacksmith.report`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m blacksmith.report",
        description="Make one self-contained HTML page of a run, or of several to compare them.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page to write (default: report.html in the run directory; for several runs "
        "comparison.html in the directory that holds them all)",
    )
    arguments = parser.parse_args(argv)
    runs, output = arguments.runs, arguments.output
    if len({run.resolve() for run in runs}) < len(runs):
        parser.error("a run directory is given twice")
    if output is not None and output.is_dir():
        parser.error(f"--output {output} is a directory, must be a file name such as report.html")
    try:
        for run in runs:
            if run.is_dir() and not _looks_like_a_run(run):
                raise DataError(f"{run} is not a run directory: no config.json, metrics.jsonl ...")
        if len(runs) > 1:
            shared = Path(os.path.commonpath([run.resolve().parent for run in runs]))
            written = write_comparison(output or shared / "comparison.html", runs)
        elif output is None:
            written = write(runs[0])
        else:
            page = _run_page(_load_run(runs[0], runs[0].resolve().name))
            written = _write_page(output, page)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(written)
    return 0


def _looks_like_a_run(directory: Path) -> bool:
    names = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    return any((directory / name).exists() for name in names)


if __name__ == "__main__":
    sys.exit(main())
