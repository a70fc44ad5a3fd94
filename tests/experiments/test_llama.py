"""The Llama experiment end to end, as a user runs it, on the bundled sentences."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from blacksmith import launch as launcher
from blacksmith.datasets import sst2
from blacksmith.errors import CheckpointError, ConfigError, DataError, RunError, UserError
from blacksmith.experiments.pytorch.llama import checkpoints, evaluation, train
from blacksmith.experiments.pytorch.llama.batches import padding
from blacksmith.experiments.pytorch.llama.prompts import Prompt
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer
from blacksmith.run.checkpoint import find
from blacksmith.run.order import LengthOrder
from blacksmith.run.run import Run
from blacksmith.run.schedule import learning_rate

SMALL = [
    "llama.Data.validation = 20",
    "llama.Model.hidden_size = 32",
    "llama.Model.intermediate_size = 48",
    "llama.Train.epochs = None",
    "llama.Train.steps = 12",
    "llama.Train.batch_size = 8",
    "llama.Train.evaluate_every_steps = 5",
    "llama.Evaluation.generate = 3",
    "Schedule.warmup_steps = 2",
    "Log.every_steps = 3",
    "Log.tensorboard = False",
    'Log.progress = "off"',
]
ACCURACY = 'Checkpoint.metric = "val_accuracy"'
LORA = ["llama.Lora.rank = 4", "llama.Lora.alpha = 8.0"]


@pytest.fixture
def run(tmp_path):
    """Runs the tiny Gin file, in ``run`` unless a directory is given; returns the exit status."""

    def call(*params: str, directory: Path = tmp_path / "run", flags=()) -> int:
        resolved = launcher.resolve(["gin/llama_sst2_tiny.gin"], [*SMALL, *params])
        return launcher.run_experiment(resolved, directory, device="cpu", **dict(flags))

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model directory of random weights."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=5).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def pretrained(base: Path) -> list[str]:
    """The settings that name `base` instead of sizes."""
    sizes = ["llama.Model.hidden_size = 64", "llama.Model.intermediate_size = 176"]
    return [*sizes, f'llama.Model.name_or_path = "{base}"']


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors, the optimizer's too."""
    path = find(directory).path
    return {f"{f.name}/{k}": v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}


def test_the_tiny_file_learns_and_shows_it(stream, tmp_path, capsys):
    directory = tmp_path / "run"
    resolved = launcher.resolve(["gin/llama_sst2_tiny.gin"], ['Log.progress = "off"', "Log.every_steps = 20"])
    assert launcher.run_experiment(resolved, directory, device="cpu") == 0
    content = result(directory)
    assert content["status"] == "done"
    assert content["shared_prefix_tokens"] > 5
    count = sum(map(sum, content["test"]["confusion_matrix"]))
    answers = json.loads((directory / "eval_results.json").read_text())
    assert len(answers) == count == content["data"]["test"] == content["test"]["generated"]["examples"] == 80
    correct = sum(answer["prediction"] == answer["label"] for answer in answers)
    assert correct / count == pytest.approx(content["test"]["accuracy"])
    for answer in answers:
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert answer["prediction"] == int(answer["probabilities"][1] > answer["probabilities"][0])
        assert answer["generated"] is not None
    written = stream(directory)
    assert [line["step"] for line in written if line["split"] == "val"] == list(range(0, 261, 26))
    losses = [line["loss"] for line in written if line["split"] == "train"]
    assert losses[0] > 1 > 0.05 > losses[-1]
    assert {"gradient_norm", "learning_rate"} <= written[1].keys()
    assert written[-1]["split"] == "test"
    out, error = capsys.readouterr()
    assert re.search(r"test loss .*accuracy", out)
    assert re.search(r"shared \d+-token prefix computed once per batch", error)
    page = (directory / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "negative" in page


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [*LORA, "llama.Lora.dropout = 0.2"],
        ["llama.Train.accumulate = 4", *LORA, "llama.Lora.dropout = 0.2"],
        ["llama.Train.shared_prefix = False", 'Optimizer.name = "sgd"', "Optimizer.momentum = 0.9"],
        ['Optimizer.name = "adafactor"'],
        ['Schedule.name = "cosine"', 'llama.Train.precision = "bfloat16"'],
        [*LORA, 'llama.Model.dtype = "bfloat16"', 'llama.Train.precision = "bfloat16"'],
        ["llama.Train.average = 0.7"],
        [*LORA, "llama.Train.average = 0.7", "llama.Lora.dropout = 0.2"],
    ],
    ids=["full", "lora", "accumulate", "sgd", "adafactor", "autocast", "bfloat16", "average", "lora-average"],
)
def test_resume_is_bit_equal(run, stream, tmp_path, settings):
    """In the middle of an epoch and after its end, at a validation and between, between training lines."""
    params = ["llama.Train.steps = 40", "Checkpoint.keep_best = 0", *settings]
    whole = tmp_path / "whole"
    run(*params, "Checkpoint.every_steps = 1", "Checkpoint.keep_last = 50", directory=whole)
    for step in (4, 10, 33):
        resumed = tmp_path / f"from_{step}"
        run(*params, directory=resumed, flags={"resume": str(whole / "checkpoints" / f"step_{step:08d}")})
        assert stream(resumed) == [line for line in stream(whole) if line["step"] > step], step
        assert len(weights(resumed)) > 10
        assert equal_weights(resumed, whole), step


