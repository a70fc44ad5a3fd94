"""Run directories for the report, and a page as its reader meets it."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">&amp;'
PARITY = {
    "rows": [{"run": "<i>torch</i>", "steps": 4, "seconds": 1.25}, {"run": "x", "steps": 3, "seconds": 2.0}],
    "curves": {
        "jax": [1.0, 0.5, 0.25, 0.125],
        "torch": [1.0, 0.5, 0.25 + 1e-6, 0.125 - 1e-5],
        "lightning": [1.0, float("nan"), 0.25],
    },
    "reference": "jax",
    "summary": {"passed": False, "title": "Parity over 4 steps", "notes": ["Dropout is off."]},
}


class Page(HTMLParser):
    """Visible text, elements, and the data of the plots."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.figures, self.text = [], [], ""
        self._inside = []
        self.feed(self.source)
        self.text = " ".join(self.text.split())
        self.titles = [figure["title"] for figure in self.figures]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append((tag, dict(attrs).get("id")))
        self.text += "" if tag == "wbr" else " "

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()
        self.text += " "

    def handle_data(self, data):
        if not self._inside:
            self.text += data
        elif self._inside[-1][1] == "figures":
            self.figures = json.loads(data)

    def figure(self, title):
        return self.figures[self.titles.index(title)]


def write_metrics(directory, rows):
    """Rows of `step`, `split` and metrics; epoch and seconds are filled in."""
    full = [{"epoch": row["step"] / 40, "seconds": row["step"] / 100, **row} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in full)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")


def metric_rows():
    rows = []
    for step in range(10, 201, 10):
        loss = 2.3 * float(np.exp(-step / 60)) + 0.05
        train = {"loss": loss, "accuracy": 1 - loss / 3, "learning_rate": step / 200_000}
        rows.append({"step": step, "split": "train", **train, "examples_per_second": 51_000.0 + step})
        if step % 20 == 0:
            rows.append({"step": step, "split": "val", "loss": loss, "accuracy": 0.9 + step / 10_000})
    return rows


def write_png(path, size=(28, 28), **texts):
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_itxt(name, text)
    Image.new("L", size).save(path, pnginfo=chunks)


def write_run(directory, backend="jax", accuracy=0.9812):
    """A run directory with everything in it."""
    matrix = np.diag(np.arange(90, 100))
    matrix[4, 9] = 7
    files = {
        "config": {
            "run": {"experiment": "keras/mnist", "backend": backend, "seed": 0},
            "model": {"hidden": [512, 512], "dropout": 0.2},
            "checkpoint": {"metric": "val_accuracy", "mode": "auto"},
        },
        "environment": {
            "command": ["python", "-m", "blacksmith.launch", "--workdir=a b"],
            "versions": {"jax": "0.10.2"},
            "git": {"commit": "3fa9c1d2b7e64f0a9c8d", "dirty": True},
            "device": "cpu",
            "data": {"source": "mnist5k", "sha256": "9f86d081"},
            "started": "2026-03-04T10:21:33+0000",
        },
        "result": {
            "status": "done",
            "step": 200,
            "epoch": 5.0,
            "seconds": 75.2,
            "parameters": 669706,
            "test": {
                "loss": 0.0612,
                "accuracy": accuracy,
                "per_class_accuracy": (matrix.diagonal() / matrix.sum(axis=1)).tolist(),
                "confusion_matrix": matrix.tolist(),
            },
            "tested_checkpoint": "step_00000180",
            "initial_weights_sha256": "ab" * 32,
        },
    }
    (directory / "images").mkdir(parents=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    write_metrics(directory, metric_rows())
    write_png(directory / "images" / "test_1.png", Title="Worst digits", Description="4 → 9\np(4) = 2e-06")
    return directory


def write_hostile_run(directory):
    """A run in which every string tries to break out of the page."""
    write_run(directory)
    result = json.loads((directory / "result.json").read_text())
    result["test"] |= {HOSTILE: 1.5, "class_names": [f"{index}{HOSTILE}" for index in range(10)]}
    files = {
        "config": {"run": {"experiment": HOSTILE, "backend": HOSTILE, HOSTILE: HOSTILE}, HOSTILE: {"a": 1}},
        # \udcff stands for a byte of the command line that is not UTF-8.
        "environment": {"command": [HOSTILE, "\udcff"], "git": {"commit": HOSTILE}, HOSTILE: {HOSTILE: 1}},
        "result": {**result, "status": HOSTILE, "tested_checkpoint": HOSTILE, "error": HOSTILE},
    }
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    write_metrics(directory, [{**row, HOSTILE: 1.0, "split": HOSTILE} for row in metric_rows()])
    write_png(directory / "images" / "hostile.png", Title=HOSTILE, Description=HOSTILE)
    write_png(directory / "images" / f"{HOSTILE.replace('/', '')}.png")
    return directory


@pytest.fixture(scope="session")
def make():
    """What the tests of the report share."""
    return SimpleNamespace(
        run=write_run,
        hostile_run=write_hostile_run,
        metrics=write_metrics,
        rows=metric_rows,
        png=write_png,
        hostile=HOSTILE,
        parity=PARITY,
    )


@pytest.fixture(scope="session")
def page():
    """Reads a page from its path."""
    return Page


@pytest.fixture
def run(tmp_path):
    """The directory of a finished run."""
    return write_run(tmp_path / "run")
