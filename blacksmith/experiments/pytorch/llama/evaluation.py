"""How well a model predicts the labels, by their likelihood and by the text that it generates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from blacksmith.experiments.pytorch.llama.prompts import Encoded, Tokens, collate
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

    @property
    def confusion(self) -> np.ndarray:
        """Counts by true label (rows) and prediction (columns), int64 [2, 2]."""
        return np.bincount(2 * self.labels + self.predictions, minlength=4).reshape(2, 2)


@torch.no_grad()
def score(
    model: torch.nn.Module,
    encoded: Encoded,
    *,
    batch_size: int,
    shared_prefix: bool = True,
    stop: StopFlag | None = None,
) -> Scores | None:
    """Compares the likelihoods of the two answers (without end token); None if `stop` became true.

    The model, a `LlamaForCausalLM` or a PEFT model around one, is left in evaluation mode.
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
        found, true = _log_probabilities(model, batch)
        loss -= float(true.cpu().double().sum())
        count += len(true)
        incorrect = [encoded.incorrect[row] for row in rows]
        if single_token:
            # Every second target is an end token.
            other = torch.tensor([[ids[answer]] for ids, answer in incorrect], device=device)
            of_correct, of_incorrect = true[::2], found[::2].gather(1, other)[:, 0]
        else:
            of_correct = _per_row(true, batch)
            batch = collate(incorrect, prefix).to(device)
            of_incorrect = _per_row(_log_probabilities(model, batch)[1], batch)
        both = torch.stack([of_correct, of_incorrect], 1).cpu().double().numpy()
        logs[rows] = np.where(labels[rows, None] == 0, both, both[:, ::-1])
    probabilities = np.exp(logs - np.logaddexp(logs[:, 0], logs[:, 1])[:, None])
    return Scores(loss / count, probabilities, labels)


def _log_probabilities(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the targets: of all tokens [targets, vocabulary], and of the targets [targets]."""
    found = F.log_softmax(target_logits(model, batch), 1)
    targets = batch.targets[batch.targets != IGNORED]
    return found, found.gather(1, targets[:, None])[:, 0]


def _per_row(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the targets of each row except its last, the end token: float32 [batch]."""
    place = (batch.targets != IGNORED).nonzero()[:, 0]
    last = torch.cat([place[1:] != place[:-1], place.new_ones(1, dtype=torch.bool)])
    return values.new_zeros(len(batch.targets)).index_add_(0, place[~last], values[~last])


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
    device = next(model.parameters()).device
    questions = [torch.tensor(ids[:answer]) for ids, answer in examples]
    texts = [""] * len(questions)
    model.eval()
    order = np.argsort([len(question) for question in questions], kind="stable")
    for begin in range(0, len(order), batch_size):
        if stop:
            return None
        rows = order[begin : begin + batch_size]
        # Padding on the left, so that generated tokens directly follow the prompt.
        left = {"batch_first": True, "padding_side": "left"}
        tokens = pad_sequence([questions[row] for row in rows], **left)
        mask = pad_sequence([torch.ones_like(questions[row]) for row in rows], **left)
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
            pad_token_id=tokenizer.eos_token_id,
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
