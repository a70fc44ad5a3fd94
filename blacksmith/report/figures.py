"""The plots of a page, in plotly's JSON built as plain dicts; `page.js` draws them."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blacksmith.report import read, text
from blacksmith.report.read import Run, Series

# Mid-tones with enough contrast on both the light and the dark page.
PALETTE = ["#3b7dd8", "#e0803a", "#2f9e73", "#b657c4", "#d6455d", "#179fb5", "#b08a14", "#7a6ff0", "#7d8793"]
SPLIT_STYLES = {
    "train": {"mode": "lines"},
    "val": {"mode": "lines+markers", "dash": "dash"},
    "test": {"mode": "markers", "symbol": "diamond", "size": 10},
}
OTHER_SPLIT_STYLE = {"mode": "lines+markers", "dash": "dot", "symbol": "square"}
MAX_POINTS = 2000  # per curve; longer SVG paths are slow and show nothing more
MAX_CLASSES = 1000  # a larger confusion matrix is not drawn
MAX_CELL_TEXTS = 25  # with more classes, counts do not fit their cells
MAX_LABEL = 14  # characters of a class name on an axis


@dataclass
class Figure:
    """A panel with one plot."""

    title: str
    data: list[dict[str, Any]] = field(default_factory=list)  # plotly traces
    layout: dict[str, Any] = field(default_factory=dict)  # plotly layout
    caption: str = ""
    # For each trace, its x values by axis name; empty if the traces have their own.
    axes: list[dict[str, list[float | None]]] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)  # for each trace, the legend keys that hide it
    log: bool = False  # whether the reader can switch to a logarithmic axis
    tall: bool = False
    id: str = ""  # of the plot's HTML element; set by the page

    def add(self, series: Series, name: str, color: str, style: Mapping[str, Any], groups: list[str]) -> None:
        """Adds a curve; a single point gets a marker, or it would be invisible."""
        kept = _thinned(series.values)
        is_point = np.isfinite(series.values).sum() < 2 and style["mode"] == "lines"
        line = {"color": color, "width": style.get("width", 1.8), "dash": style.get("dash", "solid")}
        marker = {"color": color, "size": style.get("size", 5), "symbol": style.get("symbol", "circle")}
        self.data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if is_point else style["mode"],
                "name": _plain(name),
                "y": _numbers(series.values[kept]),
                "line": line,
                "marker": marker,
            }
        )
        self.axes.append({axis: _numbers(values[kept]) for axis, values in series.axes.items()})
        self.groups.append(groups)
        if len(kept) < len(series.values):
            self.caption = (
                f"Long curves are thinned to their extremes: {len(series.values):,} points were logged."
            )

    def values(self) -> list[float]:
        """All finite values that are drawn."""
        return [value for trace in self.data for value in trace["y"] if value is not None]


def color(index: int) -> str:
    """The color of a run or a split; they repeat after nine."""
    return PALETTE[index % len(PALETTE)]


def curves(runs: Sequence[Run]) -> list[Figure]:
    """One figure per metric, with every split of every run."""
    figures = []
    splits = read.splits_of(runs)
    for metric in read.metrics_of(runs):
        if not any(set(run.series.get(metric, {})) - {"test"} for run in runs):
            continue  # numbers of only the final test are shown as key numbers
        figure = Figure(text.title(metric))
        for index, run in enumerate(runs):
            for split, series in run.series.get(metric, {}).items():
                style = SPLIT_STYLES.get(split, OTHER_SPLIT_STYLE)
                if len(runs) == 1:  # splits differ by color, so no line needs to be dashed
                    style = style | {"dash": "solid"}
                    figure.add(series, split, color(splits.index(split)), style, [f"split {split}"])
                else:
                    groups = [f"run {index}", f"split {split}"]
                    figure.add(series, f"{run.name} · {split}", color(index), style, groups)
        figure.log = "loss" in metric and min(figure.values(), default=0) > 0
        figure.layout = {"yaxis": _value_axis(metric, figure.values())}
        figures.append(figure)
    return figures


def confusion_matrix(run: Run) -> Figure | None:
    """Counts, with separate color scales for hits and errors, so that errors are visible."""
    counts = np.array(run.result.test.confusion_matrix)
    size = len(counts)
    if not 0 < size <= MAX_CLASSES:
        return None
    ticks = _class_axis(run, size)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    is_hit = np.eye(size, dtype=bool)
    worst = share[~is_hit].max(initial=0)
    data = [
        {
            "type": "heatmap",
            "name": name,
            "z": [_numbers(row) for row in np.where(mask, share, np.nan)],
            "zmin": 0,
            "zmax": top,
            "text": [[f"{c:,.0f}" if m else "" for c, m in zip(*rows)] for rows in zip(counts, mask)],
            "texttemplate": "%{text}" if size <= MAX_CELL_TEXTS else "",
            "hovertemplate": "true %{y}, predicted %{x}<br>%{text} (%{z:.2%} of the class)<extra></extra>",
            "colorscale": [[0, f"rgba({rgb},0.10)"], [1, f"rgba({rgb},0.62)"]],
        }
        for name, mask, rgb, top in (
            ("correct", is_hit, "59,125,216", 1.0),
            ("error", ~is_hit & (counts > 0), "224,112,40", worst or 1.0),
        )
    ]
    errors = int(counts[~is_hit].sum())
    caption = f"{errors:,} errors in {int(counts.sum()):,} examples."
    if errors:
        caption += f" Orange shades: share of the true class, up to {worst:.1%}."
    layout = {
        "xaxis": {"title": {"text": "predicted"}, **ticks},
        "yaxis": {"title": {"text": "true"}, "autorange": "reversed", **ticks},
    }
    return Figure("Confusion matrix", data, layout, caption, tall=True)


def accuracy_by_class(run: Run) -> Figure | None:
    """One bar per class."""
    values = run.result.test.per_class_accuracy
    if not values:
        return None
    # If all are high the axis does not start at 0, or their differences would be invisible.
    lowest = min((value for value in values if value is not None), default=0.0)
    start = math.floor((lowest - 0.02) * 20) / 20 if lowest > 0.6 else 0.0
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "text": [f"{value:.1%}" if value is not None else "–" for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "class %{y}: %{x:.2%}<extra></extra>",
        "marker": {"color": color(0)},
    }
    layout = {
        "xaxis": {"range": [start, 1.0001], "tickformat": "~%", "fixedrange": True},
        "yaxis": {"title": {"text": "class"}, "autorange": "reversed", **_class_axis(run, len(values))},
        "bargap": 0.25,
        "margin": {"r": 52},  # room for the label of a full bar
    }
    caption = f"The axis starts at {start:.0%}." if start else ""
    return Figure("Accuracy by class", [bars], layout, caption, tall=True)


def parity(curves: Mapping[str, list[float]], reference: str) -> list[Figure]:
    """The losses, and each run's distance from the reference on a logarithmic axis."""
    losses, differences = Figure("Loss"), Figure(f"|difference| to {reference}")
    arrays = {name: np.array(curve, np.float64) for name, curve in curves.items()}
    gaps = {}
    for name, array in arrays.items():
        if name != reference:
            steps = min(len(array), len(arrays[reference]))
            gaps[name] = np.abs(array[:steps] - arrays[reference][:steps])
    all_equal = not any(gap.any() for gap in gaps.values())
    for index, (name, array) in enumerate(arrays.items()):
        groups = [f"run {index}"]
        style = {"mode": "lines", "dash": ("solid", "dash", "dot", "dashdot")[index % 4]}
        losses.add(_by_step(array), name, color(index), style, groups)
        if name in gaps:
            # A logarithmic axis has no zero: equal steps are gaps, and the caption counts them.
            gap = gaps[name] if all_equal else np.where(gaps[name] == 0, np.nan, gaps[name])
            style = {"mode": "lines+markers", "size": 3, "width": 1}
            differences.add(_by_step(gap), name, color(index), style, groups)
    losses.log = min(losses.values(), default=0) > 0
    losses.layout = {"yaxis": {"hoverformat": ".8~g", "exponentformat": "power"}}
    scale = {} if all_equal else {"type": "log", "dtick": 1}
    differences.layout = {"yaxis": {"hoverformat": ".3~e", "exponentformat": "e", **scale}}
    equal = (f"{name} is equal at {(gap == 0).sum():,} of {len(gap):,} steps" for name, gap in gaps.items())
    differences.caption = "; ".join(equal) + "."
    return [losses, differences]


