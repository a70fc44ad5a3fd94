"""The command that checks that backends train the same: one experiment on several, compared step by step.

``python -m blacksmith.parity --gin_file=gin/mnist_jax.gin --gin_file=gin/mnist_torch.gin`` runs each file in
a process of its own on the same data, initial weights and batches, prints a table and writes ``parity.html``.
Exit status: 0 within tolerance, 1 over it, 2 bad usage or configuration; a run that fails hands on its own.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import load_file

from blacksmith import config as configuration
from blacksmith import devices, launch, report
from blacksmith.errors import ConfigError
from blacksmith.files import write_json
from blacksmith.run import metrics
from blacksmith.run.checkpoint import Checkpoints

# What a comparison needs of the sections that all experiments share.
_SHARED_BINDINGS = {
    "Log.every_steps": 1,
    "Log.tensorboard": False,
    "Log.wandb": "off",
    "Log.progress": "off",
    "Log.histograms_every": None,
    "Checkpoint.keep_best": 0,
    "Checkpoint.keep_last": 1,
}


@dataclass(frozen=True)
class Tolerances:
    """How far a run may be from the first one.

    Attributes:
      loss: largest absolute difference of a step's loss.
      weights: norm of the difference of all final weights over their norm. A norm, since single weights
        near zero differ by per cents for no reason that matters.
      accuracy: difference of the test accuracy in percentage points.
    """

    loss: float = 1e-4
    weights: float = 1e-3
    accuracy: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """What one run left to compare.

    Attributes:
      name: the Gin file's stem.
      backend: ``jax`` or ``torch``, with the device.
      initial_weights: hash.
      batches: hash of the index stream.
      losses: float64 [steps].
      weights: final weights by name.
      test_accuracy: from 0 to 1.
      seconds: wall time of the run.
    """

    name: str
    backend: str
    initial_weights: str
    batches: str
    losses: np.ndarray
    weights: Mapping[str, np.ndarray]
    test_accuracy: float
    seconds: float


def define_flags() -> flags.FlagValues:
    """The command's flags, in a set of their own."""
    values = flags.FlagValues()
    mine = {"flag_values": values}
    default = Tolerances()
    flags.DEFINE_multi_string("gin_file", [], "A Gin file to compare; give two or more.", **mine)
    flags.DEFINE_multi_string("gin_param", [], "A binding for all runs; repeatable.", **mine)
    flags.DEFINE_integer("steps", 500, "Optimizer steps of each run.", lower_bound=1, **mine)
    flags.DEFINE_float("loss_tolerance", default.loss, "Largest |loss difference| of a step.", **mine)
    flags.DEFINE_float("weight_tolerance", default.weights, "Largest relative norm difference.", **mine)
    flags.DEFINE_float("accuracy_tolerance", default.accuracy, "In percentage points.", **mine)
    flags.DEFINE_string("workdir", None, "A new directory; runs/parity/<time> if not given.", **mine)
    flags.DEFINE_string("device", "cpu", "As for the launcher, for all runs.", **mine)
    flags.DEFINE_multi_string("plugin", [], "As for the launcher.", **mine)
    flags.DEFINE_bool("allow_imports", False, "As for the launcher.", **mine)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return launch.command(_main, argv)


def _main(argv: list[str]) -> int:
    values = define_flags()
    if not launch.parse_flags(values, argv, __doc__):
        return 0
    return compare(values)


