"""Initial weights: the same bytes on every backend, with the distribution of Keras's initializers."""

import numpy as np
import pytest


@pytest.mark.parametrize("model", ["mlp", "cnn", "text", "vector"])
def test_initial_weights_are_the_same_bytes_on_both_backends(backends, model):
    jax, torch = backends.both("initial_weights", model=model)
    assert jax.keys() == torch.keys()
    for name in jax:
        assert np.array_equal(jax[name], torch[name]), name
    assert jax["sha256"] == torch["sha256"]


def test_initial_weights_depend_on_the_seed(backend):
    first, other = (backend.run("initial_weights", seed=seed) for seed in (0, 1))
    kernels = [name for name in first if name.endswith("/kernel")]
    assert len(kernels) == 3
    for name in kernels:
        assert not np.isclose(first[name], other[name], atol=1e-6).any()


def test_initial_weights_depend_only_on_the_layer_name(backend):
    both = backend.run("same_shape_layers", names=["left", "right"])
    swapped = backend.run("same_shape_layers", names=["right", "left"])
    assert not np.isclose(both["left"], both["right"], atol=1e-6).any()
    assert np.array_equal(both["left"], swapped["left"])
    assert np.array_equal(both["right"], swapped["right"])


SCALINGS = [
    {
        "class_name": "VarianceScaling",
        "config": {"scale": 1.7, "mode": mode, "distribution": distribution},
    }
    for mode in ("fan_in", "fan_out", "fan_avg")
    for distribution in ("uniform", "truncated_normal", "untruncated_normal")
]
NAMED = [
    {"class_name": name, "config": {}}
    for name in ("GlorotUniform", "GlorotNormal", "HeUniform", "HeNormal", "LecunUniform", "LecunNormal")
]
PLAIN = [
    {"class_name": "RandomUniform", "config": {"minval": -0.3, "maxval": 0.1}},
    {"class_name": "RandomNormal", "config": {"mean": 0.2, "stddev": 0.5}},
    {"class_name": "TruncatedNormal", "config": {"mean": 0.2, "stddev": 0.5}},
]


@pytest.mark.parametrize("shape", [(80, 300), (3, 2, 40, 100)], ids=["dense", "conv"])
def test_initial_weights_have_the_distribution_of_keras(backends, shape):
    # 24,000 draws each: mean and deviation of a sample are off by up to 0.03 deviations, which is 4 standard
    # errors; the extremes of uniform and truncated samples are within 1% of the range.
    configs = SCALINGS + NAMED + PLAIN
    found = backends.on("jax", "initializer_samples", configs=configs, shape=shape)
    for number, config in enumerate(configs):
        ours, keras = found[f"{number}/ours"], found[f"{number}/keras"]
        assert ours.dtype == np.float32
        assert ours.shape == keras.shape == shape
        std = keras.std()
        assert abs(ours.mean() - keras.mean()) < 0.03 * std, config
        assert abs(ours.std() - std) < 0.03 * std, config
        if "untruncated" not in str(config) and config["class_name"] != "RandomNormal":
            extent = keras.max() - keras.min()
            assert abs(ours.max() - keras.max()) < 0.01 * extent, config
            assert abs(ours.min() - keras.min()) < 0.01 * extent, config


def test_separable_convolutions_are_initialized_too(backends):
    # Keras calls their initializers `depthwise_initializer` and `pointwise_initializer`.
    jax, torch = backends.both("separable_weights")
    assert {"separable/depthwise_kernel", "separable/pointwise_kernel", "depthwise/kernel"} < jax.keys()
    for name in jax:
        assert np.array_equal(jax[name], torch[name]), name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("orthogonal", "square/kernel: the initializer Orthogonal has no NumPy counterpart"),
        ("unknown", "unknown/w is random, but the layer has no w_initializer"),
        ("twins", "variables share a name.*twins/w"),
    ],
)
def test_a_weight_that_cannot_be_drawn_is_refused(backends, kind, message):
    with pytest.raises(backends.Error, match=f"ValueError: {message}"):
        backends.on("torch", "initialize_layer", kind=kind)
