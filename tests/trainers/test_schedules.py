"""Learning-rate schedules: hand-computed values, and the rate that the weights are changed by."""

import math

import numpy as np
import pytest

PEAK, TOTAL = 0.02, 20


def by_hand(name, step, warmup=0, decay=TOTAL, final=0.0):
    """The rate at `step`, from 0, in double precision."""
    if name == "exponential":
        return PEAK * (min(1, (step + 1) / warmup) if warmup else 1) * final ** min(step / decay, 1.0)
    if step < warmup:
        return PEAK * (step + 1) / warmup
    progress = min((step - warmup) / decay, 1.0)
    left = {
        "constant": 1.0,
        "linear": 1 - (1 - final) * progress,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2,
    }[name]
    return PEAK * left


# (settings, the same for `by_hand`); without `decay_steps` a decay ends with the run.
SCHEDULES = [
    ({"name": "constant"}, {}),
    ({"name": "constant", "warmup_steps": 4}, {"warmup": 4, "decay": 16}),
    ({"name": "linear"}, {}),
    ({"name": "linear", "warmup_steps": 4, "final_fraction": 0.2}, {"warmup": 4, "decay": 16, "final": 0.2}),
    ({"name": "linear", "decay_steps": 10}, {"decay": 10}),
    ({"name": "cosine"}, {}),
    ({"name": "cosine", "warmup_steps": 5, "final_fraction": 0.1}, {"warmup": 5, "decay": 15, "final": 0.1}),
    ({"name": "cosine", "warmup_steps": 2, "decay_steps": 8}, {"warmup": 2, "decay": 8}),
    ({"name": "exponential", "final_fraction": 0.1}, {"final": 0.1}),
    ({"name": "exponential", "warmup_steps": 4, "final_fraction": 0.5}, {"warmup": 4, "final": 0.5}),
]


def test_by_hand():
    assert by_hand("linear", 5) == pytest.approx(0.75 * PEAK)
    assert by_hand("cosine", 10) == pytest.approx(0.5 * PEAK)
    assert by_hand("cosine", 0, warmup=5) == pytest.approx(0.2 * PEAK)
    assert by_hand("cosine", 30, final=0.1) == pytest.approx(0.1 * PEAK)


@pytest.mark.parametrize(("settings", "hand"), SCHEDULES)
def test_schedules_equal_hand_computed_values(backend, settings, hand):
    steps = list(range(TOTAL + 5))
    found = backend.run("rates", schedule=settings, peak=PEAK, total_steps=TOTAL, steps=steps)
    expected = [by_hand(settings["name"], step, **hand) for step in steps]
    # 1e-7 of the peak is one rounding in float32.
    np.testing.assert_allclose(found["scalar"], expected, rtol=2e-7, atol=1e-7 * PEAK)
    np.testing.assert_allclose(found["vector"], found["scalar"], rtol=2e-7, atol=1e-7 * PEAK)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd"},
        {"name": "adam"},
        {"name": "adam", "amsgrad": True},
        {"name": "adamw", "weight_decay": 0.0},
        {"name": "lion"},
    ],
    ids=["sgd", "adam", "amsgrad", "adamw", "lion"],
)
@pytest.mark.parametrize(("settings", "hand"), [SCHEDULES[1], SCHEDULES[3], SCHEDULES[6]])
def test_weights_change_at_the_rate_of_the_schedule(backends, optimizer, settings, hand):
    # If the gradient is always 1, each of these optimizers moves a weight by the rate itself, Adam only if
    # its bias correction is right. `adam` and `adamw` use PyTorch's fused kernel.
    jax, torch = backends.both(
        "constant_gradient_changes",
        steps=TOTAL,
        optimizer=optimizer | {"learning_rate": PEAK},
        schedule=settings,
        total_steps=TOTAL,
    )
    rates = [by_hand(settings["name"], step, **hand) for step in range(TOTAL)]
    for found in (jax, torch):
        # A weight below 1 is kept to 6e-8, before and after; Adam's epsilon is 3e-6 of the first gradient.
        np.testing.assert_allclose(-found["change"], rates, rtol=1e-5, atol=1.2e-7)
        assert (found["spread"] == 0).all()
