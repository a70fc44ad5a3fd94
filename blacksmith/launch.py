"""The launcher: reads flags and configuration, opens a run directory and starts the experiment.

``python -m blacksmith.launch --gin_file=gin/mnist_jax.gin``. Exit status: 0 done, 1 crash, 2 bad usage or
configuration, 3 bad data or checkpoint, 75 stopped by a signal and resumable. No framework is imported before
the configuration has been validated.
"""

if __name__ == "__main__":
    # Before the other imports, which take a second.
    from blacksmith.run.signals import stop_at_once

    stop_at_once()

import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from blacksmith import config as configuration
from blacksmith import registry
from blacksmith.errors import CheckpointError, ConfigError, note, one_line_errors

MODES = ("train", "eval", "export", "view")


def define_flags() -> flags.FlagValues:
    """The launcher's flags, apart from absl's global ones."""
    values = flags.FlagValues()
    mine = {"flag_values": values}
    flags.DEFINE_multi_string(
        "gin_file", [], "A Gin file, by path or bundled name; repeatable, later files override.", **mine
    )
    flags.DEFINE_multi_string(
        "gin_param", [], "A binding that overrides the files, 'mnist.Train.epochs = 3'; repeatable.", **mine
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "The run directory, default runs/<gin file>/<time>; resumed if it has checkpoints.",
        **mine,
    )
    flags.DEFINE_enum("mode", "train", MODES, "What to do. Not every experiment can be viewed.", **mine)
    flags.DEFINE_string(
        "resume",
        "auto",
        "auto: resume from the newest checkpoint in --workdir, if any; never: refuse a directory with "
        "checkpoints; a path: start a new directory from that checkpoint or run. Some experiments "
        "can also evaluate and export a directory of weights that no run wrote.",
        **mine,
    )
    flags.DEFINE_string("device", "auto", "auto, cpu, gpu, tpu, or a JAX platform or torch device.", **mine)
    flags.DEFINE_bool("dry_run", False, "Print the resolved configuration and exit.", **mine)
    flags.DEFINE_bool("list", False, "List the experiments and exit.", **mine)
    flags.DEFINE_bool("allow_imports", False, "Let Gin files import Python modules, which runs them.", **mine)
    flags.DEFINE_multi_string("plugin", [], "A Python module that registers experiments; repeatable.", **mine)
    return values


def parse_flags(values: flags.FlagValues, argv: Sequence[str], usage: str) -> bool:
    """Parses `argv` into `values`; returns False if it printed help instead. Mistakes raise `ConfigError`."""
    for name in ("help", "helpfull", "helpshort"):
        flags.DEFINE_bool(name, False, "Show this help.", flag_values=values)
    try:
        rest = values(list(argv))
    except (flags.Error, ValueError) as error:
        raise ConfigError(f"{' '.join(str(error).split())} (see --helpfull)") from error
    if values.help or values.helpfull or values.helpshort:
        print(usage.strip() + "\n\nflags:\n" + values.get_help())
        return False
    if len(rest) > 1:
        raise ConfigError(
            f"{rest[1]!r} is not a flag; Gin files are given as --gin_file={rest[1]} (see --helpfull)"
        )
    return True


