"""How well a model predicts the labels, by their likelihood and by the text that it generates."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
class EvalPairs:
    """Sentences in the prompt, with the correct and with the incorrect answer."""

    labels: np.ndarray  # the correct ones, int64 [pairs]
    correct: Encoded
    incorrect: Encoded

    @classmethod
    def encode(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        sentences: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        max_length: int,
    ) -> "EvalPairs":
        """Encodes sentences with both answers; sentences that are too long are truncated.

        Raises:
          ConfigError: only one of the answers merges with the text before it, so that their likelihoods would
            cover different text.
        """
        labels = np.asarray(labels, np.int64)
        correct, incorrect = (
            encode(tokenizer, prompt, sentences, answers.tolist(), max_length=max_length, too_long="truncate")
            for answers in (labels, 1 - labels)
        )
        questions = zip(correct.tokens, correct.answers, incorrect.tokens, incorrect.answers)
        for one, start, other, other_start in questions:
            if one[:start] != other[:other_start]:
                seam = tokenizer.decode(max(one[:start], other[:other_start], key=len)[-2:])
                raise ConfigError(
                    f"llama.Data.labels = {prompt.labels}: this tokenizer merges only one of them with "
                    f"{seam!r} before it; use labels that begin alike, or change the end of the template"
                )
        return cls(labels, correct, incorrect)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def single_token(self) -> bool:
        """Whether both answers are one token, so that one row of logits gives the likelihoods of both."""
        return all(
            len(tokens) == answer + 2  # the end token follows
            for encoded in (self.correct, self.incorrect)
            for tokens, answer in zip(encoded.tokens, encoded.answers)
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """Likelihoods of the labels."""

    loss: float  # mean cross-entropy of the tokens of the correct answers, end tokens included, in nats
    probabilities: np.ndarray  # of the labels 0 and 1, summing to 1, float64 [pairs, 2]
    labels: np.ndarray  # the correct ones, int64 [pairs]

    @property
    def predictions(self) -> np.ndarray:
        """The more likely labels, int64 [pairs]."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return float((self.predictions == self.labels).mean())

    @property
    def confusion(self) -> np.ndarray:
        """Counts by true label (rows) and prediction (columns), int64 [2, 2]."""
        return np.bincount(2 * self.labels + self.predictions, minlength=4).reshape(2, 2)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    pairs: EvalPairs,
    *,
    batch_size: int,
    pad: int,
    shared_prefix: bool = True,
    stop: StopFlag | None = None,
) -> Scores | None:
    """Compares the likelihoods of the two answers (without end token), with dropout off.

    Args:
      model: a `LlamaForCausalLM`, or a PEFT model around one.
      pad: token that fills up shorter rows.
      shared_prefix: whether the common prefix of all prompts is computed once per batch.
      stop: ends the computation early, with None as the result.
    """
    device = next(model.parameters()).device
    correct, incorrect, single_token = pairs.correct, pairs.incorrect, pairs.single_token
    shared = correct.shared_prefix() if shared_prefix else []
    if shared and not single_token:
        shared = common_prefix([shared, incorrect.shared_prefix()])
    logs = np.empty((len(pairs), 2))  # log-likelihoods of the labels 0 and 1
    loss, count = 0.0, 0
    with _evaluation_mode(model):
        order = np.argsort(correct.lengths, kind="stable")  # rows of similar length need little padding
        for begin in range(0, len(order), batch_size):
            if stop:
                return None
            rows = order[begin : begin + batch_size]
            place, found, true = _log_probabilities(model, collate(correct, rows, shared, pad).to(device))
            loss -= float(true.cpu().double().sum())
            count += len(true)
            if single_token:
                # The position that predicts the correct answer also predicts the incorrect one. Every second
                # target is an end token.
                other = [incorrect.tokens[row][incorrect.answers[row]] for row in rows]
                of_correct = true[::2]
                of_incorrect = found[::2].gather(1, torch.tensor(other, device=device)[:, None])[:, 0]
            else:
                of_correct = _per_row(true, place, len(rows))
                place, _, true = _log_probabilities(model, collate(incorrect, rows, shared, pad).to(device))
                of_incorrect = _per_row(true, place, len(rows))
            both = torch.stack([of_correct, of_incorrect], 1).cpu().double().numpy()
            logs[rows] = np.where(pairs.labels[rows, None] == 0, both, both[:, ::-1])
    probabilities = np.exp(logs - np.logaddexp(logs[:, 0], logs[:, 1])[:, None])
    return Scores(loss / max(count, 1), probabilities, pairs.labels)


@contextlib.contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _log_probabilities(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the targets, log-probabilities of all tokens there [targets, vocabulary] and of the targets."""
    is_target = batch.targets != IGNORED
    found = F.log_softmax(target_logits(model, batch), 1)
    return is_target.nonzero()[:, 0], found, found.gather(1, batch.targets[is_target][:, None])[:, 0]


def _per_row(values: Tensor, place: Tensor, rows: int) -> Tensor:
    """Sums over the targets of each row except its last, the end token: float32 [rows]."""
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
    """Answers each prompt by greedy decoding, with dropout off; the encoded answers are ignored.

    Returns:
      The text of each answer; None if `stop` became true.
    """
    device = next(model.parameters()).device
    pad = padding(tokenizer)
    questions = [tokens[:answer] for tokens, answer in zip(encoded.tokens, encoded.answers)]
    texts = [""] * len(questions)
    with _evaluation_mode(model):
        order = np.argsort([len(question) for question in questions], kind="stable")
        for begin in range(0, len(order), batch_size):
            if stop:
                return None
            rows = order[begin : begin + batch_size]
            length = max(len(questions[row]) for row in rows)
            # Padding on the left, so that generated tokens directly follow the prompt.
            space = [length - len(questions[row]) for row in rows]
            tokens = torch.tensor([[pad] * n + questions[row] for n, row in zip(space, rows)])
            mask = torch.tensor([[0] * n + [1] * (length - n) for n in space])
            # A model's own generation settings must not change the decoding.
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
    return texts


def parse_answer(text: str, labels: Sequence[str]) -> int | None:
    """Returns the label whose word a generated answer starts with, ignoring case, or None."""
    text = text.strip().casefold()
    matches = [label for label, word in enumerate(labels) if text.startswith(word.strip().casefold())]
    # If one label starts with the other, the longer one is meant.
    return max(matches, key=lambda label: len(labels[label]), default=None)