def equal_weights(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs have the same tensors."""
    old, new = weights(one), weights(other)
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def stop_during(monkeypatch, owner, name, call=1):
    """Sends SIGTERM when the function `name` of `owner` is called for the given time; returns its calls."""
    function, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (train, "build_model", 1, 0),  # while the run starts
        (evaluation, "score", 1, 0),  # in the validation before the first step
        (train, "token_losses", 4 * 6 + 2, 7),  # in the second part of the seventh step
        (evaluation, "score", 3, 10),  # in a later validation
        (evaluation, "score", 5, 12),  # in the test
        (evaluation, "generate", 1, 12),
    ],
    ids=["start", "first", "step", "validation", "test", "generation"],
)
def test_a_stop_loses_nothing(run, stream, tmp_path, monkeypatch, owner, name, call, step):
    params = ["llama.Train.accumulate = 4", *LORA]
    run(*params, directory=tmp_path / "whole")
    calls = stop_during(monkeypatch, owner, name, call)
    assert run(*params) == 75
    if name == "token_losses":
        assert len(calls) == 4 * 7
    stopped = result(tmp_path / "run")
    assert (stopped["status"], stopped["step"]) == ("stopped", step)
    monkeypatch.undo()
    assert run(*params) == 0
    assert stream(tmp_path / "run") == stream(tmp_path / "whole")
    assert equal_weights(tmp_path / "run", tmp_path / "whole")
    for part in ("status", "best", "tested_checkpoint", "final", "test"):
        assert result(tmp_path / "run")[part] == result(tmp_path / "whole")[part]


def test_a_stop_in_the_best_validation_keeps_its_weights(run, stream, tmp_path, monkeypatch):
    """The checkpoint that the stop leaves gets its metrics when the validation is repeated."""
    params = ["Optimizer.learning_rate = 0.3", ACCURACY]
    run(*params, directory=tmp_path / "whole")
    best = result(tmp_path / "whole")["best"]["step"]
    validated = [line["step"] for line in stream(tmp_path / "whole") if line["split"] == "val"]
    assert best < validated[-1]
    stop_during(monkeypatch, evaluation, "score", 1 + validated.index(best))
    assert run(*params) == 75
    assert result(tmp_path / "run")["step"] == best
    monkeypatch.undo()
    assert run(*params) == 0
    assert stream(tmp_path / "run") == stream(tmp_path / "whole")
    tested = f"step_{best:08d}"
    states = []
    for directory in (tmp_path / "run", tmp_path / "whole"):
        assert result(directory)["tested_checkpoint"] == tested
        states.append(json.loads((directory / "checkpoints" / tested / "state.json").read_text()))
    assert states[0]["metrics"] == states[1]["metrics"] != {}


def test_a_loss_that_is_not_finite_names_step_and_rows(run, tmp_path, monkeypatch):
    losses, calls = train.token_losses, []

    def broken(model, batch):
        calls.append(1)
        return losses(model, batch) * (torch.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(train, "token_losses", broken)
    with pytest.raises(
        RunError, match=r"loss nan .*at step 8 \(rows [\d, ]+ of the training data\); .*step_00000006"
    ) as caught:
        run("Checkpoint.every_steps = 3", "Checkpoint.keep_best = 0", "llama.Data.min_words = 8")
    assert find(tmp_path / "run").step == 6
    assert result(tmp_path / "run")["status"] == "failed"
    # The rows are those of the file, whatever was held out or left out before.
    data = sst2.read("sample").split(validation=20, seed=0)
    named = [int(n) for n in re.search(r"rows ([\d, ]+) of", str(caught.value))[1].split(", ")]
    table = (Path(sst2.__file__).with_name("sample.tsv")).read_text().splitlines()
    training = [line.split("\t") for line in table[1:]]
    sentences = {s for s in data.train.sentences if len(s.split()) >= 8}
    assert len(named) == 8
    for number in named:
        assert any(column in sentences for column in training[number - 1])
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    "settings",
    [
        ["llama.Model.gradient_checkpointing = True"],
        ["llama.Model.gradient_checkpointing = True", *LORA],
        ["llama.Train.shared_prefix = False", "llama.Model.gradient_checkpointing = True"],
        ["llama.Train.shared_prefix = False", "llama.Train.accumulate = 3"],
        ["llama.Train.accumulate = 3", "llama.Train.batch_size = 9"],
        ['llama.Model.attention = "eager"'],
    ],
    ids=lambda settings: settings[0].partition(" ")[0],
)
def test_other_ways_to_compute_give_the_same_losses(run, stream, tmp_path, settings):
    # Answers of different lengths: parts of a batch do not weigh alike.
    shared = ['llama.Data.labels = ("bad", "positive")', "llama.Train.batch_size = 9"]
    lora = LORA if LORA[0] in settings else []
    run(*shared, *lora, directory=tmp_path / "plain")
    run(*shared, *settings, directory=tmp_path / "run")
    assert len(stream(tmp_path / "run")) == len(stream(tmp_path / "plain"))
    for one, other in zip(stream(tmp_path / "run"), stream(tmp_path / "plain")):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5), one


def test_without_shared_prefix_the_plain_model_is_called(run, tmp_path, monkeypatch, capsys):
    forward, training = LlamaForCausalLM.forward, []

    def recorded(model, input_ids=None, **options):
        if model.training:
            training.append(input_ids.shape == options["labels"].shape)
        return forward(model, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded)
    assert run("llama.Train.shared_prefix = False") == 0
    assert training == [True] * 12
    assert result(tmp_path / "run")["shared_prefix_tokens"] == 0
    assert "no shared prefix" in capsys.readouterr().err


def test_a_template_without_a_common_beginning_is_padded(run, tmp_path, capsys):
    assert run('llama.Data.template = "{sentence} It was {label}"') == 0
    assert result(tmp_path / "run")["shared_prefix_tokens"] == 0
    assert "no shared prefix" in capsys.readouterr().err


@pytest.fixture
def accuracies(monkeypatch):
    """Replaces the validation's scores: the given accuracies in turn, that before the first step included."""

    def give(*values):
        scores = iter([SimpleNamespace(loss=1.0, accuracy=value) for value in values])
        monkeypatch.setattr(train, "score", lambda *_: next(scores))

    return give


@pytest.mark.parametrize(
    ("setting", "values", "step", "best"),
    [
        ("llama.Train.early_stopping = None", (0.9, 0.5, 0.7, 0.6), 12, 10),
        ("llama.Train.early_stopping = 1", (0.9, 0.7, 0.6), 10, 5),
        ("llama.Train.stop_at = 0.8", (0.5, 0.7, 0.8), 10, 10),
    ],
    ids=["best", "early_stopping", "stop_at"],
)
def test_the_best_is_tested_and_validation_may_end_the_run(
    run, accuracies, tmp_path, setting, values, step, best
):
    accuracies(*values)
    assert run(setting, ACCURACY) == 0
    content = result(tmp_path / "run")
    assert (content["status"], content["step"]) == ("done", step)
    assert content["tested_checkpoint"] == f"step_{best:08d}"
    assert content["best"]["step"] == best


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_averages_are_validated_saved_and_tested(run, stream, tmp_path, lora):
    """And training does not see them."""
    params = [*lora, "Checkpoint.every_steps = 1", "Checkpoint.keep_last = 100"]
    run(*params, directory=tmp_path / "plain")
    run(*params, "Optimizer.learning_rate = 1e-30", directory=tmp_path / "start")
    run(*params, "llama.Train.average = 0.3", "llama.Model.gradient_checkpointing = True")
    of = {}
    for directory in (tmp_path / "plain", tmp_path / "run"):
        of[directory.name] = [line["loss"] for line in stream(directory) if line["split"] == "train"]
    assert of["run"] == pytest.approx(of["plain"], rel=1e-6)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    average = load_file(tmp_path / "start" / "checkpoints" / "step_00000001" / name)
    for step in range(1, 13):
        at, plain = (tmp_path / run / "checkpoints" / f"step_{step:08d}" for run in ("run", "plain"))
        saved, weights, trained = (
            load_file(f) for f in (at / name, at / "unaveraged.safetensors", plain / name)
        )
        weights = {key.replace(".default.", "."): value for key, value in weights.items()}
        assert saved.keys() == weights.keys() == trained.keys()
        keep = min(0.3, step / (step + 9))
        for key, value in weights.items():
            assert torch.allclose(value, trained[key], rtol=1e-4, atol=1e-6)
            average[key] = keep * average[key] + (1 - keep) * value
            assert torch.allclose(saved[key], average[key], rtol=1e-4, atol=1e-6), (step, key)
        assert any(not torch.equal(saved[key], value) for key, value in weights.items())
    evaluated = [*params, "llama.Train.average = 0.3", "llama.Model.gradient_checkpointing = True"]
    assert run(*evaluated, flags={"mode": "eval"}) == 0  # of the saved weights: it knows no others
    content, trained = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("eval.json", "result.json")
    )
    assert content["test"] == trained["test"]
    tested = int(trained["tested_checkpoint"].removeprefix("step_"))
    (look,) = [a for a in stream(tmp_path / "run") if a["split"] == "val" and a["step"] == tested]
    assert content["val"] == {name: look[name] for name in ("loss", "accuracy")}
    flags = {"resume": str(tmp_path / "run" / "checkpoints" / "step_00000005")}
    with pytest.raises(ConfigError, match=r"llama\.Train\.average 0\.3 -> None"):
        run(*params, directory=tmp_path / "other", flags=flags)


