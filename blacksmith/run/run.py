"""What the launcher hands to an experiment: a run directory with its metrics, checkpoints and stop flag."""

import contextlib
import dataclasses
import errno
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blacksmith import config as configuration
from blacksmith.errors import CheckpointError, ConfigError, DataError, RunError, UserError, first_line, note
from blacksmith.files import settle, temporary_directory, write_json
from blacksmith.run import metrics as metric_writers
from blacksmith.run import provenance
from blacksmith.run.checkpoint import Checkpoints, Saved
from blacksmith.run.lock import locked
from blacksmith.run.manifest import Manifest, check_apart, check_ours, set_aside
from blacksmith.run.signals import STOPPED, StopFlag


@dataclasses.dataclass(eq=False)
class Run:
    """One run of an experiment in a directory."""

    directory: Path
    config: Any  # the experiment's frozen configuration
    _: dataclasses.KW_ONLY
    experiment: str
    checkpoint_format: str
    backend: str  # ``jax`` or ``torch``
    device: str  # the framework's name of it
    mode: str = "train"  # ``train``, ``eval``, ``export`` or ``view``
    resumed: Saved | None = None  # the checkpoint that this run starts from
    external_weights: Path | None = None  # weights that no run wrote, to be evaluated or exported
    bindings: Sequence[configuration.Binding] = ()  # what the user bound, for `config.gin`
    command: Sequence[str] = ()  # the command line, for `environment.json`
    write_report: Callable[[Path], Any] | None = None

    def __post_init__(self) -> None:
        self.stop = StopFlag() if self.mode == "train" else StopFlag("stopping")
        self.data: dict[str, Any] = {}  # what `use_data` recorded
        self.checkpoints = checkpoints_of(self.directory / "checkpoints", self.config)
        self._environment: dict[str, Any] = {}
        self._metrics: metric_writers.Metrics | None = None
        self._manifest: Manifest | None = None  # while the directory is locked
        self._in_place: Callable[[], bool] = lambda: True  # whether the directory is the one that was locked
        self.ended = False  # whether this process has written a result
        self._changed = False  # whether the directory is no longer as it was found
        self._opened_at = 0.0

    @property
    def metrics(self) -> metric_writers.Metrics:
        """The metric stream of a training run, once `begin` was called."""
        if self._metrics is None:
            raise RuntimeError("this run has no metric stream: only mode 'train' has one, after run.begin()")
        return self._metrics

    @property
    def resumes_in_place(self) -> bool:
        """Whether the run continues in the directory of the checkpoint that it starts from."""
        directory = self.checkpoints.directory.resolve()
        return self.resumed is not None and self.resumed.path.parent.resolve() == directory

    @contextlib.contextmanager
    def opened(self, checkpoints: Sequence[Path] | None = None) -> Iterator["Run"]:
        """Makes and locks the directory and handles signals until the block ends.

        A refused run (`ConfigError`, `DataError` or `CheckpointError`) leaves no trace: directories that it
        made are removed. After any other failure `result.json` says what happened.

        Raises:
          ConfigError: the directory has files and no run made it, another run uses it, or its checkpoints are
            no longer `checkpoints`, those that were there when `resumed` was chosen.
          RunError: the disk is full, the directory was removed, or something in it cannot be read or written.
        """
        viewing = self.mode == "view"  # a viewer writes nothing, and may show a run that is still training
        if not viewing:
            check_ours(self.directory)
        made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--workdir: cannot make {self.directory}: {error.strerror}") from error
        self._opened_at = time.perf_counter()
        try:
            with contextlib.nullcontext() if viewing else self._taken(), self.stop:
                try:
                    if checkpoints is not None and self.checkpoints.steps() != list(checkpoints):
                        raise ConfigError(f"{self.directory} was just changed by another run; start again")
                    if not viewing:
                        self._manifest.clean()
                        self.checkpoints.clean()
                    if self.mode == "train" and not self.resumes_in_place:
                        self.begin()
                    yield self
                except BaseException as error:
                    self._give_up(error, made)
                    raise
                finally:
                    self._close()
        except Exception as error:
            self._explain(error)
            raise

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        """Locks the directory and reads its manifest."""
        with locked(self.directory) as self._in_place:
            self._manifest = self.checkpoints.manifest = Manifest(self.directory)
            yield

    def _give_up(self, error: BaseException, made: Sequence[Path]) -> None:
        """After `error`: removes the directories that a refused run `made`, or records that a run failed."""
        refused = isinstance(error, (ConfigError, DataError, CheckpointError))
        if refused and made and not self.checkpoints.steps():
            self._close()
            with contextlib.suppress(OSError):  # another run, or a user's file, may be in one of them by now
                (self._manifest.dispose if self._manifest else self.directory.rmdir)()
                for parent in made[1:]:
                    parent.rmdir()
        elif self._changed and self._in_place():
            self._record_failure(error)

    def _explain(self, error: Exception) -> None:
        """Raises a `RunError` in place of an error that has its cause in the run directory."""
        newest = self.checkpoints.describe_newest
        if reason := _full_disk(error):
            raise RunError(
                f"the disk is full ({reason}); {newest()}; make room and run the same command again"
            ) from error
        if isinstance(error, UserError):
            return
        if not self._in_place():
            raise RunError(self._gone()) from error
        if self.resumed is not None and not self.resumed.path.is_dir():
            raise CheckpointError(
                f"{self.resumed.path} was removed meanwhile, perhaps by the run that wrote it; start again"
            ) from error
        if isinstance(error, OSError) and error.filename is not None:
            path = Path(os.fsdecode(error.filename)) if not isinstance(error.filename, int) else Path()
            if self.directory.absolute() in path.absolute().parents:
                raise RunError(
                    f"{path}: {error.strerror}; {newest()}; repair it and run the same command again"
                ) from error

    def _gone(self) -> str:
        return (
            f"the run directory {self.directory} was removed, moved or replaced while the run was going, and "
            "nothing more can be saved; start again, in a directory that stays"
        )

    def claim(self, path: Path | str) -> Path:
        """The path of a file in the run directory that the run is about to write: a name there, or a `Path`.

        Its directory is made. Whatever is in the way and was not written by a run is kept under another name,
        with a warning.
        """
        if not self._in_place():
            raise RunError(self._gone())
        if self._manifest is None:
            raise RuntimeError("a run writes only while it is opened, and never in mode 'view'")
        return self._manifest.claim(path)

    def clear(self, *patterns: str, where: Callable[[Path], bool] = lambda path: True) -> None:
        """Removes files that runs wrote in this directory, and no others.

        `patterns` are relative names, as in `fnmatch`; that of a directory stands for all in it. With
        `where`, only paths for which it is true are removed.
        """
        if self._manifest is not None:
            self._manifest.clear(*patterns, where=where)

    @contextlib.contextmanager
    def new_directory(self, name: str) -> Iterator[Path]:
        """Makes a temporary directory, which becomes `name` in the run directory once the block succeeds.

        Files that earlier runs wrote there are removed; others stay.
        """
        target = self.directory / name
        with temporary_directory(target) as temporary:
            yield temporary
            settle(temporary)
            files = [path.relative_to(temporary) for path in temporary.rglob("*") if not path.is_dir()]
            self.clear(name)
            if target.is_symlink() or (target.exists() and not target.is_dir()):
                set_aside(target)
            if target.exists() and any(target.iterdir()):  # what is left is the user's
                for file in files:
                    os.replace(temporary / file, self.claim(target / file))
            else:
                self._manifest.add(*(target / file for file in files))
                temporary.rename(target)

    def begin(self) -> None:
        """Takes the directory for this run; a second call does nothing.

        Removes what belongs to a history that the run does not continue. Until then the directory stays as it
        was, so that a refused run changes nothing.
        """
        if self._metrics is not None:
            return
        path = self.directory / "metrics.jsonl"
        kept = self.resumed.state if self.resumes_in_place else {"metrics_offset": 0, "metrics_sha256": ""}
        offset = kept["metrics_offset"]
        digest = metric_writers.digest(path, offset)
        if offset and digest.hexdigest() != kept["metrics_sha256"]:
            raise CheckpointError(
                f"{path} has lost or changed lines since {self.resumed.path.name} was written; "
                "resume into a new directory with --resume=PATH"
            )
        log = self.config.log
        writers = [self._wandb_writer()] if log.wandb != "off" else []
        if not self.resumes_in_place and self.checkpoints.steps():
            # An interrupted save had moved it aside, where the launcher did not see it.
            raise ConfigError(f"{self.directory} has a checkpoint; start again to resume from it")
        self._changed = True
        self._manifest.rewrite()
        self.clear("result.json", "report.html", "images/test_*")
        self.claim("config.gin").write_text(configuration.bindings_as_gin(self.bindings))
        self.claim("operative.gin").write_text(configuration.as_gin(self.config))
        write_json(self.claim("config.json"), configuration.as_dict(self.config))
        self._environment = provenance.describe(
            self.directory,
            command=list(self.command),
            **self._identity(),
            resumed_from=str(self.resumed.path) if self.resumed else None,
            data=self.data,
        )
        write_json(self.claim("environment.json"), self._environment)
        first = 0
        if self.resumes_in_place:
            self.checkpoints.remove_after(self.resumed.step)
            self.checkpoints.retain()
            first = self.resumed.step + 1
        if log.tensorboard:
            events = metric_writers.events_file(self.directory / "tensorboard")
            writers.append(metric_writers.TensorBoardWriter(self.claim(events), first))
        seconds = time.perf_counter() - self._opened_at
        seconds += self.resumed.state["seconds"] if self.resumed else 0
        path = path if offset else self.claim(path)
        self._metrics = metric_writers.Metrics(path, writers, offset=offset, digest=digest, seconds=seconds)
        self._metrics.last_step = self.resumed.step if self.resumed else 0

    def use_data(self, info: Any, **more: Any) -> None:
        """Records and prints which data is used; `DataError` if it is not that of a resumed run's checkpoint.

        `info` is a dataclass that has at least `source`, `sha256` and `describe()`, one line for the console.
        """
        note(info.describe())
        self.data = {**dataclasses.asdict(info), **more}
        if self.mode != "view" and isinstance(place := self.data.get("path"), (str, Path)):
            check_apart(self.directory, place, "the data")
        if self.resumed is not None and self.mode == "train":
            before = self.resumed.state["data"]
            if before.get("sha256") != info.sha256:
                raise DataError(
                    f"the data has changed since {self.resumed.path.name}: it was {_short(before)}, now it "
                    f"is {_short(self.data)}; give the same data"
                )
        if self._metrics is not None:
            self._environment["data"] = self.data
            write_json(self.claim("environment.json"), self._environment)

    def trained_on_this_data(self) -> bool:
        """For evaluation: whether the checkpoint was trained on the data in use; prints a note if not."""
        trained_on = self.resumed.state["data"] if self.resumed else {}
        if trained_on.get("sha256") == self.data.get("sha256"):
            return True
        note(
            f"note: the model was trained on other data ({_short(trained_on)}), which may overlap with the "
            "test data"
        )
        return False

    def save_checkpoint(
        self,
        step: int,
        position: Mapping[str, Any],
        write: Callable[[Path], Mapping[str, Any] | None],
        metrics: Mapping[str, float],
    ) -> Path:
        """Saves the experiment's files, as `Checkpoints.save` does, with everything that a resume needs.

        The loop's JSON values are found again under ``position``. `RunError` if the directory is gone.
        """
        if not self._in_place():
            raise RunError(self._gone())
        content = {
            **self._identity(),
            "checkpoint_format": self.checkpoint_format,
            "seed": self.config.run.seed,
            "config": configuration.as_dict(self.config),
            "data": self.data,
            **self.metrics.mark(),
            "seconds": self.metrics.seconds,
            "position": dict(position),
        }
        return self.checkpoints.save(step, content, write, metrics)

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        """Writes `result.json`, then the report; `status` is ``done`` or ``stopped``."""
        self.metrics.flush()
        times = {"seconds": round(self.metrics.seconds, 3), "peak_memory_bytes": provenance.peak_memory()}
        self._write_result(status, {**times, "data": self.data, **result})

    def stopped(self, result: Mapping[str, Any] | None = None) -> int:
        """Ends the run early: writes the `result`, prints how to resume; returns the exit status."""
        if self.mode != "train":
            print("stopped", file=sys.stderr)
            return STOPPED
        self.begin()
        result = result or {}
        self.finish("stopped", result)
        command = list(self.command)
        if not any(part.startswith("--workdir") for part in command):
            command.append(f"--workdir={self.directory}")
        if not self.checkpoints.steps():
            print(f"stopped before anything was saved. To start again: {shlex.join(command)}")
            return STOPPED
        if any(part.lstrip("-").startswith("resume") for part in command):
            command.append("--resume=auto")  # the last one counts
        step = f" at step {result['step']}" if "step" in result else ""
        print(f"stopped{step}. To resume: {shlex.join(command)}")
        return STOPPED

    def _identity(self) -> dict[str, str]:
        return {"experiment": self.experiment, "backend": self.backend, "device": self.device}

    def _wandb_writer(self) -> metric_writers.WandbWriter:
        import wandb

        log = self.config.log
        try:
            return metric_writers.WandbWriter(
                self.directory, log.wandb, log.wandb_project, configuration.as_dict(self.config)
            )
        except wandb.errors.Error as error:
            reason = first_line(error)
            raise ConfigError(f"Log.wandb = {log.wandb!r}: {reason}; or set it to 'offline'") from error

    def _record_failure(self, error: BaseException) -> None:
        """Writes that the run failed, as far as the disk permits."""
        with contextlib.suppress(Exception):
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                message = f"aborted by {self.stop.signal or 'SIGINT'}"
            step = self._metrics.last_step if self._metrics else 0
            self._write_result("failed", {"error": message, "step": step, "data": self.data})

    def _write_result(self, status: str, result: Mapping[str, Any]) -> None:
        self.ended = True
        write_json(self.claim("result.json"), {"status": status, **self._identity(), **result})
        if self.write_report is not None:
            self.claim("report.html")
            try:
                self.write_report(self.directory)
            except Exception as error:
                note(f"warning: no report: {type(error).__name__}: {error}")

    def _close(self) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):
                self._metrics.close()


