"""What the Llama experiment refuses or leaves out: settings, data, models and checkpoints that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blacksmith import launch as launcher
from blacksmith.datasets import sst2
from blacksmith.errors import CheckpointError, ConfigError, DataError, UserError
from blacksmith.experiments.pytorch.llama.prompts import Prompt
from blacksmith.files import file_sha256
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer
from blacksmith.run import checkpoint
from blacksmith.run.checkpoint import find

LORA = ["llama.Lora.rank = 4", "llama.Lora.alpha = 8.0"]


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors, the optimizer's too."""
    path = find(directory).path
    return {f"{f.name}/{k}": v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}


def truncated(path: Path) -> None:
    """Leaves half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BAD_SETTINGS = {
    "no sentence": (['llama.Data.template = "What? {label}"'], r"must contain \{sentence\} once"),
    "no label": (['llama.Data.template = "{sentence}"'], r"must contain \{sentence\} once"),
    "label first": (['llama.Data.template = "{label}: {sentence}"'], r"\{label\} once, at its end"),
    "one label": (['llama.Data.labels = ("a",)'], "two different words"),
    "same labels": (['llama.Data.labels = ("a", "a")'], "two different words"),
    "labels alike": (['llama.Data.labels = ("Good", "good ")'], "two different words"),
    "flash": (['llama.Model.attention = "flash_attention_2"'], "computes in bfloat16"),
    "bias": (["llama.Lora.rank = 2", 'llama.Lora.bias = "all"'], "the model has no biases"),
    "bfloat16 biases": (
        ["llama.Lora.rank = 2", 'llama.Lora.bias = "all"', 'llama.Model.dtype = "bfloat16"'],
        "round away small updates",
    ),
    "answer first": (
        ['llama.Data.template = "{sentence}{label}"', "llama.Data.max_length = 9"],
        "predicts it",
    ),
    "prompt too long": (
        ["llama.Data.max_length = 12"],
        r"without a sentence, more than llama\.Data\.max_length = 12",
    ),
    "context": (["llama.Data.max_length = 600"], "more than llama.Model.max_positions = 512"),
    "heads": (["llama.Model.heads = 5"], "must be an even number"),
    "groups": (["llama.Model.key_value_heads = 3"], "does not divide"),
    "no end": (["llama.Train.steps = None"], "are both None; set one"),
    "accumulate": (["llama.Train.accumulate = 3"], "does not divide"),
    "not in PyTorch": (['Optimizer.name = "lion"'], "must be 'sgd', 'adam', 'adamw'"),
    "warm-up": (["Schedule.warmup_steps = 12"], "leaves no step"),
    "metric": (['Checkpoint.metric = "val_psnr"'], "'val_accuracy' or 'val_loss'"),
    "alpha": (["llama.Lora.alpha = 2.0"], r"has no effect unless llama\.Lora\.rank is not None"),
    "module": (["llama.Lora.rank = 2", 'llama.Lora.target_modules = ("q_prj",)'], "q_prj"),
    "no model": (
        ['llama.Model.name_or_path = "no/such/model/here"'],
        r"is not an asset \(smollm2-135m\), an existing directory",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_leaves_nothing(run_llama, tmp_path, case):
    settings, message = BAD_SETTINGS[case]
    if case == "no model":
        settings = [*settings, "llama.Model.hidden_size = 64", "llama.Model.intermediate_size = 176"]
    with pytest.raises(UserError, match=message) as caught:
        run_llama(*settings)
    assert caught.value.exit_status in (2, 3)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("missing", "message"), [("dev.tsv", "test"), ("sentence", "sentence")])
def test_bad_data_is_one_line_and_leaves_nothing(run_llama, tmp_path, missing, message):
    directory = tmp_path / "data"
    directory.mkdir()
    column = "text" if missing == "sentence" else "sentence"
    rows = "".join(f"sentence {i}\t{i % 2}\n" for i in range(40))
    for file in {"train.tsv", "dev.tsv"} - {missing}:
        (directory / file).write_text(f"{column}\tlabel\n{rows}")
    with pytest.raises(DataError, match=message) as caught:
        run_llama(f'llama.Data.source = "{directory}"')
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    assert not (tmp_path / "run").exists()


def break_config(base):
    (base / "config.json").unlink()


def break_weights(base):
    truncated(base / "model.safetensors")


@pytest.mark.parametrize("breaking", [break_config, break_weights])
def test_a_broken_model_is_one_line_and_leaves_nothing(run_llama, base, tmp_path, breaking, pretrained):
    own = shutil.copytree(base, tmp_path / "own")
    breaking(own)
    with pytest.raises(DataError, match="own") as caught:
        run_llama(*pretrained(own), *LORA)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_does_not_fit_is_one_line(run_llama, base, tmp_path, pretrained):
    settings = [*pretrained(base), *LORA]
    run_llama(*settings)
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
        run_llama(*pretrained(other), *LORA, directory=tmp_path / "a", **flags)
    assert "\n" not in str(caught.value)
    truncated(adapter / "adapter_model.safetensors")
    with pytest.raises((DataError, CheckpointError), match=r"adapter_model\.safetensors") as caught:
        run_llama(*settings, directory=tmp_path / "b", **flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.fixture(scope="module")
def trained(resolve_llama, tmp_path_factory) -> Path:
    """The directory of a run with `LORA`."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    assert launcher.run_experiment(resolve_llama(*LORA), directory, device="cpu") == 0
    return directory


def without_a_moment(own, path):
    tensors = load_file(path / "optimizer.safetensors")
    del tensors[min(name for name in tensors if name.endswith("exp_avg"))]
    save_file(tensors, path / "optimizer.safetensors")


