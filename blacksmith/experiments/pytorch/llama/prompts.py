"""From sentences to tokens and batches: the prompt, and which of its tokens are the answer."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError, DataError
from blacksmith.models.pytorch.llama.checks import check_embedded, one_line_errors
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch, common_prefix


@dataclass(frozen=True)
class Prompt:
    """A template that contains ``{sentence}`` and ends with ``{label}``, and the words for labels 0 and 1."""

    template: str
    labels: tuple[str, ...]

    def question(self, sentence: str) -> str:
        """Returns everything up to the answer."""
        return self.template.removesuffix("{label}").replace("{sentence}", sentence)


class Tokens(NamedTuple):
    """A prompt with an answer and the end token."""

    ids: list[int]
    answer: int  # index of the first answer token; the loss covers the tokens from there to the end


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples as tokens, each with both answers; the two do not differ before the answer."""

    examples: sst2.Examples  # those that were not left out
    correct: list[Tokens]
    incorrect: list[Tokens]
    truncated: int  # how many sentences were truncated
    begun_twice: int = 0  # how many began with two beginning tokens, of which one was dropped
    what: str = "data"  # training, validation or test, for messages

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example with the correct answer, int64 [examples]."""
        return np.array([len(ids) for ids, _ in self.correct], np.int64)

    def shared_prefix(self) -> list[int]:
        """Returns the longest prefix of all examples that ends before the token that predicts an answer."""
        shared = common_prefix([ids for ids, _ in self.correct])
        return shared[: max(0, min(answer for _, answer in self.correct) - 1)]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    examples: sst2.Examples,
    *,
    max_length: int,
    too_long: Literal["drop", "truncate"],
    rows: int | None = None,
    what: str = "data",
) -> Encoded:
    """Encodes ``training``, ``validation`` or ``test`` examples in the prompt, each with both answers.

    The first answer token is the first one that contains a character of the answer. It may begin before the
    answer: tokenizers often merge a space with the word after it. An example of more than `max_length` tokens
    with the longer answer, whatever its label, is left out, or its sentence truncated. A beginning token that
    both the template and the tokenizer put first is dropped once.

    Args:
      rows: tokens that the model has embeddings of; None: not checked.

    Raises:
      ConfigError: the prompt alone is too long, has no token before the answer, or merges with only one of
        the answers, so that their likelihoods would cover different text, or both are the same tokens.
      DataError: the tokenizer fails, or a text contains a token that the model has no embedding of.
    """
    kept_rows, pairs, truncated, begun_twice = [], [], 0, 0
    for row, pair in enumerate(_encode(tokenizer, prompt, examples.sentences)):
        if _longest(pair) > max_length:
            if too_long == "drop":
                continue
            pair = _truncate(tokenizer, prompt, examples.sentences[row], max_length)
            truncated += 1
        before = [ids[:answer] for ids, answer in pair]
        if not all(before):
            raise ConfigError("llama.Data.template needs something before {label} that predicts it")
        if before[0] != before[1]:
            seam = tokenizer.decode(max(before, key=len)[-2:])
            raise ConfigError(
                f"llama.Data.labels = {prompt.labels}: this tokenizer merges only one of them with {seam!r} "
                "before it; use labels that begin alike, or change the end of the template"
            )
        if pair[0].ids == pair[1].ids:
            raise ConfigError(
                f"llama.Data.labels = {prompt.labels}: to this tokenizer, both are the same tokens"
            )
        if rows is not None and (beyond := [i for ids, _ in pair for i in ids if i >= rows]):
            named = {tokenizer.convert_ids_to_tokens(i): i for i in beyond}
            check_embedded(named, rows, f"row {examples.numbers[row]} of the {what} examples")
        begun_twice += _begins_twice(tokenizer, pair[0].ids)
        pair = tuple(_begun_once(tokenizer, tokens) for tokens in pair)
        kept_rows.append(row)
        pairs.append(pair)
    kept = examples.take(kept_rows)
    correct = [pair[label] for pair, label in zip(pairs, kept.labels)]
    incorrect = [pair[1 - label] for pair, label in zip(pairs, kept.labels)]
    return Encoded(kept, correct, incorrect, truncated, begun_twice, what)


def _begins_twice(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    begin = tokenizer.bos_token_id
    return begin is not None and list(ids[:2]) == [begin, begin]


def _begun_once(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Tokens:
    return Tokens(tokens.ids[1:], tokens.answer - 1) if _begins_twice(tokenizer, tokens.ids) else tokens


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Mapping[str, list]:
    """Returns `input_ids` and `offset_mapping` of texts; raises DataError if the tokenizer fails."""
    with one_line_errors(f"a text with the tokenizer of {tokenizer.name_or_path or 'the model'}"):
        return tokenizer(texts, return_offsets_mapping=True)


def _longest(pair: Sequence[Tokens]) -> int:
    return max(len(ids) for ids, _ in pair)


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentences: Sequence[str]
) -> list[tuple[Tokens, ...]]:
    """Encodes sentences with each answer."""
    questions = [prompt.question(sentence) for sentence in sentences]
    found: list[list[Tokens]] = []
    for answer in prompt.labels:
        encoded = _tokenize(tokenizer, [question + answer for question in questions])
        found.append([])
        for question, ids, spans in zip(questions, encoded["input_ids"], encoded["offset_mapping"]):
            first = next((i for i, (_, end) in enumerate(spans) if end > len(question)), None)
            if first is None:
                raise DataError(
                    f"the tokenizer of {tokenizer.name_or_path} returns no token for the answer {answer!r}; "
                    "use the tokenizer that belongs to the model"
                )
            ended = ids[-1] == tokenizer.eos_token_id  # some tokenizers add it themselves
            found[-1].append(Tokens(ids if ended else [*ids, tokenizer.eos_token_id], first))
    return list(zip(*found))


def _truncate(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentence: str, max_length: int
) -> tuple[Tokens, ...]:
    """Encodes a sentence, truncated at the end of a token so that it fits, with each answer."""

    def pair(end: int) -> tuple[Tokens, ...]:
        return _encode(tokenizer, prompt, [sentence[:end].rstrip()])[0]

    (spans,) = _tokenize(tokenizer, [prompt.question(sentence)])["offset_mapping"]
    first = prompt.template.index("{sentence}")
    ends = sorted({0, *(end - first for _, end in spans if first < end < first + len(sentence))})
    # Fewer characters can give more tokens, but never many: bisection finds the longest fit to within a few.
    fitting = bisect.bisect_right(ends, max_length, key=lambda end: _longest(pair(end)))
    if not fitting:
        raise ConfigError(
            f"llama.Data.template needs {_longest(pair(0))} tokens without a sentence, more than "
            f"llama.Data.max_length = {max_length}; shorten it or raise the limit"
        )
    return pair(ends[fitting - 1])


def collate_whole(examples: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Returns input_ids and labels as transformers takes them: int64 [batch, tokens], padded on the right.

    Only the answers have labels that are not `IGNORED`.
    """
    input_ids = [torch.tensor(ids) for ids, _ in examples]
    labels = [torch.tensor([IGNORED] * answer + ids[answer:]) for ids, answer in examples]
    # Padded with token 0; nothing depends on which one it is.
    return pad_sequence(input_ids, batch_first=True), pad_sequence(labels, True, padding_value=IGNORED)


def collate(examples: Sequence[Tokens], prefix: Sequence[int]) -> Batch:
    """Returns examples that all begin with `prefix`, which may be empty, as a batch that shares it."""
    input_ids, labels = collate_whole(examples)
    # A token's target is the token after it; the last one has none.
    start = len(prefix)
    return Batch(torch.tensor(prefix, dtype=torch.int64), input_ids[:, start:-1], labels[:, start + 1 :])
