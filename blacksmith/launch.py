"""The command: flags, then configuration, then a run directory, then the experiment.

``python -m blacksmith.launch --gin_file=gin/mnist_jax.gin``. Exit status: 0 done, 1 crash, 2 bad usage or
configuration, 3 bad data or checkpoint, 75 stopped by a signal and resumable. No framework is imported before
the configuration is known to be good.
"""

import dataclasses
import difflib
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from blacksmith import config as configuration
from blacksmith import registry
from blacksmith.errors import CheckpointError, ConfigError, UserError

MODES = ("train", "eval", "export", "view")


def define_flags() -> flags.FlagValues:
    """The launcher's flags, in a set of their own."""
    values = flags.FlagValues()
    mine = {"flag_values": values}
    flags.DEFINE_multi_string(
        "gin_file",
        [],
        "A Gin file, from here or by its name in the package; repeatable, later ones override.",
        **mine,
    )
    flags.DEFINE_multi_string(
        "gin_param",
        [],
        "A binding that overrides the files, such as 'mnist.Train.epochs = 3'; repeatable.",
        **mine,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "The run directory; runs/<gin file>/<time> if not given. One with checkpoints is resumed.",
        **mine,
    )
    flags.DEFINE_enum(
        "mode", "train", list(MODES), "What to do; view is for experiments with something to look at.", **mine
    )
    flags.DEFINE_string(
        "resume",
        "auto",
        "auto: go on from --workdir's newest checkpoint, if any; never: refuse a directory with "
        "checkpoints; a path: start a new directory from that checkpoint or run. pytorch/llama evaluates and "
        "exports a directory with an adapter, too.",
        **mine,
    )
    flags.DEFINE_string(
        "device",
        "auto",
        "auto, cpu, gpu, tpu, or any JAX platform or torch device by name.",
        **mine,
    )
    flags.DEFINE_bool("dry_run", False, "Print the resolved configuration and stop there.", **mine)
    flags.DEFINE_bool("list", False, "List the experiments.", **mine)
    flags.DEFINE_bool(
        "allow_imports",
        False,
        "Let Gin files import Python modules, which runs their code.",
        **mine,
    )
    flags.DEFINE_multi_string(
        "plugin",
        [],
        "A Python module to import first that adds an experiment to the registry; repeatable.",
        **mine,
    )
    return values


def parse_flags(values: flags.FlagValues, argv: Sequence[str], usage: str) -> bool:
    """Parses `argv` into `values`; returns False when help was printed instead.

    Raises:
      ConfigError: an unknown flag, a bad value or a stray argument.
    """
    for name in ("help", "helpfull", "helpshort"):
        flags.DEFINE_bool(name, False, "Show this help.", flag_values=values)
    try:
        rest = values(list(argv))
    except (flags.Error, ValueError) as error:
        line = " ".join(str(error).split())
        line = re.sub(r"\('Non-boolean argument to boolean flag', .*\)", "must be true or false", line)
        raise ConfigError(f"{line} (see --helpfull)") from error
    if values.help or values.helpfull or values.helpshort:
        print(usage.strip() + "\n\nflags:\n" + values.get_help())
        return False
    if len(rest) > 1:
        raise ConfigError(
            f"{rest[1]!r} is not a flag; a Gin file is given as --gin_file={rest[1]} (see --helpfull)"
        )
    return True


def import_plugins(names: Sequence[str]) -> None:
    """Imports modules that add experiments; they may lie in the directory one works in.

    Raises:
      ConfigError: there is no such module.
    """
    for name in names:
        if "" not in sys.path:
            sys.path.insert(0, "")
        registry.import_module(name, what=f"--plugin={name}")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A validated configuration and what it asks for."""

    experiment: registry.Experiment
    backend: str
    config: Any
    bindings: list[configuration.Binding]


def resolve(gin_files: Sequence[str], gin_params: Sequence[str], *, allow_imports: bool = False) -> Resolved:
    """Reads and validates a configuration; creates nothing and imports no framework.

    Raises:
      ConfigError: the first mistake.
    """
    if not gin_files and not gin_params:
        raise ConfigError("give a configuration: --gin_file=gin/mnist_jax.gin (--list shows the experiments)")
    bindings = configuration.parse(gin_files, gin_params, allow_imports=allow_imports)
    binding = configuration.bound(bindings, "Run", "experiment")
    if binding is None:
        bound = {f"{b.selector}.{b.field}".strip("."): b.where for b in bindings}
        near = difflib.get_close_matches("Run.experiment", bound, n=1, cutoff=0.7)
        if near:
            raise ConfigError(f"{bound[near[0]]}: {near[0]!r} is unknown; did you mean 'Run.experiment'?")
        raise ConfigError(
            f"{', '.join(gin_files) or '--gin_param'}: Run.experiment is not set; it names the "
            f"experiment, one of: {', '.join(registry.names())}. A file in gin/include/ is a fragment, "
            "not a whole configuration"
        )
    experiment = registry.get(binding.value, where=f"{binding.where}: Run.experiment")
    module = registry.import_module(experiment.configs, what=f"experiment {experiment.name}")
    config = configuration.build(module.Config, bindings, experiment=experiment.name)
    backends = list(experiment.backends)
    backend = config.run.backend or (backends[0] if len(backends) == 1 else None)
    chosen = configuration.bound(bindings, "Run", "backend")
    where = f"{chosen.where}: " if chosen else ""
    if backend is None:
        raise ConfigError(f"Run.backend is required by {experiment.name}: {' or '.join(backends)}")
    if backend not in backends:
        raise ConfigError(
            f"{where}Run.backend = {backend!r}: {experiment.name} runs on {' or '.join(backends)}"
        )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, backend=backend))
    return Resolved(experiment, backend, config, bindings)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher; returns the exit status."""
    return command(_main, argv)


