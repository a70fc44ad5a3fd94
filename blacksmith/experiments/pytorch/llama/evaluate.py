"""Testing, evaluating and exporting a fine-tuned Llama."""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blacksmith.datasets import sst2
from blacksmith.experiments.pytorch.llama import evaluation
from blacksmith.experiments.pytorch.llama.batches import padding
from blacksmith.experiments.pytorch.llama.checkpoints import load_model
from blacksmith.experiments.pytorch.llama.data import drop_short, encode_eval, read_data
from blacksmith.experiments.pytorch.llama.evaluation import EvalPairs
from blacksmith.experiments.pytorch.llama.prompts import Prompt
from blacksmith.files import write_json
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.adapters import merge
from blacksmith.run.run import Run


def autocast(run: Run) -> contextlib.AbstractContextManager:
    """The precision that the configuration names."""
    if run.config.train.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)


def score(run: Run, model: torch.nn.Module, pairs: EvalPairs, pad: int) -> evaluation.Scores | None:
    """Scores sentences by the likelihood of their answers; None if the run is to stop."""
    settings = run.config
    with autocast(run):
        return evaluation.score(
            model,
            pairs,
            batch_size=settings.evaluation.batch_size,
            pad=pad,
            shared_prefix=settings.train.shared_prefix,
            stop=run.stop,
        )


def test(
    run: Run,
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    examples: sst2.Examples,
    directory: Path,
) -> dict[str, Any] | None:
    """Scores examples by likelihood and some by generation; None if the run is to stop.

    Writes `eval_results.json` into a directory: for each example its sentence, label, prediction,
    probabilities, and the text that was generated, or None where none was.

    Returns:
      loss, accuracy, the confusion matrix (rows: true, columns: predicted), and how generation did.
    """
    settings = run.config.evaluation
    (directory / "eval_results.json").unlink(missing_ok=True)
    pairs = encode_eval(run, tokenizer, prompt, examples, "test")
    scores = score(run, model, pairs, padding(tokenizer))
    if scores is None:
        return None
    wanted = len(pairs) if settings.generate is None else min(settings.generate, len(pairs))
    with autocast(run):
        texts = evaluation.generate(
            model,
            pairs.correct.first(wanted),
            tokenizer,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            stop=run.stop,
        )
    if texts is None:
        return None
    answers = [evaluation.parse_answer(text, prompt.labels) for text in texts]
    right = sum(answer == label for answer, label in zip(answers, examples.labels.tolist()))
    lines = [
        {
            "sentence": sentence,
            "label": int(label),
            "prediction": int(prediction),
            "probabilities": [round(float(p), 6) for p in probabilities],
            "generated": texts[index] if index < wanted else None,
        }
        for index, (sentence, label, prediction, probabilities) in enumerate(
            zip(examples.sentences, examples.labels, scores.predictions, scores.probabilities)
        )
    ]
    directory.mkdir(exist_ok=True)
    write_json(directory / "eval_results.json", lines)
    confusion = scores.confusion
    return {
        "loss": scores.loss,
        "accuracy": scores.accuracy,
        "per_class_accuracy": (confusion.diagonal() / np.maximum(confusion.sum(1), 1)).tolist(),
        "confusion_matrix": confusion.tolist(),
        "class_names": [label.strip() for label in prompt.labels],
        "questions": {"examples": len(pairs), "truncated": pairs.correct.truncated},
        "generated": {
            "examples": wanted,
            "accuracy": right / wanted if wanted else None,
            "unparsable": sum(answer is None for answer in answers),
        },
    }


def evaluate(run: Run) -> int:
    """``--mode=eval``: a checkpoint or adapter on the validation and test sets, into `eval.json`.

    On other data than it was trained on, all that is not for training is tested; of a single file, all of it.
    """
    settings = run.config.data
    source = read_data(run)
    trained_on = run.resumed.state["data"].get("sha256") if run.resumed else None
    known = trained_on == source.sha256
    data = source.split(settings.validation, run.config.run.seed) if known else source.for_testing()
    run.use_data(data.info)
    model, tokenizer = load_model(run)
    prompt = Prompt.of(settings.template, settings.labels)
    result: dict[str, Any] = {
        "checkpoint": str(run.external_weights or run.resumed.path),
        "data": run.data,
    }
    if known:
        held_out = drop_short(run, data.validation, "validation")
        pairs = encode_eval(run, tokenizer, prompt, held_out, "validation")
        scores = score(run, model, pairs, padding(tokenizer))
        if scores is None:
            return run.stopped()
        result["val"] = {"loss": scores.loss, "accuracy": scores.accuracy}
    else:
        print(
            "note: the model was trained on other or unknown data, which may include these sentences",
            file=sys.stderr,
        )
    directory = run.directory / "eval"  # what training wrote beside `result.json` stays
    result["test"] = test(run, model, tokenizer, prompt, data.test, directory)
    if result["test"] is None:
        return run.stopped()
    write_json(run.directory / "eval.json", result)
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


def export(run: Run) -> int:
    """``--mode=export``: adapter and model merged, as a Hugging Face model directory, `export/`."""
    model, tokenizer = load_model(run)
    if run.config.lora.rank is not None or run.external_weights:
        if run.config.model.dtype != "float32":
            print(
                f"written in float32: {run.config.model.dtype} would round small updates away; "
                f"load it with dtype=torch.{run.config.model.dtype} to save memory",
                file=sys.stderr,
            )
        model = merge(model.float())
    directory = run.directory / "export"
    temporary = run.directory / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with loading.quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        shutil.copymode(temporary / "config.json", file)  # safetensors makes its files private
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    print(directory)
    return 0