def _by_step(values: np.ndarray) -> Series:
    return Series(values, {"step": np.arange(1.0, len(values) + 1)})


def _thinned(values: np.ndarray) -> np.ndarray:
    """Indices of about `MAX_POINTS` values: both ends, and each section's extremes and first gap."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), MAX_POINTS // 3):
        is_finite = np.isfinite(values[part])
        if is_finite.any():
            known = part[is_finite]
            kept |= {known[values[known].argmin()], known[values[known].argmax()]}
        if not is_finite.all():
            kept.add(part[is_finite.argmin()])
    return np.array(sorted(kept))


def _value_axis(metric: str, values: list[float]) -> dict[str, Any]:
    if metric.endswith("_per_second"):
        return {"tickformat": "~s", "hoverformat": ",.0f", "rangemode": "tozero"}
    axis = {"hoverformat": ".4~g", "exponentformat": "power", "minexponent": 5}
    if text.is_share(metric, values):
        axis = {"tickformat": "~%", "hoverformat": ".2%"}
    if values and min(values) == max(values):
        # plotly's axis would span 2, however small the value.
        margin = abs(values[0]) / 2 or 1.0
        axis["range"] = [values[0] - margin, values[0] + margin]
    return axis


def _class_axis(run: Run, size: int) -> dict[str, Any]:
    """An axis with the class names, truncated to `MAX_LABEL`."""
    names = run.result.test.class_names
    if len(names) != size:
        names = [str(index) for index in range(size)]
    short = [name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}…" for name in names]
    ticks = {"tickvals": list(range(size)), "ticktext": [_plain(name) for name in short], "ticks": ""}
    return {**ticks, "showgrid": False, "zeroline": False}


def _numbers(values: Iterable[float]) -> list[float | None]:
    """JSON has no NaN: values that are not finite become gaps."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _plain(name: str) -> str:
    """Escapes a name, because plotly renders some HTML in names and labels."""
    return html.escape(name, quote=False)
