"""PyTorch's own optimizers from a configuration: every setting reaches them, and gradients are clipped."""

import typing

import pytest

pytest.importorskip("torch")
import torch

from blacksmith.config import fields, section
from blacksmith.config.settings import TorchOptimizerConfig
from blacksmith.trainers.native_optimizers import clip_gradients, make_optimizer
from blacksmith.trainers.torch_state import set_learning_rate

NAMES = typing.get_args(fields(TorchOptimizerConfig)["name"].annotation)
BETAS, EPSILON = {"beta_1": 0.7, "beta_2": 0.8}, {"epsilon": 1e-3}
OWN = {
    "sgd": {"momentum": 0.6, "nesterov": True},
    "adam": BETAS | EPSILON | {"amsgrad": True},
    "adamw": BETAS | EPSILON | {"amsgrad": True},
    "adamax": BETAS | EPSILON,
    "nadam": BETAS | EPSILON,
    "rmsprop": {"momentum": 0.6, "rho": 0.8} | EPSILON,
    "adagrad": EPSILON,
    "adadelta": {"rho": 0.8} | EPSILON,
    "adafactor": {},
}
IN_TORCH = {"epsilon": "eps", "rho": "rho"}


def weight():
    return torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_reaches_the_optimizer(name):
    plain = make_optimizer(TorchOptimizerConfig(name=name), [weight()])
    assert type(plain).__name__.lower() == name
    own = OWN[name] | {"weight_decay": 0.3}
    (group,) = make_optimizer(
        TorchOptimizerConfig(name=name, learning_rate=0.02, **own), [weight()]
    ).param_groups
    assert group["lr"] == 0.02
    if "beta_1" in own:
        assert group["betas"] == (own.pop("beta_1"), own.pop("beta_2"))
    if name == "rmsprop":
        assert group["alpha"] == own.pop("rho")
    for setting, value in own.items():
        assert group[IN_TORCH.get(setting, setting)] == value


def test_one_beta_keeps_the_default_of_the_other():
    optimizer = make_optimizer(TorchOptimizerConfig(beta_2=0.99), [weight()])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_unset_settings_are_pytorch_s_defaults():
    ours, theirs = make_optimizer(TorchOptimizerConfig(), [weight()]), torch.optim.Adam([weight()])
    assert ours.defaults == theirs.defaults | {"fused": True}


def test_a_default_for_a_different_optimizer_is_ignored():
    @section("Optimizer", defaults={"beta_2": 0.99})
    class Adam(TorchOptimizerConfig):
        """Adam, unless set otherwise."""

    assert make_optimizer(Adam(), [weight()]).param_groups[0]["betas"] == (0.9, 0.99)
    assert make_optimizer(Adam(name="sgd"), [weight()]).param_groups[0]["momentum"] == 0


def test_groups_may_have_their_own_rates():
    groups = [{"params": [weight()], "lr": 0.5}, {"params": [weight()]}]
    optimizer = make_optimizer(TorchOptimizerConfig(learning_rate=0.1), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    set_learning_rate(optimizer, 0.05)  # what a schedule does at each step
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({}, ([3.0, 4.0], [12.0, 0.0])),
        ({"global_clip_norm": 6.5}, ([1.5, 2.0], [6.0, 0.0])),  # the norm of all is 13
        ({"clip_norm": 10.0}, ([3.0, 4.0], [10.0, 0.0])),
        ({"clip_value": 3.5}, ([3.0, 3.5], [3.5, 0.0])),
    ],
)
def test_gradients_are_clipped_and_their_norm_returned(clip, expected):
    weights = [weight(), weight()]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0, 0.0])
    norm = clip_gradients(TorchOptimizerConfig(**clip), weights)
    assert norm == 13
    for parameter, gradient in zip(weights, expected):
        # PyTorch adds 1e-6 to the norm that it divides by.
        torch.testing.assert_close(parameter.grad, torch.tensor(gradient), rtol=1e-6, atol=0)
