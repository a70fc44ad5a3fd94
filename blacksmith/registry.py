"""Which experiments there are: names and strings only, so that listing them imports nothing.

An experiment of one's own is a module named with ``--plugin`` that calls `add`.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blacksmith.errors import ConfigError, closest


@dataclass(frozen=True)
class Needs:
    """What one backend of an experiment needs: an install extra, and the modules that it brings."""

    extra: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """One entry of the registry.

    Attributes:
      name: what ``Run.experiment`` says.
      summary: one line for ``--list``.
      configs: the module with the frozen `Config` dataclass; importing it loads no framework.
      entry: ``module:function``, called with the `blacksmith.run.Run`; imported once the backend is set.
      backends: what each value of ``Run.backend`` needs.
      checkpoint_format: experiments with the same format read each other's checkpoints.
      uses_keras: whether ``KERAS_BACKEND`` has to be set before it is imported.
      modes: what ``--mode`` may be.
      foreign: a file that marks a directory which evaluation and export read though no run wrote it.
    """

    name: str
    summary: str
    configs: str
    entry: str
    backends: Mapping[str, Needs]
    checkpoint_format: str
    uses_keras: bool = False
    modes: tuple[str, ...] = ("train", "eval", "export")
    foreign: str | None = None


_EXPERIMENTS: dict[str, Experiment] = {}


def add(experiment: Experiment) -> None:
    """Adds an experiment; a second one under the same name is an error."""
    if _EXPERIMENTS.get(experiment.name, experiment) != experiment:
        raise ConfigError(f"two experiments are called {experiment.name!r}; rename yours")
    _EXPERIMENTS[experiment.name] = experiment


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_EXPERIMENTS)


def get(name: str, *, where: str = "Run.experiment") -> Experiment:
    """The experiment called `name`.

    Raises:
      ConfigError: there is none; lists those there are.
    """
    if not isinstance(name, str) or name not in _EXPERIMENTS:
        hint = closest(name, _EXPERIMENTS) if isinstance(name, str) else ""
        raise ConfigError(f"{where}: no experiment {name!r}{hint}; allowed: {', '.join(names())}")
    return _EXPERIMENTS[name]


def import_module(name: str, *, what: str) -> Any:
    """Imports `name`; a module that does not exist is a ConfigError naming `what` asked for it."""
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


add(
    Experiment(
        name="keras/mnist",
        summary="MNIST MLP written once on Keras 3, on JAX or PyTorch",
        configs="blacksmith.experiments.keras.mnist.configs",
        entry="blacksmith.experiments.keras.mnist.train:main",
        backends={
            "jax": Needs("jax", ("keras", "jax")),
            "torch": Needs("torch", ("keras", "torch")),
        },
        checkpoint_format="keras-arrays-1",
        uses_keras=True,
    )
)
add(
    Experiment(
        name="lightning/mnist",
        summary="the same Keras 3 MLP inside Lightning's Trainer",
        configs="blacksmith.experiments.keras.mnist.configs",
        entry="blacksmith.experiments.lightning.mnist.train:main",
        backends={"torch": Needs("lightning", ("keras", "torch", "lightning"))},
        checkpoint_format="keras-arrays-1",
        uses_keras=True,
    )
)
add(
    Experiment(
        name="lightning/nerf",
        summary="radiance field of a Blender scene: voxel grid, or the NeRF paper's networks",
        configs="blacksmith.experiments.lightning.nerf.configs",
        entry="blacksmith.experiments.lightning.nerf.train:main",
        backends={
            "torch": Needs(
                "nerf",
                ("torch", "lightning", "PIL", "torchmetrics", "av", "scipy", "skimage", "viser"),
            )
        },
        checkpoint_format="nerf-lightning-1",
        modes=("train", "eval", "export", "view"),
    )
)
add(
    Experiment(
        name="pytorch/llama",
        summary="Llama fine-tuned on SST-2 with LoRA, each shared prompt computed once a batch",
        configs="blacksmith.experiments.pytorch.llama.configs",
        entry="blacksmith.experiments.pytorch.llama.train:main",
        backends={
            "torch": Needs("llama", ("torch", "transformers", "peft", "datasets", "accelerate", "gguf"))
        },
        checkpoint_format="llama-peft-3",
        foreign="adapter_config.json",
    )
)
