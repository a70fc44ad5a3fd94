"""A shared prefix gives the loss and gradients of the ordinary padded batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from blacksmith.models.pytorch.llama.prefix import (
    IGNORED,
    Batch,
    checkpoint_layers,
    common_prefix,
    hidden_states,
    token_losses,
)

LENGTHS = (3, 9, 5, 14)
PREFIX = 11
ANSWER = 2


def make(*, lora: bool, groups: int = 2, attention: str = "sdpa", tied: bool = False, dropout: float = 0.0):
    """A small random model in training mode, with an adapter that is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=groups,
        max_position_embeddings=128,
        attn_implementation=attention,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if lora:
        adapter = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def sequences(lengths=LENGTHS, prefix=PREFIX):
    """Random tokens: the prefix, and the rest of each row."""
    random = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(5, 300, (count,), generator=random).tolist()  # noqa: E731
    return draw(prefix), [draw(length) for length in lengths]


def batch_of(prefix, rows, *, shared: bool) -> Batch:
    """The rows after a shared prefix, or with the prefix in each."""
    if not shared:
        prefix, rows = [], [[*prefix, *row] for row in rows]
    length = max(map(len, rows))
    tokens, targets = torch.zeros(len(rows), length).long(), torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        targets[i, len(row) - ANSWER - 1 : len(row) - 1] = torch.tensor(row[-ANSWER:])
    return Batch(torch.tensor(prefix, dtype=torch.int64), tokens, targets)


def transformers_loss(model, prefix, rows, width=None):
    """The loss of `LlamaForCausalLM` itself for the padded rows, with mask and labels."""
    rows = [[*prefix, *row] for row in rows]
    width = width or max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, len(row) - ANSWER : len(row)] = torch.tensor(row[-ANSWER:])
    return model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss


def gradients(model, loss):
    """Loss and gradients by name."""
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(model, expected, found):
    """Loss within 1e-6, each parameter's gradient within 1e-5 of its norm."""
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(found[1]) == sorted(trained)
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_loss_and_gradients_are_those_of_transformers(lora, attention, recomputed, shared):
    model = make(lora=lora, attention=attention)
    prefix, rows = sequences()
    expected = gradients(model, transformers_loss(model, prefix, rows))
    if recomputed:
        checkpoint_layers(model)
    found = gradients(model, token_losses(model, batch_of(prefix, rows, shared=shared)).mean())
    assert_equal(model, expected, found)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_with_any_number_of_key_value_heads(lora, groups):
    model = make(lora=lora, groups=groups)
    prefix, rows = sequences()
    expected = gradients(model, transformers_loss(model, prefix, rows, width=60))
    found = gradients(model, token_losses(model, batch_of(prefix, rows, shared=True)).mean())
    assert_equal(model, expected, found)


@pytest.mark.parametrize(
    ("lengths", "prefix"), [((4,), 11), ((3, 3, 3), 11), ((3, 40), 1), ((3, 7), 80), ((30, 3, 21, 6, 9), 2)]
)
def test_with_any_lengths(lengths, prefix):
    model = make(lora=True)
    prefix, rows = sequences(lengths, prefix)
    expected = gradients(model, transformers_loss(model, prefix, rows))
    found = gradients(model, token_losses(model, batch_of(prefix, rows, shared=True)).mean())
    assert_equal(model, expected, found)


def test_with_tied_embeddings():
    model = make(lora=False, tied=True)
    prefix, rows = sequences()
    expected = gradients(model, transformers_loss(model, prefix, rows))
    found = gradients(model, token_losses(model, batch_of(prefix, rows, shared=True)).mean())
    assert_equal(model, expected, found)


def test_parts_of_a_batch_add_up_to_its_gradient():
    model = make(lora=True)
    prefix, rows = sequences()
    expected = gradients(model, transformers_loss(model, prefix, rows))
    model.zero_grad()
    total = 0.0
    for part in (rows[:3], rows[3:]):
        loss = token_losses(model, batch_of(prefix, part, shared=True)).sum() / (ANSWER * len(rows))
        loss.backward()
        total += float(loss.detach())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(model, expected, (total, found))


def test_padding_has_no_effect():
    model = make(lora=True).eval()
    batch = batch_of(*sequences(), shared=True)
    with torch.no_grad():
        expected = token_losses(model, batch)
        tokens = batch.tokens.clone()
        for row, length in enumerate(LENGTHS):
            tokens[row, length:] = 299 - row
        assert not torch.equal(tokens, batch.tokens)
        assert torch.equal(token_losses(model, batch._replace(tokens=tokens)), expected)


def test_a_row_does_not_see_the_others():
    model = make(lora=True).eval()
    prefix, rows = sequences()
    with torch.no_grad():
        together = token_losses(model, batch_of(prefix, rows, shared=True)).view(len(rows), ANSWER)
        alone = [token_losses(model, batch_of(prefix, [row], shared=True)) for row in rows]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_every_prefix_token_has_an_effect():
    model = make(lora=False).eval()
    batch = batch_of(*sequences(), shared=True)
    with torch.no_grad():
        before = hidden_states(model, batch.prefix, batch.tokens)
        for place in range(PREFIX):
            changed = batch.prefix.clone()
            changed[place] = 4
            assert (hidden_states(model, changed, batch.tokens) - before).abs().amax() > 1e-4


def test_adapter_dropout_differs_between_rows():
    model = make(lora=True, dropout=0.5)
    prefix, (row, *_) = sequences()
    same = batch_of(prefix, [row, row], shared=True)

    def losses(seed):
        torch.manual_seed(seed)
        return token_losses(model, same).detach().view(2, ANSWER)

    assert torch.equal(losses(0), losses(0))
    assert not torch.equal(losses(0), losses(1))
    assert not torch.equal(*losses(0))


def test_recomputing_with_dropout_gives_the_same_gradient():
    prefix, rows = sequences()
    found = []
    for recomputed in (False, True):
        model = make(lora=True, dropout=0.3)
        if recomputed:
            checkpoint_layers(model)
        torch.manual_seed(7)
        found.append(gradients(model, token_losses(model, batch_of(prefix, rows, shared=True)).mean()))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-7)


def test_recomputing_stores_less():
    def kept(recomputed: bool) -> int:
        model = make(lora=True)
        if recomputed:
            checkpoint_layers(model)
        batch = batch_of(*sequences((40,) * 16, 30), shared=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            token_losses(model, batch).sum()
        return sum(sizes)

    assert kept(True) < 0.3 * kept(False)


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[1, 2, 3]], [1, 2, 3]),
        ([[1, 2, 3], [1, 2, 4]], [1, 2]),
        ([[1, 2, 3], [1, 2]], [1, 2]),
        ([[5, 1], [1, 5]], []),
        ([[1, 9, 2], [1, 3, 2], [1, 9, 2], [1, 9, 4]], [1]),
        ([[], [1]], []),
    ],
)
def test_common_prefix(sequences, expected):
    assert common_prefix(sequences) == expected
