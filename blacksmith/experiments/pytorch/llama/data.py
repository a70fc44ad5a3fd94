"""The experiment's data: sentences of at least some words, as tokens."""

import sys
from typing import Any

import numpy as np

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama.evaluation import EvalPairs
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Prompt, encode
from blacksmith.run.run import Run


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
    """The examples of at least `llama.Data.min_words` words; prints how many are left out.

    Raises:
      ConfigError: none is long enough.
    """
    fewest = run.config.data.min_words
    rows = np.array([i for i, s in enumerate(examples.sentences) if len(s.split()) >= fewest], np.int64)
    if not len(rows):
        raise ConfigError(f"llama.Data.min_words = {fewest} leaves no {what} example; lower it")
    if len(rows) < len(examples):
        dropped = len(examples) - len(rows)
        print(
            f"{dropped:,} of {len(examples):,} {what} examples have fewer than {fewest} words: left out",
            file=sys.stderr,
        )
    return examples.take(rows)


def encode_training(run: Run, tokenizer: Any, prompt: Prompt, examples: sst2.Examples) -> Encoded:
    """The training examples as tokens; prints how many were too long.

    Raises:
      ConfigError: all of them are too long.
    """
    settings = run.config.data
    encoded = encode(
        tokenizer,
        prompt,
        examples.sentences,
        examples.labels.tolist(),
        max_length=settings.max_length,
        too_long=settings.too_long,
    )
    for count, done in ((encoded.dropped, "left out"), (encoded.truncated, "truncated")):
        report_truncation(count, len(examples), "training", settings.max_length, done)
    if not len(encoded):
        raise ConfigError(
            f"llama.Data.max_length = {settings.max_length} leaves no training example; raise it"
        )
    return encoded


def encode_eval(run: Run, tokenizer: Any, prompt: Prompt, examples: sst2.Examples, what: str) -> EvalPairs:
    """Examples with both answers as tokens; prints how many were too long."""
    length = run.config.data.max_length
    pairs = EvalPairs.encode(tokenizer, prompt, examples.sentences, examples.labels, length)
    report_truncation(pairs.correct.truncated, len(examples), what, length, "truncated")
    return pairs


def report_truncation(count: int, of: int, what: str, max_length: int, done: str) -> None:
    """Prints what happened to examples of more than `max_length` tokens, if there are any."""
    if count:
        print(
            f"{count:,} of {of:,} {what} examples have more than {max_length} tokens: {done}", file=sys.stderr
        )
