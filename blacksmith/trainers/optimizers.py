"""Keras optimizers and learning-rate schedules from their configuration, the same on every backend."""

import re

import keras
from keras import ops

from blacksmith.config.settings import OptimizerConfig, ScheduleConfig
from blacksmith.run.schedule import decay, decay_length, decay_start

_CLASSES = {name.lower(): kind for name, kind in vars(keras.optimizers).items() if isinstance(kind, type)}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """`blacksmith.run.schedule.learning_rate` in float32, for one step or an array of steps."""

    def __init__(self, schedule: ScheduleConfig, peak: float, end: int) -> None:
        super().__init__()
        self.schedule, self.peak, self.end = schedule, peak, end

    def __call__(self, step: object) -> object:
        """The learning rate at `step`, counted from 0."""
        schedule, warmup = self.schedule, self.schedule.warmup_steps
        step = ops.cast(step, "float32")
        progress = ops.clip((step - decay_start(schedule)) / decay_length(schedule, self.end), 0.0, 1.0)
        rate = self.peak * decay(schedule.name, progress, schedule.final_fraction, ops.cos)
        if warmup:
            peak = rate if schedule.name == "exponential" else self.peak
            rate = ops.where(step < warmup, peak * (step + 1.0) / warmup, rate)
        return rate


def make_optimizer(
    config: OptimizerConfig, schedule: ScheduleConfig, total_steps: int
) -> keras.optimizers.Optimizer:
    """The configured optimizer, not yet built; a decay without a length ends after `total_steps`."""
    rate: float | Schedule = config.learning_rate
    if schedule.name != "constant" or schedule.warmup_steps:
        rate = Schedule(schedule, config.learning_rate, total_steps)
    clips = {
        "clipnorm": config.clip_norm,
        "global_clipnorm": config.global_clip_norm,
        "clipvalue": config.clip_value,
    }
    return _CLASSES[config.name](learning_rate=rate, name="optimizer", **config.own_settings(), **clips)


def named_variables(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> dict[str, keras.Variable]:
    """The optimizer's variables by backend-neutral names such as ``hidden_1_kernel_momentum``.

    The second variable of a name becomes ``name.2``. A numbered one (``variable_7``) loses its number, which
    depends on what the process created before.
    """
    named: dict[str, keras.Variable] = {}
    for variable in optimizer.variables:
        name = variable.path.removeprefix(f"{optimizer.name}/").removeprefix(f"{model.name}_")
        name = base = re.sub(r"^variable_\d+$", "variable", name)
        number = 1
        while name in named:
            number += 1
            name = f"{base}.{number}"
        named[name] = variable
    return named
