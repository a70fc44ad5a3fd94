"""The experiments: names and strings only, so that listing them imports no framework.

A bundled experiment is the `EXPERIMENT` of its package below `blacksmith/experiments/`. Others come from
entry points of the group ``blacksmith.experiments`` or from ``--plugin`` modules that call `add`.
"""

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blacksmith.errors import ConfigError, closest, first_line, note

BUNDLED = "blacksmith.experiments"  # the package of the bundled experiments, and the group of entry points


@dataclass(frozen=True)
class Needs:
    """An install extra and the modules that it must provide."""

    extra: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """An experiment that the launcher can run."""

    name: str  # the value of ``Run.experiment``
    summary: str  # one line for ``--list``
    configs: str  # the module with the frozen `Config` dataclass; importing it loads no framework
    # ``module:function`` for each value of ``--mode``; imported once the backend is set, called with the run.
    modes: Mapping[str, str]
    backends: Mapping[str, Needs]  # what each value of ``Run.backend`` needs
    checkpoint_format: str  # experiments with the same format read each other's checkpoints
    uses_keras: bool = False  # whether ``KERAS_BACKEND`` must be set before Keras is imported
    # A file that marks a directory of weights that no run wrote, but that can be evaluated and exported.
    external_weights: str | None = None
    # The safetensors file in a checkpoint that parity compares, except its arrays ``optimizer/...``.
    weights: str | None = None


def add(experiment: Experiment) -> None:
    """Adds an experiment; raises `ConfigError` if a different one has the same name."""
    _put(_experiments(), experiment)


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_experiments())


def get(name: str, *, where: str = "Run.experiment") -> Experiment:
    """The experiment called `name`, or a `ConfigError` that lists all names."""
    experiment = _experiments().get(str(name))
    if experiment is None:
        hint = closest(str(name), names())
        allowed = f"{', '.join(names())}, and your own with --plugin=MODULE"
        raise ConfigError(f"{where}: no experiment {name!r}{hint}; allowed: {allowed}")
    return experiment


@functools.cache
def _experiments() -> dict[str, Experiment]:
    """The bundled experiments and those of entry points, to which `add` adds."""
    found: dict[str, Experiment] = {}
    package = importlib.import_module(BUNDLED)
    for framework in pkgutil.iter_modules(package.__path__, f"{BUNDLED}."):
        tasks = importlib.import_module(framework.name).__path__
        for task in pkgutil.iter_modules(tasks, f"{framework.name}."):
            _put(found, importlib.import_module(task.name).EXPERIMENT)
    for entry in importlib.metadata.entry_points(group=BUNDLED):
        try:
            _put(found, entry.load())
        except Exception as error:
            # One broken package must not disable everyone else's experiments.
            note(f"warning: entry point {entry.name} = {entry.value}: {first_line(error)}")
    return found


def _put(experiments: dict[str, Experiment], experiment: Experiment) -> None:
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{experiment!r} is not a blacksmith.registry.Experiment")
    present = experiments.setdefault(experiment.name, experiment)
    if present != experiment:
        raise ConfigError(
            f"two experiments are called {experiment.name!r}, with configurations in {present.configs} and "
            f"{experiment.configs}; rename yours"
        )


def import_module(name: str, *, what: str) -> Any:
    """Imports `name`; raises a `ConfigError` that begins with `what` if there is no such module."""
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise ConfigError(f"{what}: {name!r} is not a module name; write package.module, without .py")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{what}: no module {name!r} on the Python path ({sys.path[0] or 'current directory'})"
            ) from error
        raise
