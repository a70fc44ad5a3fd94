"""The report page: what it shows of a run, what it survives, and that a browser really draws it."""

import base64
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import urllib.parse
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from blacksmith import report
from blacksmith.errors import DataError

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">&amp;'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """A page as a reader meets it: visible text, elements, and the data of the plots."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements = []
        self.texts = []
        self.figures = []
        self._inside = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())
        self.titles = re.findall(r"aria-label=\"plot: (.*?)\"", self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.texts.append(data)
        elif self._inside[-1][1] == "figures":
            self.figures = json.loads(data)

    def figure(self, title):
        return self.figures[self.titles.index(title)]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def metric_rows(steps=200, every=10):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(every, steps + 1, every):
        shared = {"step": step, "epoch": step / 40, "seconds": step / 100}
        loss = 2.3 * float(np.exp(-step / 60)) + 0.05
        train = {"loss": loss, "accuracy": 1 - loss / 3, "learning_rate": 0.001 * step / steps}
        rate = {"examples_per_second": 50_000 + float(rng.normal())}
        rows.append({**shared, "split": "train", **train, **rate})
        if step % (2 * every) == 0:
            val = {"loss": loss + 0.02, "accuracy": 0.9 + step / 10_000}
            rows.append({**shared, "split": "val", **val})
    return rows


def write_metrics(directory, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")


def confusion_matrix():
    matrix = np.diag(np.arange(90, 100))
    matrix[4, 9] = 7
    return matrix


def make_run(directory, backend="jax", seed=0, accuracy=0.9812):
    """A run directory with everything in it."""
    directory.mkdir(parents=True)
    write_json(
        directory / "config.json",
        {
            "run": {"experiment": "keras/mnist", "backend": backend, "seed": seed},
            "model": {"hidden": [512, 512], "dropout": 0.2},
            "optimizer": {"name": "adam", "learning_rate": 0.001},
        },
    )
    write_json(
        directory / "environment.json",
        {
            "command": ["python", "-m", "blacksmith.launch", "--workdir=a b"],
            "python": "3.11.9",
            "versions": {"jax": "0.10.2"},
            "git": {"commit": "3fa9c1d2b7e64f0a9c8d", "dirty": True},
            "device": "cpu",
            "data": {"source": "mnist5k", "sha256": "9f86d081"},
            "started": "2026-03-04T10:21:33+00:00",
        },
    )
    write_metrics(directory, metric_rows())
    matrix = confusion_matrix()
    write_json(
        directory / "result.json",
        {
            "status": "done",
            "step": 200,
            "epoch": 5.0,
            "seconds": 75.2,
            "examples_per_second": 51234.5,
            "parameters": 669706,
            "final": {"train_loss": 0.05, "val_accuracy": 0.97},
            "test": {
                "loss": 0.0612,
                "accuracy": accuracy,
                "per_class_accuracy": (matrix.diagonal() / matrix.sum(axis=1)).tolist(),
                "confusion_matrix": matrix.tolist(),
            },
            "tested_checkpoint": "step_00000180",
            "initial_weights_sha256": "ab" * 32,
            "order_sha256": "cd" * 32,
        },
    )
    rng = np.random.default_rng(1)
    np.savez(
        directory / "worst.npz",
        images=rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        labels=np.array([4, 7, 2]),
        predictions=np.array([9, 1, 8]),
        probabilities=np.array([0.0000021, 0.0123, 0.25], dtype=np.float32),
    )
    return directory


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def decode_png(content):
    """Pixels [height, width] of a grey PNG without row filters."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, position = {}, 8
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kind = content[position + 4 : position + 8]
        chunks[kind] = content[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert checksum == zlib.crc32(kind + chunks[kind])
        position += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_full_run_shows_key_numbers_and_every_section(run):
    path = report.write(run)
    assert path == run / "report.html"
    page = Page(path)
    for text in (
        "keras/mnist done",
        "backend jax",
        "device cpu",
        "2026-03-04 10:21 UTC",
        "Test accuracy 98.12 %",
        "Test loss 0.0612",
        "step_00000180",
        "Best val accuracy 92.00 % at step 200",
        "Steps 200 5 epochs",
        "Wall time 1 min 15 s",
        "Examples/s 51,234",
        "Parameters 669,706",
        "hidden [512, 512]",
        "jax 0.10.2",
        "commit 3fa9c1d2b7 (modified)",
        "python -m blacksmith.launch '--workdir=a b'",
        "p(4) 2e-06",
        "p(7) 0.012",
    ):
        assert text in page.text, text
    assert page.titles == [
        "Loss",
        "Accuracy",
        "Learning rate",
        "Examples per second",
        "Confusion matrix",
        "Accuracy by class",
    ]
    assert [trace["name"] for trace in page.figure("Loss")["data"]] == ["train", "val"]
    assert [trace["mode"] for trace in page.figure("Loss")["data"]] == ["lines", "lines+markers"]
    assert len(page.figure("Loss")["data"][0]["y"]) == 20
    assert page.figure("Loss")["axes"][1]["epoch"][0] == 0.5


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"parameters": 136_957_248, "trained_parameters": 2_442_240}, "Parameters 137.0M 2,442,240 trained"),
        ({"parameters": 10_000_000, "trained_parameters": 10_000_000}, "Parameters 10.0M"),
        ({"parameters": 9_999_999}, "Parameters 9,999,999"),
    ],
)
def test_many_parameters_fit_their_card_and_those_that_are_trained_are_told(run, counts, shown):
    content = json.loads((run / "result.json").read_text())
    write_json(run / "result.json", {**content, **counts})
    page = Page(report.write(run))
    assert shown in page.text
    assert ("M trained" in page.text or "0 trained" in page.text) == ("trained" in shown)


def test_confusion_matrix_shows_counts_and_scales_errors_on_their_own(run):
    hits, errors = Page(report.write(run)).figure("Confusion matrix")["data"]
    assert hits["text"][4][4] == "94"
    assert hits["z"][4][9] is None
    assert errors["text"][4][9] == "7"
    assert errors["z"][4][9] == errors["zmax"] == pytest.approx(7 / 101)
    assert sum(cell is not None for row in errors["z"] for cell in row) == 1


def test_worst_digits_are_embedded_pixel_for_pixel(run):
    page = Page(report.write(run))
    images = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    expected = np.load(run / "worst.npz")["images"]
    assert len(images) == len(expected)
    for source, pixels in zip(images, expected, strict=True):
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(decode_png(content), pixels)
    assert "4 → 9" in page.text


def test_any_numeric_metric_and_split_gets_its_curve(tmp_path):
    directory = tmp_path / "nerf"
    directory.mkdir()
    rows = [
        {"step": 1, "split": "train", "psnr": 20.5, "flag": True, "note": "text"},
        {"step": 2, "split": "val", "psnr": 24.0},
        {"step": 3, "split": "holdout", "psnr": 25.0},
    ]
    write_metrics(directory, rows)
    page = Page(report.write(directory))
    assert page.titles == ["PSNR"]
    names = [trace["name"] for trace in page.figure("PSNR")["data"]]
    assert names == ["train", "val", "holdout"]
    assert "Best val PSNR 24 at step 2" in page.text


@pytest.mark.parametrize(("tested", "at"), [("step_00000002", 2), ("step_00000003", 4), ("export", 4)])
def test_the_test_is_drawn_at_the_checkpoint_that_was_tested(tmp_path, tested, at):
    """Where a validation says when that was; else at the run's end."""
    directory = tmp_path / "run"
    directory.mkdir()
    rows = [
        {"step": 2, "epoch": 0.5, "split": "val", "loss": 0.3},
        {"step": 4, "epoch": 1.0, "split": "val", "loss": 0.9},
        {"step": 4, "epoch": 1.0, "split": "test", "loss": 0.35},
    ]
    write_metrics(directory, rows)
    write_json(directory / "result.json", {"tested_checkpoint": tested, "test": {"loss": 0.35}})
    figure = Page(report.write(directory)).figure("Loss")
    (number,) = [index for index, trace in enumerate(figure["data"]) if trace["name"] == "test"]
    assert figure["data"][number]["y"] == [0.35]
    assert figure["axes"][number] == {"step": [at], "epoch": [at / 4]}


def test_gallery_embeds_images_in_natural_order(run):
    (run / "images").mkdir()
    png = report._png(np.zeros((2, 2, 3), np.uint8))
    for name in ("view_10.png", "view_9.png"):
        (run / "images" / name).write_bytes(png)
    (run / "images" / "spin.gif").write_bytes(b"GIF89a")
    (run / "images" / "notes.txt").write_text("not an image")
    page = Page(report.write(run))
    gallery = [attrs.get("alt") for tag, attrs in page.elements if tag == "img"][3:]
    assert gallery == ["spin.gif", "view_9.png", "view_10.png"]
    assert "data:image/gif;base64," in page.source
    assert "notes.txt" not in page.text


def test_stopped_run_says_what_is_missing(run):
    write_json(run / "result.json", {"status": "stopped", "step": 120, "seconds": 3.0})
    for name in ("worst.npz", "environment.json"):
        (run / name).unlink()
    page = Page(report.write(run))
    assert "keras/mnist stopped" in page.text
    assert "The run was stopped before its end" in page.text
    assert "the test set was not evaluated" in page.text
    assert "Not in the run directory: environment.json." in page.text
    assert "Test accuracy – no test" in page.text
    assert "Not there: environment.json, worst.npz, images." in page.text
    assert "Confusion matrix" not in page.titles
    assert "Loss" in page.titles


def test_failed_run_shows_its_error_as_text(run):
    write_json(run / "result.json", {"status": "failed", "error": f"ValueError: {HOSTILE}"})
    page = Page(report.write(run))
    assert "The run failed" in page.text
    assert f"ValueError: {HOSTILE}" in page.text


def test_empty_directory_still_gives_a_page(tmp_path):
    page = Page(report.write(tmp_path))
    assert "unfinished" in page.text
    assert "There is no result.json" in page.text
    assert "config.json, environment.json, metrics.jsonl" in page.text
    assert page.figures == []


def test_empty_metrics_are_named_and_draw_no_curve(run):
    (run / "metrics.jsonl").write_text("")
    page = Page(report.write(run))
    assert "metrics.jsonl is empty" in page.text
    assert page.titles == ["Confusion matrix", "Accuracy by class"]


def test_last_metrics_line_may_be_cut_off(run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 210, "note": "\xc3')
    page = Page(report.write(run))
    assert "The last line of metrics.jsonl is cut off" in page.text
    assert max(page.figure("Loss")["axes"][0]["step"]) == 200


def test_values_that_are_not_finite_become_gaps_and_are_counted(run):
    rows = [row for row in metric_rows() if row["split"] == "train"]
    rows[5]["loss"] = float("nan")
    rows[6]["loss"] = "NaN"
    rows[7]["loss"] = "-Infinity"
    write_metrics(run, rows)
    page = Page(report.write(run))
    losses = page.figure("Loss")["data"][0]["y"]
    assert [index for index, loss in enumerate(losses) if loss is None] == [5, 6, 7]
    assert "Loss (train): 3 of 20 values are not finite, first at step 60" in page.text


def test_long_curves_are_thinned_without_losing_spikes(run):
    rows = [{"step": step, "split": "train", "loss": 1.0} for step in range(20_000)]
    rows[7_777]["loss"] = 50.0
    rows[12_345]["loss"] = "NaN"
    write_metrics(run, rows)
    page = Page(report.write(run))
    losses = page.figure("Loss")["data"][0]["y"]
    assert len(losses) <= report.MAX_POINTS + 2
    assert 50.0 in losses
    assert None in losses
    assert "20,000 points" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is not valid JSON"),
        ("result.json", b"[1]", "a JSON object belongs"),
        ("environment.json", b"\xff\xfe", "is not valid JSON"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', "line 2 is not valid JSON"),
        ("metrics.jsonl", b'{"step": 1}\n{"loss": 1}\n', "line 2 is not an object"),
        ("worst.npz", b"not an archive", "is not an archive"),
        ("worst.npz", b"PK\x03\x04 cut off", "is not an archive"),
        ("result.json", b'{"test": {"confusion_matrix": [[1, 2]]}}', "is not a square table"),
    ],
)
def test_broken_file_is_one_line_and_exit_status_3(run, capsys, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        report.write(run)
    assert not (run / "report.html").exists()
    assert report.main([str(run)]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pickled_arrays_are_refused(run):
    arrays = dict(np.load(run / "worst.npz"))
    np.savez(run / "worst.npz", **{**arrays, "labels": np.array([{}, 1, 2], dtype=object)})
    with pytest.raises(DataError, match="is not an archive"):
        report.write(run)


@pytest.mark.parametrize(
    ("array", "value"),
    [
        ("images", np.zeros((3, 28, 28), np.float32)),
        ("images", np.zeros((3, 28), np.uint8)),
        ("labels", np.zeros(2, np.int64)),
        ("predictions", np.array(["a", "b", "c"])),
    ],
)
def test_worst_examples_of_a_wrong_shape_or_type_are_refused(run, array, value):
    arrays = dict(np.load(run / "worst.npz"))
    np.savez(run / "worst.npz", **{**arrays, array: value})
    with pytest.raises(DataError, match=array):
        report.write(run)


def test_failed_write_leaves_the_old_page_and_no_temporary_file(run, monkeypatch):
    report.write(run).write_text("old")

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", refuse)
    with pytest.raises(DataError, match="No space left on device"):
        report.write(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".*"))


def make_hostile_run(directory):
    """A run in which every string tries to break out of the page."""
    make_run(directory)
    write_json(
        directory / "config.json",
        {"run": {"experiment": HOSTILE, "backend": HOSTILE, HOSTILE: HOSTILE}, HOSTILE: {"a": 1}},
    )
    write_json(
        directory / "environment.json",
        {"command": [HOSTILE], "device": HOSTILE, "started": HOSTILE, HOSTILE: {HOSTILE: 1}},
    )
    result = json.loads((directory / "result.json").read_text())
    result["test"]["class_names"] = [f"{HOSTILE}{index}" for index in range(10)]
    result |= {"status": HOSTILE, "tested_checkpoint": HOSTILE, "error": HOSTILE}
    write_json(directory / "result.json", result)
    write_metrics(directory, [{**row, HOSTILE: 1.0, "split": HOSTILE} for row in metric_rows()])
    return directory


def assert_nothing_from_elsewhere(page):
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert all("src" not in attrs for attrs in scripts)
    assert len(scripts) in (0, 3)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base"}
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page.source


def test_page_refers_to_nothing_outside_itself(run, tmp_path):
    assert_nothing_from_elsewhere(Page(report.write(run)))
    other = make_run(tmp_path / "other")
    comparison = report.write_comparison(tmp_path / "both.html", [run, other])
    assert_nothing_from_elsewhere(Page(comparison))


def test_no_string_breaks_out_of_the_page(tmp_path):
    directory = make_hostile_run(tmp_path / "hostile <script>")
    page = Page(report.write(directory))
    assert_nothing_from_elsewhere(page)
    assert HOSTILE in page.text
    assert "<script>window.hacked" not in page.source
    figure = page.figure("Loss")
    assert "<" not in figure["data"][0]["name"]


def test_comparison_overlays_the_runs_and_tells_them_apart(tmp_path):
    first = make_run(tmp_path / "mnist_jax" / "0102")
    second = make_run(tmp_path / "mnist_torch" / "0102", "torch", accuracy=0.9790)
    page = Page(report.write_comparison(tmp_path / "out" / "both.html", [first, second]))
    names = [trace["name"] for trace in page.figure("Loss")["data"]]
    assert names == [
        "mnist_jax/0102 · train",
        "mnist_jax/0102 · val",
        "mnist_torch/0102 · train",
        "mnist_torch/0102 · val",
    ]
    assert page.figure("Loss")["groups"][3] == ["run 1", "split val"]
    colors = [trace["line"]["color"] for trace in page.figure("Loss")["data"]]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert "Test accuracy by class" in page.titles
    assert "initial weights abababababab" in page.text, "what all share is said once, above"
    assert "<b>98.12 %</b>" in page.source
    assert "<td>97.90 %</td>" in page.source
    assert "run.backend jax torch" in page.text
    assert "6 the same in all runs" in page.text


def test_comparison_takes_runs_that_stopped_failed_or_hold_nothing(tmp_path):
    full = make_run(tmp_path / "full")
    stopped = make_run(tmp_path / "stopped")
    write_json(stopped / "result.json", {"status": "stopped"})
    failed = make_run(tmp_path / "failed")
    write_json(failed / "result.json", {"status": "failed", "error": "ValueError: no"})
    (failed / "metrics.jsonl").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    runs = [full, stopped, failed, empty]
    page = Page(report.write_comparison(tmp_path / "page.html", runs))
    assert "stopped: The run was stopped before its end" in page.text
    assert "failed failed: ValueError: no" in page.text
    assert "empty: There is no result.json" in page.text


def parity_arguments():
    reference = [1.0, 0.5, 0.25, 0.125]
    curves = {
        "jax": reference,
        "torch": [1.0, 0.5, 0.25 + 1e-6, 0.125 - 1e-5],
        "lightning": [1.0, float("nan"), 0.25],
    }
    rows = [
        {"run": "torch", "max_abs_difference": 1e-5, "steps": 4, "passed": True},
        {"run": "<i>lightning</i>", "max_abs_difference": 0.0, "steps": 3, "passed": False},
    ]
    summary = {"passed": False, "title": "keras/mnist", "notes": ["Dropout is off."]}
    return rows, curves, "jax", summary


def test_parity_page_plots_losses_and_differences_and_the_table(tmp_path):
    page = Page(report.write_parity(tmp_path / "parity.html", *parity_arguments()))
    assert page.titles == ["Loss", "|difference| to jax"]
    losses, differences = page.figures
    assert [trace["name"] for trace in losses["data"]] == ["jax", "torch", "lightning"]
    assert losses["axes"][0]["step"] == [1, 2, 3, 4]
    assert differences["layout"]["yaxis"]["type"] == "log"
    torch, lightning = (trace["y"] for trace in differences["data"])
    assert torch == [None, None, pytest.approx(1e-6), pytest.approx(1e-5)]
    assert lightning == [None, None, None]
    assert "torch is equal at 2 of 4 steps; lightning is equal at 2 of 3 steps." in page.text
    assert "keras/mnist failed" in page.text
    assert "Dropout is off." in page.text
    assert "torch 1e-05 4 yes" in page.text
    assert "<i>lightning</i> 0 3 no" in page.text


def test_parity_page_of_equal_curves_draws_zero(tmp_path):
    curves = {"jax": [1.0, 0.5], "torch": [1.0, 0.5]}
    summary = {"passed": True, "title": "parity", "notes": []}
    page = Page(report.write_parity(tmp_path / "parity.html", [], curves, "jax", summary))
    assert page.figures[1]["data"][0]["y"] == [0, 0]
    assert "type" not in page.figures[1]["layout"]["yaxis"]


def test_parity_page_refuses_an_unknown_reference(tmp_path):
    rows, curves, _, summary = parity_arguments()
    with pytest.raises(ValueError, match="'keras' is not one of the curves"):
        report.write_parity(tmp_path / "parity.html", rows, curves, "keras", summary)


def test_command_writes_one_run_or_a_comparison(tmp_path, capsys):
    first = make_run(tmp_path / "runs" / "a")
    second = make_run(tmp_path / "runs" / "b")
    assert report.main([str(first)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "report.html")
    assert report.main([str(first), "--output", str(tmp_path / "one.html")]) == 0
    assert "keras/mnist" in Page(tmp_path / "one.html").text
    assert report.main([str(first), str(second)]) == 0
    assert "2 runs" in Page(tmp_path / "runs" / "comparison.html").text


@pytest.mark.parametrize("arguments", [[], ["--nonsense"], ["a", "a"], ["a", "--output", "."]])
def test_bad_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        report.main(arguments)
    assert exit_info.value.code == 2


def test_missing_or_foreign_directory_exits_3(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 3
    assert "there is no run directory" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 3
    assert "is not a run directory" in capsys.readouterr().err


def test_report_imports_no_framework_and_plotly_only_to_write(run):
    code = (
        "import sys; from blacksmith import report; assert 'plotly' not in sys.modules\n"
        f"report.write({str(run)!r})\n"
        "heavy = {'jax', 'torch', 'keras', 'lightning', 'pytorch_lightning', 'tensorflow'}\n"
        "assert not heavy & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Looks at the plots, then presses the buttons and looks again; what it found goes to the console.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  const drawn = plots.filter((plot) => plot.querySelector("svg.main-svg .mlayer :is(path, image)"));
  const found = {
    drawn: drawn.map((plot) => plot.getAttribute("aria-label").replace("plot: ", "")),
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
  };
  for (const button of ["[data-axis=epoch]", "[data-log]", ".key"])
    document.querySelector(button)?.click();
  setTimeout(() => {
    found.axes = plots.map((plot) => plot.layout.xaxis.title?.text);
    found.log = plots[0].layout.yaxis.type;
    found.visible = plots[0].data.map((trace) => trace.visible);
    found.hacked = window.hacked ?? null;
    console.info("found " + encodeURIComponent(JSON.stringify(found)));
  }, 500);
}, 500));
</script></body>"""


def open_in_chromium(path: Path, profile: Path, width: int):
    """What PROBE found in the page, and every other message of its console.

    The page is opened in a frame, since a window of its own is never narrower than 500 px.
    """
    page = path.read_text(encoding="utf-8")
    path.with_name("probed.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    frame = path.with_name("frame.html")
    frame.write_text(f'<iframe src="probed.html" width="{width}" height="1000"></iframe>')
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--window-size=1400,1100",
            "--virtual-time-budget=10000",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = re.findall(r'CONSOLE[^\]]*\] "(.*)", source:', done.stderr)
    found = [message for message in console if message.startswith("found ")]
    assert len(found) == 1, f"the probe did not run: {console}"
    console.remove(found[0])
    return json.loads(urllib.parse.unquote(found[0].removeprefix("found "))), console


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
@pytest.mark.parametrize("kind", ["run", "hostile", "comparison", "parity"])
def test_browser_draws_every_plot_without_a_console_message(tmp_path, kind):
    if kind == "run":
        path, width = report.write(make_run(tmp_path / "run")), 1280
        visible = [False, True]  # the legend's first key is the split "train"
    elif kind == "hostile":
        path, width = report.write(make_hostile_run(tmp_path / "run")), 400
        visible = [False]
    elif kind == "comparison":
        runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "torch")]
        path, width = report.write_comparison(tmp_path / "both.html", runs), 400
        visible = [False, False, True, True]  # its first key is the first run
    else:
        path, width = report.write_parity(tmp_path / "parity.html", *parity_arguments()), 1280
        visible = [False, True, True]
    found, console = open_in_chromium(path, tmp_path / "profile", width)
    titles = [html.unescape(title) for title in Page(path).titles]
    assert console == []
    assert found["width"] == width
    assert found["drawn"] == titles
    assert found["overflow"] <= 0, "the page must not scroll sideways"
    assert found["axes"][0] == ("step" if kind == "parity" else "epoch")
    assert found["log"] == "log"
    assert found["visible"] == visible
    assert found["hacked"] is None
