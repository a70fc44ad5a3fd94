"""Keras optimisers and learning-rate schedules from their configuration, the same on every backend."""

import math
import re

import keras
from keras import ops

from blacksmith.config.settings import OWN_SETTINGS, OptimizerConfig, ScheduleConfig
from blacksmith.errors import ConfigError

_CLASSES = {
    "sgd": keras.optimizers.SGD,
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "adamax": keras.optimizers.Adamax,
    "nadam": keras.optimizers.Nadam,
    "rmsprop": keras.optimizers.RMSprop,
    "adagrad": keras.optimizers.Adagrad,
    "adadelta": keras.optimizers.Adadelta,
    "lion": keras.optimizers.Lion,
    "adafactor": keras.optimizers.Adafactor,
    "lamb": keras.optimizers.Lamb,
    "muon": keras.optimizers.Muon,
}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then a constant, linear or cosine decay, in float32.

    Works on one step or an array of steps. With warm-up over W steps, step t < W has the rate
    ``peak * (t + 1) / W``; the decay then runs over D steps to ``peak * final_fraction``.

    Args:
      name: ``constant``, ``linear`` or ``cosine``.
      peak: the rate after warm-up.
      warmup_steps: W, may be 0.
      decay_steps: D.
      final_fraction: what is left of the rate after the decay.
    """

    def __init__(
        self, name: str, peak: float, warmup_steps: int, decay_steps: int, final_fraction: float
    ) -> None:
        super().__init__()
        self.name = name
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.final_fraction = final_fraction

    def __call__(self, step: object) -> object:
        """The learning rate at `step`, counted from 0."""
        step = ops.cast(step, "float32")
        progress = ops.clip((step - self.warmup_steps) / self.decay_steps, 0.0, 1.0)
        if self.name == "constant":
            fraction = ops.ones_like(progress)
        elif self.name == "linear":
            fraction = 1.0 - (1.0 - self.final_fraction) * progress
        else:
            half = 0.5 * (1.0 - self.final_fraction)
            fraction = self.final_fraction + half * (1.0 + ops.cos(math.pi * progress))
        rate = self.peak * fraction
        if self.warmup_steps:
            warm = self.peak * (step + 1.0) / self.warmup_steps
            rate = ops.where(step < self.warmup_steps, warm, rate)
        return rate

    def get_config(self) -> dict:
        """What `from_config` needs."""
        return {
            "name": self.name,
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "final_fraction": self.final_fraction,
        }


def make_optimizer(
    config: OptimizerConfig, schedule: ScheduleConfig, total_steps: int
) -> keras.optimizers.Optimizer:
    """The optimiser that the configuration names, not yet built.

    Args:
      config: name and settings.
      schedule: the learning rate over time.
      total_steps: optimiser steps of the whole run, for a decay "to the end".

    Raises:
      ConfigError: the warm-up is longer than the run.
    """
    rate: float | Schedule = config.learning_rate
    if schedule.name != "constant" or schedule.warmup_steps:
        decay = schedule.decay_steps or total_steps - schedule.warmup_steps
        if decay < 1:
            raise ConfigError(
                f"Schedule.warmup_steps = {schedule.warmup_steps} leaves no step of the run's "
                f"{total_steps} for what follows"
            )
        rate = Schedule(
            schedule.name,
            config.learning_rate,
            schedule.warmup_steps,
            decay,
            schedule.final_fraction,
        )
    settings = {
        "learning_rate": rate,
        "weight_decay": config.weight_decay,
        "clipnorm": config.clip_norm,
        "global_clipnorm": config.global_clip_norm,
        "clipvalue": config.clip_value,
        "name": "optimizer",
    }
    settings |= {
        name: getattr(config, name) for name, having in OWN_SETTINGS.items() if config.name in having
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    return _CLASSES[config.name](**settings)


def named_variables(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> dict[str, keras.Variable]:
    """The optimiser's variables by backend-neutral names such as ``hidden_1_kernel_momentum``.

    The optimiser's and the model's own names are left out; where Keras gives two variables one name, the
    second becomes ``name.2``. A variable that Keras numbers for want of a name (``variable_7``) loses the
    number, which depends on what the process made before.
    """
    named: dict[str, keras.Variable] = {}
    for variable in optimizer.variables:
        name = base = variable.path.removeprefix(f"{optimizer.name}/").removeprefix(f"{model.name}_")
        if re.fullmatch(r"variable_\d+", name):
            name = base = "variable"
        number = 1
        while name in named:
            number += 1
            name = f"{base}.{number}"
        named[name] = variable
    return named
