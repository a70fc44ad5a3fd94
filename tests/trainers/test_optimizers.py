"""Every optimizer that a configuration can name takes the steps of Keras's own, on both backends."""

import numpy as np
import pytest

STEPS = 12

# Each runs plain, and with settings that change its formula. A large epsilon shows a wrong place in the
# formula; a schedule changes the rate in every step and shows a rate that was frozen in a trace.
PLAIN = {
    name: {"optimizer": {"name": name, "learning_rate": rate}}
    for name, rate in {
        "sgd": 0.1,
        "adam": 0.01,
        "adamw": 0.01,
        "adamax": 0.01,
        "nadam": 0.01,
        "rmsprop": 0.01,
        "adagrad": 0.05,
        "adadelta": 1.0,
        "lion": 0.002,
        "adafactor": 0.05,
        "lamb": 0.01,
        "muon": 0.01,
    }.items()
}
COSINE = {"name": "cosine", "warmup_steps": 3, "final_fraction": 0.1}


def case(name, *, schedule=None, **settings):
    """The plain case of `name` with more settings."""
    optimizer = PLAIN[name]["optimizer"] | settings
    return {"optimizer": optimizer} | ({"schedule": schedule} if schedule else {})


CASES = PLAIN | {
    "sgd, momentum": case("sgd", momentum=0.9),
    "sgd, nesterov, cosine": case("sgd", momentum=0.9, nesterov=True, schedule=COSINE),
    "sgd, weight decay, clip value": case("sgd", weight_decay=0.5, clip_value=0.02),
    "rmsprop, momentum": case("rmsprop", momentum=0.9),
    "adam, epsilon, betas": case("adam", epsilon=1e-3, beta_1=0.5, beta_2=0.9),
    "adam, cosine": case("adam", schedule=COSINE),
    "adam, amsgrad": case("adam", amsgrad=True),
    "adam, weight decay": case("adam", weight_decay=0.5),
    "adam, clip norm": case("adam", clip_norm=0.05),
    "adamw, epsilon, weight decay, cosine": case("adamw", epsilon=1e-3, weight_decay=0.5, schedule=COSINE),
    "adamw, amsgrad, global clip norm, cosine": case(
        "adamw", amsgrad=True, global_clip_norm=0.1, schedule=COSINE
    ),
    "nadam, cosine": case("nadam", schedule=COSINE),
    "lion, weight decay, cosine": case("lion", weight_decay=0.5, schedule=COSINE),
    "adafactor, cosine": case("adafactor", schedule=COSINE),
    "lamb, global clip norm": case("lamb", global_clip_norm=0.1),
    "muon, weight decay": case("muon", weight_decay=0.5),
}

# SGD, Nadam and Adadelta cannot be traced in Keras's update for PyTorch and run its backend-neutral one; Adam
# and AdamW run the formula of the fused kernel. Both round differently. All others are equal to the bit.
ROUNDED = ("sgd", "nadam", "adadelta", "adam", "adamw")
EXACT = {
    "adam, amsgrad",
    "adam, weight decay",
    "adam, clip norm",
    "adamw, amsgrad, global clip norm, cosine",
} | {name for name in CASES if name.split(",")[0] not in ROUNDED}