def import_plugins(names: Sequence[str]) -> None:
    """Imports modules that register experiments, also from the current directory."""
    for name in names:
        if "" not in sys.path:
            sys.path.insert(0, "")
        registry.import_module(name, what=f"--plugin={name}")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A validated configuration with its experiment and backend."""

    experiment: registry.Experiment
    backend: str
    config: Any
    bindings: list[configuration.Binding]


def resolve(gin_files: Sequence[str], gin_params: Sequence[str], *, allow_imports: bool = False) -> Resolved:
    """Reads and validates a configuration without side effects; the first mistake raises `ConfigError`."""
    if not gin_files and not gin_params:
        raise ConfigError(
            "give a configuration: --gin_file=FILE, such as gin/mnist_jax.gin or the config.gin of a run "
            "(--list shows the experiments)"
        )
    bindings = configuration.parse(gin_files, gin_params, allow_imports=allow_imports)
    binding = configuration.bound(bindings, "Run", "experiment")
    if binding is None:
        bound = {f"{b.selector}.{b.field}".strip("."): b.where for b in bindings}
        for near in difflib.get_close_matches("Run.experiment", bound, n=1, cutoff=0.7):
            raise ConfigError(f"{bound[near]}: {near!r} is unknown; did you mean 'Run.experiment'?")
        raise ConfigError(
            f"{', '.join(gin_files) or '--gin_param'}: Run.experiment is not set; allowed: "
            f"{', '.join(registry.names())}. A file in gin/include/ is a fragment, not a whole configuration"
        )
    experiment = registry.get(binding.value, where=f"{binding.where}: Run.experiment")
    module = registry.import_module(experiment.configs, what=f"experiment {experiment.name}")
    if not hasattr(module, "Config"):
        raise ConfigError(f"experiment {experiment.name}: {experiment.configs} has no class Config")
    config = configuration.build(module.Config, bindings, experiment=experiment.name)
    backends = list(experiment.backends)
    allowed = " or ".join(backends)
    backend = config.run.backend or (backends[0] if len(backends) == 1 else None)
    if backend is None:
        raise ConfigError(f"Run.backend is required by {experiment.name}: {allowed}")
    if backend not in backends:
        where = configuration.bound(bindings, "Run", "backend").where
        raise ConfigError(f"{where}: Run.backend = {backend!r}: {experiment.name} runs on {allowed}")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, backend=backend))
    return Resolved(experiment, backend, config, bindings)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher; returns the exit status."""
    argv = list(sys.argv if argv is None else argv)
    values = define_flags()
    if not parse_flags(values, argv, __doc__):
        return 0
    import_plugins(values.plugin)
    if values["list"].value:
        for name in registry.names():
            entry = registry.get(name)
            print(f"{name:18} {'/'.join(entry.backends):10} {entry.summary}")
        return 0
    resolved = resolve(values.gin_file, values.gin_param, allow_imports=values.allow_imports)
    stem = Path(values.gin_file[-1]).stem if values.gin_file else "params"
    workdir = new_directory(stem) if values.workdir is None else user_path(values.workdir)
    if values.dry_run:
        print(configuration.as_gin(resolved.config))
        print(f"# {resolved.experiment.name} on {resolved.backend}, run directory {workdir}")
        return 0
    return run_experiment(
        resolved,
        workdir,
        mode=values.mode,
        resume=values.resume,
        device=values.device,
        command=["python", "-m", "blacksmith.launch", *argv[1:]],
    )


def user_path(value: str) -> Path:
    """A path given to --workdir, with ``~`` replaced, which shells leave as it is in --workdir=~/run."""
    if not value:
        raise ConfigError("--workdir is empty")
    return Path(os.path.expanduser(value))


def new_directory(name: str) -> Path:
    """A path for a new run, ``runs/<name>/<time>``, that does not exist yet."""
    base = Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    directory, number = base, 1
    while directory.exists():
        number += 1
        directory = base.with_name(f"{base.name}-{number}")
    return directory


