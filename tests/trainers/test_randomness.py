"""Dropout masks depend on (seed, step) alone, so that a resumed run equals the uninterrupted one."""

import numpy as np
import pytest

STEPS, CUT = 20, 9
ROUTES = {
    "fused": {"name": "adam", "learning_rate": 0.01},
    "traced": {"name": "lion", "learning_rate": 0.002},
}


@pytest.mark.parametrize(("optimizer", "accumulate"), [("fused", 1), ("fused", 2), ("traced", 1)])
def test_a_resumed_run_equals_the_uninterrupted_one(backend, optimizer, accumulate):
    setup = {
        "dropout": 0.4,
        "optimizer": ROUTES[optimizer],
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "accumulate": accumulate,
    }
    whole = backend.run("train", lengths=[STEPS], **setup)
    half = backend.run("train", lengths=[CUT], **setup)
    rest = backend.run("train", lengths=[STEPS - CUT], start=CUT, load=half.path, **setup)
    assert np.concatenate([half["loss"], rest["loss"]]).tobytes() == whole["loss"].tobytes()
    for name, array in whole.under("state/").items():
        assert array.tobytes() == rest[f"state/{name}"].tobytes(), name


def test_masks_are_determined_by_seed_and_step(backend):
    # [repetition, step, layer, unit]; each repetition has its own model and backend.
    masks = backend.run("dropout_masks", steps=6, repeat=2)["masks"]
    other = backend.run("dropout_masks", steps=6, seed=1)["masks"]
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], other[0])
    # 192 units at a rate of a half: 96 kept, give or take 4 deviations of 7.
    assert 68 <= masks[0].sum() <= 124


def test_masks_change_with_every_step_and_layer(backend):
    masks = backend.run("dropout_masks", steps=6, repeat=2)["masks"][0]
    rows = [row.tobytes() for row in masks.reshape(12, 16)]
    # By chance, two of 12 masks of 16 bits are equal once in a thousand cases; the seed is fixed.
    assert len(set(rows)) == 12


def test_dropout_is_on_in_training_only(backend):
    found = backend.run("evaluate", sizes=[9], dropout=0.4)
    np.testing.assert_allclose(found["9/outputs"], found["9/expected"], rtol=1e-6, atol=1e-6)
    off = backend.run("train", lengths=[3], dropout=0.0)
    on = backend.run("train", lengths=[3], dropout=0.4)
    assert not np.isclose(off["loss"], on["loss"], rtol=1e-4).any()


def test_step_seeds_do_not_depend_on_the_block(backends):
    whole = backends.on("torch", "seeds_of_steps", seed=5, first=0, count=1000)["seeds"]
    part = backends.on("torch", "seeds_of_steps", seed=5, first=700, count=300)["seeds"]
    other = backends.on("torch", "seeds_of_steps", seed=6, first=0, count=1000)["seeds"]
    assert whole.dtype == np.uint64
    assert np.array_equal(whole[700:], part)
    assert len(set(whole) | set(other)) == 2000


# A noise layer; dropout with its own seed or noise shape; a generator that is not named as in Keras.
@pytest.mark.parametrize("kind", ["noise", "seeded", "shaped", "hidden"])
def test_a_layer_that_tracing_would_freeze_is_refused(backends, kind):
    with pytest.raises(backends.Error, match=f"ValueError: the layer '{kind}' draws from a Keras seed gen"):
        backends.on("torch", "train_random_layer", kind=kind)


def test_jax_allows_any_random_layer(backends):
    assert np.isfinite(backends.on("jax", "train_random_layer", kind="hidden")["loss"]).all()


def test_a_recurrent_layer_is_refused_only_with_dropout(backends):
    jax, torch = backends.both("train_random_layer", kind="recurrent_without")
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=1e-6)
    with pytest.raises(backends.Error, match="draws from a Keras seed generator"):
        backends.on("torch", "train_random_layer", kind="recurrent")