def _short(data: Mapping[str, Any]) -> str:
    """Recorded data in a few words: its source and the beginning of its hash."""
    return f"{data.get('source')} {str(data.get('sha256'))[:12]}" if data else "unknown data"


def checkpoints_of(directory: Path, config: Any) -> Checkpoints:
    """The checkpoints in a directory of ``step_*`` under a configuration's retention rules."""
    rules = config.checkpoint
    return Checkpoints(directory, rules.keep_last, rules.keep_best, rules.metric, rules.mode)


def check_directory(directory: Path, config: Any) -> None:
    """Raises `ConfigError` if a run with `config` must not use a directory."""
    for setting, place in configuration.locations(config).items():
        check_apart(directory, place, f"what {setting} names")
    check_ours(directory)


def check_resume(
    saved: Saved, config: Any, experiment: str, checkpoint_format: str, *, mode: str = "train"
) -> None:
    """Raises a `UserError` if a run with `config` cannot resume from `saved`, or evaluate or export it."""
    if saved.state["checkpoint_format"] != checkpoint_format:
        raise CheckpointError(
            f"{saved.path} was written by {saved.state['experiment']} in the format "
            f"{saved.state['checkpoint_format']} but {experiment} reads {checkpoint_format}"
        )
    different = configuration.changes(config, saved.state["config"], forbidden_in=mode)
    if different:
        shown = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in different.items())
        cure = f"use --gin_file={saved.path.parent.parent / 'config.gin'}"
        cure += ", or start without --resume in a new --workdir" if mode == "train" else ""
        raise ConfigError(f"settings differ from the checkpoint {saved.path}: {shown}; {cure}")


def _full_disk(error: Exception) -> str | None:
    """The reason where a full disk or quota is behind `error`: libraries hide the OSError in a message."""
    reasons = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
    if isinstance(error, OSError) and error.errno in reasons:
        return reasons[error.errno]
    return next((reason for reason in reasons.values() if reason in str(error)), None)
