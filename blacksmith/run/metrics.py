"""The metric stream of a run: `metrics.jsonl` always, TensorBoard by default, Weights & Biases on request."""

import contextlib
import hashlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith.errors import DataError, RunError
from blacksmith.files import parse_json

MAX_BYTES = 2**28  # of a `metrics.jsonl` that is read: a million lines
_PLACE = ("step", "epoch", "seconds", "split")  # on every line, beside the values


def is_timed(name: str) -> bool:
    """Whether a value of this name is a time or a rate, which differs between two identical runs."""
    return name.startswith("seconds") or name.endswith("_per_second")


class TensorBoardWriter:
    """TensorBoard events in a new file; earlier ones in its directory from `first_step` on are forgotten."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        # No EventFileWriter: its errors, a full disk for example, show up as a traceback from a thread.
        self._file = path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # TensorBoard drops events at or after a restart's step when it meets this record.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._add(step, *({"tag": f"{split}/{name}", "simple_value": v} for name, v in values.items()))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        values = _finite_values(values)
        if not values.size:
            return
        counts, edges = np.histogram(values, bins=30)
        histogram = self._summary.HistogramProto(
            min=values.min(),
            max=values.max(),
            num=values.size,
            sum=values.sum(),
            sum_squares=np.square(values).sum(),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._add(step, {"tag": name, "histo": histogram})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        from PIL import Image

        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        height, width, channels = pixels.shape
        picture = self._summary.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue()
        )
        self._add(step, {"tag": name, "image": picture})

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, *values: dict[str, Any]) -> None:
        summary = self._summary.Summary
        self._write(step=step, summary=summary(value=[summary.Value(**value) for value in values]))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


def events_file(directory: Path) -> Path:
    """The path of a new file of TensorBoard events; readers take them in the order of their names."""
    number = len(list(directory.glob("*.tfevents.*")))
    return directory / (
        f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{number}"
    )


class WandbWriter:
    """Weights & Biases: the run's `config` is logged, and its files are kept in the run's directory."""

    def __init__(self, directory: Path, mode: str, project: str, config: Mapping[str, Any]) -> None:
        directory = directory.resolve()
        # Read by wandb when imported: else its logs go into the user's home, and it reports home offline.
        os.environ.setdefault("WANDB_CACHE_DIR", str(directory / "wandb" / "cache"))
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        with _no_standard_input():  # without a key, wandb would ask for one on a terminal
            self._run = wandb.init(
                project=project,
                mode=mode,
                dir=str(directory),
                name=f"{directory.parent.name}/{directory.name}",
                id=hashlib.sha256(str(directory).encode()).hexdigest()[:16],
                resume="allow" if mode == "online" else None,
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        values = _finite_values(values)
        if values.size:
            self._run.log({name: self._wandb.Histogram(values)}, step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def _no_standard_input() -> Iterator[None]:
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = stdin


class Metrics:
    """The metric stream of one run, in a JSON-lines file and the `writers`.

    A resumed run keeps the first `offset` bytes of the file, which have this `digest`, and had already taken
    `seconds`.
    """

    def __init__(
        self,
        path: Path,
        writers: Sequence[TensorBoardWriter | WandbWriter] = (),
        *,
        offset: int = 0,
        digest: "hashlib._Hash | None" = None,
        seconds: float = 0,
    ) -> None:
        self._path, self._digest = path, digest or hashlib.sha256()
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(offset)
        self._file.seek(offset)
        self._writers = writers
        self._start = time.perf_counter() - seconds
        self.last_step = 0

    @property
    def seconds(self) -> float:
        """Wall seconds of the run so far, those before a resume included."""
        return time.perf_counter() - self._start

    def write(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes one line: scalar metrics of one split after `step` optimizer steps."""
        values = {name: float(value) for name, value in values.items()}
        self.last_step = step
        line = {"step": step, "epoch": round(epoch, 6), "seconds": round(self.seconds, 4), "split": split}
        # What is not finite becomes a string: JSON has no NaN.
        line |= {name: v if math.isfinite(v) else json.dumps(v) for name, v in values.items()}
        written = json.dumps(line).encode() + b"\n"
        self._file.write(written)
        self._file.flush()
        self._digest.update(written)
        for writer in self._writers:
            writer.scalars(step, split, values)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes the distribution of an array to the writers that can show one."""
        for writer in self._writers:
            writer.histogram(step, name, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8 [height, width, 3], to the writers."""
        for writer in self._writers:
            writer.image(step, name, pixels)

    def flush(self) -> None:
        """Puts `metrics.jsonl` on disk; `RunError` if it is no longer there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            there = False
        if not there:
            raise RunError(f"{self._path} was removed or replaced while the run was going; start again")

    def mark(self) -> dict[str, Any]:
        """Puts `metrics.jsonl` on disk; returns what a checkpoint needs to find and verify this place."""
        self.flush()
        return {"metrics_offset": self._file.tell(), "metrics_sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Flushes and closes the file and every writer, also when one of them fails."""
        if not self._file.closed:
            with contextlib.ExitStack() as stack:
                for closing in (self._file, *self._writers):
                    stack.callback(closing.close)


def digest(path: Path, offset: int) -> "hashlib._Hash":
    """The sha256 of the first `offset` bytes of a file, or of as many as there are."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as stream:
            while offset and (part := stream.read(min(offset, 2**20))):
                digest.update(part)
                offset -= len(part)
    return digest


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, except a last one cut short; `DataError` if another is broken."""
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES >> 20} MiB; log less with Log.every_steps")
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(parse_json(line.decode())))
        except (ValueError, OverflowError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is broken: {error}") from error
    return rows


def _row(row: Any) -> dict[str, Any]:
    """A line with numbers in place of ``"NaN"`` and the like; `ValueError` if it is not one of ours."""
    if not isinstance(row, dict) or not row.keys() >= set(_PLACE):
        raise ValueError(f"not an object with {', '.join(_PLACE)}")
    row = {k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in row.items()}
    for name, value in row.items():
        if name == "split":
            valid = isinstance(value, str)
        elif name in _PLACE:
            valid = type(value) is int if name == "step" else type(value) in (int, float)
            valid = valid and math.isfinite(value)
        else:
            valid = type(value) is not int or math.isfinite(value)  # OverflowError if it is no float
        if not valid:
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    return row


def _finite_values(values: np.ndarray) -> np.ndarray:
    """The finite values of an array of any shape: float64 [values]."""
    values = np.asarray(values, np.float64).reshape(-1)
    return values[np.isfinite(values)]