FORGED = {
    "no base": (lambda own, path: own.pop("base"), "own.base is not valid"),
    "base": (lambda own, path: own.update(base=[1]), "own.base is not valid"),
    "fingerprint": (lambda own, path: own["base"].update(weights=5), r"own.base.weights is not valid"),
    "no fingerprint": (lambda own, path: own["base"].clear(), "base model with different weights"),
    "numbers": (lambda own, path: own.update(optimizer_numbers="x"), "own.optimizer_numbers is not valid"),
    "number": (
        lambda own, path: own.update(optimizer_numbers={"a/step": {}}),
        r"own.optimizer_numbers.a/step",
    ),
    "weight": (lambda own, path: own.update(optimizer_numbers={"a/step": 1}), "has a parameter 'a'"),
    "moment": (without_a_moment, "the optimizer's state of .* does not fit"),
    "adapter": (lambda own, path: (path / "adapter_model.safetensors").unlink(), "lists no adapter_model"),
    "optimizer": (lambda own, path: (path / "optimizer.safetensors").unlink(), "lists no optimizer"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_checkpoint_is_one_line(trained, run_llama, tmp_path, case):
    change, message = FORGED[case]
    run = shutil.copytree(trained, tmp_path / "forged")
    saved = find(run)
    state = json.loads((saved.path / "state.json").read_text())
    change(state["own"], saved.path)
    state["sha256"] = {
        name: file_sha256(saved.path / name) for name in state["sha256"] if (saved.path / name).exists()
    }
    del state["state_sha256"]
    state["state_sha256"] = checkpoint._content_sha256(state)
    (saved.path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=message) as caught:
        run_llama(*LORA, resume=str(saved.path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_that_a_checkpoint_does_not_list_are_not_loaded(run_llama, tmp_path):
    assert run_llama() == 0
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        planted = load_file(path / "model.safetensors")
        save_file({name: value * 0 for name, value in planted.items()}, path / "model_2.safetensors")
    assert run_llama(mode="eval") == 0
    loss = json.loads((tmp_path / "run" / "eval.json").read_text())["test"]["loss"]
    assert loss == result(tmp_path / "run")["test"]["loss"]


def test_a_longer_linear_schedule_is_refused(run_llama, tmp_path):
    run_llama()
    with pytest.raises(ConfigError, match=r"over 18, .*set Schedule\.decay_steps = 10"):
        run_llama("llama.Train.steps = 20")
    assert run_llama("llama.Train.steps = 20", "Schedule.decay_steps = 10") == 0
    assert result(tmp_path / "run")["step"] == 20


def test_the_base_model_may_move_but_not_change(run_llama, base, tmp_path, pretrained):
    settings = [*LORA, "llama.Train.steps = 6", "Schedule.decay_steps = 10"]
    own = shutil.copytree(base, tmp_path / "own")
    run_llama(*settings, *pretrained(own))
    moved = own.rename(tmp_path / "moved")
    assert run_llama(*settings, *pretrained(moved), "llama.Train.steps = 8") == 0
    assert result(tmp_path / "run")["step"] == 8
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=6).save_pretrained(moved)
    for flags in ({}, {"mode": "eval"}, {"mode": "export"}):
        with pytest.raises(CheckpointError, match="base model with different weights") as caught:
            run_llama(*settings, *pretrained(moved), "llama.Train.steps = 10", **flags)
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
            run_llama(*settings, *pretrained(moved), mode="eval")
    (moved / "config.json").write_text(json.dumps(config))
    vocabulary = json.loads((moved / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (moved / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="base model with different tokenizer"):
        run_llama(*settings, *pretrained(moved), "llama.Train.steps = 10")


def test_full_fine_tuning_resumes_without_its_base(run_llama, base, tmp_path, pretrained):
    own = shutil.copytree(base, tmp_path / "own")
    settings = ["llama.Train.steps = 4", "Schedule.decay_steps = 10"]
    run_llama(*settings, *pretrained(own))
    # Its checkpoint holds all weights: what the base has become is of no interest.
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=6).save_pretrained(own)
    assert run_llama(*settings, *pretrained(own), "llama.Train.steps = 8") == 0
    run_llama(*settings, *pretrained(base), "llama.Train.steps = 8", directory=tmp_path / "whole")
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("too_long", "word"), [("drop", "left out"), ("truncate", "truncated")])
def test_examples_that_are_too_long_are_counted(run_llama, tmp_path, too_long, word, capsys, resolve_llama):
    run_llama("llama.Data.max_length = 90", f'llama.Data.too_long = "{too_long}"')
    said = capsys.readouterr().err
    config = resolve_llama().config
    data = sst2.read("sample").split(validation=20)
    prompt = Prompt(config.data.template, config.data.labels)
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


def test_short_examples_are_left_out(run_llama, tmp_path, capsys):
    assert run_llama("llama.Data.min_words = 8", "llama.Evaluation.generate = 0") == 0
    said = capsys.readouterr().err
    everything = sst2.read("sample").split(validation=20)
    for what, examples in (("training", everything.train), ("validation", everything.validation)):
        short = sum(len(sentence.split()) < 8 for sentence in examples.sentences)
        assert 0 < short < len(examples)
        assert f"{short} of {len(examples)} {what} examples have fewer than 8 words: left out" in said
    answers = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert min(len(answer["sentence"].split()) for answer in answers) < 8
    with pytest.raises(ConfigError, match="leaves no training example"):
        run_llama("llama.Data.min_words = 80", directory=tmp_path / "none")
