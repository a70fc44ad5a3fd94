"""A run's directory: taken, locked, left alone when refused, and with a record of how the run ended."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numpy_toy import Info, configure, result_of, save, take_steps

from blacksmith import config as configuration
from blacksmith.errors import CheckpointError, ConfigError, DataError
from blacksmith.files import temporary_name
from blacksmith.run import metrics, provenance
from blacksmith.run import run as runs

DATA = dataclasses.asdict(Info())


def _json(directory, name):
    return json.loads((directory / name).read_text())


# What a run leaves


def test_a_finished_run_leaves_its_files(make):
    with make().opened() as run:
        take_steps(run, 2)
        run.finish("done", {"step": 2})
    assert {p.name for p in run.directory.iterdir()} == {
        ".lock",
        "manifest.jsonl",
        "checkpoints",
        "config.gin",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "operative.gin",
        "result.json",
    }
    result = result_of(run.directory)
    assert (result["status"], result["step"], result["data"]) == ("done", 2, DATA)
    assert (result["experiment"], result["backend"], result["device"]) == ("toy", "jax", "cpu")
    assert 20e6 < result["peak_memory_bytes"] < 1e12


def test_a_checkpoint_holds_what_a_resume_needs(make):
    with make("Run.seed = 3").opened() as run:
        take_steps(run, 2)
    saved = run.checkpoints.newest()
    assert (saved.step, saved.own, saved.state["position"]) == (2, {"letters": 2}, {"step": 2})
    assert saved.state["metrics"] == {"val_loss": 0.5}
    assert saved.state["data"] == DATA
    assert saved.state["checkpoint_format"] == "toy-1"
    assert saved.state["config"] == configuration.as_dict(run.config)
    assert saved.state["metrics_offset"] == (run.directory / "metrics.jsonl").stat().st_size


def test_the_saved_gin_files_give_the_same_configuration(make):
    with make("toy.Train.epochs = 3").opened() as run:
        pass
    for name in ("config.gin", "operative.gin"):
        parsed = configuration.parse([str(run.directory / name)])
        assert configuration.build(type(run.config), parsed, experiment="toy") == run.config
    assert _json(run.directory, "config.json") == configuration.as_dict(run.config)


def test_the_environment_describes_machine_command_and_data(make, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    monkeypatch.setenv("TORCH_HOME", "https://me:word@host/x")
    monkeypatch.setenv("KERAS_API_KEY", "word")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    with make(command=["launch", "--gin_file=a.gin"]).opened() as run:
        run.use_data(Info(), rows=20)
        environment = _json(run.directory, "environment.json")
    assert environment["command"] == ["launch", "--gin_file=a.gin"]
    assert environment["variables"]["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in environment["variables"]
    assert environment["variables"]["XLA_FLAGS"] == "--xla_x=1"
    assert environment["variables"]["TORCH_HOME"] == "https://***@host/x"
    assert "word" not in str(environment["variables"])
    assert "AWS_SECRET_ACCESS_KEY" not in environment["variables"]
    assert environment["cores"] == sorted(os.sched_getaffinity(0))
    assert environment["experiment"] == "toy"
    assert (environment["backend"], environment["device"]) == ("jax", "cpu")
    assert environment["data"] == run.data == DATA | {"rows": 20}
    assert environment["resumed_from"] is None
    assert environment["previous"] == []
    assert environment["python"] == sys.version.partition(" ")[0]
    assert environment["cpu_count"] == os.cpu_count()
    root = Path(runs.__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", root, "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        assert environment["git"]["commit"] == head
        assert environment["git"]["dirty"] in (True, False)


def test_versions_are_those_of_all_installed_packages():
    found = provenance.versions()
    assert found["pytest"] == pytest.__version__
    assert {"jaxlib", "numpy", "tokenizers"} <= found.keys()  # also what others require


def test_the_environment_of_a_resumed_run_keeps_earlier_ones(make):
    with make(command=["first"]).opened() as run:
        take_steps(run, 1)
    newest = run.checkpoints.newest()
    with make(command=["second"], resumed=newest, backend="torch").opened() as run:
        take_steps(run, 1, first=1)
    environment = _json(run.directory, "environment.json")
    assert environment["resumed_from"] == str(newest.path)
    (previous,) = environment["previous"]
    assert (previous["command"], previous["backend"]) == (["first"], "jax")
    assert (environment["command"], environment["backend"]) == (["second"], "torch")
    for broken in ("{}", "{", "[]", '{"previous": 1}', "[" * 200_000):
        (run.directory / "environment.json").write_text(broken)
        with make(resumed=run.checkpoints.newest()).opened() as run:
            run.begin()


def test_data_is_described_on_the_console(make, capsys):
    with make().opened() as run:
        run.use_data(Info())
    assert capsys.readouterr().err == "data: rows\n"


def test_a_report_is_written_after_the_result(make):
    results = []
    with make(write_report=lambda path: results.append(result_of(path)["status"])).opened() as run:
        take_steps(run, 1)
        run.finish("done", {})
    assert results == ["done"]


def test_a_report_that_fails_is_a_warning_and_keeps_the_result(make, capsys):
    def broken(directory):
        raise ValueError("no plot")

    with make(write_report=broken).opened() as run:
        run.finish("done", {})
    assert result_of(run.directory)["status"] == "done"
    assert capsys.readouterr().err == "warning: no report: ValueError: no plot\n"


# Begin


def test_a_new_run_begins_at_once_and_once(make):
    run = make()
    with run.opened():
        for stale in ("result.json", "report.html", "metrics.jsonl", "images/test_1.png"):
            run.claim(stale).write_text("old")
    run = make()
    with run.opened():
        assert not (run.directory / "result.json").exists()
        assert not (run.directory / "report.html").exists()
        assert not (run.directory / "images" / "test_1.png").exists()
        run.metrics.write(1, 0.1, "train", {})
        stream = run.metrics
        run.begin()
        assert run.metrics is stream
    assert [line["step"] for line in metrics.read(run.directory / "metrics.jsonl")] == [1]


def test_a_run_that_resumes_changes_nothing_before_begin(make, tree):
    with make().opened() as run:
        take_steps(run, 3)
        run.finish("done", {})
    (run.checkpoints.newest().path / "a").unlink()
    before = tree(run.directory)
    with make(resumed=run.checkpoints.newest()).opened() as again:
        assert (again.resumes_in_place, again.resumed.step) == (True, 2)
        again.use_data(Info())
        with pytest.raises(RuntimeError, match=r"after run\.begin"):
            again.metrics.write(3, 0.3, "train", {"loss": 9.0})
        assert tree(run.directory) == before
        again.begin()
        again.metrics.write(3, 0.3, "train", {"loss": 9.0})
        assert not (run.directory / "result.json").exists()
    assert [p.name for p in again.checkpoints.steps()] == ["step_00000002"]
    lines = metrics.read(run.directory / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_resumed_run_continues_the_seconds(make, monkeypatch):
    with make().opened() as run:
        run.use_data(Info())
        monkeypatch.setattr(type(run.metrics), "seconds", property(lambda _: 1000.0))
        save(run, 1)
    monkeypatch.undo()
    with make(resumed=run.checkpoints.newest()).opened() as run:
        run.begin()
        assert run.metrics.seconds > 1000


def test_a_run_from_a_checkpoint_elsewhere_leaves_that_run_alone(make, tree, tmp_path):
    with make().opened() as first:
        take_steps(first, 2)
    before = tree(first.directory)
    second = make(directory=tmp_path / "second", resumed=first.checkpoints.newest())
    assert not second.resumes_in_place
    with second.opened() as run:
        take_steps(run, 1, first=2)
        run.finish("done", {})
    assert tree(first.directory) == before
    assert [line["step"] for line in metrics.read(run.directory / "metrics.jsonl")] == [3]


def test_metrics_shorter_than_at_the_checkpoint_are_refused(make, tree):
    with make().opened() as run:
        take_steps(run, 2)
    os.truncate(run.directory / "metrics.jsonl", 10)
    before = tree(run.directory)
    with (
        pytest.raises(CheckpointError, match=r"metrics.jsonl has lost or changed lines .* --resume=PATH"),
        make(resumed=run.checkpoints.newest()).opened() as run,
    ):
        run.begin()
    assert tree(run.directory) == before


def test_a_checkpoint_that_a_kill_left_aside_is_not_started_over(make):
    with make().opened() as run:
        take_steps(run, 1)
    (saved,) = run.checkpoints.steps()
    saved.rename(temporary_name(saved, "old"))
    with pytest.raises(ConfigError, match="start again to resume"), make(resumed=None).opened():
        pass
    assert run.checkpoints.newest().step == 1


def test_weights_and_biases_that_refuses_changes_nothing(make, monkeypatch):
    with make().opened() as run:
        take_steps(run, 1)
        run.finish("done", {})

    def refuse(*_):
        raise ConfigError("Log.wandb = 'online': no key")

    monkeypatch.setattr(runs.Run, "_wandb_writer", refuse)
    again = make("Log.wandb = 'online'", resumed=run.checkpoints.newest())
    with pytest.raises(ConfigError), again.opened():
        again.begin()
    assert result_of(run.directory)["status"] == "done"


def test_evaluation_leaves_the_record_of_the_training_alone(make, tree, capsys):
    with make().opened() as run:
        take_steps(run, 2)
        run.finish("done", {"step": 2})
    before = tree(run.directory)
    with make(mode="eval", resumed=run.checkpoints.newest()).opened() as run:
        run.use_data(Info())
        assert run.trained_on_this_data()
        run.use_data(Info("others", "f" * 64))
        assert not run.trained_on_this_data()
        assert "note: the model was trained on other data (rows 0123456789ab)" in capsys.readouterr().err
        with pytest.raises(RuntimeError, match="no metric stream"):
            run.metrics.write(1, 0, "train", {})
        assert run.stopped() == runs.STOPPED
    assert tree(run.directory) == before


def test_weights_of_no_run_can_be_evaluated(make, tmp_path):
    run = make(mode="eval", external_weights=tmp_path)
    with run.opened():
        run.use_data(Info())
        assert (run.external_weights, run.resumed, run.resumes_in_place) == (tmp_path, None, False)
        assert not run.trained_on_this_data()


# Which checkpoints fit


@pytest.mark.parametrize(
    ("bindings", "shown"),
    [
        (["Run.seed = 1"], ["Run.seed 0 -> 1"]),
        (["toy.Train.learning_rate = 0.5"], ["toy.Train.learning_rate 0.1 -> 0.5"]),
        (["toy.Train.early_stopping = 3"], ["toy.Train.early_stopping None -> 3"]),
        (
            [
                "Run.seed = 1",
                "toy.Train.batch_size = 3",
                "toy.Train.learning_rate = 0.5",
                "Checkpoint.mode = 'max'",
                "toy.Train.early_stopping = 3",
            ],
            ["batch_size 4 -> 3"],
        ),
    ],
)
def test_a_resume_with_other_settings_is_refused_naming_them(make, bindings, shown):
    with make().opened() as run:
        take_steps(run, 1)
    with pytest.raises(ConfigError) as raised:
        runs.check_resume(run.checkpoints.newest(), configure(*bindings)[0], "toy", "toy-1")
    for words in (*shown, "step_00000001", f"--gin_file={run.directory / 'config.gin'}", "new --workdir"):
        assert words in str(raised.value)
    assert str(raised.value).count(" -> ") == len(bindings)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_resume_with_settings_that_may_change_is_allowed(make, mode):
    with make().opened() as run:
        take_steps(run, 1)
    bindings = [
        "toy.Train.steps = 9",
        "Checkpoint.keep_last = 7",
        "Log.progress = 'lines'",
        "Run.backend = 'jax'",
    ]
    runs.check_resume(run.checkpoints.newest(), configure(*bindings)[0], "other", "toy-1", mode=mode)


def test_a_checkpoint_of_another_format_is_refused(make):
    with make().opened() as run:
        take_steps(run, 1)
    with pytest.raises(CheckpointError, match=r"written by toy in the format toy-1 but other reads other-1"):
        runs.check_resume(run.checkpoints.newest(), run.config, "other", "other-1")


@pytest.mark.parametrize("info", [Info(sha256="f" * 64), Info("others", "0" * 64)])
def test_a_resume_with_other_data_is_refused_and_changes_nothing(make, tree, info):
    with make().opened() as run:
        take_steps(run, 2)
        run.finish("done", {"step": 2})
    before = tree(run.directory)
    message = (
        f"changed since step_00000002: it was rows 0123456789ab, now it is {info.source} {info.sha256[:12]}"
    )
    with pytest.raises(DataError, match=message), make(resumed=run.checkpoints.newest()).opened() as run:
        run.use_data(info)
    assert tree(run.directory) == before
