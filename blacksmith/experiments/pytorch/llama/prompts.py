"""From sentences to tokens: the prompt, and which of its tokens are the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from blacksmith.errors import ConfigError
from blacksmith.models.pytorch.llama.prefix import common_prefix

_SEAM = 8  # tokens by which an answer may change what stands before it


@dataclass(frozen=True)
class Prompt:
    """How a sentence is asked about.

    Attributes:
      before: what stands before the sentence.
      after: what stands between the sentence and the answer.
      labels: the answers for 0 and 1.
    """

    before: str
    after: str
    labels: tuple[str, ...]

    @classmethod
    def of(cls, template: str, labels: tuple[str, ...]) -> "Prompt":
        """The prompt of a template with ``{sentence}`` that ends with ``{label}``."""
        before, _, after = template.partition("{sentence}")
        return cls(before, after.removesuffix("{label}"), labels)

    def question(self, sentence: str) -> str:
        """Everything up to the answer."""
        return self.before + sentence + self.after


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples as tokens.

    Attributes:
      rows: their numbers in the set that they come from, int64 [examples].
      tokens: prompt, answer and end token of each.
      answers: the place of each one's first answer token; what is learnt goes from there to the end.
      truncated: how many have lost tokens of their sentence.
      dropped: how many were left out.
    """

    rows: np.ndarray
    tokens: list[list[int]]
    answers: list[int]
    truncated: int
    dropped: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def first(self, count: int) -> "Encoded":
        """The first `count` examples."""
        parts = (self.rows[:count], self.tokens[:count], self.answers[:count])
        return Encoded(*parts, self.truncated, self.dropped)

    def shared_prefix(self) -> list[int]:
        """The longest run of tokens that all begin with, short of the one that predicts an answer."""
        shared = common_prefix(self.tokens)
        return shared[: max(0, min(self.answers, default=0) - 1)]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sentences: Sequence[str],
    labels: Sequence[int],
    *,
    max_length: int,
    too_long: Literal["drop", "truncate"],
) -> Encoded:
    """Puts sentences and their answers into the prompt.

    An answer begins with the first token that holds a character of it: tokens may merge where it begins, so
    that its own tokens are not those of its text alone.

    Args:
      tokenizer: a fast one, which knows the characters of its tokens.
      prompt: how sentences are asked about.
      sentences: of the examples.
      labels: 0 or 1 for each.
      max_length: tokens that an example may have, with the longer of the two answers.
      too_long: whether an example of more is left out, or its sentence cut.

    Raises:
      ConfigError: the prompt alone is longer, or has no token before the answer.
    """
    own = _encode(tokenizer, prompt, sentences, [prompt.labels[label] for label in labels])
    # No answer has more tokens than bytes, so that the other one matters near the limit alone.
    margin = _SEAM + max(len(answer.encode()) for answer in prompt.labels)
    near = [row for row, one in enumerate(own) if len(one.tokens) > max_length - margin]
    others = _encode(
        tokenizer, prompt, [sentences[row] for row in near], [prompt.labels[1 - labels[row]] for row in near]
    )
    longest = {row: max(len(own[row].tokens), len(other.tokens)) for row, other in zip(near, others)}
    rows, tokens, starts, truncated = [], [], [], 0
    for row, (sentence, label, found) in enumerate(zip(sentences, labels, own)):
        if longest.get(row, 0) > max_length:
            if too_long == "drop":
                continue
            found = _shorten(tokenizer, prompt, sentence, found.spans, max_length)[label]
            truncated += 1
        if found.answer == 0:
            raise ConfigError("llama.Data.template needs something before {label} that predicts it")
        rows.append(row)
        tokens.append(found.tokens)
        starts.append(found.answer)
    return Encoded(np.array(rows, np.int64), tokens, starts, truncated, len(sentences) - len(tokens))


class _Example(NamedTuple):
    """Tokens with the end token, the place of the first answer token, and the characters of tokens."""

    tokens: list[int]
    answer: int
    spans: list[tuple[int, int]]


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentences: Sequence[str], answers: Sequence[str]
) -> list[_Example]:
    """Sentences in the prompt, each with its answer."""
    questions = [prompt.question(sentence) for sentence in sentences]
    if not questions:
        return []
    texts = [question + answer for question, answer in zip(questions, answers)]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, truncation=False)
    found = []
    for question, ids, spans in zip(questions, encoded["input_ids"], encoded["offset_mapping"]):
        start = next(i for i, (_, end) in enumerate(spans) if end > len(question))
        ended = ids[-1] == tokenizer.eos_token_id
        found.append(_Example(list(ids) if ended else [*ids, tokenizer.eos_token_id], start, spans))
    return found


def _shorten(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sentence: str,
    spans: Sequence[tuple[int, int]],
    max_length: int,
) -> list[_Example]:
    """A sentence cut until it fits, with each of the answers."""
    first, last = len(prompt.before), len(prompt.before) + len(sentence)
    ends = sorted({min(end, last) - first for _, end in spans if first < end})
    ends = [0, *(end for end in ends if end < len(sentence))]
    # The most that fits, by bisection: fewer characters may give more tokens, but never many.
    low, high, best = 0, len(ends), None
    while low < high:
        middle = (low + high) // 2
        cut = sentence[: ends[middle]].rstrip()
        found = _encode(tokenizer, prompt, [cut] * len(prompt.labels), prompt.labels)
        if max(len(one.tokens) for one in found) <= max_length:
            best, low = found, middle + 1
        else:
            high = middle
    if best is None:
        empty = _encode(tokenizer, prompt, [""] * len(prompt.labels), prompt.labels)
        needed = max(len(one.tokens) for one in empty)
        raise ConfigError(
            f"llama.Data.template needs {needed} tokens without a sentence, more than "
            f"llama.Data.max_length = {max_length}; shorten it or raise the limit"
        )
    return best
