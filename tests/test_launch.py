"""The launcher: one-line errors that create nothing, plugins, exit statuses, lazy imports."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from blacksmith import config as configuration
from blacksmith import devices, errors, launch, registry, report
from blacksmith.run import run as runs
from blacksmith.run.manifest import Manifest

JAX = "--gin_file=gin/mnist_jax.gin"
BUNDLED = sorted(configuration.gin_directory().glob("*.gin"))
FRAGMENTS = sorted((configuration.gin_directory() / "include").glob("*.gin"))

# An experiment without a framework, as a user would write it.
TOY = '''\
"""A toy experiment."""

import dataclasses
from typing import Literal

from blacksmith import registry
from blacksmith.config import settings
from blacksmith.config.sections import section, setting
from blacksmith.errors import DataError, RunError


@section("toy.Train")
class Train:
    """How it runs and ends."""

    steps: int = setting(3, "steps", gt=0)
    ending: Literal["done", "data", "disk", "bug", "stopped", "forgotten"] = setting("done", "how it ends")


@dataclasses.dataclass(frozen=True)
class Config:
    """The toy's configuration."""

    run: settings.RunConfig
    train: Train
    checkpoint: settings.CheckpointConfig
    log: settings.LogConfig

def main(run):
    train = run.config.train
    if train.ending == "data":
        raise DataError("toys.csv: no toys in it")
    for step in range(1, train.steps + 1):
        run.metrics.write(step, step / train.steps, "train", {"loss": 1 / step})
    if train.ending == "disk":
        raise RunError("the loss is not finite")
    if train.ending == "bug":
        raise ZeroDivisionError("a bug")
    if train.ending == "forgotten":
        return 0
    run.finish("done", {"step": train.steps, "test": {"loss": 1 / train.steps}})
    return 75 if train.ending == "stopped" else 0


