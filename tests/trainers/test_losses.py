"""Losses and accuracy against NumPy in double precision."""

import numpy as np

LABELS = [2, 3, 1, 2, 2, 0]
OUTPUTS = np.random.default_rng(0).normal(0, 3, (6, 4)).astype(np.float32)


def test_losses_and_accuracy_equal_numpy(backend):
    found = backend.run("per_sample", labels=LABELS, outputs=OUTPUTS.tolist())
    z = OUTPUTS.astype(np.float64)
    log_sum = np.log(np.exp(z).sum(axis=1))
    cross_entropy = log_sum - z[np.arange(6), LABELS]
    mse = ((z - np.eye(4)[LABELS]) ** 2).mean(axis=1)
    # A few float32 roundings.
    np.testing.assert_allclose(found["cross_entropy"], cross_entropy, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["mse"], mse, rtol=1e-6)
    assert found["accuracy"].tolist() == (z.argmax(axis=1) == LABELS).astype(float).tolist()
    assert 0 < found["accuracy"].sum() < 6
    assert {v.dtype for v in (found["cross_entropy"], found["mse"], found["accuracy"])} == {
        np.dtype("float32")
    }


def test_cross_entropy_is_finite_for_extreme_logits(backend):
    found = backend.run("per_sample", labels=[0, 0], outputs=[[1e4, -1e4], [-1e4, 1e4]])
    assert found["cross_entropy"].tolist() == [0.0, 2e4]


def test_training_on_mse_agrees_on_both_backends(backends):
    jax, torch = backends.both("train", lengths=[14], loss="mse")
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=1e-5)
    # An output of zeros has a loss of (1 + 0 + 0 + 0) / 4; training starts near that.
    assert jax["loss"][-7:].mean() < jax["loss"][:7].mean()
