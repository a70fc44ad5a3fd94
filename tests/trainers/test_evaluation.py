"""Evaluation of any number of samples; the weights and gradients that histograms show."""

import numpy as np
import pytest

SIZES = [1, 999, 1000, 1001, 2300]  # around the evaluation batch of 1,000


def test_evaluation_returns_one_value_per_sample(backend):
    found = backend.run("evaluate", sizes=SIZES, steps=3)
    for size in SIZES:
        outputs, labels = found[f"{size}/outputs"], found[f"{size}/labels"]
        assert outputs.shape == (size, 4)
        # Keras's own call on all samples at once; only rounding differs.
        np.testing.assert_allclose(outputs, found[f"{size}/expected"], rtol=1e-5, atol=1e-6)
        z = outputs.astype(np.float64)
        loss = np.log(np.exp(z).sum(axis=1)) - z[np.arange(size), labels]
        np.testing.assert_allclose(found[f"{size}/loss"], loss, rtol=1e-5, atol=1e-6)
        assert np.array_equal(found[f"{size}/accuracy"], outputs.argmax(axis=1) == labels)


def test_evaluation_agrees_on_both_backends(backends):
    jax, torch = backends.both("evaluate", sizes=SIZES)
    for size in SIZES:
        np.testing.assert_allclose(jax[f"{size}/loss"], torch[f"{size}/loss"], rtol=1e-5, atol=1e-6)


def test_reading_distributions_changes_nothing(backend):
    found = backend.run("distributions_between", steps=5, model="mlp", dropout=0.3)
    assert found["plain"].tobytes() == found["read"].tobytes()
    for name, array in found.under("before/").items():
        assert array.tobytes() == found[f"after/{name}"].tobytes(), name
    weights = found.under("seen/weights/")
    assert weights.keys() == found.under("seen/gradients/").keys()
    for name, array in weights.items():
        assert np.array_equal(array, found[f"before/model/{name}"]), name


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_gradients_agree_on_both_backends(backends, model):
    jax, torch = backends.both("distributions_between", steps=5, model=model)
    gradients = jax.under("seen/gradients/")
    assert len(gradients) >= 6
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            torch[f"seen/gradients/{name}"],
            gradient,
            rtol=0,
            atol=1e-4 * np.abs(gradient).max(),
            err_msg=name,
        )


def test_gradients_are_the_slopes_of_the_loss(backend):
    found = backend.run("directional_derivatives", width=1e-2, directions=5)
    # Central differences over 1e-2 err by 1e-4 from the third derivative and by 1e-5 from rounding.
    np.testing.assert_allclose(found["slopes"], found["differences"], rtol=0.01, atol=3e-4)
    assert np.abs(found["slopes"]).max() > 0.02


KERNEL = "model/hidden_1/kernel"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("inputs", "nan", "1 of 52 samples are not finite, first those of sample 3: its input is not finite"),
        (KERNEL, "nan", "52 of 52 .* sample 0: the weights hidden_1/kernel are not finite"),
        (KERNEL, "inf", "sample 0: the weights hidden_1/kernel are not finite"),
        # Finite itself, but its product with another number is not.
        (
            KERNEL,
            3e38,
            "the weights and its input are finite, but not the activations after the layer hidden_1",
        ),
    ],
)
def test_outputs_that_are_not_finite_are_refused(backend, name, value, says):
    with pytest.raises(backend.Error, match=rf"NotFinite: the outputs of .*{says}"):
        backend.run("evaluate_damaged", name=name, value=float(value))
