"""Blocks of steps of any length give the same numbers; ragged batches, and batches in parts."""

import numpy as np
import pytest

STEPS = 21  # three epochs of seven batches, the last of each with four samples
# A rate that changes in every step; Adam is fused on PyTorch, Lion is traced.
ROUTES = {
    "adam": {"optimizer": {"name": "adam", "learning_rate": 0.01}, "schedule": {"name": "cosine"}},
    "lion": {"optimizer": {"name": "lion", "learning_rate": 0.01}, "schedule": {"name": "cosine"}},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lengths", [[1] * STEPS, [3, 1, 5, 2, 4, 6], [16, 5]], ids=["single", "odd", "full"])
def test_block_lengths_change_no_bit(backend, route, lengths):
    whole = backend.run("train", lengths=[STEPS], dropout=0.3, **ROUTES[route])
    cut = backend.run("train", lengths=lengths, dropout=0.3, **ROUTES[route])
    for name in ("loss", "accuracy", *(n for n in whole if n.startswith("state/"))):
        assert whole[name].tobytes() == cut[name].tobytes(), name


def test_block_capacity_changes_no_bit(backend):
    wide = backend.run("train", lengths=[STEPS], block_steps=16)
    narrow = backend.run("train", lengths=[2] * 10 + [1], block_steps=2)
    for name in ("loss", *(n for n in wide if n.startswith("state/"))):
        assert wide[name].tobytes() == narrow[name].tobytes(), name


@pytest.mark.parametrize(("optimizer", "traced"), [("adam", 1), ("lion", 2)])
def test_pytorch_traces_only_in_the_first_step(backends, optimizer, traced):
    # Rates and the time left exclude the first step. No later one may trace, not even with a ragged batch.
    found = backends.on("torch", "traces", steps=9, optimizer={"name": optimizer})
    assert found["traced"] == [traced] * 9


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_ragged_batch_has_the_mean_over_its_real_samples(backend, accumulate, loss):
    found = backend.run("ragged_loss", accumulate=accumulate, loss=loss)
    assert found["weights"].tolist() == [0.25] * 4 + [0.0] * 4
    assert found["by_hand"].shape == (4,)
    # The same four numbers summed in another order: rounding.
    assert found["loss"][0] == pytest.approx(found["by_hand"].mean(), rel=1e-6)
    assert found["accuracy"][0] == pytest.approx(found["accuracy_by_hand"].mean(), rel=1e-6)


def test_accumulation_equals_the_whole_batch(backend):
    whole, parts = (
        backend.run("train", lengths=[STEPS], accumulate=n, optimizer={"name": "sgd"}) for n in (1, 4)
    )
    # Four sums of two samples instead of one sum of eight: rounding, which SGD does not amplify.
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
    for name, array in whole.under("state/model/").items():
        np.testing.assert_allclose(parts[f"state/model/{name}"], array, rtol=0, atol=1e-6, err_msg=name)
