"""Which experiments there are: names and strings only, so that listing them imports no framework.

A shipped experiment is the `EXPERIMENT` of its package below `blacksmith/experiments/`. Any other is an entry
point of the group ``blacksmith.experiments``, or a ``--plugin`` module calls `add`.
"""

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blacksmith.errors import ConfigError, closest, first_line

SHIPPED = "blacksmith.experiments"
"""The package of the shipped experiments, and the group of entry points."""


@dataclass(frozen=True)
class Needs:
    """What one backend of an experiment needs: an install extra, and the modules that it installs."""

    extra: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """One entry of the registry.

    Attributes:
      name: the value of ``Run.experiment``.
      summary: one line for ``--list``.
      configs: the module with the frozen `Config` dataclass; importing it loads no framework.
      modes: for each value of ``--mode`` a ``module:function``, imported once the backend is set and called
        with the `blacksmith.run.run.Run`.
      backends: what each value of ``Run.backend`` needs.
      checkpoint_format: experiments with the same format read each other's checkpoints.
      uses_keras: whether ``KERAS_BACKEND`` must be set before Keras is imported.
      external_weights: the name of a file that marks a directory of weights that no run wrote, which can be
        evaluated and exported; None if there is no such format.
      weights: the safetensors file of a checkpoint that holds the weights, and maybe ``optimizer/...``; the
        parity command compares them. None: runs cannot be compared.
    """

    name: str
    summary: str
    configs: str
    modes: Mapping[str, str]
    backends: Mapping[str, Needs]
    checkpoint_format: str
    uses_keras: bool = False
    external_weights: str | None = None
    weights: str | None = None


_ADDED: dict[str, Experiment] = {}


def add(experiment: Experiment) -> None:
    """Adds an experiment.

    Raises:
      ConfigError: there is a different one with the same name.
    """
    _put(_ADDED, experiment, _declared())


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted({**_declared(), **_ADDED})


def get(name: str, *, where: str = "Run.experiment") -> Experiment:
    """The experiment called `name`.

    Raises:
      ConfigError: there is no such experiment; lists all names.
    """
    experiments = {**_declared(), **_ADDED}
    if not isinstance(name, str) or name not in experiments:
        hint = closest(name, experiments) if isinstance(name, str) else ""
        raise ConfigError(f"{where}: no experiment {name!r}{hint}; allowed: {', '.join(names())}")
    return experiments[name]


@functools.cache
def _declared() -> Mapping[str, Experiment]:
    """The shipped experiments and those of entry points."""
    found: dict[str, Experiment] = {}
    package = importlib.import_module(SHIPPED)
    for framework in pkgutil.iter_modules(package.__path__, f"{SHIPPED}."):
        for task in pkgutil.iter_modules(
            importlib.import_module(framework.name).__path__, f"{framework.name}."
        ):
            _put(found, importlib.import_module(task.name).EXPERIMENT)
    for entry in importlib.metadata.entry_points(group=SHIPPED):
        try:
            experiment = entry.load()
        except Exception as error:
            # One broken package must not stop the experiments of all others.
            print(f"warning: entry point {entry.name} = {entry.value}: {first_line(error)}", file=sys.stderr)
            continue
        _put(found, experiment)
    return found


def _put(
    into: dict[str, Experiment], experiment: Experiment, others: Mapping[str, Experiment] | None = None
) -> None:
    present = {**(others or {}), **into}.get(experiment.name, experiment)
    if present != experiment:
        raise ConfigError(
            f"two experiments are called {experiment.name!r}, with configurations in {present.configs} and "
            f"{experiment.configs}; rename yours"
        )
    into[experiment.name] = experiment


def import_module(name: str, *, what: str) -> Any:
    """Imports `name`.

    Raises:
      ConfigError: it is not a module's name, or there is no such module; says that `what` needs it.
    """
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise ConfigError(f"{what}: {name!r} is not a module's name; write package.module, without .py")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{what}: no module {name!r} on the Python path ({sys.path[0] or 'current directory'})"
            ) from error
        raise
