"""From sentences to tokens: the prompt, and which of its tokens are the answer."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from blacksmith.errors import ConfigError
from blacksmith.models.pytorch.llama.prefix import common_prefix


@dataclass(frozen=True)
class Prompt:
    """The text around a sentence, and the answers for the labels 0 and 1."""

    before: str
    after: str  # between the sentence and the answer
    labels: tuple[str, ...]

    @classmethod
    def of(cls, template: str, labels: tuple[str, ...]) -> "Prompt":
        """Returns the prompt of a template that contains ``{sentence}`` and ends with ``{label}``."""
        before, _, after = template.partition("{sentence}")
        return cls(before, after.removesuffix("{label}"), labels)

    def question(self, sentence: str) -> str:
        """Returns everything up to the answer."""
        return self.before + sentence + self.after


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples as tokens."""

    rows: np.ndarray  # index of each example among the sentences that were encoded, int64 [examples]
    tokens: list[list[int]]  # prompt, answer and end token of each example
    answers: list[int]  # index of each first answer token; the loss covers the tokens from there to the end
    truncated: int  # how many sentences were truncated
    dropped: int  # how many were left out

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 [examples]."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def first(self, count: int) -> "Encoded":
        """Returns the first `count` examples."""
        parts = (self.rows[:count], self.tokens[:count], self.answers[:count])
        return Encoded(*parts, self.truncated, self.dropped)

    def shared_prefix(self) -> list[int]:
        """Returns the longest prefix of all examples that ends before the token that predicts an answer."""
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
    """Encodes sentences in the prompt, each with its answer.

    The first answer token is the first one that contains a character of the answer. It may begin before the
    answer: tokenizers often merge a space with the word after it.

    Args:
      tokenizer: a fast one, which knows the characters of each token.
      max_length: maximum number of tokens, counted with the longer answer whatever the label.
      too_long: whether a longer example is left out, or its sentence truncated.

    Raises:
      ConfigError: the prompt alone is longer, or has no token before the answer.
    """
    rows, tokens, starts, truncated = [], [], [], 0
    both = [_encode(tokenizer, prompt, sentences, answer) for answer in prompt.labels]
    for row, (sentence, label, *versions) in enumerate(zip(sentences, labels, *both)):
        if _longest(versions) > max_length:
            if too_long == "drop":
                continue
            versions = _truncate(tokenizer, prompt, sentence, label, max_length)
            truncated += 1
        if versions[label][1] == 0:
            raise ConfigError("llama.Data.template needs something before {label} that predicts it")
        rows.append(row)
        tokens.append(versions[label][0])
        starts.append(versions[label][1])
    return Encoded(np.array(rows, np.int64), tokens, starts, truncated, len(sentences) - len(tokens))


# A sentence with one of the answers: its tokens with the end token, and the index of the first answer token.
_Version = tuple[list[int], int]


def _longest(versions: Sequence[_Version]) -> int:
    return max(len(tokens) for tokens, _ in versions)


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentences: Sequence[str], answer: str
) -> list[_Version]:
    """Encodes sentences that all have the same answer."""
    if not sentences:
        return []
    questions = [prompt.question(sentence) for sentence in sentences]
    texts = [question + answer for question in questions]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, truncation=False)
    versions = []
    for question, ids, spans in zip(questions, encoded["input_ids"], encoded["offset_mapping"]):
        first = next(i for i, (_, end) in enumerate(spans) if end > len(question))
        ended = ids[-1] == tokenizer.eos_token_id  # some tokenizers add it themselves
        versions.append((ids if ended else [*ids, tokenizer.eos_token_id], first))
    return versions


def _truncate(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sentence: str, label: int, max_length: int
) -> list[_Version]:
    """Encodes a sentence, truncated at the end of a token so that it fits, with each answer."""

    def versions(end: int) -> list[_Version]:
        cut = sentence[:end].rstrip()
        return [_encode(tokenizer, prompt, [cut], answer)[0] for answer in prompt.labels]

    text = prompt.question(sentence) + prompt.labels[label]
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    first, last = len(prompt.before), len(prompt.before) + len(sentence)
    ends = sorted({0, *(min(end, last) - first for _, end in spans if first < end)} - {len(sentence)})
    # Fewer characters can give more tokens, but never many: bisection finds the longest fit to within a few.
    fitting = bisect.bisect_right(ends, max_length, key=lambda end: _longest(versions(end)))
    if not fitting:
        raise ConfigError(
            f"llama.Data.template needs {_longest(versions(0))} tokens without a sentence, more than "
            f"llama.Data.max_length = {max_length}; shorten it or raise the limit"
        )
    return versions(ends[fitting - 1])
