"""Conditions: the other settings that a setting needs to have an effect, see `only_with` of `setting`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Is:
    """A condition on a setting that is not equality, for example ``Is("above 0", lambda x: x > 0)``."""

    words: str
    test: Callable[[Any], bool]


NOT_NONE = Is("not None", lambda value: value is not None)
POSITIVE = Is("above 0", lambda value: value > 0)

# {"Section.field": a value, a tuple of values or `Is`}: all must hold. A tuple of such mappings: any.
Conditions = Mapping[str, Any] | tuple[Mapping[str, Any], ...]


def hold(only_with: Conditions, values: Mapping[str, Any]) -> bool:
    """Whether the conditions hold for the settings `values`, by ``Section.field``."""
    return any(all(_as_is(w).test(values[k]) for k, w in each.items()) for each in _alternatives(only_with))


def in_words(only_with: Conditions) -> str:
    """The conditions in words: ``Optimizer.name is 'sgd' or 'rmsprop'``."""
    return " or ".join(
        " and ".join(f"{key} is {_as_is(wanted).words}" for key, wanted in each.items())
        for each in _alternatives(only_with)
    )


def _alternatives(only_with: Conditions) -> tuple[Mapping[str, Any], ...]:
    return only_with if isinstance(only_with, tuple) else (only_with,)


def _as_is(wanted: Any) -> Is:
    if isinstance(wanted, Is):
        return wanted
    values = wanted if isinstance(wanted, tuple) else (wanted,)
    quoted = [repr(value) for value in values]
    words = f"one of {', '.join(quoted)}" if len(values) > 2 else " or ".join(quoted)
    return Is(words, lambda value: value in values)
