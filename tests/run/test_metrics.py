"""The metric stream: its file, TensorBoard, Weights & Biases."""

import contextlib
import hashlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from blacksmith.errors import DataError
from blacksmith.run import metrics
from blacksmith.run.metrics import Metrics, TensorBoardWriter, events_file, is_timed

# metrics.jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@contextlib.contextmanager
def _opened(path, writers=(), **options):
    stream = Metrics(path, writers, **options)
    yield stream
    stream.close()


def test_a_line_has_step_epoch_seconds_split_and_the_values(path):
    with _opened(path) as stream:
        stream.write(50, 1 / 3, "train", {"loss": np.float32(0.1), "accuracy": 0.1 + 0.2})
        stream.write(60, 2.0, "val", {"loss": 1})
    first, second = map(json.loads, path.read_text().splitlines())
    assert list(first) == ["step", "epoch", "seconds", "split", "loss", "accuracy"]
    assert first.pop("seconds") >= 0
    # Values keep all their bits; float32 is widened.
    expected = {"step": 50, "epoch": 0.333333, "split": "train", "accuracy": 0.30000000000000004}
    assert first == expected | {"loss": float(np.float32(0.1))}
    assert second["loss"] == 1.0
    assert metrics.read(path)[0] == first | {"seconds": metrics.read(path)[0]["seconds"]}