def test_eval_scores_a_checkpoint_as_training_did(run, stream, tmp_path, capsys):
    settings = [*LORA, "llama.Data.min_words = 8", 'llama.Train.precision = "bfloat16"']
    run(*settings)
    assert run(*settings, flags={"mode": "eval"}) == 0
    content = json.loads((tmp_path / "run" / "eval.json").read_text())
    trained = result(tmp_path / "run")
    assert content["test"] == trained["test"]
    written = [tmp_path / "run" / name for name in ("eval_results.json", "eval/eval_results.json")]
    assert written[0].read_text() == written[1].read_text()
    tested = int(trained["tested_checkpoint"].removeprefix("step_"))
    (look,) = [a for a in stream(tmp_path / "run") if a["split"] == "val" and a["step"] == tested]
    assert content["val"] == {name: look[name] for name in ("loss", "accuracy")}
    assert "val: accuracy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"settings differ .*llama\.Train\.batch_size 8 -> 4"):
        run(*settings, "llama.Train.batch_size = 4", flags={"mode": "eval"})


def test_eval_finds_the_best_in_a_run_or_a_copied_directory(run, tmp_path):
    settings = ["Optimizer.learning_rate = 0.3", ACCURACY]
    run(*settings)
    tested = result(tmp_path / "run")["tested_checkpoint"]
    assert tested != find(tmp_path / "run").path.name
    kept = shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "kept")
    (kept / "checkpoints").mkdir()  # beside step_*, it means nothing
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "checkpoints", kept)):
        directory = tmp_path / str(number)
        run(*settings, directory=directory, flags={"mode": "eval", "resume": str(source)})
        assert Path(json.loads((directory / "eval.json").read_text())["checkpoint"]).name == tested


