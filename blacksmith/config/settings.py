"""The configuration sections that experiments share: run, optimiser, schedule, checkpoints, logs."""

from collections.abc import Mapping
from typing import Any, Literal

from blacksmith.config.sections import fields, section, setting
from blacksmith.errors import ConfigError

# The settings that only some optimisers have; the configuration refuses them elsewhere.
_WITH_BETAS = ("adam", "adamw", "adamax", "nadam", "lion", "lamb")
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "beta_1": _WITH_BETAS,
    "beta_2": _WITH_BETAS,
    "rho": ("rmsprop", "adadelta"),
    "epsilon": ("adam", "adamw", "adamax", "nadam", "rmsprop", "adagrad", "adadelta", "lamb", "muon"),
    "amsgrad": ("adam", "adamw"),
}


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
        None,
        "decoupled weight decay, times the learning rate; None: Keras's default for the optimiser",
        ge=0,
    )
    momentum: float = setting(0.0, "momentum of sgd and rmsprop", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum for sgd")
    beta_1: float | None = setting(
        None, "decay of the first moment; None: Keras's default for the optimiser", ge=0, lt=1
    )
    beta_2: float | None = setting(
        None, "decay of the second moment; None: Keras's default for the optimiser", ge=0, lt=1
    )
    rho: float | None = setting(
        None, "decay of rmsprop and adadelta; None: Keras's default for the optimiser", ge=0, lt=1
    )
    epsilon: float | None = setting(
        None, "added to the denominator; None: Keras's default for the optimiser", gt=0
    )
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
        min_length=1,
    )
    mode: Literal["auto", "min", "max"] = setting(
        "auto", "whether less or more is better; auto: less for losses"
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


def check_optimizer(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
    """Refuses settings that would have no effect or contradict one another.

    Raises:
      ConfigError: the first of them.
    """
    clips = [n for n in ("clip_norm", "global_clip_norm", "clip_value") if getattr(optimizer, n) is not None]
    if len(clips) > 1:
        raise ConfigError(f"Optimizer.{' and Optimizer.'.join(clips)} are both set; choose one way to clip")
    for name, having in OWN_SETTINGS.items():
        value = getattr(optimizer, name)
        if value != fields(OptimizerConfig)[name].default and optimizer.name not in having:
            raise ConfigError(
                f"Optimizer.{name} = {value!r} has no effect on {optimizer.name}; "
                f"it belongs to {' and '.join(having)}"
            )
    if optimizer.nesterov and not optimizer.momentum:
        raise ConfigError("Optimizer.nesterov = True needs Optimizer.momentum above 0")
    if schedule.name == "constant":
        for name in ("decay_steps", "final_fraction"):
            value = getattr(schedule, name)
            if value != fields(ScheduleConfig)[name].default:
                raise ConfigError(
                    f"Schedule.{name} = {value!r} has no effect on a constant schedule; it belongs to "
                    "linear and cosine"
                )


def check_same_decay(
    schedule: ScheduleConfig, before: Mapping[str, Any], steps_per_epoch: int, end: int
) -> None:
    """A decay to the end of the run cannot be resumed towards another end: its past would change.

    Args:
      schedule: of the run.
      before: the configuration of the checkpoint that it goes on from, as a dictionary.
      steps_per_epoch: optimiser steps.
      end: the run's last step.

    Raises:
      ConfigError: the decay would have another length; names the one to set.
    """
    if schedule.name == "constant":
        return
    old_end = before["train"]["steps"] or before["train"]["epochs"] * steps_per_epoch
    old = before["schedule"]["decay_steps"] or old_end - schedule.warmup_steps
    new = schedule.decay_steps or end - schedule.warmup_steps
    if new != old:
        raise ConfigError(
            f"the schedule {schedule.name!r} decayed over {old} steps and would now over {new}; "
            f"set Schedule.decay_steps = {old}"
        )


def check_log(log: LogConfig) -> None:
    """Refuses histograms that nothing would show.

    Raises:
      ConfigError: histograms without TensorBoard and Weights & Biases.
    """
    if log.histograms_every is not None and not log.tensorboard and log.wandb == "off":
        raise ConfigError(
            f"Log.histograms_every = {log.histograms_every} has no effect without Log.tensorboard or "
            "Log.wandb"
        )
