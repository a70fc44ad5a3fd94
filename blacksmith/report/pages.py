"""The three pages, from the template `page.html`: one run, a comparison of several, a parity check."""

import functools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith.errors import DataError
from blacksmith.files import atomic_file
from blacksmith.report import figures, read, text
from blacksmith.report.read import Run

BEST = {"accuracy": max, "psnr": max, "ssim": max, "loss": min, "lpips": min}
FILES = {"Configuration": "config.json", "Result": "result.json", "Environment": "environment.json"}
TABLES = ("test.class_names", "test.confusion_matrix", "test.per_class_accuracy")
SHOWN_ELSEWHERE = ("started", "command", "previous", "error", *TABLES)


def write(directory: Path, output: Path | None = None) -> Path:
    """Writes the page of one run, by default its `report.html`; returns the path.

    Like the functions below, raises `DataError` if a file is broken or the page cannot be written.
    """
    directory = Path(directory)
    run = read.load(directory, directory.resolve().name)
    return _render(output or directory / "report.html", **_run_page(run))


def write_comparison(output: Path, directories: Sequence[Path]) -> Path:
    """Writes a page that overlays the curves of several runs and compares their results; returns the path."""
    shared = read.shared_directory(directories)
    runs = [read.load(path, path.resolve().relative_to(shared).as_posix()) for path in directories]
    return _render(output, **_comparison_page(runs))


def write_parity(
    output: Path,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, list[float]],
    reference: str,
    summary: Mapping[str, Any],
) -> Path:
    """Writes the page of a parity check: verdict, table, curves and their differences; returns the path.

    Args:
      output: the file to write.
      rows: the table, one mapping per row with the same keys; values are strings or numbers.
      curves: run name -> loss at each step, from step 1.
      reference: the run in `curves` that the others are compared with.
      summary: `passed` (bool), `title` (str) and `notes` (list of str).
    """
    cells = [[v if isinstance(v, str) else text.number(v) for v in row.values()] for row in rows]
    return _render(
        output,
        eyebrow="parity",
        title=summary["title"],
        status="passed" if summary["passed"] else "failed",
        chips=[("reference", reference), ("steps", max(map(len, curves.values())))],
        notices=summary["notes"],
        notice_style="calm" if summary["passed"] else "bad",
        table={"header": list(rows[0]), "rows": [{"cells": row} for row in cells]} if rows else None,
        legend=_run_legend(curves),
        curves=figures.parity(curves, reference),
    )


