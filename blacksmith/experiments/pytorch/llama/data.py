"""The data of the experiment, read, filtered and encoded as `llama.Data` says."""

import sys

import torch
from transformers import PreTrainedTokenizerBase

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Prompt, encode
from blacksmith.models.pytorch.llama.prefix import causal_model
from blacksmith.run.run import Run


def read_data(run: Run) -> sst2.Source:
    """Reads what `llama.Data` names; raises DataError if it is missing or broken."""
    data = run.config.data
    return sst2.read(data.source, sentence_column=data.sentence_column, label_column=data.label_column)


def encode_examples(
    run: Run,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: sst2.Examples,
    what: str,
) -> Encoded:
    """Returns ``training``, ``validation`` or ``test`` examples as tokens, without those to be left out.

    Raises:
      ConfigError: none is left; the template or the labels do not suit the tokenizer.
      DataError: the tokenizer fails, or does not suit the model.
    """
    data = run.config.data
    if what != "test":
        words = [len(sentence.split()) for sentence in examples.sentences]
        rows = [row for row, count in enumerate(words) if count >= data.min_words]
        if not rows:
            raise ConfigError(f"llama.Data.min_words = {data.min_words} leaves no {what} example; lower it")
        _report(len(words) - len(rows), len(words), what, f"fewer than {data.min_words} words: left out")
        examples = examples.take(rows)
    too_long = data.too_long if what == "training" else "truncate"
    prompt = Prompt(data.template, data.labels)
    rows = causal_model(model).config.vocab_size
    options = {"max_length": data.max_length, "too_long": too_long}
    encoded = encode(tokenizer, prompt, examples, **options, rows=rows, what=what)
    if not len(encoded):
        raise ConfigError(f"llama.Data.max_length = {data.max_length} leaves no {what} example; raise it")
    longer = f"more than {data.max_length} tokens"
    _report(len(examples) - len(encoded), len(examples), what, f"{longer}: left out")
    _report(encoded.truncated, len(examples), what, f"{longer}: truncated")
    twice = "two beginning tokens, of the template and of the tokenizer: one was dropped"
    _report(encoded.begun_twice, len(examples), what, twice)
    return encoded


def _report(count: int, of: int, what: str, message: str) -> None:
    """Prints what happened to some of the examples, if any."""
    if count:
        print(f"{count:,} of {of:,} {what} examples have {message}", file=sys.stderr)
