"""How well a model tells the labels: by their likelihood, and by what it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama.batches import collate, padding
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Prompt, encode
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch, causal_model, common_prefix, target_logits
from blacksmith.run.signals import StopFlag


@dataclass(frozen=True, eq=False)
class Questions:
    """Sentences with both answers in the prompt.

    Attributes:
      sentences: one for each question.
      labels: the true ones, int64 [questions].
      right: the sentences with their true answers.
      wrong: with the other answer.
    """

    sentences: Sequence[str]
    labels: np.ndarray
    right: Encoded
    wrong: Encoded

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        sentences: Sequence[str],
        labels: np.ndarray,
        max_length: int,
    ) -> "Questions":
        """Encodes sentences with both answers; those too long lose tokens of their sentence.

        Raises:
          ConfigError: the answers merge differently with what stands before them, so that they answer
            different questions.
        """
        labels = np.asarray(labels, np.int64)
        options: dict[str, Any] = {"max_length": max_length, "too_long": "truncate"}
        right = encode(tokenizer, prompt, sentences, labels.tolist(), **options)
        wrong = encode(tokenizer, prompt, sentences, (1 - labels).tolist(), **options)
        for one, a, other, b in zip(right.tokens, right.answers, wrong.tokens, wrong.answers):
            if one[:a] != other[:b]:
                seam = tokenizer.decode(max(one[:a], other[:b], key=len)[-2:])
                raise ConfigError(
                    f"llama.Data.labels = {prompt.labels}: this tokenizer merges only one of them with "
                    f"{seam!r} before it; let both begin alike, or change what llama.Data.template has there"
                )
        return cls(sentences, labels, right, wrong)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def single(self) -> bool:
        """Whether both answers are one token after the same question, so that one row tells both."""
        pairs = zip(self.right.tokens, self.right.answers, self.wrong.tokens, self.wrong.answers)
        return all(
            a == b and right[:a] == wrong[:b] and len(right) == len(wrong) == a + 2
            for right, a, wrong, b in pairs
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model makes of questions.

    Attributes:
      loss: mean cross-entropy of the answers' tokens, the end token too, in nats.
      probabilities: of the labels 0 and 1, which add up to 1: float64 [questions, 2].
      labels: the true ones, int64 [questions].
    """

    loss: float
    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """The likelier labels, int64 [questions]."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The share of true labels among the predictions."""
        return float((self.predictions == self.labels).mean())

    @property
    def confusion(self) -> np.ndarray:
        """Counts by true label (rows) and prediction (columns), int64 [2, 2]."""
        counts = np.zeros((2, 2), np.int64)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts


@torch.no_grad()
def score(
    model: torch.nn.Module,
    questions: Questions,
    *,
    batch_size: int,
    pad: int,
    shared_prefix: bool = True,
    stop: StopFlag | None = None,
) -> Scores | None:
    """Scores questions by the likelihood of the labels' tokens (end token left out), without dropout.

    Args:
      model: a `LlamaForCausalLM`, or a PEFT model around one; is in evaluation mode meanwhile.
      questions: what is asked.
      batch_size: questions at a time.
      pad: the token that fills up shorter rows.
      shared_prefix: compute what all begin with once a batch.
      stop: once true, the scoring ends.

    Returns:
      The scores; None when stopped before the last question.
    """
    device = next(model.parameters()).device
    right, wrong, single = questions.right, questions.wrong, questions.single
    shared = right.shared_prefix() if shared_prefix else []
    if shared and not single:
        shared = common_prefix([shared, wrong.shared_prefix()])
    logs = np.empty((len(questions), 2))
    loss, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        order = np.argsort(right.lengths, kind="stable")
        for begin in range(0, len(order), batch_size):
            if stop:
                return None
            rows = order[begin : begin + batch_size]
            labels = torch.from_numpy(questions.labels[rows]).to(device)
            batch = collate(right, rows, shared, pad).to(device)
            place, found = _log_probabilities(model, batch)
            true = _picked(found, batch)
            loss -= float(true.cpu().double().sum())
            count += len(true)
            if single:
                first = torch.tensor([wrong.tokens[row][wrong.answers[row]] for row in rows], device=device)
                starts = torch.cat([place.new_ones(1, dtype=torch.bool), place[1:] != place[:-1]])
                of_right = true[starts]
                of_wrong = found[starts].gather(1, first[:, None])[:, 0]
            else:
                of_right = _per_row(true, place, len(rows))
                batch = collate(wrong, rows, shared, pad).to(device)
                place, found = _log_probabilities(model, batch)
                of_wrong = _per_row(_picked(found, batch), place, len(rows))
            both = torch.stack([of_right, of_wrong], 1)
            both = torch.where(labels[:, None] == 0, both, both.flip(1))
            logs[rows] = both.cpu().double().numpy()
    finally:
        model.train(training)
    probabilities = np.exp(logs - np.logaddexp(logs[:, 0], logs[:, 1])[:, None])
    return Scores(loss / max(count, 1), probabilities, questions.labels)


def _log_probabilities(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows of the learnt places, int64 [places], and log-probabilities, float32 [places, vocabulary]."""
    return (batch.targets != IGNORED).nonzero()[:, 0], F.log_softmax(target_logits(model, batch), 1)


def _picked(found: Tensor, batch: Batch) -> Tensor:
    """The targets' log-probabilities, float32 [places]."""
    return found.gather(1, batch.targets[batch.targets != IGNORED][:, None])[:, 0]


def _per_row(values: Tensor, place: Tensor, rows: int) -> Tensor:
    """Sums over each row's places but the last, which is the end token's: float32 [rows]."""
    last = torch.cat([place[1:] != place[:-1], place.new_ones(1, dtype=torch.bool)])
    return values.new_zeros(rows).index_add_(0, place[~last], values[~last])


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: StopFlag | None = None,
) -> list[str] | None:
    """Answers of the greedy kind to some questions, as text; None when stopped before the last.

    Args:
      model: a `LlamaForCausalLM`, or a PEFT model around one; is in evaluation mode meanwhile.
      encoded: the questions, whose answers are not looked at.
      tokenizer: turns tokens into text.
      batch_size: questions at a time.
      max_new_tokens: the most tokens of an answer.
      stop: once true, no more are asked.
    """
    device = next(model.parameters()).device
    pad = padding(tokenizer)
    asked = [tokens[:answer] for tokens, answer in zip(encoded.tokens, encoded.answers)]
    texts = [""] * len(asked)
    training = model.training
    model.eval()
    try:
        order = np.argsort([len(tokens) for tokens in asked], kind="stable")
        for begin in range(0, len(order), batch_size):
            if stop:
                return None
            rows = order[begin : begin + batch_size]
            length = max(len(asked[row]) for row in rows)
            # On the left: generated tokens come right after the question.
            tokens = torch.tensor([[pad] * (length - len(asked[row])) + asked[row] for row in rows])
            mask = torch.tensor([[0] * (length - len(asked[row])) + [1] * len(asked[row]) for row in rows])
            written = causal_model(model).generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad,
            )
            for row, answer in zip(rows, written[:, length:].tolist()):
                texts[row] = tokenizer.decode(answer, skip_special_tokens=True)
    finally:
        model.train(training)
    return texts


def parse_answer(text: str, labels: Sequence[str]) -> int | None:
    """The label that a generated answer begins with, whatever its case; None if it is neither."""
    text = text.strip().casefold()
    matches = [label for label, word in enumerate(labels) if text.startswith(word.strip().casefold())]
    # Of two words that begin alike the longer one is meant.
    return max(matches, key=lambda label: len(labels[label]), default=None)