def test_validation_has_the_precision_of_training(run, stream, tmp_path):
    for precision in ("float32", "bfloat16"):
        run(f'llama.Train.precision = "{precision}"', directory=tmp_path / precision)
    one, other = (stream(tmp_path / precision)[0]["loss"] for precision in ("float32", "bfloat16"))
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


def test_a_checkpoint_is_evaluated_on_a_small_file(run, tmp_path, capsys):
    run()
    rows = [("a warm and clever film", 1), ("dull", 0), ("clever", 1)]
    own = tmp_path / "own.tsv"
    own.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    flags = {"mode": "eval", "resume": str(tmp_path / "run")}
    assert run(f'llama.Data.source = "{own}"', directory=tmp_path / "e", flags=flags) == 0
    told = capsys.readouterr().err
    assert f"{own}: 3 test sentences" in told
    assert "note: the model was trained on other data" in told
    assert "val" not in json.loads((tmp_path / "e" / "eval.json").read_text())
    answers = json.loads((tmp_path / "e" / "eval" / "eval_results.json").read_text())
    assert [(answer["sentence"], answer["label"]) for answer in answers] == rows


def test_an_adapter_directory_is_evaluated_and_exported(run, base, tmp_path, capsys):
    settings = [*LORA, *pretrained(base)]
    run(*settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((find(tmp_path / "run").path / name).read_bytes())
    newest = {"mode": "eval", "resume": str(find(tmp_path / "run").path)}
    assert run(*settings, directory=tmp_path / "a", flags=newest) == 0
    foreign = {"mode": "eval", "resume": str(adapter)}
    assert run(*settings, directory=tmp_path / "b", flags=foreign) == 0
    one, other = (json.loads((tmp_path / d / "eval.json").read_text()) for d in ("a", "b"))
    assert one["test"] == other["test"]
    assert "val" not in other
    assert f"trained on {base}; llama.Lora has no effect" in capsys.readouterr().err
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = "some/other"
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    assert run(*settings, directory=tmp_path / "x", flags={"mode": "export", "resume": str(adapter)}) == 0
    assert f"trained on some/other, used with {base}; llama.Lora has no" in capsys.readouterr().err
    public = (tmp_path / "x" / "export" / "config.json").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "x" / "export").iterdir()} == {public}
    assert {file.stat().st_mode for file in find(tmp_path / "run").path.iterdir()} == {public}
    assert run(*settings, directory=tmp_path / "y", flags={**newest, "mode": "export"}) == 0
    exported = [load_file(tmp_path / d / "export" / "model.safetensors") for d in ("x", "y")]
    assert exported[0].keys() == exported[1].keys()
    for name, value in exported[0].items():
        assert torch.equal(value, exported[1][name])
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in exported[0].items())
    with pytest.raises(ConfigError, match="no training state"):
        run(*settings, directory=tmp_path / "c", flags={"resume": str(adapter)})


