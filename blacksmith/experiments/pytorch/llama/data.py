"""The data of the experiment, read, filtered and encoded as `llama.Data` says."""

import sys

import numpy as np
from transformers import PreTrainedTokenizerBase

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama.evaluation import EvalPairs
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
    report(len(examples) - len(rows), len(examples), what, f"fewer than {fewest} words: left out")
    return examples.take(rows)


def encode_training(
    run: Run, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, examples: sst2.Examples
) -> Encoded:
    """Returns the training examples as tokens; raises ConfigError if all are too long."""
    length, too_long = run.config.data.max_length, run.config.data.too_long
    labels = examples.labels.tolist()
    encoded = encode(tokenizer, prompt, examples.sentences, labels, max_length=length, too_long=too_long)
    report(encoded.dropped, len(examples), "training", f"more than {length} tokens: left out")
    report(encoded.truncated, len(examples), "training", f"more than {length} tokens: truncated")
    if not len(encoded):
        raise ConfigError(f"llama.Data.max_length = {length} leaves no training example; raise it")
    return encoded


def encode_eval(
    run: Run, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, examples: sst2.Examples, what: str
) -> EvalPairs:
    """Returns examples with both answers as tokens."""
    length = run.config.data.max_length
    pairs = EvalPairs.encode(tokenizer, prompt, examples.sentences, examples.labels, length)
    report(pairs.correct.truncated, len(examples), what, f"more than {length} tokens: truncated")
    return pairs


def report(count: int, of: int, what: str, message: str) -> None:
    """Prints what happened to some of the examples, if any."""
    if count:
        print(f"{count:,} of {of:,} {what} examples have {message}", file=sys.stderr)