def command(body: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Runs the body of a command; turns its errors into one line and an exit status."""
    try:
        return body(list(sys.argv if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
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
    workdir = Path(values.workdir) if values.workdir else _default_workdir(values)
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


def run_experiment(
    resolved: Resolved,
    workdir: Path,
    *,
    mode: str = "train",
    resume: str = "auto",
    device: str = "auto",
    command: Sequence[str] = (),
) -> int:
    """Runs a resolved configuration in `workdir`; returns the exit status.

    Raises:
      UserError: the run cannot start or go on; its `exit_status` says which kind.
    """
    # Imported here: --list, --dry_run and a bad configuration do not need them.
    from blacksmith import devices
    from blacksmith.run import run as runs
    from blacksmith.run.checkpoint import find, place

    experiment, config = resolved.experiment, resolved.config
    if mode not in experiment.modes:
        raise ConfigError(f"--mode={mode}: {experiment.name} has {', '.join(experiment.modes)}")
    devices.check_installed(experiment, resolved.backend)
    if experiment.uses_keras:
        devices.check_keras(resolved.backend)
    if config.log.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"Log.wandb = {config.log.wandb!r} needs wandb, which is not installed: pip install '.[wandb]'"
        )
    own = runs.checkpoints_of(workdir / "checkpoints", config)
    try:
        if workdir.exists() and not workdir.is_dir():
            raise ConfigError(f"--workdir: {workdir} is a file, not a directory")
    except OSError as error:
        raise ConfigError(f"--workdir: {error.strerror}: {str(workdir)[:60]}...") from error
    if not device:
        raise ConfigError("--device is empty; say auto, cpu, gpu, tpu, or a device by name")
    seen, foreign = own.steps(), None
    if resume == "auto":
        saved = own.newest()
        if saved is None and mode != "train":
            raise CheckpointError(
                f"--mode={mode} needs a checkpoint: {workdir} has none; name one with --workdir=RUN or "
                "--resume=PATH"
            )
        if mode != "train" and saved is not None:
            saved = own.chosen()
    else:
        if seen and mode == "train":
            raise ConfigError(
                f"--resume={resume}: {workdir} already has checkpoints; choose another --workdir, or "
                "--resume=auto to go on there"
            )
        if resume == "never" and mode != "train":
            raise ConfigError(f"--mode={mode} reads a checkpoint; --resume=never forbids it")
        saved = None
        path = Path(resume)
        if resume != "never" and _is_foreign(path, experiment):
            if mode == "train":
                raise ConfigError(
                    f"--resume={resume} has no state of a run to go on from; --mode=eval and --mode=export "
                    "read it"
                )
            foreign = path
        elif resume != "never":
            chosen = runs.checkpoints_of(place(path), config).chosen() if mode != "train" else None
            saved = chosen or find(path)
    if saved is not None:
        runs.check_resume(saved, config, experiment, mode=mode)
    name = devices.activate(experiment, resolved.backend, device)
    module, _, function = experiment.modes[mode].partition(":")
    entry = getattr(registry.import_module(module, what=f"experiment {experiment.name}"), function)
    run = runs.Run(
        workdir,
        config,
        experiment,
        backend=resolved.backend,
        device=name,
        mode=mode,
        resumed=saved,
        foreign=foreign,
        bindings=resolved.bindings,
        command=command,
    )
    source = foreign or (saved.path if saved else None)
    going_on = f", from {source}" if source else ""
    print(f"{experiment.name} on {resolved.backend} ({name}): {workdir}{going_on}", file=sys.stderr)
    with run.opened(checkpoints=seen):
        return entry(run) or 0


def _is_foreign(path: Path, experiment: registry.Experiment) -> bool:
    """Whether a path is a directory that the experiment reads though no run wrote it."""
    if experiment.external_weights is None or (path / "state.json").is_file():
        return False
    return (path / experiment.external_weights).is_file()


def _default_workdir(values: flags.FlagValues) -> Path:
    stem = Path(values.gin_file[-1]).stem if values.gin_file else "params"
    base = Path("runs") / stem / time.strftime("%Y%m%d-%H%M%S")
    directory, number = base, 1
    while directory.exists():
        number += 1
        directory = base.with_name(f"{base.name}-{number}")
    return directory


if __name__ == "__main__":
    sys.exit(main())