def test_the_base_model_may_move_but_not_change(run, base, tmp_path):
    settings = [*LORA, "llama.Train.steps = 6", "Schedule.decay_steps = 10"]
    own = shutil.copytree(base, tmp_path / "own")
    run(*settings, *pretrained(own))
    moved = own.rename(tmp_path / "moved")
    assert run(*settings, *pretrained(moved), "llama.Train.steps = 8") == 0
    assert result(tmp_path / "run")["step"] == 8
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=6).save_pretrained(moved)
    for flags in ({}, {"mode": "eval"}, {"mode": "export"}):
        with pytest.raises(CheckpointError, match="base model with different weights") as caught:
            run(*settings, *pretrained(moved), "llama.Train.steps = 10", flags=flags)
        assert "\n" not in str(caught.value)
    assert result(tmp_path / "run")["step"] == 8
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=5).save_pretrained(moved)
    config = json.loads((moved / "config.json").read_text())
    for change in (
        {"rms_norm_eps": 1e-3},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ):
        (moved / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="base model with different architecture"):
            run(*settings, *pretrained(moved), flags={"mode": "eval"})
    (moved / "config.json").write_text(json.dumps(config))
    vocabulary = json.loads((moved / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (moved / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="base model with different tokenizer"):
        run(*settings, *pretrained(moved), "llama.Train.steps = 10")


def test_full_fine_tuning_resumes_without_its_base(run, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "own")
    settings = ["llama.Train.steps = 4", "Schedule.decay_steps = 10"]
    run(*settings, *pretrained(own))
    # Its checkpoint holds all weights: what the base has become is of no interest.
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=6).save_pretrained(own)
    assert run(*settings, *pretrained(own), "llama.Train.steps = 8") == 0
    run(*settings, *pretrained(base), "llama.Train.steps = 8", directory=tmp_path / "whole")
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_exported_model_answers_the_same(run, base, tmp_path, lora):
    settings = [*pretrained(base), *(LORA if lora else []), "Optimizer.learning_rate = 0.01"]
    run(*settings)
    assert run(*settings, flags={"mode": "export"}) == 0
    directory = tmp_path / "run" / "export"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = launcher.resolve(["gin/llama_sst2_tiny.gin"], [*SMALL, *settings]).config
    prompt = Prompt.of(config.data.template, config.data.labels)
    answers = json.loads((tmp_path / "run" / "eval_results.json").read_text())[:20]
    pairs = evaluation.EvalPairs.encode(
        tokenizer, prompt, [a["sentence"] for a in answers], [a["label"] for a in answers], 256
    )
    scores = evaluation.score(model, pairs, batch_size=7, pad=0)
    for answer, found in zip(answers, scores.probabilities):
        # Best or newest: training has moved both from the base, which says something else.
        assert found == pytest.approx(answer["probabilities"], abs=2e-4)
    before = evaluation.score(AutoModelForCausalLM.from_pretrained(base), pairs, batch_size=7, pad=0)
    assert abs(before.probabilities - scores.probabilities).max() > 1e-2


def test_a_bfloat16_export_loses_nothing_of_the_adapter(run, base, tmp_path, capsys):
    # Updates so small that bfloat16 would round most of them away.
    settings = [
        *pretrained(base),
        *LORA,
        'llama.Model.dtype = "bfloat16"',
        "Optimizer.learning_rate = 1e-4",
    ]
    run(*settings)
    assert run(*settings, flags={"mode": "export"}) == 0
    assert "written in float32" in capsys.readouterr().err
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    own = load_file(base / "model.safetensors")
    best = tmp_path / "run" / "checkpoints" / result(tmp_path / "run")["tested_checkpoint"]
    adapter = load_file(best / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    update = 8.0 / 4 * up @ down
    assert update.abs().max() > 0
    expected = own[f"{name}.weight"].bfloat16().float() + update
    assert torch.allclose(exported[f"{name}.weight"], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("too_long", "word"), [("drop", "left out"), ("truncate", "truncated")])
def test_examples_that_are_too_long_are_counted(run, tmp_path, too_long, word, capsys):
    run("llama.Data.max_length = 90", f'llama.Data.too_long = "{too_long}"')
    said = capsys.readouterr().err
    config = launcher.resolve(["gin/llama_sst2_tiny.gin"], SMALL).config
    data = sst2.read("sample").split(validation=20)
    prompt = Prompt.of(config.data.template, config.data.labels)
    # In bytes, with the end token and the longer answer.
    longer = max(map(len, prompt.labels))
    lengths = [len(prompt.question(s).encode()) + longer + 1 for s in data.train.sentences]
    count = sum(length > 90 for length in lengths)
    assert 0 < count < len(lengths)
    assert f"{count} of {len(lengths)} training examples have more than 90 tokens: {word}" in said
    for what, part in (("validation", data.validation), ("test", data.test)):
        over = sum(len(prompt.question(s).encode()) + longer + 1 > 90 for s in part.sentences)
        assert over > 0
        assert f"{over} of {len(part)} {what} examples have more than 90 tokens: truncated" in said


def test_short_examples_are_left_out(run, tmp_path, capsys):
    assert run("llama.Data.min_words = 8") == 0
    said = capsys.readouterr().err
    everything = sst2.read("sample").split(validation=20)
    for what, examples in (("training", everything.train), ("validation", everything.validation)):
        short = sum(len(sentence.split()) < 8 for sentence in examples.sentences)
        assert 0 < short < len(examples)
        assert f"{short} of {len(examples)} {what} examples have fewer than 8 words: left out" in said
    answers = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert min(len(answer["sentence"].split()) for answer in answers) < 8
    with pytest.raises(ConfigError, match="leaves no training example"):
        run("llama.Data.min_words = 80", directory=tmp_path / "none")


def test_histograms_and_a_trace_are_written(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = [*LORA, "Log.tensorboard = True", "Log.histograms_every = 6", "llama.Train.profile_steps = 2"]
    assert run(*settings) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0})
    events.Reload()
    names = events.Tags()["histograms"]
    assert any(name.startswith("weights/") and "lora_A" in name for name in names)
    assert any(name.startswith("gradients/") and "lora_B" in name for name in names)
    for name in names:
        steps = [event.step for event in events.Histograms(name)]
        assert steps == ([0, 6, 12] if name.startswith("weights/") else [6, 12])
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if e.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(run, stream, tmp_path):
    deep = [*LORA, "llama.Model.layers = 12"]
    run(*deep, directory=tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    run(*deep, "llama.Model.compile = True", directory=tmp_path / "run")
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == frames["ok"] > 0
    for one, other in zip(stream(tmp_path / "run"), stream(tmp_path / "plain")):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4), one


def test_likelihoods_are_those_of_whole_answers(base):
    model, tokenizer = loading.load_model(str(base))
    sentences, labels = ["fine", "a dull and joyless thing", "ok"], [1, 0, 1]
    for words in (("A", "B"), ("AA", "AB"), ("A", "BCD")):
        prompt = Prompt.of("Review: {sentence}\nSentiment: {label}", words)
        pairs = evaluation.EvalPairs.encode(tokenizer, prompt, sentences, labels, 200)
        assert pairs.single_token == (len(words[1]) == 1)
        for shared in (True, False):
            scores = evaluation.score(model, pairs, batch_size=2, pad=0, shared_prefix=shared)
            for row, sentence in enumerate(sentences):
                logs = []
                for word in words:
                    tokens = tokenizer(prompt.question(sentence) + word + tokenizer.eos_token)["input_ids"]
                    with torch.no_grad():
                        found = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
                    answer = [
                        found[i - 1, tokens[i]] for i in range(len(tokens) - len(word) - 1, len(tokens))
                    ]
                    logs.append(sum(answer[:-1]))
                expected = torch.stack(logs).softmax(0)
                assert scores.probabilities[row] == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_validation_loss_is_the_mean_over_answer_tokens(base):
    model, tokenizer = loading.load_model(str(base))
    sentences, labels = ["fine", "a dull and joyless thing", "ok"], [1, 0, 1]
    prompt = Prompt.of("Review: {sentence}\nSentiment: {label}", ("negative", "good"))
    pairs = evaluation.EvalPairs.encode(tokenizer, prompt, sentences, labels, 200)
    total, count = 0.0, 0
    for sentence, label in zip(sentences, labels):
        question = tokenizer(prompt.question(sentence))["input_ids"]
        tokens = tokenizer(prompt.question(sentence) + prompt.labels[label] + tokenizer.eos_token)[
            "input_ids"
        ]
        learnt = [-100] * len(question) + tokens[len(question) :]
        number = len(tokens) - len(question)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([tokens]), labels=torch.tensor([learnt])).loss
        total, count = total + float(loss) * number, count + number
    assert evaluation.score(model, pairs, batch_size=2, pad=0).loss == pytest.approx(total / count, abs=1e-5)


