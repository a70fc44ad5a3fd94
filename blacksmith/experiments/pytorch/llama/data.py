"""The data of the experiment, read, filtered and encoded as `llama.Data` says."""

import sys

import numpy as np
from transformers import PreTrainedTokenizerBase

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Prompt, encode
from blacksmith.run.run import Run


def read_data(run: Run) -> sst2.Source:
    """Reads what `llama.Data` names; raises DataError if it is missing or broken."""
    data = run.config.data
    return sst2.read(data.source, sentence_column=data.sentence_column, label_column=data.label_column)


def drop_short(run: Run, examples: sst2.Examples, what: str) -> sst2.Examples:
    """Returns the examples of at least `llama.Data.min_words` words; raises ConfigError if there are none."""
    fewest = run.config.data.min_words
    rows = np.flatnonzero([len(sentence.split()) >= fewest for sentence in examples.sentences])
    if not len(rows):
        raise ConfigError(f"llama.Data.min_words = {fewest} leaves no {what} example; lower it")
    _report(len(examples) - len(rows), len(examples), what, f"fewer than {fewest} words: left out")
    return examples.take(rows)


def encode_examples(
    run: Run, tokenizer: PreTrainedTokenizerBase, examples: sst2.Examples, what: str
) -> Encoded:
    """Returns ``training``, ``validation`` or ``test`` examples as tokens.

    Raises:
      ConfigError: all training examples are too long; the template or the labels do not suit the tokenizer.
    """
    data = run.config.data
    encoded = encode(
        tokenizer,
        Prompt(data.template, data.labels),
        examples.sentences,
        examples.labels,
        max_length=data.max_length,
        too_long=data.too_long if what == "training" else "truncate",
    )
    if not len(encoded):
        raise ConfigError(f"llama.Data.max_length = {data.max_length} leaves no {what} example; raise it")
    longer = f"more than {data.max_length} tokens"
    _report(len(examples) - len(encoded), len(examples), what, f"{longer}: left out")
    _report(encoded.truncated, len(examples), what, f"{longer}: truncated")
    return encoded


def _report(count: int, of: int, what: str, message: str) -> None:
    """Prints what happened to some of the examples, if any."""
    if count:
        print(f"{count:,} of {of:,} {what} examples have {message}", file=sys.stderr)
