"""What an experiment is handed: one run directory with its metrics, checkpoints, stop flag and provenance.

The launcher opens a `Run` and passes it to the experiment's entry function. Nothing here knows a framework.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blacksmith import config as configuration
from blacksmith.errors import CheckpointError, ConfigError, DataError, RunError
from blacksmith.files import write_json
from blacksmith.registry import Experiment
from blacksmith.run import metrics as metric_writers
from blacksmith.run import provenance
from blacksmith.run.checkpoint import Checkpoints, Saved
from blacksmith.run.signals import StopFlag

STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, resumable


class Run:
    """One run.

    Attributes:
      directory: the run directory.
      config: the experiment's frozen configuration.
      experiment: its registry entry.
      backend: ``jax`` or ``torch``.
      device: the device in the framework's words.
      mode: ``train``, ``eval``, ``export`` or ``view``.
      resumed: the checkpoint that this run goes on from, or None.
      foreign: a directory of weights that no run wrote, to be evaluated or exported, or None.
      checkpoints: the run's own checkpoints.
      stop: true once the run is to stop.
    """

    def __init__(
        self,
        directory: Path,
        config: Any,
        experiment: Experiment,
        *,
        backend: str,
        device: str,
        mode: str = "train",
        resumed: Saved | None = None,
        foreign: Path | None = None,
        bindings: Sequence[configuration.Binding] = (),
        command: Sequence[str] = (),
    ) -> None:
        self.directory = Path(directory)
        self.config = config
        self.experiment = experiment
        self.backend = backend
        self.device = device
        self.mode = mode
        self.resumed = resumed
        self.foreign = foreign
        self.stop = StopFlag() if mode == "train" else StopFlag("stopping")
        self.data: dict[str, Any] = {}
        self._bindings = bindings
        self._command = list(command)
        self._environment: dict[str, Any] = {}
        self.checkpoints = checkpoints_of(self.directory / "checkpoints", config)
        self._metrics: metric_writers.Metrics | None = None
        self._opened_at = 0.0
        self._started = False

    @property
    def metrics(self) -> metric_writers.Metrics:
        """The metric stream of a training run. Its first use is what changes a directory with checkpoints."""
        if self._metrics is None:
            if self.mode != "train":
                raise RuntimeError(f"--mode={self.mode} has no metric stream")
            self._start()
        return self._metrics

    @contextlib.contextmanager
    def opened(self, checkpoints: Sequence[Path] | None = None) -> Iterator["Run"]:
        """Makes and locks the directory, records provenance, opens the metrics; closes them at the end.

        A run that is refused (`ConfigError`, `DataError` or `CheckpointError`) leaves no trace: directories
        that it made are removed again, one that it was to go on in is as it was. Any other failure leaves a
        `result.json` that says so.

        Args:
          checkpoints: those that were there when `resumed` was chosen; None leaves them unchecked.

        Raises:
          ConfigError: another process is running in this directory, or was since `checkpoints` were listed.
          RunError: the disk is full.
        """
        made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--workdir: cannot make {self.directory}: {error.strerror}") from error
        self._opened_at = time.perf_counter()
        try:
            # A viewer writes nothing, and may look at a run that is in training.
            with self._lock() if self.mode != "view" else contextlib.nullcontext(), self.stop:
                try:
                    if checkpoints is not None and self.checkpoints.steps() != list(checkpoints):
                        raise ConfigError(
                            f"{self.directory} was changed by another run just now; start again"
                        )
                    if self.mode == "train" and not self.goes_on:
                        self._start()
                    yield self
                except BaseException as error:
                    refused = isinstance(error, (ConfigError, DataError, CheckpointError))
                    if refused and made and not self.checkpoints.steps():
                        self._close()
                        shutil.rmtree(self.directory, ignore_errors=True)
                        with contextlib.suppress(OSError):  # another run may be in one by now
                            for parent in made[1:]:
                                parent.rmdir()
                    elif self._started:
                        self._failed(error)
                    raise
                finally:
                    self._close()
        except Exception as error:
            if reason := _full_disk(error):
                newest = self.checkpoints.steps()
                kept = f"the last checkpoint is {newest[-1]}" if newest else "there is no checkpoint yet"
                raise RunError(
                    f"the disk is full ({reason}); {kept}; make room and run the same command again"
                ) from error
            raise

    def use_data(self, info: Mapping[str, Any], line: str) -> None:
        """Records which data is used and prints `line`.

        Raises:
          DataError: a resumed run's data is not that of its checkpoint.
        """
        print(line, file=sys.stderr)
        self.data = dict(info)
        if self.resumed is not None and self.mode == "train":
            before = self.resumed.state["data"]
            if before.get("sha256") != info.get("sha256"):
                raise DataError(
                    f"the data has changed since {self.resumed.path.name}: it was "
                    f"{before.get('source')} {str(before.get('sha256'))[:12]}, now it is "
                    f"{info.get('source')} {str(info.get('sha256'))[:12]}; give the same source"
                )
        if self._started:
            self._environment["data"] = self.data
            write_json(self.directory / "environment.json", self._environment)

    def save_checkpoint(
        self,
        step: int,
        state: Mapping[str, Any],
        write: Callable[[Path], None],
        metrics: Mapping[str, float],
    ) -> Path:
        """Saves the experiment's files with everything that a resume has to know.

        Args:
          step: optimiser steps taken.
          state: the experiment's own JSON values, found again under ``loop``.
          write: puts the files into a directory.
          metrics: the latest validation metrics.

        Raises:
          OSError: it could not be written; older checkpoints are intact.
        """
        content = {
            "experiment": self.experiment.name,
            "checkpoint_format": self.experiment.checkpoint_format,
            "backend": self.backend,
            "device": self.device,
            "seed": self.config.run.seed,
            "config": configuration.as_dict(self.config),
            "config_hash": configuration.config_hash(self.config),
            "data": self.data,
            "metrics_offset": self.metrics.flush(),
            "seconds": self.metrics.seconds,
            "loop": dict(state),
        }
        return self.checkpoints.save(step, content, write, metrics)

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        """Writes `result.json`, then the report.

        Args:
          status: ``done`` or ``stopped``.
          result: what the experiment has to say; see the experiment's README.
        """
        self.metrics.flush()
        content = {
            "status": status,
            "experiment": self.experiment.name,
            "backend": self.backend,
            "device": self.device,
            "seconds": round(self.metrics.seconds, 3),
            "peak_memory_bytes": _peak_memory(),
            "data": self.data,
            **result,
        }
        write_json(self.directory / "result.json", content)
        self._report()

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on in the directory of the checkpoint that it starts from."""
        if self.resumed is None:
            return False
        return self.resumed.path.parent.resolve() == self.checkpoints.directory.resolve()

    def _start(self) -> None:
        """Puts the directory into the state that the run starts from."""
        path = self.directory / "metrics.jsonl"
        offset = self.resumed.state["metrics_offset"] if self.goes_on else 0
        if offset > (path.stat().st_size if path.exists() else 0):
            raise CheckpointError(
                f"{path} is shorter than when {self.resumed.path.name} was written; "
                "resume into a new directory with --resume=PATH"
            )
        self._started = True
        self.checkpoints.clean()
        for stale in ("result.json", "report.html", "eval_results.json"):
            (self.directory / stale).unlink(missing_ok=True)
        for picture in (self.directory / "images").glob("test_*"):
            picture.unlink()
        (self.directory / "config.gin").write_text(configuration.bindings_as_gin(self._bindings))
        (self.directory / "operative.gin").write_text(configuration.as_gin(self.config))
        write_json(self.directory / "config.json", configuration.as_dict(self.config))
        self._environment = self._provenance()
        write_json(self.directory / "environment.json", self._environment)
        purge = None
        if self.goes_on:
            self.checkpoints.remove_after(self.resumed.step)
            purge = self.resumed.step + 1
        elif (self.directory / "tensorboard").exists():
            purge = 0
        log = self.config.log
        writers: list[metric_writers.Writer] = []
        if log.tensorboard:
            writers.append(metric_writers.TensorBoardWriter(self.directory / "tensorboard", purge_step=purge))
        if log.wandb != "off":
            writers.append(self._wandb_writer())
        seconds = time.perf_counter() - self._opened_at
        if self.resumed is not None:
            seconds += self.resumed.state["seconds"]
        self._metrics = metric_writers.Metrics(path, writers, offset=offset, seconds=seconds)

    def _wandb_writer(self) -> metric_writers.WandbWriter:
        import wandb

        log = self.config.log
        try:
            return metric_writers.WandbWriter(
                self.directory, log.wandb, log.wandb_project, configuration.as_dict(self.config)
            )
        except wandb.errors.Error as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"Log.wandb = {log.wandb!r}: {reason}; or set it to 'offline'") from error

    def _provenance(self) -> dict[str, Any]:
        previous = []
        with contextlib.suppress(OSError, ValueError):
            old = json.loads((self.directory / "environment.json").read_text())
            previous = old.pop("previous", [])
            kept = ("started", "command", "backend", "device", "resumed_from")
            previous.append({key: old.get(key) for key in kept})
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": self._command,
            "experiment": self.experiment.name,
            "backend": self.backend,
            "device": self.device,
            "resumed_from": str(self.resumed.path) if self.resumed else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "variables": provenance.variables(),
            "versions": provenance.versions(),
            "git": provenance.git_state(),
            "data": self.data,
            "previous": previous,
        }

    def _failed(self, error: BaseException) -> None:
        """Leaves word of a crash, as far as the disk lets it."""
        with contextlib.suppress(Exception):
            try:
                step = metric_writers.read(self.directory / "metrics.jsonl")[-1]["step"]
            except (OSError, DataError, IndexError):
                step = 0
            aborted = isinstance(error, KeyboardInterrupt)
            by = self.stop.signal or "SIGINT"
            write_json(
                self.directory / "result.json",
                {
                    "status": "failed",
                    "error": f"aborted by {by}" if aborted else f"{type(error).__name__}: {error}",
                    "experiment": self.experiment.name,
                    "backend": self.backend,
                    "device": self.device,
                    "step": step,
                    "data": self.data,
                },
            )
            if _full_disk(error) is None:
                self._report()

    def _report(self) -> None:
        from blacksmith import report

        try:
            report.write(self.directory)
        except Exception as error:
            print(f"warning: no report: {type(error).__name__}: {error}", file=sys.stderr)

    def _close(self) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):
                self._metrics.close()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            file = (self.directory / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(f"--workdir: cannot write in {self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"{self.directory} is in use by another run (process {holder}); "
                "wait for it or choose another --workdir"
            ) from error
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            file.close()


def checkpoints_of(directory: Path, config: Any) -> Checkpoints:
    """The checkpoints in a directory of ``step_*`` under a configuration's retention rules."""
    rules = config.checkpoint
    return Checkpoints(
        directory,
        keep_last=rules.keep_last,
        keep_best=rules.keep_best,
        metric=rules.metric,
        mode=rules.mode,
    )


def check_resume(saved: Saved, config: Any, experiment: Experiment, *, mode: str = "train") -> None:
    """Checks that a run with `config` may go on from `saved`, or evaluate or export it.

    Raises:
      ConfigError: it differs in a field that must not change; names the first differences.
      CheckpointError: the checkpoint belongs to an experiment of another kind.
    """
    if saved.state["checkpoint_format"] != experiment.checkpoint_format:
        raise CheckpointError(
            f"{saved.path} was written by {saved.state['experiment']} in the format "
            f"{saved.state['checkpoint_format']} and does not fit {experiment.name}, which reads "
            f"{experiment.checkpoint_format}"
        )
    different = configuration.forbidden_changes(config, saved.state["config"], mode=mode)
    if different:
        shown = "; ".join(f"{k} was {a!r}, now {b!r}" for k, (a, b) in list(different.items())[:4])
        if len(different) > 4:
            shown += f"; and {len(different) - 4} more"
        cure = "set them back, or start in a new --workdir" if mode == "train" else "set them back"
        do = {"train": "go on from", "eval": "evaluate", "export": "export"}.get(mode, "show")
        raise ConfigError(
            f"cannot {do} {saved.path} with other settings: {shown}; {cure}"
            + ("" if mode == "train" else f" (--gin_file={saved.path.parent.parent / 'config.gin'} has them)")
        )


def _peak_memory() -> int:
    """The most memory that this process has had of the machine's, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _full_disk(error: Exception) -> str | None:
    """The reason where a full disk or quota is behind `error`: libraries hide the OSError in a message."""
    reasons = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
    if isinstance(error, OSError) and error.errno in reasons:
        return reasons[error.errno]
    return next((reason for reason in reasons.values() if reason in str(error)), None)