def test_generation_in_batches_is_that_of_each_alone(base):
    model, tokenizer = loading.load_model(str(base))
    prompt = Prompt.of("Review: {sentence}\nSentiment: {label}", ("negative", "positive"))
    sentences = ["fine", "a dull and joyless thing", "", "so so"]
    pairs = evaluation.EvalPairs.encode(tokenizer, prompt, sentences, [1, 0, 1, 0], 200)
    options = {"max_new_tokens": 6}
    together = evaluation.generate(model, pairs.correct, tokenizer, batch_size=4, **options)
    alone = evaluation.generate(model, pairs.correct, tokenizer, batch_size=1, **options)
    assert together == alone
    for sentence, text in zip(sentences, together):
        tokens = tokenizer(prompt.question(sentence))["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        question = tokenizer(prompt.question(sentence))["input_ids"]
        assert text == tokenizer.decode(tokens[len(question) :], skip_special_tokens=True)


def test_generation_is_greedy_whatever_the_model_s_settings(base):
    model, tokenizer = loading.load_model(str(base))
    prompt = Prompt.of("Review: {sentence}\nSentiment: {label}", ("negative", "positive"))
    pairs = evaluation.EvalPairs.encode(tokenizer, prompt, ["fine", "so so"], [1, 0], 200)
    options = {"batch_size": 2, "max_new_tokens": 6}
    plain = evaluation.generate(model, pairs.correct, tokenizer, **options)
    model.generation_config.update(num_beams=4, repetition_penalty=5.0, do_sample=True, temperature=2.0)
    assert evaluation.generate(model, pairs.correct, tokenizer, **options) == plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" negative", 0),
        ("Positive.\n", 1),
        ("positively dull", 1),
        ("the film is positive", None),
        ("", None),
        ("neg", None),
    ],
)
def test_answers_are_parsed(text, expected):
    assert evaluation.parse_answer(text, ("negative", "positive")) == expected


