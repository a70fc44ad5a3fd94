"""The pages of several runs and of a parity check, and the command."""

import subprocess
import sys

import pytest

from blacksmith import report
from blacksmith.report.__main__ import main


def test_comparison_overlays_runs_and_marks_the_best(tmp_path, make, page):
    first = make.run(tmp_path / "mnist_jax" / "0102")
    second = make.run(tmp_path / "mnist_torch" / "0102", "torch", accuracy=0.9790)
    shown = page(report.write_comparison(tmp_path / "out" / "both.html", [first, second]))
    loss = shown.figure("Loss")
    names = ["mnist_jax/0102 · train", "mnist_jax/0102 · val"]
    names += ["mnist_torch/0102 · train", "mnist_torch/0102 · val"]
    assert [trace["name"] for trace in loss["data"]] == names
    assert loss["groups"][3] == ["run 1", "split val"]
    colors = [trace["line"]["color"] for trace in loss["data"]]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert "initial weights abababababab" in shown.text, "what all share stands once, above the table"
    assert '<td class="best">98.12%</td>' in shown.source
    assert "<td>97.90%</td>" in shown.source
    assert "run.backend jax torch" in shown.text
    assert "6 settings are identical in all runs" in shown.text


def test_comparison_takes_runs_that_stopped_failed_or_are_empty(tmp_path, make, page):
    full, stopped, failed = (make.run(tmp_path / name) for name in ("full", "stopped", "failed"))
    (stopped / "result.json").write_text('{"status": "stopped"}')
    (failed / "result.json").write_text('{"status": "failed", "error": "ValueError: no"}')
    (failed / "metrics.jsonl").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    shown = page(report.write_comparison(tmp_path / "page.html", [full, stopped, failed, empty]))
    assert "stopped: The run was stopped before its end" in shown.text
    assert "failed failed ValueError: no" in shown.text
    assert "empty: There is no result.json" in shown.text


def test_parity_page_plots_losses_and_differences(tmp_path, make, page):
    shown = page(report.write_parity(tmp_path / "parity.html", **make.parity))
    assert shown.titles == ["Loss", "|difference| to jax"]
    losses, differences = shown.figures
    assert [trace["name"] for trace in losses["data"]] == ["jax", "torch", "lightning"]
    assert losses["axes"][0]["step"] == [1, 2, 3, 4]
    assert differences["layout"]["yaxis"]["type"] == "log"
    torch, lightning = (trace["y"] for trace in differences["data"])
    assert torch == [None, None, pytest.approx(1e-6), pytest.approx(1e-5)]
    assert lightning == [None, None, None]
    assert "torch is equal at 2 of 4 steps; lightning is equal at 2 of 3 steps." in shown.text
    for text in ("Parity over 4 steps failed", "Dropout is off.", "<i>torch</i> 4 1.25", "x 3 2"):
        assert text in shown.text, text


def test_parity_of_equal_curves_draws_zero(tmp_path, page):
    curves = {"jax": [1.0, 0.5], "torch": [1.0, 0.5]}
    summary = {"passed": True, "title": "parity", "notes": []}
    shown = page(report.write_parity(tmp_path / "parity.html", [], curves, "jax", summary))
    assert shown.figures[1]["data"][0]["y"] == [0, 0]
    assert "type" not in shown.figures[1]["layout"]["yaxis"]


def test_command_writes_one_run_or_a_comparison(tmp_path, make, page, capsys):
    first = make.run(tmp_path / "runs" / "a")
    second = make.run(tmp_path / "runs" / "b")
    assert main([str(first)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "report.html")
    assert main([str(first), "--output", str(tmp_path / "one.html")]) == 0
    assert "keras/mnist" in page(tmp_path / "one.html").text
    assert main([str(first), str(second)]) == 0
    assert "2 runs" in page(tmp_path / "runs" / "comparison.html").text


@pytest.mark.parametrize("arguments", [[], ["--nonsense"]])
def test_bad_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


def test_missing_or_unrelated_directory_exits_3(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 3
    assert "there is no run directory" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 3
    assert "is not a run directory" in capsys.readouterr().err


def test_report_imports_no_framework_and_plotly_only_to_write(run):
    code = (
        "import sys; from blacksmith import report\n"
        "assert not {'plotly', 'jinja2', 'PIL'} & set(sys.modules)\n"
        f"report.write({str(run)!r})\n"
        "heavy = {'jax', 'torch', 'keras', 'lightning', 'pytorch_lightning', 'tensorflow'}\n"
        "assert not heavy & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
