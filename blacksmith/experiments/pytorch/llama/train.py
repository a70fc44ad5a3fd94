"""Fine-tuning Llama on SST-2 in a plain PyTorch loop: data, model, optimizer, loop, test.

Each step computes once what all prompts begin with, and the language-model head only at the answers; see
`blacksmith/models/pytorch/llama/prefix.py`.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from blacksmith.experiments.pytorch.llama.averages import Averages
from blacksmith.experiments.pytorch.llama.checkpoints import TrainState, build_model, load_weights
from blacksmith.experiments.pytorch.llama.data import encode_examples, read_data
from blacksmith.experiments.pytorch.llama.evaluate import autocast, score, test
from blacksmith.experiments.pytorch.llama.prompts import Encoded, collate, collate_whole
from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.prefix import token_losses
from blacksmith.run.loop import Loop
from blacksmith.run.order import LengthOrder, seed_int
from blacksmith.run.run import Run
from blacksmith.run.schedule import learning_rate
from blacksmith.trainers.native_optimizers import clip_gradients, make_optimizer
from blacksmith.trainers.torch_state import set_learning_rate, weights_and_gradients


def train(run: Run) -> int:
    """Fine-tunes the model, then tests the best checkpoint; returns the exit status."""
    config, settings = run.config, run.config.train

    # Data and model.
    data = read_data(run).split(config.data.validation, config.run.seed)
    run.use_data(data.info)
    model, tokenizer = build_model(run)
    training = encode_examples(run, model, tokenizer, data.train, "training")
    validation = encode_examples(run, model, tokenizer, data.validation, "validation")
    testing = encode_examples(run, model, tokenizer, data.test, "test")  # now, so that it cannot fail later
    prefix = training.shared_prefix() if settings.shared_prefix else []
    order = LengthOrder(training.lengths, settings.batch_size, settings.by_length, config.run.seed)
    end = settings.total_steps(order.steps_per_epoch)

    # Optimizer, and all that a checkpoint holds.
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = make_optimizer(config.optimizer, weights.values())
    averages = Averages(weights, settings.average)
    state = TrainState(model, loading.fingerprint(model, tokenizer), weights, optimizer, averages)
    if run.resumed is not None:
        state.restore(run.resumed)
    sizes = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trained_parameters": sum(weight.numel() for weight in weights.values()),
        "shared_prefix_tokens": len(prefix),
    }
    describe(sizes, training, end)

    # What happens beside the steps.
    def rate_of(step: int) -> float:
        return learning_rate(config.schedule, config.optimizer.learning_rate, step, end)

    def validate() -> dict[str, float] | None:
        if loop.step == 0:
            loop.say(f"validating on {len(validation):,} sentences before the first step")
        with averages.applied():
            scores = score(run, model, validation)
        model.train()
        return scores and {"loss": scores.loss, "accuracy": scores.accuracy}

    def examples_of(step: int) -> str:
        numbers = sorted(training.examples.numbers[order.rows(step)])
        return f"rows {', '.join(map(str, numbers))} of the training data"

    loop = Loop(
        run,
        order,
        end=end,
        validate=validate,
        save=state.save,
        validate_every=settings.evaluate_every_steps or math.ceil(end / 10),
        validate_first=True,
        learning_rate=rate_of,
        histograms=lambda: weights_and_gradients(weights),
        examples_of=examples_of,
    )

    # The steps.
    model.train()
    with profiled(run) as profile_step:
        run.begin()
        run.clear("eval_results.json")  # of an earlier test
        for step in loop:
            set_learning_rate(optimizer, rate_of(step))
            optimizer.zero_grad(set_to_none=True)
            rows = order.rows(step)
            # The loss is the mean over the answer tokens of the whole batch, which may be computed in parts.
            answer_tokens = sum(len(ids) - answer for ids, answer in (training.correct[row] for row in rows))
            loss, tokens = torch.zeros((), device=run.device), 0
            for number, part in enumerate(np.array_split(rows, min(settings.accumulate, len(rows)))):
                # Dropout depends on the step alone, so that a resumed run draws the same masks.
                torch.manual_seed(seed_int(config.run.seed, "step", step, number) % 2**63)
                some = [training.correct[row] for row in part]
                with autocast(run):
                    if settings.shared_prefix:
                        batch = collate(some, prefix).to(run.device)
                        part_loss = token_losses(model, batch).sum() / answer_tokens
                        tokens += len(prefix) + batch.tokens.numel()
                    else:
                        input_ids, labels = (t.to(run.device) for t in collate_whole(some))
                        part_loss = model(
                            input_ids, labels=labels, num_items_in_batch=answer_tokens, use_cache=False
                        ).loss
                        tokens += input_ids.numel()
                part_loss.backward()
                loss += part_loss.detach()
            norm = clip_gradients(config.optimizer, weights.values())
            optimizer.step()
            averages.update(step + 1)
            profile_step()
            loop.log({"loss": loss, "gradient_norm": norm}, tokens=tokens)

    # The test.
    def test_checkpoint(saved: Any) -> dict[str, Any] | None:
        load_weights(model, saved, state.base)
        print(f"testing {saved.path.name} on {len(data.test):,} sentences", file=sys.stderr)
        return test(run, model, tokenizer, testing, run.directory)

    return loop.finish(test_checkpoint, sizes)


def describe(sizes: dict[str, int], training: Encoded, end: int) -> None:
    """Prints what is trained, on what."""
    lengths, prefix = training.lengths, sizes["shared_prefix_tokens"]
    shared = f"shared {prefix}-token prefix computed once per batch" if prefix else "no shared prefix"
    print(
        f"training {sizes['trained_parameters']:,} of {sizes['parameters']:,} parameters, {end:,} steps, "
        f"{len(training):,} examples (mean {lengths.mean():.0f} tokens, {lengths.min()}-{lengths.max()}); "
        f"{shared}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """Traces `llama.Train.profile_steps` steps; yields a function to call after each step."""
    steps = run.config.train.profile_steps
    if not steps:
        yield lambda: None
        return
    path = run.claim("profile/trace.json")
    schedule = torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda profile: profile.export_chrome_trace(str(path))
    ) as profile:
        yield profile.step
