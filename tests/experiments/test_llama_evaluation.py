"""Evaluation and export of the Llama experiment, and how sentences are scored."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError, DataError, RunError
from blacksmith.experiments.pytorch.llama import evaluate, evaluation, train
from blacksmith.experiments.pytorch.llama.prompts import Prompt, encode
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer
from blacksmith.run.checkpoint import find

ACCURACY = 'Checkpoint.metric = "val_accuracy"'
LORA = ["llama.Lora.rank = 4", "llama.Lora.alpha = 8.0"]


def encoded(tokenizer, prompt, sentences, labels):
    """The sentences with both answers."""
    examples = sst2.Examples(tuple(sentences), np.array(labels), np.arange(len(labels)))
    return encode(tokenizer, prompt, examples, max_length=256, too_long="truncate")


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


def test_eval_scores_a_checkpoint_as_training_did(run_llama, stream, tmp_path, capsys):
    settings = [*LORA, "llama.Data.min_words = 8", 'llama.Train.precision = "bfloat16"']
    run_llama(*settings)
    assert run_llama(*settings, mode="eval") == 0
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
        run_llama(*settings, "llama.Train.batch_size = 4", mode="eval")


def test_eval_finds_the_best_in_a_run_or_a_copied_directory(run_llama, tmp_path):
    settings = ["Optimizer.learning_rate = 0.3", ACCURACY]
    run_llama(*settings)
    tested = result(tmp_path / "run")["tested_checkpoint"]
    assert tested != find(tmp_path / "run").path.name
    kept = shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "kept")
    (kept / "checkpoints").mkdir()  # beside step_*, it means nothing
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "checkpoints", kept)):
        directory = tmp_path / str(number)
        run_llama(*settings, directory=directory, mode="eval", resume=str(source))
        assert Path(json.loads((directory / "eval.json").read_text())["checkpoint"]).name == tested


def test_validation_has_the_precision_of_training(run_llama, stream, tmp_path):
    for precision in ("float32", "bfloat16"):
        run_llama(f'llama.Train.precision = "{precision}"', directory=tmp_path / precision)
    one, other = (stream(tmp_path / precision)[0]["loss"] for precision in ("float32", "bfloat16"))
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


def test_a_checkpoint_is_evaluated_on_a_small_file(run_llama, tmp_path, capsys):
    run_llama()
    rows = [("a warm and clever film", 1), ("dull", 0), ("clever", 1)]
    own = tmp_path / "own.tsv"
    own.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    flags = {"mode": "eval", "resume": str(tmp_path / "run")}
    assert run_llama(f'llama.Data.source = "{own}"', directory=tmp_path / "e", **flags) == 0
    told = capsys.readouterr().err
    assert f"{own}: 3 test sentences" in told
    assert "note: the model was trained on other data" in told
    assert "val" not in json.loads((tmp_path / "e" / "eval.json").read_text())
    answers = json.loads((tmp_path / "e" / "eval" / "eval_results.json").read_text())
    assert [(answer["sentence"], answer["label"]) for answer in answers] == rows


def test_an_adapter_directory_is_evaluated_and_exported(run_llama, base, tmp_path, capsys, pretrained):
    settings = [*LORA, *pretrained(base)]
    run_llama(*settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((find(tmp_path / "run").path / name).read_bytes())
    newest = {"mode": "eval", "resume": str(find(tmp_path / "run").path)}
    assert run_llama(*settings, directory=tmp_path / "a", **newest) == 0
    assert run_llama(*settings, directory=tmp_path / "b", mode="eval", resume=str(adapter)) == 0
    one, other = (json.loads((tmp_path / d / "eval.json").read_text()) for d in ("a", "b"))
    assert one["test"] == other["test"]
    assert "val" not in other
    assert f"trained on {base}, used with {base}; llama.Lora has no effect" in capsys.readouterr().err
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = "some/other"
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    assert run_llama(*settings, directory=tmp_path / "x", mode="export", resume=str(adapter)) == 0
    assert f"trained on some/other, used with {base}; llama.Lora has no" in capsys.readouterr().err
    public = (tmp_path / "x" / "export" / "config.json").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "x" / "export").iterdir()} == {public}
    assert {file.stat().st_mode for file in find(tmp_path / "run").path.iterdir()} == {public}
    assert run_llama(*settings, directory=tmp_path / "y", **(newest | {"mode": "export"})) == 0
    exported = [load_file(tmp_path / d / "export" / "model.safetensors") for d in ("x", "y")]
    assert exported[0].keys() == exported[1].keys()
    for name, value in exported[0].items():
        assert torch.equal(value, exported[1][name])
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in exported[0].items())
    with pytest.raises(ConfigError, match="no training state"):
        run_llama(*settings, directory=tmp_path / "c", resume=str(adapter))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_exported_model_answers_the_same(run_llama, base, tmp_path, lora, pretrained, resolve_llama):
    settings = [*pretrained(base), *(LORA if lora else []), "Optimizer.learning_rate = 0.01"]
    run_llama(*settings)
    assert run_llama(*settings, mode="export") == 0
    directory = tmp_path / "run" / "export"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = resolve_llama(*settings).config
    prompt = Prompt(config.data.template, config.data.labels)
    answers = json.loads((tmp_path / "run" / "eval_results.json").read_text())[:20]
    pairs = encoded(tokenizer, prompt, [a["sentence"] for a in answers], [a["label"] for a in answers])
    scores = evaluation.score(model, pairs, batch_size=7)
    for answer, found in zip(answers, scores.probabilities):
        # Best or newest: training has moved both from the base, which says something else.
        assert found == pytest.approx(answer["probabilities"], abs=2e-4)
    before = evaluation.score(AutoModelForCausalLM.from_pretrained(base), pairs, batch_size=7)
    assert abs(before.probabilities - scores.probabilities).max() > 1e-2


def test_a_bfloat16_export_loses_nothing_of_the_adapter(run_llama, base, tmp_path, capsys, pretrained):
    # Updates so small that bfloat16 would round most of them away.
    settings = [
        *pretrained(base),
        *LORA,
        'llama.Model.dtype = "bfloat16"',
        "Optimizer.learning_rate = 1e-4",
    ]
    run_llama(*settings)
    assert run_llama(*settings, mode="export") == 0
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


def test_likelihoods_are_those_of_whole_answers(base):
    model, tokenizer = loading.load_model(str(base))
    sentences, labels = ["fine", "a dull and joyless thing", "ok"], [1, 0, 1]
    # The end token counts only where one answer begins the other.
    for words, last in ((("A", "B"), -1), (("AA", "AB"), -1), (("A", "BCD"), -1), (("A", "AB"), None)):
        prompt = Prompt("Review: {sentence}\nSentiment: {label}", words)
        pairs = encoded(tokenizer, prompt, sentences, labels)
        for shared in (True, False):
            scores = evaluation.score(model, pairs, batch_size=2, shared_prefix=shared)
            for row, sentence in enumerate(sentences):
                logs = []
                for word in words:
                    tokens = tokenizer(prompt.question(sentence) + word + tokenizer.eos_token)["input_ids"]
                    with torch.no_grad():
                        found = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
                    answer = [
                        found[i - 1, tokens[i]] for i in range(len(tokens) - len(word) - 1, len(tokens))
                    ]
                    logs.append(sum(answer[:last]))
                expected = torch.stack(logs).softmax(0)
                assert scores.probabilities[row] == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_validation_loss_is_the_mean_over_answer_tokens(base):
    model, tokenizer = loading.load_model(str(base))
    sentences, labels = ["fine", "a dull and joyless thing", "ok"], [1, 0, 1]
    prompt = Prompt("Review: {sentence}\nSentiment: {label}", ("negative", "good"))
    pairs = encoded(tokenizer, prompt, sentences, labels)
    total, count = 0.0, 0
    for sentence, label in zip(sentences, labels):
        question = tokenizer(prompt.question(sentence))["input_ids"]
        tokens = tokenizer(prompt.question(sentence) + prompt.labels[label] + tokenizer.eos_token)[
            "input_ids"
        ]
        learned = [-100] * len(question) + tokens[len(question) :]
        number = len(tokens) - len(question)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([tokens]), labels=torch.tensor([learned])).loss
        total, count = total + float(loss) * number, count + number
    assert evaluation.score(model, pairs, batch_size=2).loss == pytest.approx(total / count, abs=1e-5)


def test_generation_in_batches_is_that_of_each_alone(base):
    model, tokenizer = loading.load_model(str(base))
    prompt = Prompt("Review: {sentence}\nSentiment: {label}", ("negative", "positive"))
    sentences = ["fine", "a dull and joyless thing", "", "so so"]
    pairs = encoded(tokenizer, prompt, sentences, [1, 0, 1, 0])
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
    prompt = Prompt("Review: {sentence}\nSentiment: {label}", ("negative", "positive"))
    pairs = encoded(tokenizer, prompt, ["fine", "so so"], [1, 0])
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


def add_to_adapter(adapter: Path, value: float, part: str = "lora_B") -> None:
    """Adds a value to one number of a saved adapter."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name][0, 0] += value
    save_file(tensors, path)