def test_numbers_that_are_not_finite_are_valid_json(path):
    with _opened(path) as stream:
        stream.write(1, 0, "train", {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (line,) = metrics.read(path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"], line["d"]) == (math.inf, -math.inf, 1.5)


def test_a_line_can_be_read_as_soon_as_it_is_written(path):
    with _opened(path) as stream:
        stream.write(1, 0, "train", {"loss": 1.0})
        assert len(metrics.read(path)) == 1


def test_a_mark_is_the_place_up_to_which_a_resume_keeps_the_file(path):
    def mark_of_all():
        return {
            "metrics_offset": path.stat().st_size,
            "metrics_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }

    with _opened(path) as stream:
        assert stream.mark() == mark_of_all()
        stream.write(1, 0, "train", {"loss": 1.0})
        mark = stream.mark()
        assert mark == mark_of_all()
        stream.write(2, 0, "train", {"loss": 2.0})
    offset = mark["metrics_offset"]
    with _opened(path, offset=offset, digest=metrics.digest(path, offset)) as stream:
        assert [line["step"] for line in metrics.read(path)] == [1]
        stream.write(3, 0, "train", {"loss": 3.0})
        assert stream.mark() == mark_of_all()
    assert [line["step"] for line in metrics.read(path)] == [1, 3]


def test_without_an_offset_an_old_file_is_emptied(path):
    path.write_text("old\n")
    with _opened(path):
        pass
    assert path.read_text() == ""


def test_seconds_continue_those_of_the_run_before(path):
    with _opened(path, seconds=1000) as stream:
        stream.write(1, 0, "train", {})
        assert stream.seconds > 1000
    assert metrics.read(path)[0]["seconds"] >= 1000


def _line(step):
    return {"step": step, "epoch": 0.5, "seconds": 1.5, "split": "train"}


@pytest.mark.parametrize("tail", [b'{"step": 3, "ep', b"{", b"\0\0\0", b'{"note": "\xc3'])
def test_read_leaves_out_a_last_line_that_a_crash_cut_short(path, tail):
    path.write_bytes(json.dumps(_line(1)).encode() + b"\n" + json.dumps(_line(2)).encode() + b"\n" + tail)
    assert metrics.read(path) == [_line(1), _line(2)]


@pytest.mark.parametrize("broken", ['{"step": 2, "ep', "[1]", '{"loss": 1}', ""])
def test_read_refuses_a_broken_line_before_the_last(path, broken):
    path.write_text(f"{json.dumps(_line(1))}\n{broken}\n{json.dumps(_line(3))}\n")
    with pytest.raises(DataError, match=f"{path.name} line 2 is broken"):
        metrics.read(path)


def test_timed_values_are_seconds_and_rates():
    names = ("seconds", "seconds_per_frame", "tokens_per_second", "loss", "milliseconds_lost")
    assert [is_timed(name) for name in names] == [True, True, True, False, False]


def test_read_of_an_empty_file_is_empty(path):
    path.write_text("")
    assert metrics.read(path) == []


class _Recorder:
    """A writer that records its calls; `close` can be made to fail."""

    def __init__(self, fails=False):
        self.calls = []
        self._fails = fails

    def scalars(self, step, split, values):
        self.calls.append((step, split, dict(values)))

    def histogram(self, step, name, values):
        self.calls.append((step, name, values.tolist()))

    def image(self, step, name, pixels):
        self.calls.append((step, name, pixels.shape))

    def close(self):
        self.calls.append("close")
        if self._fails:
            raise OSError("the disk is full")


def test_every_writer_gets_everything(path):
    writers = [_Recorder(), _Recorder()]
    with _opened(path, writers) as stream:
        stream.write(1, 0.5, "val", {"loss": 2})
        stream.histogram(1, "weights/a", np.arange(3))
        stream.image(1, "views/a", np.zeros((2, 4, 3), np.uint8))
    expected = [(1, "val", {"loss": 2.0}), (1, "weights/a", [0, 1, 2]), (1, "views/a", (2, 4, 3))]
    for writer in writers:
        assert writer.calls == [*expected, "close"]


def test_close_closes_every_writer_once_also_when_one_fails(path):
    writers = [_Recorder(fails=True), _Recorder(fails=True), _Recorder()]
    stream = Metrics(path, writers)
    with pytest.raises(OSError, match="the disk is full"):
        stream.close()
    stream.close()
    assert [writer.calls for writer in writers] == [["close"]] * 3


# TensorBoard


def _events(directory):
    """What TensorBoard itself reads from a log directory."""
    from tensorboard.backend.event_processing import event_accumulator as tensorboard

    guidance = {tensorboard.SCALARS: 0, tensorboard.HISTOGRAMS: 0, tensorboard.IMAGES: 0}
    return tensorboard.EventAccumulator(str(directory), guidance).Reload()


def test_tensorboard_reads_the_scalars(tmp_path, path):
    with _opened(path, [TensorBoardWriter(events_file(tmp_path))]) as stream:
        for step in (10, 20):
            stream.write(step, 0.5, "train", {"loss": step / 8, "accuracy": 0.5})
        stream.write(20, 0.5, "val", {"loss": math.nan})
    events = _events(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["train/accuracy", "train/loss", "val/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.25), (20, 2.5)]
    assert math.isnan(events.Scalars("val/loss")[0].value)


def test_tensorboard_reads_the_histograms(tmp_path):
    writer = TensorBoardWriter(events_file(tmp_path))
    values = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    writer.histogram(5, "weights/a", values)
    writer.histogram(5, "weights/constant", np.full(7, 2.0))
    writer.close()
    events = _events(tmp_path)
    assert sorted(events.Tags()["histograms"]) == ["weights/a", "weights/constant"]
    (event,) = events.Histograms("weights/a")
    read = event.histogram_value
    assert event.step == 5
    assert (read.num, read.min, read.max) == (1200, values.min(), values.max())
    assert sum(read.bucket) == 1200
    assert len(read.bucket) == len(read.bucket_limit) == 30
    # Sums of 1,200 float64 values: their rounding alone.
    assert read.sum == pytest.approx(values.sum(dtype=np.float64), rel=1e-9)
    assert read.sum_squares == pytest.approx(np.square(values, dtype=np.float64).sum(), rel=1e-9)
    below_zero = sum(n for n, limit in zip(read.bucket, read.bucket_limit) if limit <= 0)
    assert below_zero <= (values <= 0).sum() <= below_zero + max(read.bucket)
    assert sum(events.Histograms("weights/constant")[0].histogram_value.bucket) == 7


def test_a_histogram_is_of_the_finite_values(tmp_path):
    writer = TensorBoardWriter(events_file(tmp_path))
    writer.histogram(1, "some", np.array([math.nan, 1.0, math.inf, 3.0]))
    writer.histogram(1, "none", np.array([math.nan]))
    writer.close()
    events = _events(tmp_path)
    assert events.Tags()["histograms"] == ["some"]
    assert events.Histograms("some")[0].histogram_value.num == 2


def test_tensorboard_reads_the_pictures_to_the_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    writer = TensorBoardWriter(events_file(tmp_path))
    writer.image(10, "views/a", pixels)
    writer.image(20, "views/a", 255 - pixels)
    writer.close()
    events = _events(tmp_path)
    assert events.Tags()["images"] == ["views/a"]
    first, second = events.Images("views/a")
    assert (first.step, first.width, first.height, second.step) == (10, 7, 5, 20)
    for event, expected in ((first, pixels), (second, 255 - pixels)):
        read = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        np.testing.assert_array_equal(read, expected)


def test_tensorboard_drops_later_events_after_a_resume(tmp_path):
    first = TensorBoardWriter(events_file(tmp_path))
    for step in (10, 20, 30):
        first.scalars(step, "train", {"loss": 1.0})
        first.histogram(step, "weights", np.ones(3))
    first.close()
    second = TensorBoardWriter(events_file(tmp_path), first_step=21)
    second.scalars(30, "train", {"loss": 2.0})
    second.histogram(30, "weights", np.ones(4))
    second.close()
    events = _events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    found = [(e.step, e.histogram_value.num) for e in events.Histograms("weights")]
    assert found == [(10, 3), (20, 3), (30, 4)]


# Weights & Biases

OFFLINE_RUN = """
import sys
from pathlib import Path
import numpy as np
from blacksmith.run.metrics import Metrics, WandbWriter

directory = Path(sys.argv[1])
for _ in range(2):  # the second continues the first
    writer = WandbWriter(directory, "offline", "forge-project", {"train": {"epochs": 3}})
    stream = Metrics(directory / "metrics.jsonl", [writer])
    stream.write(10, 0.5, "train", {"loss": float("nan"), "accuracy": 0.5})
    stream.histogram(10, "weights/a", np.array([1.0, 2.0, float("inf")]))
    stream.histogram(10, "weights/none", np.array([float("nan")]))
    stream.image(10, "views/a", np.full((2, 3, 3), 7, np.uint8))
    stream.write(10, 0.5, "val", {"loss": 0.25})
    stream.flush()
    stream.close()
"""


@pytest.fixture
def proxy():
    """A proxy that serves nobody: its address, and the connections that were tried."""
    tried = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    tried.append(address)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", tried


def test_wandb_offline_writes_only_into_the_run_directory(tmp_path, proxy):
    pytest.importorskip("wandb")
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    run.mkdir()
    address, tried = proxy
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), address)
    environment |= {"HOME": str(home), "NO_PROXY": "", "no_proxy": ""}
    command = [sys.executable, "-c", OFFLINE_RUN, str(run)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert list(home.iterdir()) == []
    assert tried == []
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "wandb"]
    records = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 2
    for record in records:
        content = record.read_bytes()
        for name in (b"forge-project", b"train/loss", b"train/accuracy", b"val/loss", b"weights/a"):
            assert name in content
        assert b"weights/none" not in content
        assert b"views/a" in content


def test_wandb_asks_for_no_key_on_a_terminal(tmp_path):
    pytest.importorskip("wandb")
    code = "import pathlib; from blacksmith.run.metrics import WandbWriter\n"
    code += "WandbWriter(pathlib.Path(), 'online', 'a-project', {})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    master, terminal = os.openpty()
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(tmp_path), "TERM": "xterm"},
        cwd=tmp_path,
        stdin=terminal,
        stderr=terminal,
    )
    assert command.wait(60) == 1
    assert b"No API key configured" in os.read(master, 10_000)
