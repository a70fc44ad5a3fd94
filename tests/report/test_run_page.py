"""The page of one run: what it shows, and what it does with files that are missing or broken."""

import base64
import json
import os

import pytest
from PIL import Image

from blacksmith import report
from blacksmith.errors import DataError
from blacksmith.report import figures
from blacksmith.report.__main__ import main


def test_full_run_shows_key_numbers_and_sections(run, make, page):
    path = report.write(run)
    assert path == run / "report.html"
    shown = page(path)
    for text in (
        "keras/mnist done",
        "backend jax",
        "device cpu",
        "2026-03-04 10:21 UTC",
        "Test accuracy 98.12% step_00000180",
        "Test loss 0.0612",
        "Best val accuracy 92.00% at step 200",
        "Steps 200 5 epochs",
        "Wall time 1 min 15 s",
        "Examples/s 51,105",
        "Parameters 669,706",
        "hidden [512, 512]",
        "jax 0.10.2",
        "commit 3fa9c1d2b7 (modified)",
        "python -m blacksmith.launch '--workdir=a b'",
    ):
        assert text in shown.text, text
    curves = ["Loss", "Accuracy", "Learning rate", "Examples per second"]
    assert shown.titles == [*curves, "Confusion matrix", "Accuracy by class"]
    loss = shown.figure("Loss")
    assert [trace["name"] for trace in loss["data"]] == ["train", "val"]
    assert [trace["mode"] for trace in loss["data"]] == ["lines", "lines+markers"]
    assert loss["data"][0]["y"] == [row["loss"] for row in make.rows() if row["split"] == "train"]
    assert loss["axes"][1]["epoch"][0] == 0.5


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"parameters": 136_957_248, "trained_parameters": 2_442_240}, "Parameters 137.0M 2,442,240 trained"),
        ({"parameters": 9_999_999, "trained_parameters": 9_999_999}, "Parameters 9,999,999"),
    ],
)
def test_parameters_fit_their_card(run, page, counts, text):
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | counts))
    shown = page(report.write(run)).text
    assert text in shown
    assert ("0 trained" in shown) == ("trained" in text)


def test_confusion_matrix_scales_errors_separately(run, page):
    hits, errors = page(report.write(run)).figure("Confusion matrix")["data"]
    assert hits["text"][4][4] == "94"
    assert hits["z"][4][9] is None
    assert errors["text"][4][9] == "7"
    assert errors["z"][4][9] == errors["zmax"] == pytest.approx(7 / 101)
    assert sum(cell is not None for row in errors["z"] for cell in row) == 1


def test_images_are_embedded_with_their_captions(run, make, page):
    make.png(run / "images" / "view_2.png", (300, 100))
    Image.new("L", (200, 200)).save(run / "images" / "view_1.gif")
    (run / "images" / "notes.txt").write_text("not an image")
    shown = page(report.write(run))
    images = [attrs for tag, attrs in shown.elements if tag == "img"]
    assert [image["alt"] for image in images] == ["4 → 9, p(4) = 2e-06", "view_1.gif", "view_2.png"]
    assert "Worst digits 4 → 9 p(4) = 2e-06 Images view_1.gif view_2.png" in shown.text
    for image, name in zip(images, ("test_1.png", "view_1.gif", "view_2.png")):
        head, _, content = image["src"].partition(";base64,")
        assert head == f"data:image/{name[-3:]}"
        assert base64.b64decode(content) == (run / "images" / name).read_bytes()


def test_any_numeric_metric_and_split_gets_its_curve(tmp_path, make, page):
    rows = [
        {"step": 1, "split": "train", "psnr": 20.5, "note": "text"},
        {"step": 2, "split": "val", "psnr": 24.0},
        {"step": 3, "split": "holdout", "psnr": 25.0},
        {"step": 3, "split": "test", "ssim": 0.5},
    ]
    make.metrics(tmp_path, rows)
    shown = page(report.write(tmp_path))
    assert shown.titles == ["PSNR"]
    assert [trace["name"] for trace in shown.figure("PSNR")["data"]] == ["train", "val", "holdout"]


@pytest.mark.parametrize(
    ("metric", "text"),
    [("val_loss", "Best val loss 0.2 at step 4"), ("val_accuracy", "Best val accuracy 80.00% at step 2")],
)
def test_best_validation_is_by_the_checkpoint_metric(tmp_path, make, page, metric, text):
    rows = [
        {"step": 2, "split": "val", "loss": 0.3, "accuracy": 0.8},
        {"step": 4, "split": "val", "loss": 0.2, "accuracy": 0.7},
        {"step": 6, "split": "val", "loss": 0.2, "accuracy": 0.8},
        {"step": 8, "split": "val", "loss": "NaN", "accuracy": "NaN"},
    ]
    make.metrics(tmp_path, rows)
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"metric": metric, "mode": "auto"}}))
    shown = page(report.write(tmp_path)).text
    assert text in shown
    assert shown.count("Best val") == 1