def compare(values: flags.FlagValues) -> int:
    """Runs and compares what the flags name; returns the exit status.

    Raises:
      UserError: the configurations are wrong or not comparable, or the data is.
    """
    launch.import_plugins(values.plugin)
    names = _names(values.gin_file)
    params, notes, weights = comparable_params(values)
    workdir = Path(values.workdir or Path("runs") / "parity" / time.strftime("%Y%m%d-%H%M%S"))
    if workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"--workdir: {workdir} is not empty; choose a new directory")
    workdir.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name, gin_file in zip(names, values.gin_file):
        print(f"running {name} ...", file=sys.stderr, flush=True)
        status = _run(gin_file, params, workdir / name, values)
        if status:
            print(f"error: {name} ended with exit status {status}; see above", file=sys.stderr)
            return status
        outcomes.append(read_outcome(name, workdir / name, weights))
    tolerances = Tolerances(values.loss_tolerance, values.weight_tolerance, values.accuracy_tolerance)
    rows = [compare_outcomes(o, outcomes[0], values.steps, tolerances) for o in outcomes]
    passed = all(row["within tolerance"] == "yes" for row in rows)
    verdict = "within tolerance" if passed else "NOT within tolerance"
    notes.append(
        f"tolerances: loss {tolerances.loss:g}, weights {tolerances.weights:g} (relative norm), "
        f"accuracy {tolerances.accuracy:g} points"
    )
    print(table(rows))
    for note in notes:
        print(f"- {note}")
    print(f"parity over {values.steps} steps: {verdict}")
    write_json(workdir / "parity.json", {"passed": passed, "notes": notes, "rows": rows})
    page = report.write_parity(
        workdir / "parity.html",
        rows,
        {o.name: o.losses.tolist() for o in outcomes},
        outcomes[0].name,
        {"passed": passed, "title": f"Parity over {values.steps} steps", "notes": notes},
    )
    print(page)
    return 0 if passed else 1


def comparable_params(values: flags.FlagValues) -> tuple[list[str], list[str], str]:
    """The bindings that all runs get, notes on what they switch off, and the file of their weights.

    Raises:
      ConfigError: fewer than two files, or files that differ in more than experiment and backend.
      DataError: the data is not there.
    """
    if len(values.gin_file) < 2:
        raise ConfigError("give two or more --gin_file to compare (see --helpfull)")
    resolved = [
        launch.resolve([f], values.gin_param, allow_imports=values.allow_imports) for f in values.gin_file
    ]
    for each in resolved:
        devices.check_installed(each.experiment, each.backend)
    first = resolved[0]
    for other, gin_file in zip(resolved[1:], values.gin_file[1:]):
        if type(other.config) is not type(first.config):
            raise ConfigError(
                f"{gin_file} is of another kind ({other.experiment.name}) than {values.gin_file[0]} "
                f"({first.experiment.name}); only runs with the same settings can be compared"
            )
        different = configuration.changes(other.config, configuration.as_dict(first.config))
        different = {k: v for k, v in different.items() if k not in ("Run.experiment", "Run.backend")}
        if different:
            key, (a, b) = next(iter(different.items()))
            raise ConfigError(
                f"{values.gin_file[0]} and {gin_file} are not the same work: {key} is {a!r} and {b!r}"
            )
        if other.experiment.weights != first.experiment.weights:
            raise ConfigError(f"{values.gin_file[0]} and {gin_file} save their weights in different files")
    if first.experiment.weights is None:
        raise ConfigError(f"{first.experiment.name} cannot be compared: it declares no Experiment.weights")
    bindings = {**_SHARED_BINDINGS, **_training_bindings(first.config.train, values.steps)}
    if hasattr(first.config, "parity_bindings"):
        bindings |= first.config.parity_bindings()
    before = {
        f"{type(part).gin_name}.{field}": getattr(part, field)
        for part in (getattr(first.config, f.name) for f in dataclasses.fields(first.config))
        for field in configuration.fields(type(part))
    }
    notes = [
        f"{key} = {value!r} for the comparison (was {before[key]!r})"
        for key, value in bindings.items()
        if before[key] != value and key not in _SHARED_BINDINGS
    ]
    params = [*values.gin_param, *(f"{k} = {v!r}" for k, v in bindings.items())]
    return params, notes, first.experiment.weights


def _training_bindings(train: Any, steps: int) -> dict[str, Any]:
    """What makes a run take exactly `steps` optimizer steps."""
    wanted = {"steps": steps, "early_stopping": None, "stop_at": None}
    return {f"{train.gin_name}.{k}": v for k, v in wanted.items() if k in configuration.fields(type(train))}


