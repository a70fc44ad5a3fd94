"""Keras optimizers and learning-rate schedules from their configuration, the same on every backend."""

import re

import keras
from keras import ops

from blacksmith.config.settings import OptimizerConfig, ScheduleConfig, check_warmup
from blacksmith.run.schedule import decay, decay_length, decay_start

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
    """`blacksmith.run.schedule.learning_rate` in float32, for one step or an array of steps.

    Args:
      name: the shape, see ``Schedule.name``.
      peak: the rate after the warm-up.
      warmup_steps: optimizer steps of the warm-up, may be 0.
      decay_start: the step at which the decay starts.
      decay_steps: length of the decay.
      final_fraction: what is left of the rate after the decay.
    """

    def __init__(
        self,
        name: str,
        peak: float,
        warmup_steps: int,
        decay_start: int,
        decay_steps: int,
        final_fraction: float,
    ) -> None:
        super().__init__()
        self.name = name
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.decay_start = decay_start
        self.decay_steps = decay_steps
        self.final_fraction = final_fraction

    def __call__(self, step: object) -> object:
        """The learning rate at `step`, counted from 0."""
        step = ops.cast(step, "float32")
        progress = ops.clip((step - self.decay_start) / self.decay_steps, 0.0, 1.0)
        rate = self.peak * decay(self.name, progress, self.final_fraction, ops.cos)
        if self.warmup_steps:
            peak = rate if self.name == "exponential" else self.peak
            rate = ops.where(step < self.warmup_steps, peak * (step + 1.0) / self.warmup_steps, rate)
        return rate

    def get_config(self) -> dict:
        """What `from_config` needs."""
        names = ("name", "peak", "warmup_steps", "decay_start", "decay_steps", "final_fraction")
        return {name: getattr(self, name) for name in names}


def make_optimizer(
    config: OptimizerConfig, schedule: ScheduleConfig, total_steps: int
) -> keras.optimizers.Optimizer:
    """The optimizer that the configuration names, not yet built.

    Args:
      config: name and settings.
      schedule: the learning rate over time.
      total_steps: optimizer steps of the whole run, for a decay "to the end".

    Raises:
      ConfigError: the warm-up is longer than the run.
    """
    rate: float | Schedule = config.learning_rate
    if schedule.name != "constant" or schedule.warmup_steps:
        check_warmup(schedule, total_steps)
        rate = Schedule(
            schedule.name,
            config.learning_rate,
            schedule.warmup_steps,
            decay_start(schedule),
            decay_length(schedule, total_steps),
            schedule.final_fraction,
        )
    clips = {
        "clipnorm": config.clip_norm,
        "global_clipnorm": config.global_clip_norm,
        "clipvalue": config.clip_value,
    }
    return _CLASSES[config.name](
        learning_rate=rate, name="optimizer", **config.own_settings(), **{k: v for k, v in clips.items() if v}
    )


def named_variables(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> dict[str, keras.Variable]:
    """The optimizer's variables by backend-neutral names such as ``hidden_1_kernel_momentum``.

    The optimizer's and the model's own names are left out. If Keras gives two variables the same name, the
    second becomes ``name.2``. A variable that Keras only numbers (``variable_7``) loses the number, which
    depends on what the process created before.
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