def test_of_labels_that_begin_alike_the_longer_one_counts():
    assert evaluation.parse_answer("goodish", ("good", "goodish")) == 1
    assert evaluation.parse_answer("good", ("good", "goodish")) == 0


# --- the reference ---


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
def test_ten_steps_are_those_of_the_hugging_face_trainer(run, base, stream, tmp_path, shared):
    """Same model, adapter, data, batches and optimizer: the same losses within 1e-4."""
    settings = [
        *pretrained(base),
        *LORA,
        "llama.Train.steps = 10",
        f"llama.Train.shared_prefix = {shared}",
        "Optimizer.learning_rate = 3e-3",
        "Optimizer.weight_decay = 0.01",
        "Optimizer.global_clip_norm = 0.5",
        'llama.Data.labels = ("bad", "positive")',
        "Log.every_steps = 1",
    ]
    run(*settings)
    ours = [line["loss"] for line in stream(tmp_path / "run") if line["split"] == "train"]

    resolved = launcher.resolve(["gin/llama_sst2_tiny.gin"], [*SMALL, *settings])
    config = resolved.config
    options = {"experiment": "llama", "checkpoint_format": "", "backend": "torch", "device": "cpu"}
    other = Run(tmp_path / "trainer", config, **options)
    model, tokenizer = checkpoints.build_model(other)
    prompt = Prompt.of(config.data.template, config.data.labels)
    encoded = train.encode_training(other, tokenizer, prompt, sst2.read("sample").split(validation=20).train)
    order = LengthOrder(encoded.lengths, 8, config.train.by_length, config.run.seed)
    rows = [row for step in range(10) for row in order.rows(step).tolist()]
    pad = padding(tokenizer)

    def collate(some):
        width = max(len(one["tokens"]) for one in some) + 5
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for one in some:
            tokens, answer, space = one["tokens"], one["answer"], width - len(one["tokens"])
            batch["input_ids"].append(tokens + [pad] * space)
            batch["attention_mask"].append([1] * len(tokens) + [0] * space)
            batch["labels"].append([-100] * answer + tokens[answer:] + [-100] * space)
        return {name: torch.tensor(value) for name, value in batch.items()}

    losses = []

    class Trainer(transformers.Trainer):
        def training_step(self, *arguments, **options):
            losses.append(super().training_step(*arguments, **options))
            return losses[-1]

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        optim="adamw_torch",
        weight_decay=0.01,
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset = [{"tokens": encoded.tokens[row], "answer": encoded.answers[row]} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    trainer.create_optimizer()
    # Ours takes its first step of a warm-up at a rate above 0, theirs at 0.
    peak = config.optimizer.learning_rate
    rates = [learning_rate(config.schedule, peak, step, 10) for step in range(11)]
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda s: rates[s] / 3e-3)
    trainer.train()
    theirs = [float(loss) for loss in losses]
    assert len(ours) == len(theirs) == 10
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(ours) - min(ours) > 0.1


# --- what can go wrong ---


