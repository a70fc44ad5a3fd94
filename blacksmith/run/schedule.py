"""Learning-rate schedules: one formula per shape, for native loops in float64 and for Keras in float32."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from blacksmith.config.settings import ScheduleConfig
from blacksmith.errors import ConfigError


def learning_rate(
    schedule: ScheduleConfig, peak: float, step: int, end: int, *, restarted_at: int = 0
) -> float:
    """The learning rate of optimizer step `step`, counted from 0, in a run of `end` steps.

    In a warm-up of W steps the rate is ``peak * (step + 1) / W``. A linear or cosine decay follows it. An
    exponential decay starts at step 0, so that while warming up the rate is the product of both. After a
    restart at step `restarted_at` the warm-up runs again, while the decay goes on.
    """
    warmup, since = schedule.warmup_steps, max(0, step - restarted_at + 1)
    progress = min(1.0, max(0.0, (step - decay_start(schedule)) / decay_length(schedule, end)))
    left = decay(schedule.name, progress, schedule.final_fraction)
    if not warmup or since > warmup:
        return peak * left
    # Each in its own order of operations: a run must reproduce to the bit.
    return peak * (since / warmup * left) if schedule.name == "exponential" else peak * left * since / warmup


def decay(name: str, progress: Any, final_fraction: float, cos: Callable[[Any], Any] = math.cos) -> Any:
    """The fraction of the peak rate that is left at a `progress` of the decay from 0 to 1.

    `progress` is a number or an array with arithmetic operators, and `cos` the cosine for its type.
    """
    if name == "linear":
        return 1.0 - (1.0 - final_fraction) * progress
    if name == "cosine":
        return final_fraction + 0.5 * (1.0 - final_fraction) * (1.0 + cos(math.pi * progress))
    if name == "exponential":
        return final_fraction**progress
    return 1.0


def decay_start(schedule: ScheduleConfig) -> int:
    """The optimizer step at which the decay starts."""
    return 0 if schedule.name == "exponential" else schedule.warmup_steps


def decay_length(schedule: ScheduleConfig, end: int) -> int:
    """Optimizer steps of the decay in a run of `end` steps."""
    return schedule.decay_steps or max(1, end - decay_start(schedule))


def check_same_decay(
    schedule: ScheduleConfig, before: Mapping[str, Any], steps_per_epoch: int, end: int
) -> None:
    """Raises `ConfigError` if a resumed run would not continue the decay of its checkpoint's configuration.

    A decay "to the end of the run" depends on that end: the steps already taken would have had other rates.
    """
    if schedule.name == "constant":
        return
    old_end = before["train"]["steps"] or before["train"]["epochs"] * steps_per_epoch
    old = before["schedule"]["decay_steps"] or max(1, old_end - decay_start(schedule))
    new = decay_length(schedule, end)
    if new != old:
        raise ConfigError(
            f"the learning rate of this run decays over {old} steps; with the new end, over {new}, "
            f"which changes the rates of steps already taken: set Schedule.decay_steps = {old}"
        )