def _render(output: Path, curves: Sequence[figures.Figure], tests: Sequence = (), **variables: Any) -> Path:
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    if output.is_file():
        with output.open("rb") as stream:
            if b'name="generator" content="blacksmith"' not in stream.read(2000):
                raise DataError(f"{output} is not a page that this program wrote; choose another --output")
    # Autoescape turns everything from a run directory into text; only our own files are Markup.
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = lambda name: Markup("<wbr>").join(re.split(r"(?<=[._/])", name))
    plots = [*curves, *tests]
    for index, figure in enumerate(plots):
        figure.id = f"figure-{index}"
    page = environment.get_template("page.html").render(
        curves=curves,
        tests=tests,
        figures=[vars(figure) for figure in plots],
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs() if plots else ""),
        **variables,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as stream:
            stream.write(page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise DataError(f"cannot write the report {output}: {error.strerror or error}") from error
    return output


def _run_page(run: Run) -> dict[str, Any]:
    environment, result = run.environment, run.result
    git = environment.git or {}
    commit = str(git.get("commit", ""))[:10]
    galleries: dict[str, list] = {}
    for picture in run.pictures:
        galleries.setdefault(picture.title, []).append(picture)
    settings = {title: _flat(run, name) for title, name in FILES.items()}
    for key in settings["Environment"].keys() & settings["Result"].keys():  # data, backend, device
        settings["Result"].pop(key)
    return {
        "eyebrow": run.name,
        "title": run.experiment,
        "status": result.status,
        "date": f"{environment.started:%Y-%m-%d %H:%M %Z}" if environment.started else "",
        "chips": [
            ("backend", run.config.run.get("backend")),
            ("device", environment.device),
            ("data", environment.data.get("source")),
            ("seed", run.config.run.get("seed")),
            ("commit", commit + " (modified)" if git.get("dirty") else commit),
        ],
        "failures": [("The run failed", result.error)] if result.error else [],
        "notices": _remarks(run),
        "cards": list(_cards(run)),
        "legend": [
            {"group": f"split {split}", "label": split, "color": figures.color(index)}
            for index, split in enumerate(read.splits_of([run]))
        ],
        "axes": read.AXES,
        "curves": figures.curves([run]),
        "tests": [each for each in (figures.confusion_matrix(run), figures.accuracy_by_class(run)) if each],
        "galleries": list(galleries.items()),
        "settings": [
            {"title": title, "sections": _sections(flat)} for title, flat in settings.items() if flat
        ],
        "command": shlex.join(map(str, environment.command)),
    }


def _remarks(run: Run) -> list[str]:
    """What the reader must know before trusting the page."""
    remarks = []
    if "result.json" not in run.files:
        remarks.append("There is no result.json: the run is still going, or was killed.")
    elif run.result.status == "stopped":
        remarks.append("The run was stopped before its end.")
    elif run.result.status == "done" and not run.result.test.scores:
        remarks.append("The test set was not evaluated.")
    if missing := [name for name in ("config.json", "environment.json") if name not in run.files]:
        remarks.append(f"Not in the run directory: {', '.join(missing)}.")
    if not run.rows:
        remarks.append("Nothing was logged, so there are no curves.")
    for metric, splits in run.series.items():
        for split, series in splits.items():
            steps = series.axes["step"][~np.isfinite(series.values)]
            if len(steps):
                remarks.append(
                    f"{text.title(metric)} ({split}): {len(steps):,} of {len(series.values):,} values "
                    f"are not finite, first at step {steps[0]:.0f}; the curve has gaps there."
                )
    return remarks + run.notes


def _cards(run: Run) -> Iterator[tuple[str, str, str]]:
    """(label, value, remark) of the known key numbers."""
    result = run.result
    for name, value in result.test.scores.items():
        yield f"Test {text.words(name)}", text.score(name, value), result.tested_checkpoint
    metric = run.config.checkpoint.get("metric", "")
    if best := run.best(metric):
        yield f"Best {text.words(metric)}", text.score(metric, best[0]), f"at step {best[1]:.0f}"
    step, epoch, seconds = map(run.reached, read.AXES)
    if step is not None:
        yield "Steps", text.number(step), f"{epoch:.4g} epochs" if epoch is not None else ""
    if seconds is not None:
        yield "Wall time", text.duration(seconds), ""
    if rate := run.rate():
        yield f"{text.title(rate[0])}/s", text.number(rate[1]), ""
    if count := result.parameters:
        # Eight or more digits do not fit a card.
        shown = f"{count / 1e6:,.1f}M" if count >= 1e7 else text.number(count)
        trained = result.trained_parameters or count
        yield "Parameters", shown, f"{trained:,} trained" if trained < count else ""


def _comparison_page(runs: Sequence[Run]) -> dict[str, Any]:
    table, chips = _comparison_table(runs)
    splits = [{"group": f"split {s}", "label": s, "split": s} for s in read.splits_of(runs)]
    return {
        "eyebrow": "comparison",
        "title": f"{len(runs)} runs",
        "chips": chips,
        "failures": [(f"{run.name} failed", run.result.error) for run in runs if run.result.error],
        "notices": [f"{run.name}: {' '.join(remarks)}" for run in runs if (remarks := _remarks(run))],
        "table": table,
        "legend": _run_legend([run.name for run in runs]) + splits,
        "axes": read.AXES,
        "curves": figures.curves(runs),
        "settings": [_differences(title, runs) for title in ("Configuration", "Environment")],
    }


def _comparison_table(runs: Sequence[Run]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The table that compares the runs, and (label, value) of what is equal in all of them."""
    header, same = ["run", "status"], []
    rows = [
        {"cells": [run.name, run.result.status], "color": figures.color(index), "best": []}
        for index, run in enumerate(runs)
    ]

    def add(
        title: str, values: Sequence[Any], show: Callable = text.setting, best: Callable | None = None
    ) -> None:
        texts = ["–" if value is None else show(value) for value in values]
        known = [value for value in values if value is not None]
        all_equal = len(set(texts)) == 1
        if known and all_equal and not best:
            same.append((title, texts[0]))
        elif known:
            header.append(title)
            for row, value, shown in zip(rows, values, texts):
                if best and not all_equal and value == best(known):
                    row["best"].append(len(row["cells"]))
                row["cells"].append(shown)

    add("experiment", [run.experiment for run in runs])
    add("backend", [run.config.run.get("backend") for run in runs])
    add("device", [run.environment.device for run in runs])
    add("seed", [run.config.run.get("seed") for run in runs])
    tests = [run.result.test.scores for run in runs]
    for name in dict.fromkeys(name for test in tests for name in test):
        show = functools.partial(text.score, name)
        add(f"test {text.words(name)}", [test.get(name) for test in tests], show, BEST.get(name))
    for metric in dict.fromkeys(run.config.checkpoint.get("metric", "") for run in runs):
        values = [best[0] if (best := run.best(metric)) else None for run in runs]
        show = functools.partial(text.score, metric)
        add(f"best {text.words(metric)}", values, show, BEST.get(metric.removeprefix("val_")))
    add("steps", [run.reached("step") for run in runs], text.number)
    add("wall time", [run.reached("seconds") for run in runs], text.duration)
    rates = [run.rate() or ("", None) for run in runs]
    for unit in dict.fromkeys(unit for unit, _ in rates):
        add(f"{unit}/s", [rate if its == unit else None for its, rate in rates], text.number, max)
    add("parameters", [run.result.parameters for run in runs], text.number)
    add("initial weights", [run.result.initial_weights_sha256 for run in runs], lambda sha256: sha256[:12])
    add("batch order", [run.result.order_sha256 for run in runs], lambda sha256: sha256[:12])
    return {"header": header, "rows": rows}, same


def _differences(title: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that differ between the runs as a table, all others by section."""
    settings = [_flat(run, FILES[title]) for run in runs]
    keys = dict.fromkeys(key for flat in settings for key in flat)
    texts = {key: [text.setting(flat[key]) if key in flat else "–" for flat in settings] for key in keys}
    same = {key: settings[0][key] for key in keys if len(set(texts[key])) == 1}
    rows = [{"cells": [key, *texts[key]]} for key in keys if key not in same]
    return {
        "title": title,
        "differences": {"header": ["differs", *(run.name for run in runs)], "rows": rows} if rows else None,
        "folded": f"{len(same)} settings are identical in all runs" if same else "",
        "sections": _sections(same),
    }


def _flat(run: Run, name: str) -> dict[str, Any]:
    """The settings in a JSON file, without those that the page shows elsewhere."""
    flat = text.flatten(run.files.get(name, {}))
    return {key: value for key, value in flat.items() if key not in SHOWN_ELSEWHERE}


def _sections(flat: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """A small table per section; settings outside a section are in `general`."""
    sections: dict[str, dict[str, str]] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        sections.setdefault(section if dot else "general", {})[name if dot else key] = text.setting(value)
    return sections


def _run_legend(names: Iterable[str]) -> list[dict[str, str]]:
    return [
        {"group": f"run {index}", "label": name, "color": figures.color(index)}
        for index, name in enumerate(names)
    ]
