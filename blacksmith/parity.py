"""Checks that backends train the same: runs one experiment on several and compares the runs step by step.

``python -m blacksmith.parity --gin_file=gin/mnist_jax.gin --gin_file=gin/mnist_torch.gin`` runs each file in
its own process with the same data, initial weights and batches, prints a table and writes ``parity.html``.
Exit status: 0 within tolerance, 1 not, 2 bad usage or configuration. If a run fails, its status is returned.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import load_file

from blacksmith import config as configuration
from blacksmith import launch, report
from blacksmith.errors import ConfigError, note, one_line_errors
from blacksmith.files import write_json
from blacksmith.run import metrics
from blacksmith.run.checkpoint import Checkpoints

# Every loss is compared; nothing else has to be logged or kept.
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
    """How far a run may be from the first one."""

    loss: float = 1e-4  # largest absolute difference of any step
    # Norm of the difference of all final weights over their norm. Single weights near zero may differ more.
    weights: float = 1e-3
    accuracy: float = 0.1  # percentage points on the test set


@dataclass(frozen=True)
class Outcome:
    """What is compared of a run."""

    name: str  # the Gin file's stem
    backend: str  # with experiment and device
    initial_weights: str  # sha256
    batches: str  # sha256 of the stream of indices
    losses: np.ndarray  # float64 [steps]
    weights: Mapping[str, np.ndarray]  # after the last step
    test_accuracy: float | None  # from 0 to 1; None: the experiment is no classifier
    seconds: float


def define_flags() -> flags.FlagValues:
    """The command's flags, apart from absl's global ones."""
    values = flags.FlagValues()
    mine = {"flag_values": values}
    default = Tolerances()
    flags.DEFINE_multi_string("gin_file", [], "A Gin file to compare; give two or more.", **mine)
    flags.DEFINE_multi_string("gin_param", [], "A binding for all runs; repeatable.", **mine)
    flags.DEFINE_integer("steps", 500, "Optimizer steps of each run.", lower_bound=1, **mine)
    flags.DEFINE_float("loss_tolerance", default.loss, "Largest |loss difference| of any step.", **mine)
    flags.DEFINE_float("weight_tolerance", default.weights, "Largest relative norm difference.", **mine)
    flags.DEFINE_float("accuracy_tolerance", default.accuracy, "In percentage points.", **mine)
    flags.DEFINE_string("workdir", None, "A new directory; default runs/parity/<time>.", **mine)
    flags.DEFINE_string("device", "cpu", "As for the launcher, for all runs.", **mine)
    flags.DEFINE_multi_string("plugin", [], "As for the launcher.", **mine)
    flags.DEFINE_bool("allow_imports", False, "As for the launcher.", **mine)
    return values


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    values = define_flags()
    if not launch.parse_flags(values, sys.argv if argv is None else argv, __doc__):
        return 0
    launch.import_plugins(values.plugin)
    params, notes, weights = comparable_params(values)
    workdir = launch.new_directory("parity") if values.workdir is None else launch.user_path(values.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if any(workdir.iterdir()):
            raise ConfigError(f"--workdir: {workdir} is not empty; choose a new directory")
    except OSError as error:
        raise ConfigError(f"--workdir: cannot make {workdir}: {error.strerror}") from error
    for line in notes:
        note(f"note: {line}")
    outcomes: list[Outcome] = []
    taken = {"parity.json", "parity.html"}
    for gin_file in values.gin_file:
        stem = Path(gin_file).stem
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        print(f"running {name} ...", file=sys.stderr, flush=True)
        if status := _run(gin_file, params, workdir / name, values):
            print(f"error: {name} ended with exit status {status}; see above", file=sys.stderr)
            return status
        outcomes.append(read_outcome(name, workdir / name, weights))
    tolerances = Tolerances(values.loss_tolerance, values.weight_tolerance, values.accuracy_tolerance)
    rows = [compare_outcomes(o, outcomes[0], values.steps, tolerances) for o in outcomes]
    passed = all(row["within tolerance"] == "yes" for row in rows)
    verdict = "within tolerance" if passed else "NOT within tolerance"
    limits = (
        f"tolerances: loss {tolerances.loss:g}, weights {tolerances.weights:g} (relative norm), "
        f"accuracy {tolerances.accuracy:g} points"
    )
    notes.append(limits)
    print(table(rows), limits, f"parity over {values.steps} steps: {verdict}", sep="\n")
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
    """The bindings of all runs, notes on the settings they change, and the file that holds the weights.

    Raises `ConfigError` if the files differ in more than experiment and backend.
    """
    if len(values.gin_file) < 2:
        raise ConfigError("give two or more --gin_file to compare (see --helpfull)")
    imports = {"allow_imports": values.allow_imports}
    first, *others = [launch.resolve([file], values.gin_param, **imports) for file in values.gin_file]
    first_file, config = values.gin_file[0], first.config
    for other, file in zip(others, values.gin_file[1:]):
        refusal = f"{first_file} and {file} cannot be compared"
        if type(other.config) is not type(config):
            names = f"{first.experiment.name} and {other.experiment.name}"
            raise ConfigError(f"{refusal}: {names} have different settings")
        for key, (a, b) in configuration.changes(other.config, configuration.as_dict(config)).items():
            if key not in ("Run.experiment", "Run.backend"):
                raise ConfigError(f"{refusal}: {key} is {a!r} and {b!r}")
    if first.experiment.weights is None:
        raise ConfigError(f"{first.experiment.name} cannot be compared: it declares no Experiment.weights")
    bindings = dict(_SHARED_BINDINGS)
    for field, value in {"steps": values.steps, "early_stopping": None, "stop_at": None}.items():
        bindings[f"{config.train.gin_name}.{field}"] = value
    if hasattr(config, "parity_bindings"):
        bindings |= config.parity_bindings()
    params = [*values.gin_param, *(f"{key} = {value!r}" for key, value in bindings.items())]
    compared = launch.resolve([first_file], params, **imports).config
    notes = [
        f"{key} = {now!r} for the comparison (was {before!r})"
        for key, (before, now) in configuration.changes(compared, configuration.as_dict(config)).items()
        if key not in _SHARED_BINDINGS
    ]
    return params, notes, first.experiment.weights


def _run(gin_file: str, params: Sequence[str], workdir: Path, values: flags.FlagValues) -> int:
    command = [sys.executable, "-m", "blacksmith.launch", f"--gin_file={gin_file}"]
    command += [f"--gin_param={p}" for p in params]
    command += [f"--workdir={workdir}", f"--device={values.device}"]
    command += [f"--plugin={p}" for p in values.plugin]
    if values.allow_imports:
        command.append("--allow_imports")
    # On GPUs and TPUs, JAX multiplies float32 matrices with reduced precision by default.
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "float32"}
    with _interrupted_by(signal.SIGTERM, signal.SIGHUP):  # else the child would outlive this process
        return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


@contextlib.contextmanager
def _interrupted_by(*numbers: int) -> Iterator[None]:
    """Makes these signals raise KeyboardInterrupt, as Ctrl-C does; only the main thread can handle them."""
    main_thread = threading.current_thread() is threading.main_thread()
    previous = {n: signal.signal(n, signal.default_int_handler) for n in numbers if main_thread}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_outcome(name: str, directory: Path, weights: str) -> Outcome:
    """Reads a finished run directory; `weights` is the file that holds the weights in a checkpoint."""
    result = json.loads((directory / "result.json").read_text())
    missing = {"initial_weights_sha256", "order_sha256"} - result.keys()
    if missing:
        raise ConfigError(f"{result['experiment']} cannot be compared: its result.json has no {min(missing)}")
    lines = metrics.read(directory / "metrics.jsonl")
    arrays = load_file(Checkpoints(directory / "checkpoints").newest().path / weights)
    return Outcome(
        name=name,
        backend=f"{result['experiment']} {result['backend']} {result['device']}",
        initial_weights=result["initial_weights_sha256"],
        batches=result["order_sha256"],
        losses=np.array([line["loss"] for line in lines if line["split"] == "train"], np.float64),
        weights={k: v for k, v in arrays.items() if not k.startswith("optimizer/")},
        test_accuracy=result["test"].get("accuracy"),
        seconds=result["seconds"],
    )


def compare_outcomes(
    outcome: Outcome, reference: Outcome, steps: int, tolerances: Tolerances
) -> dict[str, Any]:
    """One row of the table: how far `outcome` is from `reference`. NaN and missing steps fail."""
    difference, at = math.inf, 0
    if len(outcome.losses) == len(reference.losses) == steps:
        differences = np.nan_to_num(np.abs(outcome.losses - reference.losses), nan=math.inf)
        at = int(differences.argmax()) + 1
        difference = float(differences.max())
    weights, largest = _weight_differences(outcome.weights, reference.weights)
    accuracies = [outcome.test_accuracy, reference.test_accuracy]
    accuracy = 0.0 if accuracies == [None, None] else math.inf
    if None not in accuracies:
        accuracy = abs(accuracies[0] - accuracies[1]) * 100
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
        "max |weight difference|": f"{largest:.2e}",
        "weights, relative": f"{weights:.2e}",
        "test accuracy": "none" if outcome.test_accuracy is None else f"{outcome.test_accuracy:.2%}",
        "seconds": round(outcome.seconds, 1),
    }


def _weight_differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Norm of the difference over the norm of `theirs`, and the largest difference of a single weight.

    Both are infinite if names or shapes differ.
    """
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return math.inf, math.inf
    reference = np.concatenate([v.astype(np.float64).ravel() for v in theirs.values()])
    difference = np.concatenate([ours[k].astype(np.float64).ravel() for k in theirs]) - reference
    values = (np.linalg.norm(difference) / np.linalg.norm(reference), np.abs(difference).max())
    return tuple(float(value) if math.isfinite(value) else math.inf for value in values)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
