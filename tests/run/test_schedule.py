"""Learning-rate schedules of native loops, against values worked out by hand."""

import pytest

from blacksmith.config.settings import ScheduleConfig
from blacksmith.errors import ConfigError
from blacksmith.run.schedule import check_same_decay, learning_rate

# Fractions of the peak at steps 0 to 7 of 8. Linear from 1 to f over D steps: 1 - (1 - f) t / D; cosine:
# f + (1 - f) (1 + cos(pi t / D)) / 2; exponential: f ** (t / D).
RATES = [
    ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
    ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ({"name": "linear"}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ({"name": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
    ({"name": "linear", "decay_steps": 4, "final_fraction": 0.2}, [1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2]),
    ({"name": "cosine", "decay_steps": 4}, [1, 0.853553, 0.5, 0.146447, 0, 0, 0, 0]),
    (
        {"name": "cosine", "decay_steps": 2, "warmup_steps": 2, "final_fraction": 0.5},
        [0.5, 1, 1, 0.75, 0.5, 0.5, 0.5, 0.5],
    ),
    (
        {"name": "exponential", "decay_steps": 2, "final_fraction": 0.25},
        [1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
    ),
    # While warming up, the product of 1/4, 2/4, 3/4 and 4/4 with 1, 1/2, 1/4, 1/8.
    (
        {"name": "exponential", "final_fraction": 2**-8, "warmup_steps": 4},
        [0.25, 0.25, 0.1875, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125],
    ),
]


@pytest.mark.parametrize(("schedule", "expected"), RATES)
def test_the_rate_follows_the_schedule(schedule, expected):
    found = [learning_rate(ScheduleConfig(**schedule), 3.0, step, 8) for step in range(8)]
    assert found == pytest.approx([3 * rate for rate in expected], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "exponential"])
def test_a_restart_repeats_the_warm_up_and_continues_the_decay(name):
    schedule = ScheduleConfig(name=name, warmup_steps=2, final_fraction=0.5)
    plain = [learning_rate(schedule, 1.0, step, 20) for step in range(20)]
    again = [learning_rate(schedule, 1.0, step, 20, restarted_at=6) for step in range(20)]
    assert again[6] == plain[6] / 2
    assert again[7:] == plain[7:]


def test_the_exponential_rate_is_exactly_warm_up_times_decay():
    schedule = ScheduleConfig(name="exponential", warmup_steps=7, final_fraction=0.1)
    for step in range(1001):
        begun = 300 if step >= 300 else 0
        exact = min(1.0, (step - begun + 1) / 7) * 0.1 ** (step / 1000)
        assert learning_rate(schedule, 1.0, step, 1000, restarted_at=begun) == exact


def test_a_different_end_must_not_change_the_decay():
    def before(**schedule):
        default = {"name": "linear", "decay_steps": None, "warmup_steps": 2, "final_fraction": 0.0}
        return {"train": {"steps": None, "epochs": 3}, "schedule": default | schedule}

    linear = ScheduleConfig(name="linear", warmup_steps=2)
    check_same_decay(linear, before(), steps_per_epoch=4, end=12)
    check_same_decay(ScheduleConfig(name="constant"), before(name="constant"), 4, end=99)
    with pytest.raises(ConfigError, match=r"over 10 steps; .* over 18, .*set Schedule\.decay_steps = 10"):
        check_same_decay(linear, before(), steps_per_epoch=4, end=20)
    longer = ScheduleConfig(name="linear", warmup_steps=2, decay_steps=10)
    check_same_decay(longer, before(), steps_per_epoch=4, end=20)
    exponential = ScheduleConfig(name="exponential", warmup_steps=2, final_fraction=0.1, decay_steps=12)
    check_same_decay(exponential, before(), steps_per_epoch=4, end=20)
