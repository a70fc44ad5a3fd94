"""The trainer is for any Keras model: other inputs, other layers, losses that the model adds."""

import numpy as np
import pytest

# The two backends order float32 sums differently: single losses differ by 1e-7 to 1e-6 relative, which grows
# over 30 steps of training. A wrong gradient or a missing state is off by 1e-2 and more.
TOLERANCE = 2e-5
STEPS = 30


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("mlp", "adam"), ("cnn", "adam"), ("cnn", "sgd"), ("text", "adam"), ("vector", "adam")],
)
def test_any_model_trains_alike_on_both_backends(backends, model, optimizer):
    settings = {"name": optimizer, "learning_rate": {"sgd": 0.1, "adam": 0.01}[optimizer]}
    jax, torch = backends.both("train", lengths=[STEPS], model=model, optimizer=settings)
    assert jax["loss"].shape == torch["loss"].shape == (STEPS,)
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=TOLERANCE)
    assert np.mean(jax["loss"][-7:]) < np.mean(jax["loss"][:7])
    moved, apart = _distances(jax, torch)
    assert apart < 1e-4 * moved


def _distances(a, b):
    """Norms of the changes of the weights of `a` in training, and of their differences to those of `b`."""
    names = [name for name in a if name.startswith("state/model/")]
    start = [a[name.replace("state/", "before/")] for name in names]
    moved = sum(np.sum((a[n] - s) ** 2) for n, s in zip(names, start))
    apart = sum(np.sum((a[n] - b[n]) ** 2) for n in names)
    return float(moved) ** 0.5, float(apart) ** 0.5


def test_labels_may_be_fractions(backends):
    jax, torch = backends.both("train", lengths=[5], model="vector", loss="regression")
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_moving_statistics_are_part_of_the_state(backend, dropout):
    run = backend.run("train", lengths=[STEPS], model="cnn", dropout=dropout)
    for name, initial in (("moving_mean", 0.0), ("moving_variance", 1.0)):
        before, after = run[f"before/model/norm_1/{name}"], run[f"state/model/norm_1/{name}"]
        assert np.array_equal(before, np.full_like(before, initial))
        assert not np.isclose(before, after, atol=1e-3).any()


def test_moving_statistics_resume_bit_for_bit(backend):
    whole = backend.run("train", lengths=[STEPS], model="cnn", dropout=0.3)
    half = backend.run("train", lengths=[13], model="cnn", dropout=0.3)
    rest = backend.run("train", lengths=[STEPS - 13], start=13, model="cnn", dropout=0.3, load=half.path)
    for name, array in whole.under("state/").items():
        assert array.tobytes() == rest[f"state/{name}"].tobytes(), name


def test_evaluation_uses_the_moving_statistics(backend):
    # Keras's own eager call is the reference; 1e-5 is float32 rounding over a convolution.
    found = backend.run("evaluate", sizes=[9], steps=5, model="cnn", dropout=0.3)
    np.testing.assert_allclose(found["9/outputs"], found["9/expected"], rtol=1e-5, atol=1e-5)


def test_added_losses_are_trained_on(backend):
    # `vector` has an L2 regularizer of 0.1 on one kernel and an activity regularizer of 0.05, which Keras
    # divides by the batch size. The first loss is that of the initial weights.
    run = backend.run("train", lengths=[1], model="vector")
    plain = backend.run("first_loss_by_hand", model="vector")
    assert run["loss"][0] == pytest.approx(plain["loss"] + plain["added"], rel=1e-6)
    assert plain["added"] > 0.1 * plain["loss"]


def test_added_losses_count_once_with_accumulation(backend):
    whole, parts = (backend.run("train", lengths=[14], model="vector", accumulate=n) for n in (1, 4))
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
