"""How well a model predicts the labels, by their likelihood and by the text that it generates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from blacksmith.errors import NotFinite
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Tokens, collate
from blacksmith.models.pytorch.llama.finite import first_not_finite
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch, causal_model, target_logits
from blacksmith.run.signals import StopFlag


@dataclass(frozen=True, eq=False)
class Scores:
    """Likelihoods of the labels."""

    loss: float  # mean cross-entropy of the tokens of the correct answers, end tokens included, in nats
    probabilities: np.ndarray  # of the labels 0 and 1, summing to 1, float64 [examples, 2]
    labels: np.ndarray  # the correct ones, int32 [examples]

    @property
    def predictions(self) -> np.ndarray:
        """The more likely labels, int64 [examples]."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions."""
        return float((self.predictions == self.labels).mean())


@torch.no_grad()
def score(
    model: torch.nn.Module,
    encoded: Encoded,
    *,
    batch_size: int,
    shared_prefix: bool = True,
    stop: StopFlag | None = None,
) -> Scores | None:
    """Compares the likelihoods of the two answers; None if `stop` became true.

    An end token counts where one answer begins the other, which would always be the likelier one without it.
    The model, a `LlamaForCausalLM` or a PEFT model around one, is left in evaluation mode.

    Raises:
      NotFinite: names an example, and where the model first is not finite.
    """
    device, labels = next(model.parameters()).device, encoded.examples.labels
    prefix = encoded.shared_prefix() if shared_prefix else []
    # If all answers are one token and the end token, one row of logits gives the likelihoods of both.
    single_token = all(len(ids) == answer + 2 for ids, answer in encoded.correct + encoded.incorrect)
    logs = np.empty((len(encoded), 2))  # log-likelihoods of the labels 0 and 1
    loss, count = 0.0, 0
    model.eval()
    order = np.argsort(encoded.lengths, kind="stable")  # rows of similar length need little padding
    for rows in np.split(order, range(batch_size, len(order), batch_size)):
        if stop:
            return None
        batch = collate([encoded.correct[row] for row in rows], prefix).to(device)
        numbers = encoded.examples.numbers[rows]
        found, true = _log_probabilities(model, batch)
        _check_finite(model, batch, found, encoded.what, numbers)
        loss -= float(true.cpu().double().sum())
        count += len(true)
        incorrect = [encoded.incorrect[row] for row in rows]
        if single_token:
            # Every second target is an end token.
            other = torch.tensor([[ids[answer]] for ids, answer in incorrect], device=device)
            of_correct, of_incorrect = true[::2], found[::2].gather(1, other)[:, 0]
        else:
            ends = [_begins(encoded.correct[row], encoded.incorrect[row]) for row in rows]
            ended = torch.tensor(ends, device=device)
            of_correct = _per_row(true, batch, ended)
            batch = collate(incorrect, prefix).to(device)
            found, other = _log_probabilities(model, batch)
            _check_finite(model, batch, found, encoded.what, numbers)
            of_incorrect = _per_row(other, batch, ended)
        both = torch.stack([of_correct, of_incorrect], 1).cpu().double().numpy()
        logs[rows] = np.where(labels[rows, None] == 0, both, both[:, ::-1])
    probabilities = np.exp(logs - np.logaddexp(logs[:, 0], logs[:, 1])[:, None])
    return Scores(loss / count, probabilities, labels)


def _log_probabilities(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the targets: of all tokens [targets, vocabulary], and of the targets [targets]."""
    found = F.log_softmax(target_logits(model, batch), 1)
    targets = batch.targets[batch.targets != IGNORED]
    return found, found.gather(1, targets[:, None])[:, 0]


def _check_finite(
    model: torch.nn.Module, batch: Batch, found: Tensor, what: str, numbers: np.ndarray
) -> None:
    """Raises NotFinite if one of `found`, [targets, vocabulary], is not."""
    finite = torch.isfinite(found).all(1)
    if not finite.all():
        row = int(_rows(batch)[~finite][0])
        alone = Batch(batch.prefix, batch.tokens[row : row + 1], batch.targets[row : row + 1])
        where = first_not_finite(model, alone) or "only in a batch with others"
        raise NotFinite(
            f"row {numbers[row]} of the {what} examples: the model's output is not finite; first not finite: "
            f"{where}"
        )


def _begins(one: Tokens, other: Tokens) -> bool:
    """Whether one of two answers, without end token, begins the other."""
    short, long = sorted((one.ids[one.answer : -1], other.ids[other.answer : -1]), key=len)
    return long[: len(short)] == short


def _rows(batch: Batch) -> Tensor:
    """The row of each target, int64 [targets]."""
    return (batch.targets != IGNORED).nonzero()[:, 0]


def _per_row(values: Tensor, batch: Batch, ended: Tensor) -> Tensor:
    """Sums over the targets of each row, the last one, an end token, only where `ended`: float32 [batch]."""
    place = _rows(batch)
    last = torch.cat([place[1:] != place[:-1], place.new_ones(1, dtype=torch.bool)])
    counts = ~last | ended[place]
    return values.new_zeros(len(batch.targets)).index_add_(0, place[counts], values[counts])


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    examples: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: StopFlag | None = None,
) -> list[str] | None:
    """Returns the model's own answer to each prompt, by greedy decoding; None if `stop` became true."""
    questions = [torch.tensor(ids[:answer]) for ids, answer in examples]
    causal, end = causal_model(model), tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end)
    # The model's own settings must not change the decoding; what is not set here is taken from them.
    own, causal.generation_config = causal.generation_config, GenerationConfig()
    model.eval()
    try:
        return _generate(causal, questions, tokenizer, settings, batch_size, stop)
    finally:
        causal.generation_config = own


def _generate(
    model: LlamaForCausalLM,
    questions: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    batch_size: int,
    stop: StopFlag | None,
) -> list[str] | None:
    texts = [""] * len(questions)
    device = next(model.parameters()).device
    order = np.argsort([len(question) for question in questions], kind="stable")
    for begin in range(0, len(order), batch_size):
        if stop:
            return None
        rows = order[begin : begin + batch_size]
        # Padding on the left, so that generated tokens directly follow the prompt.
        left = {"batch_first": True, "padding_side": "left"}
        tokens = pad_sequence([questions[row] for row in rows], **left)
        mask = pad_sequence([torch.ones_like(questions[row]) for row in rows], **left)
        written = model.generate(
            input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        for row, answer in zip(rows, written[:, tokens.shape[1] :].tolist()):
            texts[row] = tokenizer.decode(answer, skip_special_tokens=True)
    return texts


def parse_answer(text: str, labels: Sequence[str]) -> int | None:
    """Returns the label whose word a generated answer starts with, ignoring case, or None."""
    text = text.strip().casefold()
    matches = [label for label, word in enumerate(labels) if text.startswith(word.strip().casefold())]
    # If one label starts with the other, the longer one is meant.
    return max(matches, key=lambda label: len(labels[label]), default=None)