@pytest.mark.parametrize(("tested", "at"), [("step_00000002", 2), ("step_00000003", 4)])
def test_the_test_is_drawn_at_the_tested_checkpoint(tmp_path, make, page, tested, at):
    """Where a validation says when that was; else at the run's end."""
    rows = [
        {"step": 2, "split": "val", "loss": 0.3},
        {"step": 4, "split": "val", "loss": 0.9},
        {"step": 4, "split": "test", "loss": 0.35},
    ]
    make.metrics(tmp_path, rows)
    result = {"tested_checkpoint": tested, "test": {"loss": 0.35}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    figure = page(report.write(tmp_path)).figure("Loss")
    assert [trace["name"] for trace in figure["data"]] == ["val", "test"]
    assert figure["data"][1]["y"] == [0.35]
    assert figure["axes"][1] == {"step": [at], "epoch": [at / 40], "seconds": [at / 100]}


def test_a_single_point_is_visible_on_an_axis_of_its_size(tmp_path, make, page):
    make.metrics(tmp_path, [{"step": 50, "split": "train", "loss": 0.4, "learning_rate": 1e-4}])
    shown = page(report.write(tmp_path))
    assert shown.figure("Loss")["layout"]["yaxis"]["range"] == pytest.approx([0.2, 0.6])
    assert shown.figure("Learning rate")["layout"]["yaxis"]["range"] == pytest.approx([0.5e-4, 1.5e-4])
    assert shown.figure("Loss")["data"][0]["mode"] == "lines+markers"


def test_stopped_run_shows_what_there_is(run, page):
    (run / "result.json").write_text('{"status": "stopped", "step": 120, "seconds": 3.0}')
    (run / "environment.json").unlink()
    shown = page(report.write(run))
    assert "keras/mnist stopped" in shown.text
    assert "The run was stopped before its end" in shown.text
    assert "Not in the run directory: environment.json." in shown.text
    assert "Steps 120 5 epochs Wall time 3 s" in shown.text
    assert "Test accuracy" not in shown.text
    assert "Confusion matrix" not in shown.titles
    assert "Loss" in shown.titles


def test_a_run_of_an_installed_package_has_no_commit(run, page):
    (run / "environment.json").write_text('{"git": null, "device": "cpu"}')
    assert "keras/mnist" in page(report.write(run)).text


def test_empty_directory_still_gives_a_page(tmp_path, page):
    shown = page(report.write(tmp_path))
    assert "unfinished" in shown.text
    assert "There is no result.json" in shown.text
    assert "Nothing was logged" in shown.text
    assert shown.figures == []


def test_values_that_are_not_finite_are_gaps_and_counted(run, make, page):
    rows = [row for row in make.rows() if row["split"] == "train"]
    rows[5]["loss"] = "NaN"
    rows[7]["loss"] = "-Infinity"
    make.metrics(run, rows)
    shown = page(report.write(run))
    losses = shown.figure("Loss")["data"][0]["y"]
    assert [index for index, loss in enumerate(losses) if loss is None] == [5, 7]
    assert "Loss (train): 2 of 20 values are not finite, first at step 60" in shown.text


def test_long_curves_are_thinned_without_losing_spikes(tmp_path, make, page):
    rows = [{"step": step, "split": "train", "loss": 1.0} for step in range(20_000)]
    rows[7_777]["loss"] = 50.0
    rows[12_345]["loss"] = "NaN"
    make.metrics(tmp_path, rows)
    shown = page(report.write(tmp_path))
    losses = shown.figure("Loss")["data"][0]["y"]
    assert len(losses) <= figures.MAX_POINTS + 2
    assert 50.0 in losses
    assert None in losses
    assert "20,000 points" in shown.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is not valid JSON"),
        ("result.json", b"[1]", "valid dictionary"),
        ("environment.json", b"\xff\xfe", "is not valid JSON"),
        ("result.json", b'{"seconds": NaN}', "seconds"),
        ("result.json", b'{"step": 1%s}' % (b"0" * 400), "step"),
        ("result.json", b'{"test": {"loss": 1%s}}' % (b"0" * 400), "loss is too large"),
        ("result.json", b'{"test": {"confusion_matrix": [[1e308]]}}', "confusion_matrix"),
        ("metrics.jsonl", b'{"st\n{"step": 3}\n', "line 1"),
    ],
)
def test_a_broken_file_is_one_line_and_exit_status_3(run, capsys, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        report.write(run)
    assert not (run / "report.html").exists()
    assert main([str(run)]) == 3
    error = capsys.readouterr().err
    assert name in error
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"run": ' * 100_000, "nested too deeply"),
        ("result.json", b'{"test": {"confusion_matrix": [[1, 2], [3]]}}', "not square"),
        ("metrics.jsonl", b'{"step": NaN, "epoch": 1, "seconds": 1, "split": "val"}\n{}\n', "step is 'nan'"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n{}\n", "nested too deeply"),
        ("config.json", b" " * (2**24 + 1), "more than 16,777,216 bytes"),
    ],
)
def test_files_that_ask_for_too_much_are_one_line(run, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        report.write(run)


def test_a_file_among_the_images_that_is_none_is_named_on_the_page(run, page):
    (run / "images" / "view.png").write_bytes(b"not an image")
    os.mkfifo(run / "images" / "pipe.png")
    assert "view.png is not a PNG or GIF file and is left out" in page(report.write(run)).text


def test_a_failed_write_leaves_the_old_page(run, monkeypatch):
    before = report.write(run).read_bytes()

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(DataError, match="No space left on device"):
        report.write(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".*"))


def test_only_our_own_page_is_overwritten(run, capsys):
    page = run / "report.html"
    page.write_text("<!doctype html>mine")
    comparison = run.parent / "comparison.html"
    comparison.write_text("mine")
    assert main([str(run)]) == 3
    assert f"{page} is not a page that this program wrote" in capsys.readouterr().err
    assert main([str(run), str(run)]) == 3
    assert (page.read_text(), comparison.read_text()) == ("<!doctype html>mine", "mine")
    assert main([str(run), f"--output={run / 'result.json'}"]) == 3
    page.unlink()
    assert main([str(run)]) == 0
    assert main([str(run), f"--output={page}"]) == 0
