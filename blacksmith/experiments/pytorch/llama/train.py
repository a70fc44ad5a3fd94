"""Fine-tuning Llama on SST-2 in a plain PyTorch loop: read `train` from top to bottom.

Each step computes what all prompts begin with once, and the language-model head only at the answers; see
`blacksmith/models/pytorch/llama/prefix.py`. `main` is what the launcher calls.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blacksmith.config.settings import check_same_decay
from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama import checkpoints, evaluation
from blacksmith.experiments.pytorch.llama.batches import LengthOrder, collate, padding
from blacksmith.experiments.pytorch.llama.checkpoints import build_model
from blacksmith.experiments.pytorch.llama.configs import evaluate_every, total_steps
from blacksmith.experiments.pytorch.llama.evaluation import EvalPairs
from blacksmith.experiments.pytorch.llama.journal import Journal
from blacksmith.experiments.pytorch.llama.optimizer import Averages, learning_rate, make_optimizer
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Prompt, encode
from blacksmith.files import write_json
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.adapters import merge
from blacksmith.models.pytorch.llama.prefix import token_losses
from blacksmith.run.order import seed_words
from blacksmith.run.run import STOPPED, Run


def main(run: Run) -> int:
    """Runs the experiment in the given mode; returns the exit status."""
    modes = {"train": train, "eval": evaluate_checkpoint, "export": export}
    return modes[run.mode](run)


def train(run: Run) -> int:
    """Fine-tunes the model, then tests the best checkpoint."""
    config, settings = run.config, run.config.train

    # Data.
    data = read_data(run).split(config.data.validation, config.run.seed)
    run.use_data(dataclasses.asdict(data.info), data.info.describe())
    model, tokenizer = build_model(run)
    prompt = Prompt.of(config.data.template, config.data.labels)
    examples = drop_short(run, data.train, "training")
    training = encode_training(run, tokenizer, prompt, examples)
    validation = encode_eval(
        run, tokenizer, prompt, drop_short(run, data.validation, "validation"), "validation"
    )
    prefix = training.shared_prefix() if settings.shared_prefix else []
    pad = padding(tokenizer)
    order = LengthOrder(training.lengths, settings.batch_size, settings.by_length, config.run.seed)
    end = total_steps(settings, order.steps_per_epoch)
    look_every = evaluate_every(settings, end)
    check_schedule(run, order, end)

    # What is trained, and where the run stands.
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    base = loading.fingerprint(model, tokenizer)
    optimizer = make_optimizer(settings, weights)
    averages = Averages(weights, settings.average)
    loop = checkpoints.resume(run, optimizer, weights, averages)
    saved_at = loop.step if run.goes_on else -1
    describe(model, weights, training, prefix, end)
    if loop.step >= end:
        print(f"already finished at step {loop.step}: testing again", file=sys.stderr)
    _ = run.metrics  # from here on the directory is this run's
    journal = Journal(run, order, examples.numbers[training.rows], end, loop)
    model.train()

    with profiled(run) as profile_step:
        while True:
            # What falls due before the next step.
            last = loop.step >= end
            if (loop.step % look_every == 0 or last) and loop.validated_at != loop.step:
                if not loop.step:
                    journal.say(f"validating on {len(validation):,} sentences before the first step")
                with journal.paused(), averages.applied():
                    scores = score(run, model, validation, pad)
                if scores is not None:
                    journal.validated(scores)
                    saved_at = -1  # a checkpoint from before an interrupted look lacks its metrics
            improved = bool(config.checkpoint.keep_best) and loop.best_step == loop.step
            due = checkpoints.due(config.checkpoint, loop.step, order)
            stop = bool(run.stop)  # looked at once: a signal may come at any time
            if (due or improved or last or stop) and saved_at != loop.step:
                with journal.paused():
                    checkpoints.save(run, model, base, optimizer, weights, averages, loop, journal.epoch)
                saved_at = loop.step
            if last or stop:
                break

            # One step: a batch, perhaps in parts, that begins with what all prompts begin with.
            rows = order.rows(loop.step)
            answer_tokens = sum(len(training.tokens[row]) - training.answers[row] for row in rows)
            rate = learning_rate(config.schedule, settings.learning_rate, loop.step, end)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss, tokens = torch.zeros((), device=run.device), 0
            for part, some in enumerate(np.array_split(rows, min(settings.accumulate, len(rows)))):
                # Dropout is drawn from the step alone, so that a resumed run draws the same.
                torch.manual_seed(seed_words(config.run.seed, "step", loop.step, part) % 2**63)
                batch = collate(training, some, prefix, pad).to(run.device)
                with autocast(run):
                    part_loss = token_losses(model, batch).sum() / answer_tokens
                part_loss.backward()
                loss += part_loss.detach()
                tokens += len(prefix) + batch.tokens.numel()
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), settings.clip_norm or math.inf)
            optimizer.step()
            averages.update(loop.step + 1)
            profile_step()
            journal.stepped(loss, norm, rate, examples=len(rows), tokens=tokens)
            every = config.log.histograms_every
            if every and loop.step % every == 0:
                with journal.paused():
                    write_histograms(run, loop.step, weights)

    journal.close()
    if run.stop:
        run.finish("stopped", {"step": loop.step})
        print(f"stopped at step {loop.step}; the same command with --workdir={run.directory} goes on")
        return STOPPED
    return conclude(run, model, tokenizer, prompt, data, journal, len(prefix))


def read_data(run: Run) -> sst2.Source:
    """Reads what `llama.Data` names.

    Raises:
      DataError: it is missing or broken.
    """
    settings = run.config.data
    return sst2.read(
        settings.source, sentence_column=settings.sentence_column, label_column=settings.label_column
    )


def drop_short(run: Run, examples: sst2.Examples, what: str) -> sst2.Examples:
    """Returns the examples with at least `llama.Data.min_words` words; prints how many are left out.

    Raises:
      ConfigError: none is left.
    """
    fewest = run.config.data.min_words
    rows = np.array([i for i, s in enumerate(examples.sentences) if len(s.split()) >= fewest], np.int64)
    if not len(rows):
        raise ConfigError(f"llama.Data.min_words = {fewest} leaves no {what} example; lower it")
    if len(rows) < len(examples):
        left_out = len(examples) - len(rows)
        print(
            f"{left_out:,} of {len(examples):,} {what} examples have fewer than {fewest} words and were left "
            "out",
            file=sys.stderr,
        )
    return examples.take(rows)


def encode_training(run: Run, tokenizer: Any, prompt: Prompt, examples: sst2.Examples) -> Encoded:
    """Encodes the training examples; prints how many were too long."""
    settings = run.config.data
    encoded = encode(
        tokenizer,
        prompt,
        examples.sentences,
        examples.labels.tolist(),
        max_length=settings.max_length,
        too_long=settings.too_long,
    )
    for count, done in ((encoded.dropped, "left out"), (encoded.truncated, "cut")):
        report_truncation(count, len(examples), "training", settings.max_length, done)
    if not len(encoded):
        raise ConfigError(
            f"llama.Data.max_length = {settings.max_length} leaves no training example; raise it"
        )
    return encoded


def encode_eval(run: Run, tokenizer: Any, prompt: Prompt, examples: sst2.Examples, what: str) -> EvalPairs:
    """Encodes examples with both answers; prints how many were too long."""
    length = run.config.data.max_length
    pairs = EvalPairs.encode(tokenizer, prompt, examples.sentences, examples.labels, length)
    report_truncation(pairs.correct.truncated, len(examples), what, length, "cut")
    return pairs


def report_truncation(count: int, of: int, what: str, max_length: int, done: str) -> None:
    """Prints how many examples were too long, and what was done with them."""
    if count:
        print(
            f"{count:,} of {of:,} {what} examples have more than {max_length} tokens and were {done}",
            file=sys.stderr,
        )


def score(run: Run, model: torch.nn.Module, pairs: EvalPairs, pad: int) -> evaluation.Scores | None:
    """Scores examples by likelihood; None if the run is to stop."""
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


def autocast(run: Run) -> contextlib.AbstractContextManager:
    """The precision that the configuration names."""
    if run.config.train.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)


def conclude(
    run: Run,
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    data: sst2.Sst2,
    journal: Journal,
    prefix_tokens: int,
) -> int:
    """Tests the best checkpoint on the test set and writes the result; returns the exit status."""
    loop = journal.loop
    saved = run.checkpoints.chosen()
    checkpoints.load_weights(model, saved.path)
    print(f"testing {saved.path.name} on {len(data.test):,} sentences", file=sys.stderr)
    tested = test(run, model, tokenizer, prompt, data.test, run.directory)
    if tested is None:
        run.finish("stopped", {"step": loop.step})
        print(f"stopped; the same command with --workdir={run.directory} tests again")
        return STOPPED
    means = {name: tested[name] for name in ("loss", "accuracy")}
    run.metrics.write(loop.step, journal.epoch, "test", means)
    run.finish(
        "done",
        {
            "step": loop.step,
            "epoch": round(journal.epoch, 4),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "trained_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
            "shared_prefix_tokens": prefix_tokens,
            "best": {"metric": run.config.checkpoint.metric, "value": loop.best, "step": loop.best_step},
            "final": dict(loop.validation),
            "tested_checkpoint": saved.path.name,
            "test": tested,
        },
    )
    print(
        f"test accuracy {means['accuracy']:.2%}, loss {means['loss']:.4f} "
        f"({saved.path.name}, {run.metrics.seconds:.1f} s)\n{run.directory / 'report.html'}"
    )
    return 0


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
    pairs = encode_eval(run, tokenizer, prompt, examples, "test")
    scores = score(run, model, pairs, padding(tokenizer))
    if scores is None:
        return None
    wanted = len(pairs) if settings.generate is None else min(settings.generate, len(pairs))
    some = pairs.correct.first(wanted)
    with autocast(run):
        texts = evaluation.generate(
            model,
            some,
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


def evaluate_checkpoint(run: Run) -> int:
    """``--mode=eval``: a checkpoint or adapter on the validation and test sets, into `eval.json`.

    On other data than that it was trained on, all that is not for training is tested, and of a file all.
    """
    settings = run.config.data
    read = read_data(run)
    trained_on = run.resumed.state["data"].get("sha256") if run.resumed else None
    known = trained_on == read.sha256
    data = read.split(settings.validation, run.config.run.seed) if known else read.for_testing()
    run.use_data(dataclasses.asdict(data.info), data.info.describe())
    model, tokenizer = build_model(run)
    prompt = Prompt.of(settings.template, settings.labels)
    source = run.foreign or run.resumed.path
    result: dict[str, Any] = {"checkpoint": str(source), "data": run.data}
    if known:
        held_out = encode_eval(
            run, tokenizer, prompt, drop_short(run, data.validation, "validation"), "validation"
        )
        scores = score(run, model, held_out, padding(tokenizer))
        if scores is None:
            return STOPPED
        result["val"] = {"loss": scores.loss, "accuracy": scores.accuracy}
    else:
        print(
            "note: the model was trained on other or unknown data, which these sentences may be a part of",
            file=sys.stderr,
        )
    directory = run.directory / "eval"  # what the training wrote beside `result.json` stays
    result["test"] = test(run, model, tokenizer, prompt, data.test, directory)
    if result["test"] is None:
        return STOPPED
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
    model, tokenizer = build_model(run)
    directory = run.directory / "export"
    merged = model
    if run.config.lora.rank is not None or run.foreign:
        if run.config.model.dtype != "float32":
            print(
                f"written in float32: {run.config.model.dtype} would round small updates away; "
                f"dtype=torch.{run.config.model.dtype} loads it smaller",
                file=sys.stderr,
            )
        merged = merge(model.float())
    temporary = run.directory / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with loading.quiet():
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        shutil.copymode(temporary / "config.json", file)  # safetensors makes its files private
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    print(directory)
    return 0


def check_schedule(run: Run, order: LengthOrder, end: int) -> None:
    """A warm-up that leaves no step, and a decay to the end of a run that is resumed towards another end.

    Raises:
      ConfigError: either of them.
    """
    schedule = run.config.schedule
    if schedule.warmup_steps >= end:
        raise ConfigError(
            f"Schedule.warmup_steps = {schedule.warmup_steps} leaves no step of the run's {end} for what "
            "follows"
        )
    if run.resumed is not None:
        check_same_decay(schedule, run.resumed.state["config"], order.steps_per_epoch, end)


def describe(
    model: torch.nn.Module, weights: dict[str, Tensor], training: Encoded, prefix: list[int], end: int
) -> None:
    """Says what is trained, on what."""
    trained, whole = sum(w.numel() for w in weights.values()), sum(w.numel() for w in model.parameters())
    lengths = training.lengths
    shared = (
        f"the first {len(prefix)} are shared and computed once a batch" if prefix else "no prefix is shared"
    )
    print(
        f"{trained:,} of {whole:,} weights are trained, for {end:,} steps, on {len(training):,} examples of "
        f"{lengths.mean():.1f} tokens ({lengths.min()} to {lengths.max()}); {shared}",
        file=sys.stderr,
    )


def write_histograms(run: Run, step: int, weights: dict[str, Tensor]) -> None:
    """Writes the distributions of trained weights and of their gradients."""
    for name, weight in weights.items():
        run.metrics.histogram(step, f"weights/{name}", weight.detach().float().cpu().numpy())
        if weight.grad is not None:
            run.metrics.histogram(step, f"gradients/{name}", weight.grad.float().cpu().numpy())


@contextlib.contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """A function to call after each step; traces `llama.Train.profile_steps` into `profile/trace.json`."""
    steps = run.config.train.profile_steps
    if not steps:
        yield lambda: None
        return
    directory = run.directory / "profile"
    directory.mkdir(exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.device(run.device).type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def write(profile: torch.profiler.profile) -> None:
        temporary = directory / ".trace.json.tmp"
        profile.export_chrome_trace(str(temporary))
        os.replace(temporary, directory / "trace.json")

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