def _run(gin_file: str, params: Sequence[str], workdir: Path, values: flags.FlagValues) -> int:
    command = [sys.executable, "-m", "blacksmith.launch", f"--gin_file={gin_file}"]
    command += [f"--gin_param={p}" for p in params]
    command += [f"--workdir={workdir}", f"--device={values.device}"]
    command += [f"--plugin={p}" for p in values.plugin]
    if values.allow_imports:
        command.append("--allow_imports")
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    # JAX multiplies float32 matrices in fewer bits on GPUs and TPUs unless told otherwise.
    environment["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


def read_outcome(name: str, directory: Path, weights: str) -> Outcome:
    """Reads a finished run directory.

    Args:
      name: of the run.
      directory: the run directory.
      weights: the file of a checkpoint that holds the weights.

    Raises:
      CheckpointError: its checkpoint is broken.
      ConfigError: its result lacks what is compared.
    """
    result = json.loads((directory / "result.json").read_text())
    lines = metrics.read(directory / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    saved = Checkpoints(directory / "checkpoints").newest()
    arrays = load_file(saved.path / weights)
    for key in ("initial_weights_sha256", "order_sha256"):
        if key not in result:
            raise ConfigError(f"{result['experiment']} cannot be compared: its result.json has no {key}")
    return Outcome(
        name=name,
        backend=f"{result['experiment']} {result['backend']} {result['device']}",
        initial_weights=result["initial_weights_sha256"],
        batches=result["order_sha256"],
        losses=np.array(losses, np.float64),
        weights={k: v for k, v in arrays.items() if not k.startswith("optimizer/")},
        test_accuracy=result["test"]["accuracy"],
        seconds=result["seconds"],
    )


def compare_outcomes(
    outcome: Outcome, reference: Outcome, steps: int, tolerances: Tolerances
) -> dict[str, Any]:
    """One row of the table: how far `outcome` is from `reference`.

    A difference that is not a number counts as infinite; a run with fewer than `steps` losses fails.
    """
    complete = len(outcome.losses) == len(reference.losses) == steps
    difference, at = math.inf, 0
    if complete:
        differences = np.nan_to_num(np.abs(outcome.losses - reference.losses), nan=math.inf)
        at = int(differences.argmax()) + 1
        difference = float(differences.max())
    weights = _relative_difference(outcome.weights, reference.weights)
    accuracy = abs(outcome.test_accuracy - reference.test_accuracy) * 100
    same_weights = outcome.initial_weights == reference.initial_weights
    same_batches = outcome.batches == reference.batches
    within = (
        same_weights
        and same_batches
        and difference <= tolerances.loss
        and weights <= tolerances.weights
        and accuracy <= tolerances.accuracy + 1e-9
    )
    return {
        "run": outcome.name,
        "within tolerance": "yes" if within else "NO",
        "backend": outcome.backend,
        "initial weights": outcome.initial_weights[:12] + ("" if same_weights else " (differ)"),
        "batches": outcome.batches[:12] + ("" if same_batches else " (differ)"),
        "max |loss difference|": f"{difference:.2e}",
        "at step": at,
        "max |weight difference|": f"{_largest_difference(outcome.weights, reference.weights):.2e}",
        "weights, relative": f"{weights:.2e}",
        "test accuracy": f"{outcome.test_accuracy:.2%}",
        "seconds": round(outcome.seconds, 1),
    }


def _relative_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Norm of the difference of all arrays over the norm of `theirs`; infinite where they do not match."""
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return math.inf
    squares = sum(float(np.sum((ours[k].astype(np.float64) - theirs[k]) ** 2)) for k in theirs)
    norm = sum(float(np.sum(theirs[k].astype(np.float64) ** 2)) for k in theirs)
    ratio = math.sqrt(squares / norm) if norm else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def _largest_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Largest absolute difference of a single weight; infinite where they do not match."""
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return math.inf
    return max(float(np.nan_to_num(np.abs(ours[k] - theirs[k]), nan=math.inf).max()) for k in theirs)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    header = list(rows[0])
    cells = [header, *([str(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _names(gin_files: Sequence[str]) -> list[str]:
    """A distinct name for each file: its stem, numbered where it comes again."""
    names: list[str] = []
    for gin_file in gin_files:
        stem = Path(gin_file).stem
        names.append(stem if stem not in names else f"{stem}_{gin_files.index(gin_file)}_{len(names)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