@pytest.fixture
def adapter(run_llama, base, tmp_path, pretrained) -> Path:
    """A trained adapter of `base`."""
    run_llama(*LORA, *pretrained(base), "llama.Train.steps = 3")
    saved = find(tmp_path / "run").path
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved / name, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_an_adapter_that_is_not_finite_gets_no_figures(run_llama, base, tmp_path, adapter, pretrained, mode):
    add_to_adapter(adapter, float("nan"))
    message = r"not finite: adapter, model\.layers\.0\.mlp\.down_proj\.lora_B"
    if mode == "eval":
        message = r"row \d+ of the test examples: the model's output is not finite; first " + message
    with pytest.raises(DataError, match=message):
        run_llama(*LORA, *pretrained(base), directory=tmp_path / "e", mode=mode, resume=str(adapter))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_model_that_is_not_finite_is_refused_before_the_first_step(
    run_llama, base, tmp_path, pretrained, value
):
    own = shutil.copytree(base, tmp_path / "own")
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:] = value
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    where = "base weights" if value != value else "activations"
    with pytest.raises(
        DataError, match=rf"row \d+ of the validation .* first not finite: {where}, "
    ) as caught:
        run_llama(*pretrained(own))
    assert "learning rate" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_that_training_made_infinite_end_the_run(run_llama, tmp_path, monkeypatch):
    score, calls = train.score, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise evaluation.NotFinite("row 7")
        return score(*arguments)

    monkeypatch.setattr(train, "score", broken)
    with pytest.raises(RunError, match=r"validation at step 5: row 7; .*; a lower learning rate"):
        run_llama()
    assert result(tmp_path / "run")["status"] == "failed"


