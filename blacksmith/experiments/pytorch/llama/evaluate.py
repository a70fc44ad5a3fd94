"""Testing, evaluating and exporting a fine-tuned Llama."""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blacksmith.datasets import sst2
from blacksmith.errors import RunError, UserError
from blacksmith.experiments.pytorch.llama import evaluation
from blacksmith.experiments.pytorch.llama.checkpoints import load_model
from blacksmith.experiments.pytorch.llama.data import encode_examples, read_data
from blacksmith.experiments.pytorch.llama.prompts import Encoded, collate
from blacksmith.files import write_json
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.adapters import merge
from blacksmith.models.pytorch.llama.finite import check_weights
from blacksmith.models.pytorch.llama.prefix import causal_model, target_logits
from blacksmith.run.run import Run
from blacksmith.trainers.confusion import class_tables

_COMPARED = 8  # sentences for which an export must answer as before


def evaluate(run: Run) -> int:
    """``--mode=eval``: scores a checkpoint or adapter on the validation and test sets, into `eval.json`.

    On data that it was not trained on, the test set is all that is not for training, or all of a single file.
    """
    source = read_data(run)
    same = run.resumed is not None and run.resumed.state["data"].get("sha256") == source.sha256
    data = source.split(run.config.data.validation, run.config.run.seed) if same else source.for_testing()
    run.use_data(data.info)
    run.trained_on_this_data()  # prints a note if it was not
    model, tokenizer = load_model(run)
    result: dict[str, Any] = {
        "checkpoint": str(run.external_weights or run.resumed.path),
        "data": run.data,
    }
    testing = encode_examples(run, model, tokenizer, data.test, "test")
    if same:
        scores = score(run, model, encode_examples(run, model, tokenizer, data.validation, "validation"))
        if scores is None:
            return run.stopped()
        result["val"] = {"loss": scores.loss, "accuracy": scores.accuracy}
    directory = run.directory / "eval"  # the `eval_results.json` of training is not overwritten
    result["test"] = test(run, model, tokenizer, testing, directory)
    if result["test"] is None:
        return run.stopped()
    write_json(run.claim("eval.json"), result)
    for split in ("val", "test"):
        if split in result:
            print(f"{split}: accuracy {result[split]['accuracy']:.2%}, loss {result[split]['loss']:.4f}")
    generated = result["test"]["generated"]
    if generated["examples"]:
        print(
            f"generated: accuracy {generated['accuracy']:.2%} of {generated['examples']}, "
            f"{generated['unparsable']} unparsable"
        )
    print(f"{run.directory / 'eval.json'}\n{directory / 'eval_results.json'}")
    return 0


def test(
    run: Run,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    directory: Path,
) -> dict[str, Any] | None:
    """Scores all examples by likelihood and `llama.Evaluation.generate` of them by generation.

    Writes `eval_results.json` into a directory: each sentence with its label, prediction, probabilities and
    generated text, if any.

    Returns:
      loss, accuracy, the confusion matrix (rows: true, columns: predicted), and how generation did; None if
      the run is to stop.
    """
    settings, words = run.config.evaluation, run.config.data.labels
    examples = encoded.examples
    scores = score(run, model, encoded)
    if scores is None:
        return None
    with autocast(run):
        texts = evaluation.generate(
            model,
            encoded.correct[: settings.generate],
            tokenizer,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            stop=run.stop,
        )
    if texts is None:
        return None
    labels = examples.labels.tolist()
    answers = [evaluation.parse_answer(text, words) for text in texts]
    correct = sum(answer == label for answer, label in zip(answers, labels))
    lines = [
        {
            "sentence": sentence,
            "label": label,
            "prediction": prediction,
            "probabilities": [round(p, 6) for p in probabilities],
            "generated": text,
        }
        for sentence, label, prediction, probabilities, text in itertools.zip_longest(
            examples.sentences, labels, scores.predictions.tolist(), scores.probabilities.tolist(), texts
        )
    ]
    write_json(run.claim(directory / "eval_results.json"), lines)
    return {
        "loss": scores.loss,
        "accuracy": scores.accuracy,
        **class_tables(scores.labels, scores.predictions, len(words)),
        "class_names": [word.strip() for word in words],
        "questions": {"examples": len(encoded), "truncated": encoded.truncated},
        "generated": {
            "examples": len(texts),
            "accuracy": correct / len(texts) if texts else None,
            "unparsable": answers.count(None),
        },
    }


def score(run: Run, model: torch.nn.Module, encoded: Encoded) -> evaluation.Scores | None:
    """Scores examples by the likelihood of their answers; None if the run is to stop."""
    with autocast(run):
        return evaluation.score(
            model,
            encoded,
            batch_size=run.config.evaluation.batch_size,
            shared_prefix=run.config.train.shared_prefix,
            stop=run.stop,
        )


def autocast(run: Run) -> torch.autocast:
    """Applies `llama.Train.precision` to the block."""
    bfloat16 = run.config.train.precision == "bfloat16"
    return torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=bfloat16)


def export(run: Run) -> int:
    """``--mode=export``: writes the model, with its adapter merged, as a Hugging Face model directory.

    The directory gets its name once the model in it was loaded and answered some sentences as before.
    """
    model, tokenizer = load_model(run)
    check_weights(model, str(run.external_weights or run.resumed.path))
    adapted = run.config.lora.rank is not None or run.external_weights
    if adapted:
        if run.config.model.dtype != "float32":
            print("written in float32, since bfloat16 would round small updates away", file=sys.stderr)
        model = model.float()
    if run.config.model.attention == "flash_attention_2":  # not in float32
        causal_model(model).set_attn_implementation("sdpa")
    sentences = sst2.read("sample").for_testing().test.take(range(_COMPARED))
    before = encode_examples(run, model, tokenizer, sentences, "test")
    evaluation.score(model, before, batch_size=1)  # raises if it is not finite
    expected = _answer_logits(model, before)
    if adapted:
        model = merge(model)
    directory = run.directory / "export"
    with run.new_directory("export") as temporary, loading.quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del model
        _compare(run, temporary, sentences, before, expected)
    print(directory)
    return 0


@torch.no_grad()
def _answer_logits(model: torch.nn.Module, encoded: Encoded) -> torch.Tensor:
    """The logits at the answers of some examples: float32 [targets, vocabulary]."""
    device = next(model.parameters()).device
    return target_logits(model.eval(), collate(encoded.correct, encoded.shared_prefix()).to(device))


def _compare(
    run: Run, written: Path, sentences: sst2.Examples, before: Encoded, expected: torch.Tensor
) -> None:
    """Raises RunError if the model in a directory does not compute what was to be exported."""
    problem = "the export differs from the model that was evaluated, and was removed"
    try:
        model, tokenizer = loading.load_model(str(written))
        after = encode_examples(run, model, tokenizer, sentences, "test")
    except UserError as error:
        raise RunError(f"{problem}: it cannot be loaded: {error}") from error
    if after.correct != before.correct:
        raise RunError(f"{problem}: its tokenizer gives other tokens")
    found = _answer_logits(model.to(run.device), after)
    # Merging rounds each weight once; of a different model, the logits differ by about their own size.
    limit = 1e-3 * float(expected.abs().max().clamp(min=1))
    difference = float((found - expected).abs().max())
    if not difference <= limit:  # nor if it is NaN
        raise RunError(f"{problem}: logits differ by {difference:.3g}, more than {limit:.3g}")
