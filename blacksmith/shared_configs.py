"""The configuration sections that experiments share: run, optimiser, schedule, checkpoints, logs."""

from typing import Literal

from blacksmith.config import section, setting


@section("Run")
class RunConfig:
    """Which experiment runs, on what, from which seed."""

    experiment: str = setting(..., "the experiment's name, see --list", resume_may_change=True, min_length=1)
    backend: Literal["jax", "torch"] | None = setting(
        None, "the framework; may be left out where there is only one", resume_may_change=True
    )
    seed: int = setting(0, "everything random comes from this one number", ge=0, le=2**63 - 1)


@section("Optimizer")
class OptimizerConfig:
    """The optimiser and its settings, under the names Keras gives them."""

    name: Literal[
        "sgd",
        "adam",
        "adamw",
        "adamax",
        "nadam",
        "rmsprop",
        "adagrad",
        "adadelta",
        "lion",
        "adafactor",
        "lamb",
        "muon",
    ] = setting("adam", "the optimiser")
    learning_rate: float = setting(1e-3, "peak learning rate", gt=0)
    weight_decay: float | None = setting(
        None, "decoupled weight decay per step, times the learning rate", ge=0
    )
    momentum: float = setting(0.0, "momentum of sgd and rmsprop", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum for sgd")
    beta_1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta_2: float = setting(0.999, "decay of the second moment (lion: 0.99 is usual)", ge=0, lt=1)
    epsilon: float = setting(1e-7, "added to the denominator of adaptive optimisers", gt=0)
    amsgrad: bool = setting(False, "the AMSGrad variant of adam and adamw")
    clip_norm: float | None = setting(None, "each gradient's norm is cut to this", gt=0)
    global_clip_norm: float | None = setting(None, "the norm of all gradients together is cut to this", gt=0)
    clip_value: float | None = setting(None, "each gradient element is cut to +-this", gt=0)


@section("Schedule")
class ScheduleConfig:
    """How the learning rate moves over the optimiser steps."""

    name: Literal["constant", "linear", "cosine"] = setting("constant", "shape of the decay after warm-up")
    warmup_steps: int = setting(0, "steps over which the rate rises linearly from 0", ge=0)
    decay_steps: int | None = setting(
        None,
        "steps of the decay, warm-up excluded; None: to the end of the run",
        gt=0,
        resume_may_change=True,  # None and the number it stands for are the same; else see the experiments
    )
    final_fraction: float = setting(0.0, "the rate after the decay, as a fraction of the peak", ge=0, le=1)


@section("Checkpoint")
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int | None = setting(None, "write one every so many steps", gt=0, resume_may_change=True)
    every_epochs: int | None = setting(1, "write one every so many epochs", gt=0, resume_may_change=True)
    keep_last: int = setting(2, "how many of the newest are kept", ge=1, resume_may_change=True)
    keep_best: int = setting(1, "how many of the best by `metric` are kept", ge=0, resume_may_change=True)
    metric: str = setting(
        "val_accuracy",
        "the validation metric that says which is best: val_loss, val_accuracy, ...",
        resume_may_change=True,
        min_length=1,
    )
    mode: Literal["auto", "min", "max"] = setting(
        "auto", "whether less or more is better; auto: less for losses", resume_may_change=True
    )


@section("Log")
class LogConfig:
    """What is written about the run as it goes."""

    every_steps: int = setting(
        50,
        "training metrics are averaged over and written every so many steps",
        gt=0,
        resume_may_change=True,
    )
    tensorboard: bool = setting(True, "write TensorBoard events", resume_may_change=True)
    wandb: Literal["off", "offline", "online"] = setting(
        "off", "log to Weights & Biases", resume_may_change=True
    )
    wandb_project: str = setting("blacksmith", "the Weights & Biases project", resume_may_change=True)
    histograms_every: int | None = setting(
        None,
        "write TensorBoard histograms of weights and gradients every so many steps",
        gt=0,
        resume_may_change=True,
    )
    progress: Literal["auto", "bar", "lines", "off"] = setting(
        "auto", "progress on the console; auto: a bar on a terminal", resume_may_change=True
    )