needs = {"jax": registry.Needs("jax", ()), "torch": registry.Needs("torch", ())}
modes = dict.fromkeys(("train", "eval", "export"), "toy:main")
registry.add(registry.Experiment("toy", "a toy", "toy", modes, needs, "toy-1"))
'''


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch, own_registry):
    """An empty working directory without the backends and plugins of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    yield
    sys.modules.pop("toy", None)


@pytest.fixture
def fails(tmp_path, capsys, tree):
    """Runs the launcher and expects one readable line, the exit status and an untouched directory."""

    def run(*argv, status=2, says=()):
        before = tree(tmp_path)
        assert launch.main(["launch", *argv]) == status
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        assert line.endswith("\n")
        assert "Traceback" not in line
        for words in says:
            assert words in line
        assert tree(tmp_path) == before

    return run


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails the test at once, instead of training, if a configuration is wrongly accepted."""

    def accepted(*_, **__):
        raise AssertionError("the configuration was accepted")

    monkeypatch.setattr(launch, "run_experiment", accepted)


@pytest.fixture
def toy(tmp_path):
    """A plugin in the working directory; returns its flags."""
    (tmp_path / "toy.py").write_text(TOY)
    return (
        "--plugin=toy",
        "--gin_param=Run.experiment = 'toy'",
        "--gin_param=Run.backend = 'jax'",
        "--gin_param=Log.tensorboard = False",
    )


# Bad configurations

# Lines that make a valid file invalid; the first is line 3 of bad.gin.
BAD_LINES = {
    # Syntax.
    "no equals sign": (
        "mnist.Train.epochs 3",
        ["bad.gin:3: cannot be parsed", "write one Section.field = value per line"],
    ),
    "no value": ("mnist.Train.epochs =", ["bad.gin:3", "a value is a number, a string"]),
    "a colon for an equals sign": (
        "mnist.Train.epochs: 3",
        ["bad.gin:3", "write one Section.field = value per line"],
    ),
    "a space in a name": (
        "mnist. Train.epochs = 3",
        ["bad.gin:3", "write one Section.field = value per line"],
    ),
    "an open bracket at the end": ("mnist.Model.hidden = (3, 4", ["bad.gin:3: cannot be parsed"]),
    "an open bracket before a setting": (
        "mnist.Model.hidden = (3, 4\nmnist.Train.epochs = 3",
        ["bad.gin:4", "Expected ',' or ')'"],
    ),
    "a missing comma": ("mnist.Model.hidden = (3 4)", ["bad.gin:3", "Expected ',' or ')'"]),
    "a tuple without brackets": ("mnist.Model.hidden = 3, 4", ["bad.gin:3"]),
    "an open quote": ('mnist.Data.path = "abc', ["bad.gin:3: cannot be parsed"]),
    "a string without quotes": ("mnist.Data.source = idx", ["bad.gin:3", "a string in quotes"]),
    "true in lower case": ("mnist.Model.bias = true", ["bad.gin:3", "a tuple, True"]),
    "deep nesting": ("mnist.Model.hidden = " + "(" * 5000, ["bad.gin:3: cannot be parsed"]),
    "a block without a body": ("mnist.Train:\nLog.wandb = 'off'", ["bad.gin:4", "Expected indentation"]),
    # What Gin can do and settings cannot.
    "a reference": ("mnist.Data.source = @auto", ["bad.gin:3", "'@auto' is a reference"]),
    "a scope": ("a/mnist.Train.epochs = 3", ["bad.gin:3", "the scope 'a'", "write mnist.Train.epochs"]),
    "an import": ("import os", ["bad.gin:3: imports 'os'", "--allow_imports"]),
    # Names.
    "an unknown section": (
        "mnst.Train.epochs = 3",
        ["bad.gin:3", "did you mean 'mnist.Train'?", "allowed: Run, "],
    ),
    "a section in British spelling": ("Optimiser.name = 'sgd'", ["bad.gin:3", "did you mean 'Optimizer'?"]),
    "a different experiment's section": (
        "nerf.Train.steps = 3",
        ["bad.gin:3: the experiment 'keras/mnist' has no section 'nerf.Train'", "allowed: Run, Schedule"],
    ),
    "a section bound itself": ("mnist.Train = 3", ["bad.gin:3", "has no section 'mnist'"]),
    "an unknown field": (
        "mnist.Train.epoch = 3",
        ["bad.gin:3", "did you mean 'epochs'?", "allowed: epochs, steps"],
    ),
    "a field without its section": ("epochs = 3", ["bad.gin:3", "written Section.field = value"]),
    "a setting twice": (
        "mnist.Train.epochs = 3\nmnist.Train.epochs = 4",
        ["bad.gin:4: mnist.Train.epochs was already set at bad.gin:3"],
    ),
    # Macros.
    "an unused macro": ("width = 3", ["bad.gin:3: the macro 'width' is never used"]),
    "an undefined macro": ("mnist.Train.epochs = %n", ["bad.gin:3: %n is not defined"]),
    "a misspelled macro": (
        "width = 3\nmnist.Model.hidden = (%widht, %width)",
        ["bad.gin:4: %widht is not defined", "did you mean 'width'?"],
    ),
    "a macro of itself": ("n = (1, %n)\nmnist.Model.hidden = %n", ["bad.gin:3: %n refers to itself"]),
    "macros of each other": ("n = %m\nm = %n\nmnist.Train.epochs = %n", ["refers to itself"]),
    # Includes.
    "a missing include": ("include 'nope.gin'", ["bad.gin:3: no Gin file 'nope.gin'", "gin/mnist_jax.gin"]),
    "an include of a directory": ("include 'folder'", ["bad.gin:3: no Gin file 'folder'"]),
    "a file that includes itself": ("include 'bad.gin'", ["bad.gin:3: bad.gin includes itself"]),
    "a cycle of includes": (
        "include 'folder/back.gin'",
        ["folder/back.gin:1", "bad.gin includes itself"],
    ),
    "a mistake in an included file": (
        "include 'folder/typo.gin'",
        ["folder/typo.gin:2", "did you mean 'epochs'?"],
    ),
    # Types.
    "a float for an int": (
        "mnist.Train.epochs = 3.0",
        ["bad.gin:3: mnist.Train.epochs = 3.0: must be a valid integer"],
    ),
    "a bool for an int": ("mnist.Train.epochs = True", ["bad.gin:3", "must be a valid integer"]),
    "an int for a bool": ("mnist.Model.bias = 1", ["bad.gin:3", "must be a valid boolean"]),
    "a list for a tuple": ("mnist.Model.hidden = [64, 64]", ["bad.gin:3", "write (64, 64)"]),
    "a float in a tuple": ("mnist.Model.hidden = (64, 6.4)", ["bad.gin:3: mnist.Model.hidden[1] = 6.4"]),
    # Values.
    "an unknown optimizer": ("Optimizer.name = 'adm'", ["bad.gin:3", "did you mean 'adam'?", "'adamw'"]),
    "neither of a union": (
        "mnist.Data.validation = 'tset'",
        ["bad.gin:3", "must be a valid integer or 'test'"],
    ),
    "zero epochs": ("mnist.Train.epochs = 0", ["bad.gin:3", "must be greater than 0"]),
    "a number too large": ("mnist.Data.mean = 1e999", ["bad.gin:3", "must be a finite number"]),
    # Rules across fields, reported where the first of them is bound.
    "accumulation that does not divide": (
        "mnist.Train.batch_size = 10\nmnist.Train.accumulate = 3",
        ["bad.gin:4: mnist.Train.accumulate = 3 does not divide mnist.Train.batch_size = 10"],
    ),
    "a negative validation set": (
        "mnist.Data.validation = -5",
        ["bad.gin:3", "must be greater than or equal to 0 or 'test'"],
    ),
    "a width of zero": ("mnist.Model.hidden = (64, 0)", ["bad.gin:3", "must be greater than 0"]),
    "two ways to clip": (
        "Optimizer.clip_value = 1.0\nOptimizer.clip_norm = 1.0",
        ["bad.gin:4: Optimizer.clip_norm and Optimizer.clip_value are both set"],
    ),
    "momentum for adam": (
        "Optimizer.momentum = 0.9",
        ["bad.gin:3", "has no effect unless Optimizer.name is 'sgd' or 'rmsprop'"],
    ),
    "nesterov without momentum": (
        "Optimizer.name = 'sgd'\nOptimizer.nesterov = True",
        ["bad.gin:4", "no effect unless", "Optimizer.momentum is above 0"],
    ),
    "an unknown metric": ("Checkpoint.metric = 'val_acc'", ["bad.gin:3", "'val_accuracy' or 'val_loss'"]),
    "early stopping without validation": (
        "mnist.Data.validation = 0\nmnist.Train.early_stopping = 3",
        ["bad.gin:4: mnist.Train.early_stopping = 3 has no effect unless mnist.Data.validation is not 0"],
    ),
    "a named set that is not read through TFDS": (
        "mnist.Data.name = 'kmnist'",
        ["bad.gin:3", "no effect unless mnist.Data.source is 'tfds'"],
    ),
}


@pytest.mark.parametrize(("lines", "says"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_a_one_line_error(tmp_path, fails, nothing_runs, lines, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "back.gin").write_text("include '../bad.gin'\n")
    (tmp_path / "folder" / "typo.gin").write_text("# A typo.\nmnist.Train.epohcs = 3\n")
    (tmp_path / "bad.gin").write_text(f'Run.experiment = "keras/mnist"\nRun.backend = "jax"\n{lines}\n')
    fails("--gin_file=bad.gin", says=says)


# Whole files.
BAD_FILES = {
    "an empty file": ("", ["bad.gin: Run.experiment is not set", "keras/mnist, lightning/mnist"]),
    "the experiment under a wrong name": (
        "Run.backend = 'jax'\nRun.experimnt = 'keras/mnist'",
        ["bad.gin:2: 'Run.experimnt' is unknown; did you mean 'Run.experiment'?"],
    ),
    "the experiment without its section": (
        "experiment = 'keras/mnist'",
        ["bad.gin:1", "did you mean 'Run.experiment'?"],
    ),
    "an unknown experiment": (
        "Run.experiment = 'keras/mnits'",
        ["bad.gin:1", "did you mean 'keras/mnist'?", "allowed: keras/mnist, lightning/mnist"],
    ),
    "an experiment in a list": ("Run.experiment = ['keras/mnist']", ["bad.gin:1", "allowed: keras/mnist"]),
    "no backend": (
        "Run.experiment = 'keras/mnist'",
        ["Run.backend is required by keras/mnist: jax or torch"],
    ),
    "an unknown backend": (
        "Run.experiment = 'keras/mnist'\nRun.backend = 'tensorflow'",
        ["bad.gin:2: Run.backend = 'tensorflow'", "must be 'jax' or 'torch'"],
    ),
    "a backend that the experiment does not have": (
        "Run.experiment = 'lightning/mnist'\nRun.backend = 'jax'",
        ["bad.gin:2: Run.backend = 'jax': lightning/mnist runs on torch"],
    ),
    "bytes that are not text": (b"Run.experiment = '\xff\xfe'", ["bad.gin: cannot be read", "utf-8"]),
    "JSON": ('{"Run": {"experiment": "keras/mnist"}}', ["bad.gin:1: cannot be parsed"]),
}


@pytest.mark.parametrize(("content", "says"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_a_one_line_error(tmp_path, fails, nothing_runs, content, says):
    (tmp_path / "bad.gin").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails("--gin_file=bad.gin", says=says)


# Command lines; the working directory contains only an empty folder.
BAD_FLAGS = {
    "nothing at all": ([], ["give a configuration: --gin_file=FILE, such as gin/mnist_jax.gin", "--list"]),
    "a misspelled file": (["--gin_file=gin/mnist_jxa.gin"], ["did you mean 'mnist_jax.gin'?"]),
    "a directory as file": (["--gin_file=folder"], ["--gin_file: no Gin file 'folder'"]),
    "a fragment alone": (
        ["--gin_file=gin/include/mnist.gin"],
        ["gin/include/mnist.gin: Run.experiment is not set", "is a fragment"],
    ),
    "a binding without a value": (
        [JAX, "--gin_param=mnist.Train.epochs"],
        ["--gin_param 'mnist.Train.epochs': cannot be parsed", "write one Section.field = value"],
    ),
    "a binding whose quotes the shell took": (
        [JAX, "--gin_param=mnist.Data.path=/data/mnist"],
        ["--gin_param 'mnist.Data.path=/data/mnist'", "a string in quotes"],
    ),
    "a binding of an unknown field": (
        [JAX, "--gin_param=mnist.Train.epoch = 3"],
        ["--gin_param 'mnist.Train.epoch = 3': mnist.Train has no field 'epoch' (did you mean 'epochs'?)"],
    ),
    "an import by a binding": ([JAX, "--gin_param=import os"], ["imports 'os'", "--allow_imports"]),
    "an unknown flag": ([JAX, "--epochs=3"], ["Unknown command line flag 'epochs'", "--helpfull"]),
    "a stray argument": ([JAX, "train"], ["'train' is not a flag", "--helpfull"]),
    "a file without its flag": (["gin/mnist_jax.gin"], ["given as --gin_file=gin/mnist_jax.gin"]),
    "an unknown mode": ([JAX, "--mode=test"], ["--mode=test", "train|eval|export"]),
    "a bad boolean": ([JAX, "--dry_run=perhaps"], ["--dry_run=perhaps"]),
    "a flag without its value": ([JAX, "--workdir"], ["workdir", "--helpfull"]),
    "a missing plugin": ([JAX, "--plugin=no_such"], ["--plugin=no_such: no module 'no_such'"]),
    "an empty plugin": ([JAX, "--plugin="], ["--plugin=: '' is not a module name"]),
    "a path as plugin": ([JAX, "--plugin=folder/toy.py"], ["is not a module name", "without .py"]),
}


@pytest.mark.parametrize(("argv", "says"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_a_bad_command_line_is_a_one_line_error(tmp_path, fails, nothing_runs, argv, says):
    (tmp_path / "folder").mkdir()
    fails(*argv, says=says)


BOUNDS = {
    "deep": "Run.seed = " + "(" * 90 + "1," + ")" * 90,
    "deeper than the parser": "Run.seed = " + "[" * 9000 + "]" * 9000,
    "signs": "Run.seed = " + "-" * 20_000 + "1",
    "digits": "Run.seed = " + "9" * 5000,
    "bits": "Run.seed = 0x" + "f" * 6000,
    "characters": f"Run.seed = '{'x' * 20_000}'",
    "words": f"Run.seed = '{'w ' * 4000}'",
    "zero byte": r"Run.seed = 'a\0b'",
    "half a character": r"Run.seed = '\ud800'",
    "control characters": "Run.seed = 1\x1b[31m\x07",
    "long name": "a" * 5000 + ".b = 3",
    "long text": "Run.seed = " + "'a' " * 100_000,
    "macros of macros": "m0 = (1, 1)\n"
    + "\n".join(f"m{i} = (%m{i - 1}, %m{i - 1}, %m{i - 1})" for i in range(1, 40))
    + "\nRun.seed = %m39",
}


@pytest.mark.parametrize("case", BOUNDS)
def test_values_without_bounds_are_one_short_line(capsys, nothing_runs, case):
    argv = ["launch", JAX, f"--gin_param={BOUNDS[case]}"]
    assert launch.main(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --gin_param ")
    assert line.count("\n") == 1
    assert len(line) < 1100
    assert line[:-1].isprintable()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        RecursionError("too deep"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_or_stack_is_one_line(monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(launch, "run_experiment", fail)
    assert launch.main(["launch", JAX]) == 1
    line = capsys.readouterr().err
    assert line == f"error: not enough memory or stack for this ({type(error).__name__}: {error})\n"


def test_a_note_shows_no_control_characters(capsys):
    errors.note("warning: \x1b[2Ja\nb")
    assert capsys.readouterr().err == "warning: \\x1b[2Ja b\n"


def test_an_error_shows_a_bounded_clean_part_of_a_file(monkeypatch, capsys):
    def fail(*_, **__):
        raise errors.DataError(f"a.csv: \x1b[2J\x9b\u202e{'x' * 5000} {'y ' * 5000}\nz; write it again")

    monkeypatch.setattr(launch, "run_experiment", fail)
    assert launch.main(["launch", JAX]) == 3
    line = capsys.readouterr().err
    assert line.startswith("error: a.csv: \\x1b[2J\\x9b\\x202exxx")
    assert line.endswith(" z; write it again\n")
    assert line[:-1].isprintable()
    assert len(line) < 1100


def test_an_import_that_fails_is_one_line(tmp_path, fails, nothing_runs):
    (tmp_path / "bad.gin").write_text("import no_such_module\n")
    fails("--gin_file=bad.gin", "--allow_imports", says=["bad.gin:1: cannot import 'no_such_module'"])


# Bad situations


@pytest.mark.parametrize(
    ("absent", "backend", "says"),
    [
        (
            ["jax"],
            "jax",
            "keras/mnist on jax: not installed: jax; pip install '.[jax]'",
        ),
        (
            ["keras", "jax"],
            "jax",
            "not installed: keras, jax; pip install '.[jax]'",
        ),
        (["torch"], "torch", "not installed: torch; pip install '.[torch]'"),
        (
            ["lightning"],
            "lightning",
            "not installed: lightning; pip install '.[lightning]'",
        ),
    ],
)
def test_a_missing_extra_is_named(fails, monkeypatch, absent, backend, says):
    present = importlib.machinery.ModuleSpec("present", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else present)
    fails(f"--gin_file=gin/mnist_{backend}.gin", says=[says])


def test_missing_wandb_is_named(fails, monkeypatch, toy):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    fails(*toy, "--gin_param=Log.wandb = 'offline'", says=["Log.wandb = 'offline'", "'.[wandb]'"])


def test_keras_imported_with_a_different_backend_is_refused(fails, monkeypatch):
    keras = types.ModuleType("keras")
    keras.__spec__ = importlib.machinery.ModuleSpec("keras", None)
    keras.config = types.SimpleNamespace(backend=lambda: "torch")
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.setattr(devices, "check_installed", lambda *_: None)
    fails(JAX, says=["Keras is already imported with the backend 'torch'", "'jax'", "start a new process"])


def test_a_tilde_in_the_workdir_is_the_home_and_an_empty_one_is_refused(tmp_path, monkeypatch, capsys, toy):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch.main(["launch", *toy, "--workdir=~/run", "--dry_run"]) == 0
    assert f"run directory {tmp_path / 'run'}\n" in capsys.readouterr().out
    assert launch.main(["launch", *toy, "--workdir="]) == 2
    assert capsys.readouterr().err == "error: --workdir is empty\n"


@pytest.mark.parametrize(("path", "says"), [("taken", "File exists"), ("taken/run", "Not a directory")])
def test_a_workdir_in_place_of_or_below_a_file_is_refused(
    tmp_path, toy, monkeypatch, capsys, tree, path, says
):
    monkeypatch.setattr(devices, "activate", lambda *_: "cpu")
    (tmp_path / "taken").write_text("")
    before = tree(tmp_path)
    assert launch.main(["launch", *toy, f"--workdir={path}"]) == 2
    assert f"error: --workdir: cannot make {path}: {says}\n" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_resume_never_refuses_a_directory_with_checkpoints(tmp_path, fails, toy):
    (tmp_path / "run").mkdir()
    Manifest(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    fails(*toy, "--workdir=run", "--resume=never", says=["--resume=never: run already has checkpoints"])
    fails(*toy, "--workdir=run", "--resume=other", says=["--resume=other: run already has checkpoints"])


@pytest.mark.parametrize("mode", ["train", "eval", "export"])
def test_a_directory_with_files_of_others_is_refused(tmp_path, fails, toy, tree, mode):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    before = tree(tmp_path)
    says = ["--workdir: run is not empty and was not made by a run", "it contains config.json"]
    fails(*toy, f"--mode={mode}", "--workdir=run", says=says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("mnist_torch", "mnist.Data.path"),
        ("nerf_blender", "nerf.Data.scene"),
        ("llama_sst2_tiny", "llama.Data.source"),
        ("llama_sst2_tiny", "llama.Model.name_or_path"),
    ],
)
def test_a_run_in_the_data_is_refused_before_anything_is_made(tmp_path, fails, tree, file, setting):
    (tmp_path / "data").mkdir()
    given = [f"--gin_file=gin/{file}.gin", f"--gin_param={setting} = 'data'"]
    for workdir, how in (("data", "is"), ("data/new/run", "lies in"), (".", "contains")):
        fails(*given, f"--workdir={workdir}", says=[f"--workdir: {workdir} {how} what {setting} names"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "data"]


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("mnist_jax", ["mnist.Data.source", "mnist.Data.path", "mnist.Data.name"]),
        ("nerf_blender", ["nerf.Data.scene"]),
        (
            "llama_sst2_tiny",
            [
                "llama.Data.source",
                "llama.Data.sentence_column",
                "llama.Data.label_column",
                "llama.Model.name_or_path",
            ],
        ),
    ],
)
def test_where_the_same_data_lies_may_change_on_resume(file, names):
    sections = configuration.sections(type(launch.resolve([f"gin/{file}.gin"], []).config)).values()
    by_name = {section.gin_name: section for section in sections}
    for name in names:
        section, _, field = name.rpartition(".")
        assert configuration.may_change(by_name[section], field)


def test_eval_with_resume_never_is_refused(fails, toy):
    fails(*toy, "--mode=eval", "--resume=never", says=["--mode=eval", "--resume=never forbids it"])


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_a_mode_that_needs_a_checkpoint_ends_in_3_without_one(fails, toy, mode):
    says = [f"--mode={mode} needs a checkpoint", "--resume=PATH"]
    fails(*toy, f"--mode={mode}", "--workdir=run", status=3, says=says)


def test_a_resume_path_without_a_checkpoint_ends_in_3(tmp_path, fails, toy):
    (tmp_path / "empty").mkdir()
    fails(*toy, "--resume=nowhere", status=3, says=["no checkpoint at nowhere: expected a run directory"])
    fails(*toy, "--resume=empty", status=3, says=["no checkpoint at empty", "step_*"])
    fails(*toy, "--mode=eval", "--resume=empty", status=3, says=["no checkpoint at empty"])


def test_a_broken_checkpoint_to_resume_from_ends_in_3(tmp_path, fails, toy):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    fails(*toy, "--resume=broken", status=3, says=["broken/state.json cannot be read"])


@pytest.mark.parametrize("device", ["quantum", "cpu:99", "cpu:-1", "cpu:x"])
def test_an_unknown_jax_device_lists_the_available_ones(fails, toy, device):
    pytest.importorskip("jax")
    fails(*toy, f"--device={device}", says=[f"--device={device}: JAX has no such device; available: cpu"])


@pytest.mark.parametrize("device", ["quantum", "cpu:-1", "cpu:x", "meta", "hpu"])
def test_an_unknown_torch_device_lists_the_available_ones(fails, toy, device):
    pytest.importorskip("torch")
    says = [f"--device={device}: PyTorch has no such device; available: cpu"]
    fails(*toy, "--gin_param=Run.backend = 'torch'", f"--device={device}", says=says)


def test_a_missing_gpu_is_named_by_its_flag(fails, toy):
    torch = pytest.importorskip("torch")
    if any(backend.is_available() for backend in (torch.cuda, torch.mps, torch.xpu)):
        pytest.skip("this machine has a GPU")
    fails(*toy, "--gin_param=Run.backend = 'torch'", "--device=gpu", says=["--device=gpu: PyTorch has no"])


# The bundled files


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_every_bundled_file_is_valid(path, capsys, tmp_path, tree):
    assert launch.main(["launch", f"--gin_file=gin/{path.name}", "--dry_run"]) == 0
    assert "Run.experiment = " in capsys.readouterr().out
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_every_bundled_file_has_its_command_in_the_header(path):
    lines = path.read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any(f"python -m blacksmith.launch --gin_file=gin/{path.name}" in line for line in header)


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.name)
def test_no_fragment_is_runnable_alone(path, fails, nothing_runs):
    fails(f"--gin_file=gin/include/{path.name}", says=["is a fragment, not a whole configuration"])


def test_the_jax_and_torch_files_differ_only_in_the_backend():
    def settings(name):
        lines = (configuration.gin_directory() / name).read_text().splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    jax, torch = settings("mnist_jax.gin"), settings("mnist_torch.gin")
    differences = [pair for pair in zip(jax, torch, strict=True) if pair[0] != pair[1]]
    assert differences == [('Run.backend = "jax"', 'Run.backend = "torch"')]


@pytest.mark.parametrize("name", ["gin/mnist_jax.gin", "mnist_jax.gin", "include/../mnist_jax.gin"])
def test_a_bundled_file_is_found_from_any_directory(name, tmp_path):
    assert not (tmp_path / name).exists()
    assert launch.resolve([name], []).experiment.name == "keras/mnist"


def test_a_file_in_the_working_directory_takes_precedence(tmp_path):
    (tmp_path / "gin").mkdir()
    (tmp_path / "gin" / "mnist_jax.gin").write_text("Run.experiment = 'lightning/mnist'\n")
    assert launch.resolve(["gin/mnist_jax.gin"], []).experiment.name == "lightning/mnist"


def test_the_only_backend_may_be_omitted():
    resolved = launch.resolve(["gin/mnist_lightning.gin"], [])
    assert (resolved.backend, resolved.config.run.backend) == ("torch", "torch")


# Help, lists and --dry_run


def test_answers_need_no_framework(tmp_path, tree):
    commands = [
        [JAX, "--dry_run"],
        ["--gin_file=gin/mnist_lightning.gin", "--dry_run"],
        ["--list"],
        ["--helpfull"],
        [JAX, "--gin_param=mnist.Train.epoch = 3"],
    ]
    code = (
        f"import sys; from blacksmith import launch; [launch.main(['launch', *c]) for c in {commands}]; "
        "print(sorted({'jax', 'jaxlib', 'torch', 'keras', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "did you mean 'epochs'?" in done.stderr
    assert tree(tmp_path) == {}


def test_dry_run_shows_every_setting_and_the_run_directory(capsys):
    assert launch.main(["launch", JAX, "--dry_run", "--workdir=somewhere"]) == 0
    out = capsys.readouterr().out
    config = launch.resolve(["gin/mnist_jax.gin"], []).config
    assert configuration.as_gin(config) in out
    assert "# keras/mnist on jax, run directory somewhere" in out


def test_list_shows_every_experiment(capsys):
    assert launch.main(["launch", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == registry.names()
    for line, name in zip(lines, registry.names(), strict=True):
        entry = registry.get(name)
        assert "/".join(entry.backends) in line
        assert entry.summary in line


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "--helpshort"])
def test_help_documents_every_flag_and_exit_status(capsys, flag):
    assert launch.main(["launch", flag]) == 0
    out = " ".join(capsys.readouterr().out.split())
    values = launch.define_flags()
    assert {"gin_file", "gin_param", "workdir", "mode", "resume", "device", "dry_run"} <= set(values)
    for name in values:
        assert f"--{name}:" in out or f"--[no]{name}:" in out
        assert " ".join(values[name].help.split()) in out
    assert "Exit status: 0 done, 1 crash, 2 bad usage or configuration, 3 bad data or checkpoint, 75 " in out


def test_the_exit_statuses_are_those_that_help_documents():
    assert errors.ConfigError.exit_status == 2
    assert errors.DataError.exit_status == 3
    assert errors.CheckpointError.exit_status == 3
    assert errors.RunError.exit_status == 1
    assert runs.STOPPED == 75


# Plugins


def test_a_plugin_is_listed_and_has_a_strict_configuration(fails, toy, capsys):
    assert launch.main(["launch", "--plugin=toy", "--list"]) == 0
    assert "toy" in capsys.readouterr().out
    says = ["toy.Train has no field 'step' (did you mean 'steps'?); allowed: steps, ending"]
    fails(*toy, "--gin_param=toy.Train.step = 3", says=says)
    fails(
        *toy, "--gin_param=mnist.Train.steps = 3", says=["the experiment 'toy' has no section 'mnist.Train'"]
    )


def test_a_plugin_runs_and_leaves_a_complete_run_directory(tmp_path, toy):
    pytest.importorskip("jax")
    command = [sys.executable, "-m", "blacksmith.launch", *toy, "--workdir=run", "--device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "toy on jax (cpu): run" in done.stderr
    run = tmp_path / "run"
    for name in ("config.gin", "operative.gin", "config.json", "environment.json", "report.html"):
        assert (run / name).stat().st_size > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"], line["loss"]) for line in lines] == [
        (1, "train", 1.0),
        (2, "train", 0.5),
        (3, "train", 1 / 3),
    ]
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["step"], result["backend"]) == ("done", 3, "jax")
    launch.import_plugins(["toy"])
    assert launch.resolve(["run/config.gin"], []).config == launch.resolve(["run/operative.gin"], []).config


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("done", 0, None),
        ("data", 3, "error: toys.csv: no toys in it"),
        ("disk", 1, "error: the loss is not finite"),
        ("stopped", 75, None),
    ],
)
def test_how_an_experiment_ends_decides_the_exit_status(toy, monkeypatch, capsys, ending, status, words):
    monkeypatch.setattr(devices, "activate", lambda *_: "cpu")
    monkeypatch.setattr(report, "write", lambda directory: None)
    argv = ["launch", *toy, "--workdir=run", f"--gin_param=toy.Train.ending = '{ending}'"]
    assert launch.main(argv) == status
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "toy on jax (cpu): run"
    assert lines[1:] == ([words] if words else [])
    # Missing data is found before the run has produced anything worth keeping.
    assert Path("run").exists() == (ending != "data")


def test_training_that_returns_without_a_result_is_a_bug(toy, monkeypatch):
    monkeypatch.setattr(devices, "activate", lambda *_: "cpu")
    with pytest.raises(RuntimeError, match="toy returned without a result"):
        launch.main(["launch", *toy, "--workdir=run", "--gin_param=toy.Train.ending = 'forgotten'"])


def test_a_bug_gives_a_traceback_and_a_failed_result(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(devices, "activate", lambda *_: "cpu")
    monkeypatch.setattr(report, "write", lambda directory: None)
    with pytest.raises(ZeroDivisionError):
        launch.main(["launch", *toy, "--workdir=run", "--gin_param=toy.Train.ending = 'bug'"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"] == "ZeroDivisionError: a bug"
    assert result["step"] == 3