def distance(a, b, before):
    """The difference between the weights of `a` and `b`, relative to the change of `a` (norms)."""
    ours, theirs = a.under("state/model/"), b.under("state/model/")
    assert ours.keys() == theirs.keys()
    apart = sum(np.sum((ours[n].astype(np.float64) - theirs[n]) ** 2) for n in ours)
    moved = sum(np.sum((ours[n].astype(np.float64) - before[f"before/model/{n}"]) ** 2) for n in ours)
    return (apart / moved) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_pytorch_steps_equal_an_eager_keras_optimizer(backends, name):
    ours = backends.on("torch", "train", lengths=[STEPS], model="small", **CASES[name])
    eager = backends.on("torch", "train_eagerly", steps=STEPS, model="small", **CASES[name])
    if name in EXACT:
        for key, array in eager.items():
            assert array.tobytes() == ours[key].tobytes(), key
    else:
        # The same formula in another order of operations: 1e-7 to 1e-6 per step.
        assert distance(ours, eager, ours) < 1e-5
        np.testing.assert_allclose(ours["loss"], eager["loss"], rtol=2e-6)
        for key in eager.under("state/optimizer/"):
            slot = f"state/optimizer/{key}"
            scale = np.abs(eager[slot]).max()
            # Keras's two formulas of Nadam take 1 - 0.999 in float32 and in float64, 5e-5 apart.
            np.testing.assert_allclose(ours[slot], eager[slot], rtol=0, atol=5e-5 * scale, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_both_backends_take_the_same_steps(backends, name):
    jax, torch = backends.both("train", lengths=[STEPS], model="small", **CASES[name])
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=1e-5)
    # Gradients differ by 1e-7 relative between backends. Where an update divides by the gradient's size, an
    # element near zero turns that into a larger part of its step; a constant frozen or misplaced in the
    # formula is off by 1e-2 and more.
    assert distance(jax, torch, jax) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_both_backends_have_the_same_state(backends, name):
    found = backends.both("train", lengths=[STEPS], model="small", **CASES[name])
    jax, torch = ({n: (a.shape, a.dtype) for n, a in result.under("state/").items()} for result in found)
    assert jax == torch
    assert jax["optimizer/iteration"] == ((), np.dtype(np.int32))
    assert jax["model/hidden_1/kernel"] == ((36, 8), np.dtype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_runs_fused_or_traced_on_pytorch(backends, name):
    (line,) = backends.on("torch", "train", lengths=[STEPS], model="small", **CASES[name])["lines"]
    fused = name.split(",")[0] in ("adam", "adamw") and name not in EXACT
    assert ("in PyTorch's fused kernel" in line) == fused
    assert ("traced from Keras (fused kernel not used: " in line) == (not fused)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer": {"name": "adam", "beta_1": 0.5, "epsilon": 1e-3}}, None),
        ({"optimizer": {"name": "adam"}, "policy": "mixed_bfloat16"}, None),
        ({"optimizer": {"name": "adamw", "weight_decay": 0.0}}, None),
        ({"optimizer": {"name": "adamw", "weight_decay": 0.1}}, None),
        ({"optimizer": {"name": "adam", "amsgrad": True}}, "AMSGrad"),
        ({"optimizer": {"name": "adam", "clip_norm": 1.0}}, "gradient clipping"),
        ({"optimizer": {"name": "adamw", "global_clip_norm": 1.0}}, "gradient clipping"),
        ({"optimizer": {"name": "adamw", "clip_value": 1.0}}, "gradient clipping"),
        ({"optimizer": {"name": "adam", "weight_decay": 0.1}}, "weight decay outside AdamW"),
        ({"optimizer": {"name": "adamw"}, "exclude": ["bias"]}, "weights excluded from weight decay"),
        ({"optimizer": {"name": "adamw"}, "constraint": True}, "weight constraints"),
        ({"optimizer": {"name": "adam"}, "policy": "bfloat16"}, "weights that are not float32"),
        ({"optimizer": {"name": "nadam"}}, "not Adam or AdamW"),
    ],
)
def test_the_fused_kernel_is_for_plain_adam_and_adamw(backends, settings, reason):
    (line,) = backends.on("torch", "optimizer_line", **settings)["lines"]
    assert line.endswith("fused kernel" if reason is None else f"(fused kernel not used: {reason})")


def test_an_optimizer_that_cannot_be_traced_runs_eagerly(backends):
    found = backends.on("torch", "train_untraceable", steps=4)
    # A gradient of 1 and a rate of 0.1 / t; weights near 1 are exact to 6e-8.
    np.testing.assert_allclose(-found["change"], 0.1 / np.arange(1, 5), rtol=0, atol=2e-7)
    assert "cannot be traced" in found["lines"][-1]


DECAY_AND_CLIPS = {
    "weight_decay": ("weight_decay", 0.3),
    "clip_norm": ("clipnorm", 0.3),
    "global_clip_norm": ("global_clipnorm", 0.3),
    "clip_value": ("clipvalue", 0.3),
}
BETAS = {"beta_1": ("beta_1", 0.7), "beta_2": ("beta_2", 0.8)}
EPSILON = {"epsilon": ("epsilon", 1e-3)}
RHO = {"rho": ("rho", 0.8)}
MOMENTUM = {"momentum": ("momentum", 0.6)}
AMSGRAD = {"amsgrad": ("amsgrad", True)}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sgd", MOMENTUM | {"nesterov": ("nesterov", True)}),
        ("adam", BETAS | EPSILON | AMSGRAD),
        ("adamw", BETAS | EPSILON | AMSGRAD),
        ("adamax", BETAS | EPSILON),
        ("nadam", BETAS | EPSILON),
        ("rmsprop", MOMENTUM | RHO | EPSILON),
        ("adagrad", EPSILON),
        ("adadelta", RHO | EPSILON),
        ("lion", BETAS),
        ("adafactor", {}),
        ("lamb", BETAS | EPSILON),
        ("muon", EPSILON),
    ],
)
def test_every_setting_reaches_the_keras_optimizer(backends, name, own):
    plain = backends.on("torch", "optimizer_settings", name=name, learning_rate=0.02)
    assert plain["class"].lower() == name
    assert plain["name"] == "optimizer"
    assert plain["learning_rate"] == pytest.approx(0.02, rel=1e-6)
    # Keras takes one way of clipping at a time.
    for ours, (keras, value) in (own | DECAY_AND_CLIPS).items():
        extra = {"momentum": 0.6} if ours == "nesterov" else {}
        found = backends.on("torch", "optimizer_settings", name=name, **{ours: value}, **extra)
        assert found[keras] == value
        assert plain[keras] != value