def test_an_export_that_differs_is_no_export(run_llama, base, tmp_path, adapter, pretrained, monkeypatch):
    settings = [*LORA, *pretrained(base)]
    flags = {"directory": tmp_path / "x", "mode": "export", "resume": str(adapter)}
    assert run_llama(*settings, **flags) == 0
    written = tmp_path / "x" / "export"
    content = {path.name: path.read_bytes() for path in written.iterdir()}
    merge = evaluate.merge

    def another(model):
        merged = merge(model)
        with torch.no_grad():
            merged.model.layers[1].self_attn.v_proj.weight[:] += 0.1
        return merged

    def untied(model):
        merged = merge(model)
        merged.config.tie_word_embeddings = False
        return merged

    for wrong, message in ((another, "logits differ by"), (untied, "it cannot be loaded: .*lm_head")):
        monkeypatch.setattr(evaluate, "merge", wrong)
        with pytest.raises(
            RunError, match=f"the export differs from the model that was evaluated, .*{message}"
        ):
            run_llama(*settings, **flags)
        # An older export stays; nothing else does.
        assert {path.name: path.read_bytes() for path in written.iterdir()} == content
        assert {path.name for path in (tmp_path / "x").iterdir()} == {".lock", "export", "manifest.jsonl"}


def test_a_beginning_token_of_template_and_tokenizer_is_there_once(run_llama, tmp_path, capsys):
    template = '"<|begin|>Review: {sentence}\\nSentiment: {label}"'
    own = tmp_path / "own"
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=5).save_pretrained(own)
    tokenizer.save_pretrained(own)
    sizes = ["llama.Model.hidden_size = 64", "llama.Model.intermediate_size = 176"]
    settings = [*sizes, f'llama.Model.name_or_path = "{own}"', "llama.Train.steps = 3"]
    assert run_llama(*settings, f"llama.Data.template = {template}", directory=tmp_path / "a") == 0
    told = capsys.readouterr().err
    for what in ("training", "validation", "test"):
        assert re.search(rf"(\d+) of \1 {what} examples have two beginning tokens, .*: one was dropped", told)
    without = template.replace("<|begin|>", "")
    assert run_llama(*settings, f"llama.Data.template = {without}", directory=tmp_path / "b") == 0
    assert "beginning tokens" not in capsys.readouterr().err
    assert result(tmp_path / "a")["test"] == result(tmp_path / "b")["test"]


def test_a_text_with_a_token_beyond_the_embedding_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"])
    examples = sst2.Examples(("fine", "an <image> of it"), np.array([1, 0]), np.array([4, 9]))
    prompt, options = Prompt("{sentence}: {label}", ("no", "yes")), {"max_length": 99, "too_long": "drop"}
    message = r"row 9 of the test examples: the token '<image>' has the number 259, .* only 259 tokens"
    with pytest.raises(DataError, match=message):
        encode(tokenizer, prompt, examples, **options, rows=259, what="test")
    assert len(encode(tokenizer, prompt, examples, **options, rows=260)) == 2


def test_answers_that_are_the_same_tokens_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Replace("yes", "no")
    with pytest.raises(ConfigError, match="both are the same tokens"):
        encoded(tokenizer, Prompt("{sentence}: {label}", ("no", "yes")), ["fine"], [1])
