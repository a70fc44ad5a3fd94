"""A state written on one backend continues on the other; one that does not fit is refused."""

import numpy as np
import pytest

STEPS = 30
OPTIMIZERS = {
    "adam": {"optimizer": {"name": "adam", "learning_rate": 0.01}, "schedule": {"name": "cosine"}},
    "sgd, momentum": {"optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9}},
    "nadam": {"optimizer": {"name": "nadam", "learning_rate": 0.01}},
    "lion": {"optimizer": {"name": "lion", "learning_rate": 0.002}},
    "adafactor": {"optimizer": {"name": "adafactor", "learning_rate": 0.05}},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("first", "second"), [("jax", "torch"), ("torch", "jax")])
def test_a_run_can_switch_backends_halfway(backends, optimizer, first, second):
    setup = OPTIMIZERS[optimizer]
    half = backends.on(first, "train", lengths=[STEPS // 2], **setup)
    rest = backends.on(second, "train", lengths=[STEPS // 2], start=STEPS // 2, load=half.path, **setup)
    curve = np.concatenate([half["loss"], rest["loss"]])
    for alone in backends.both("train", lengths=[STEPS], **setup):
        # As far apart as the two backends themselves.
        np.testing.assert_allclose(curve, alone["loss"], rtol=2e-5)
        for name, array in alone.under("state/model/").items():
            np.testing.assert_allclose(rest[f"state/model/{name}"], array, rtol=0, atol=2e-5, err_msg=name)


def test_batch_norm_statistics_are_portable(backends):
    half = backends.on("jax", "train", lengths=[15], model="cnn")
    rest = backends.on("torch", "train", lengths=[15], start=15, model="cnn", load=half.path)
    alone = backends.on("jax", "train", lengths=[30], model="cnn")
    np.testing.assert_allclose(rest["loss"], alone["loss"][15:], rtol=2e-5)
    for name in ("moving_mean", "moving_variance"):
        key = f"state/model/norm_1/{name}"
        np.testing.assert_allclose(rest[key], alone[key], rtol=1e-4, atol=1e-5)


def test_a_loaded_state_is_saved_unchanged(backends):
    for first, second in (("jax", "torch"), ("torch", "jax")):
        half = backends.on(first, "train", lengths=[15], model="cnn")
        loaded = backends.on(second, "train", lengths=[1], start=15, model="cnn", load=half.path)
        for name, array in half.under("state/").items():
            assert array.tobytes() == loaded[f"before/{name}"].tobytes(), name


def test_a_state_has_no_generator(backends):
    # Generators are seeded again at each step, so a run with dropout is as portable as one without.
    plain = backends.on("torch", "train", lengths=[15], model="cnn").under("state/")
    for result in backends.both("train", lengths=[13], model="cnn", dropout=0.3):
        assert {n: a.shape for n, a in result.under("state/").items()} == {
            n: a.shape for n, a in plain.items()
        }


def test_names_of_a_state_do_not_depend_on_the_process(backend):
    # Keras numbers variables without a name, counting through the whole process.
    setup = {"lengths": [1], "model": "small", "optimizer": {"name": "nadam"}}
    first = backend.run("train", samples=48, **setup)
    second = backend.run("train", samples=40, **setup)
    assert first.under("state/").keys() == second.under("state/").keys()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"optimizer/hidden_1_kernel_momentum has the shape \(missing\) .*, \(36, 8\) in this"),
        ("foreign", r"optimizer/hidden_9_kernel_momentum has the shape \(36, 8\) .*, \(missing\) in this"),
        ("shape", r"optimizer/hidden_1_kernel_momentum has the shape \(35, 8\) .*, \(36, 8\) in this"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(backends, backend, kind, message):
    with pytest.raises(backends.Error, match=f"ValueError: {message}"):
        backend.run("load_broken_state", kind=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps .* set Task.accumulate"),
        ({"use_ema": True}, "use_ema .* not supported"),
        ({"loss_scale_factor": 2.0}, "loss_scale_factor .* not supported"),
    ],
)
def test_unsupported_settings_of_keras_optimizers_are_refused(backends, settings, message):
    with pytest.raises(backends.Error, match=f"ValueError: .*{message}"):
        backends.on("jax", "make_task_with", **settings)