def run_experiment(
    resolved: Resolved,
    workdir: Path,
    *,
    mode: str = "train",
    resume: str = "auto",
    device: str = "auto",
    command: Sequence[str] = (),
) -> int:
    """Runs a resolved configuration in `workdir`; returns the exit status or raises a `UserError`."""
    # Not needed by --list, --dry_run and bad configurations.
    from blacksmith import devices
    from blacksmith.run import run as runs

    experiment, config = resolved.experiment, resolved.config
    if mode not in experiment.modes:
        raise ConfigError(f"--mode={mode}: {experiment.name} has {', '.join(experiment.modes)}")
    devices.check_installed(f"{experiment.name} on {resolved.backend}", experiment.backends[resolved.backend])
    if config.log.wandb != "off":
        devices.check_installed(f"Log.wandb = {config.log.wandb!r}", registry.Needs("wandb", ("wandb",)))
    if mode != "view":
        runs.check_directory(workdir, config)
    # Listed before a checkpoint is chosen and compared under the lock: another run may write meanwhile.
    try:
        present = runs.checkpoints_of(workdir / "checkpoints", config).steps()
    except OSError as error:
        raise ConfigError(f"--workdir: {error.strerror}: {str(workdir)[:60]}...") from error
    saved, external = starting_point(resolved, workdir, mode=mode, resume=resume)
    if mode != "view" and external is not None:
        runs.check_apart(workdir, external, f"--resume={resume}")
    if saved is not None:
        runs.check_resume(saved, config, experiment.name, experiment.checkpoint_format, mode=mode)
    name = devices.activate(experiment, resolved.backend, device)
    module, _, function = experiment.modes[mode].partition(":")
    entry = getattr(registry.import_module(module, what=f"experiment {experiment.name}"), function, None)
    if entry is None:
        raise ConfigError(f"experiment {experiment.name}: {module} has no function {function!r}")
    run = runs.Run(
        workdir,
        config,
        experiment=experiment.name,
        checkpoint_format=experiment.checkpoint_format,
        backend=resolved.backend,
        device=name,
        mode=mode,
        resumed=saved,
        external_weights=external,
        bindings=resolved.bindings,
        command=command,
        write_report=_write_report,
    )
    source = external or (saved.path if saved else None)
    origin = f", from {source}" if source else ""
    note(f"{experiment.name} on {resolved.backend} ({name}): {workdir}{origin}")
    with run.opened(checkpoints=present):
        status = entry(run) or 0
        if mode == "train" and not run.ended:
            raise RuntimeError(
                f"{experiment.name} returned without a result: end with `return loop.finish(...)`"
            )
        return status


def starting_point(
    resolved: Resolved, workdir: Path, *, mode: str, resume: str
) -> tuple[Any | None, Path | None]:
    """The checkpoint to start from, if any, and the directory of weights that no run wrote, if any.

    Training resumes from the newest checkpoint; every other mode reads the best one. Raises `ConfigError` if
    `mode`, `resume` and `workdir` contradict each other, and `CheckpointError` if a checkpoint is missing.
    """
    from blacksmith.run import run as runs
    from blacksmith.run.checkpoint import checkpoints_dir, find

    own = runs.checkpoints_of(workdir / "checkpoints", resolved.config)
    training = mode == "train"
    if resume == "auto":
        saved = own.newest() if training else own.best_or_newest()
        if saved is None and not training:
            none = f", and {workdir} has none" if workdir.exists() else ""
            raise CheckpointError(
                f"--mode={mode} needs a checkpoint{none}; give --workdir=RUN or --resume=PATH"
            )
        return saved, None
    if training and own.steps():
        raise ConfigError(
            f"--resume={resume}: {workdir} already has checkpoints; choose a new --workdir, or --resume=auto "
            "to resume there"
        )
    if resume == "never":
        if not training:
            raise ConfigError(f"--mode={mode} reads a checkpoint, but --resume=never forbids it")
        return None, None
    path, marker = Path(os.path.expanduser(resume)), resolved.experiment.external_weights
    if marker is not None and (path / marker).is_file() and not (path / "state.json").is_file():
        if training:
            raise ConfigError(
                f"--resume={resume} has weights but no training state; it can only be used with --mode=eval "
                "or --mode=export"
            )
        return None, path
    best = None if training else runs.checkpoints_of(checkpoints_dir(path), resolved.config).best_or_newest()
    return best or find(path), None


def _write_report(directory: Path) -> None:
    from blacksmith import report  # imported only now, so that runs start sooner

    report.write(directory)


if __name__ == "__main__":
    sys.exit(main())