def truncated(path: Path) -> None:
    """Leaves half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def copy_of(base: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in base.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


BAD_SETTINGS = {
    "no sentence": (
        ['llama.Data.template = "What? {label}"'],
        r"llama\.Data\.template has \{sentence\} 0 times",
    ),
    "no label": (['llama.Data.template = "{sentence}"'], r"has \{label\} 0 times"),
    "label first": (['llama.Data.template = "{label}: {sentence}"'], r"must end with \{label\}"),
    "one label": (['llama.Data.labels = ("a",)'], "two different words"),
    "same labels": (['llama.Data.labels = ("a", "a")'], "two different words"),
    "labels alike": (['llama.Data.labels = ("Good", "good ")'], "two different words"),
    "flash": (['llama.Model.attention = "flash_attention_2"'], "computes in bfloat16"),
    "bias": (["llama.Lora.rank = 2", 'llama.Lora.bias = "all"'], "the model has no biases"),
    "bfloat16 biases": (
        ["llama.Lora.rank = 2", 'llama.Lora.bias = "all"', 'llama.Model.dtype = "bfloat16"'],
        r"round away small updates of the biases",
    ),
    "answer first": (
        ['llama.Data.template = "{sentence}{label}"', "llama.Data.max_length = 9"],
        "predicts it",
    ),
    "prompt too long": (
        ["llama.Data.max_length = 12"],
        r"without a sentence, more than llama\.Data\.max_length = 12",
    ),
    "context": (["llama.Data.max_length = 600"], r"more than llama\.Model\.max_positions"),
    "heads": (["llama.Model.heads = 5"], "must be an even number"),
    "groups": (["llama.Model.key_value_heads = 3"], "does not divide"),
    "no end": (["llama.Train.steps = None"], "are both None; set one"),
    "accumulate": (["llama.Train.accumulate = 3"], "does not divide"),
    "old name": (["llama.Train.beta_1 = 0.5"], r"is now Optimizer\.beta_1"),
    "not in PyTorch": (['Optimizer.name = "lion"'], "must be 'sgd', 'adam', 'adamw'"),
    "warm-up": (["Schedule.warmup_steps = 12"], "leaves no step"),
    "metric": (['Checkpoint.metric = "val_psnr"'], "'val_accuracy' or 'val_loss'"),
    "alpha": (["llama.Lora.alpha = 2.0"], r"has no effect unless llama\.Lora\.rank is not None"),
    "module": (["llama.Lora.rank = 2", 'llama.Lora.target_modules = ("q_prj",)'], "q_prj"),
    "no model": (
        ['llama.Model.name_or_path = "no/such/model/here"'],
        r"is not an asset \(smollm2-135m\), directory",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_leaves_nothing(run, tmp_path, case):
    settings, message = BAD_SETTINGS[case]
    if case == "no model":
        settings = [*settings, "llama.Model.hidden_size = 64", "llama.Model.intermediate_size = 176"]
    with pytest.raises(UserError, match=message) as caught:
        run(*settings)
    assert caught.value.exit_status in (2, 3)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("missing", "message"), [("dev.tsv", "test"), ("sentence", "sentence")])
def test_bad_data_is_one_line_and_leaves_nothing(run, tmp_path, missing, message):
    directory = tmp_path / "data"
    directory.mkdir()
    column = "text" if missing == "sentence" else "sentence"
    rows = "".join(f"sentence {i}\t{i % 2}\n" for i in range(40))
    for file in {"train.tsv", "dev.tsv"} - {missing}:
        (directory / file).write_text(f"{column}\tlabel\n{rows}")
    with pytest.raises(DataError, match=message) as caught:
        run(f'llama.Data.source = "{directory}"')
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    assert not (tmp_path / "run").exists()


def break_config(base):
    (base / "config.json").unlink()


def break_weights(base):
    truncated(base / "model.safetensors")


@pytest.mark.parametrize("breaking", [break_config, break_weights])
def test_a_broken_model_is_one_line_and_leaves_nothing(run, base, tmp_path, breaking):
    own = copy_of(base, tmp_path / "own")
    breaking(own)
    with pytest.raises(DataError, match="own") as caught:
        run(*pretrained(own), *LORA)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_does_not_fit_is_one_line(run, base, tmp_path):
    settings = [*pretrained(base), *LORA]
    run(*settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((find(tmp_path / "run").path / name).read_bytes())
    other = tmp_path / "other"
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 64, 48, 2, 4, 2, 512, seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    flags = {"mode": "eval", "resume": str(adapter)}
    with pytest.raises((DataError, CheckpointError), match="adapter") as caught:
        run(*pretrained(other), *LORA, directory=tmp_path / "a", flags=flags)
    assert "\n" not in str(caught.value)
    truncated(adapter / "adapter_model.safetensors")
    with pytest.raises((DataError, CheckpointError), match=r"adapter_model\.safetensors") as caught:
        run(*settings, directory=tmp_path / "b", flags=flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_longer_linear_schedule_is_refused(run, tmp_path):
    run()
    with pytest.raises(ConfigError, match=r"would now over 18; set Schedule\.decay_steps = 10"):
        run("llama.Train.steps = 20")
    assert run("llama.Train.steps = 20", "Schedule.decay_steps = 10") == 0
    assert result(tmp_path / "run")["step"] == 20
