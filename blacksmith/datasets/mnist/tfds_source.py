"""MNIST and datasets of the same shape from TensorFlow Datasets (TFDS), without TensorFlow.

A prepared set is read once and kept in the cache as plain arrays, so that later loads are fast and do not
import tensorflow_datasets.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from blacksmith import files
from blacksmith.datasets.mnist import idx
from blacksmith.datasets.mnist.arrays import SIDE, Arrays
from blacksmith.errors import DataError, first_line, shown
from blacksmith.network import why_unreachable

# Class names in tensorflow_datasets.image_classification.mnist; all download idx files.
PREPARABLE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


FORMATS = ("PNG", "JPEG")  # what TFDS encodes images as


def default_data_dir() -> Path:
    """TFDS's own default: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    given = os.environ.get("TFDS_DATA_DIR")
    return files.absolute(given) if given else files.in_home("tensorflow_datasets")


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The directory of the newest prepared version of a set, or None. Imports nothing."""
    versions = [
        path
        for path in (data_dir / name).glob("*")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")], default=None)


def load(name: str, data_dir: Path) -> tuple[Arrays, Path]:
    """Reads a TFDS set through the array cache; downloads and prepares it if it is not on disk.

    Returns:
      The arrays, in TFDS's own shuffled order, and the directory of the prepared set.

    Raises:
      DataError: TFDS is missing, or the set cannot be prepared or read or is not 28x28 grayscale.
    """
    prepared = find_prepared(name, data_dir) or prepare(name, data_dir)
    cached = _cache_path(prepared)
    if cached.is_file():
        # A broken cache is read from the source and written again.
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(cached, allow_pickle=False) as archive:
                *parts, classes = (archive[field] for field in Arrays._fields)
            return Arrays(*parts, int(classes)), prepared
    tfds = _import_tfds()
    try:
        _check_features(prepared)
        builder = tfds.builder_from_directory(prepared)
        classes = builder.info.features["label"].num_classes
        parts = [_read_split(tfds, builder, split, classes) for split in ("train", "test")]
    except Exception as error:  # TFDS, protobuf and Pillow raise many types for a broken set
        raise DataError(f"{prepared}: cannot be read ({_summary(error)})") from error
    arrays = Arrays(*parts[0], *parts[1], classes)
    with contextlib.suppress(OSError):  # without a cache, only the next load is slow
        cached.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(cached) as stream:
            np.savez(stream, **arrays._asdict())
    return arrays, prepared


def _check_features(prepared: Path) -> None:
    """Raises ValueError if ``features.json`` names a class outside of TFDS: its module would be imported."""

    def check(content: dict[str, Any]) -> None:
        for key in ("pythonClassName", "python_class_name"):  # protobuf reads both
            name = content.get(key, "tensorflow_datasets.")
            if not (isinstance(name, str) and name.startswith("tensorflow_datasets.")):
                raise ValueError(f"features.json names the class {shown(name)}, which is not one of TFDS")

    json.loads((prepared / "features.json").read_text(), object_hook=check)


def readable(prepared: Path) -> bool:
    """Whether the set is in the array cache or TFDS is installed."""
    return _cache_path(prepared).exists() or importlib.util.find_spec("tensorflow_datasets") is not None


def _cache_path(prepared: Path) -> Path:
    """A path that changes when the prepared set does."""
    stats = [(path.name, path.stat()) for path in sorted(prepared.iterdir())]
    listing = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return files.cache_dir() / "tfds" / f"{prepared.parent.name}-{prepared.name}-{digest[:16]}.npz"


def _read_split(tfds: ModuleType, builder: Any, split: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [samples, 28, 28] and labels uint8 [samples], in stored order."""
    count = builder.info.splits[split].num_examples
    images, labels = [], []
    skip = {"image": tfds.decode.SkipDecoding()}
    for record in _records(tfds, builder, split):
        example = builder.info.features.deserialize_example_np(record, decoders=skip)
        with Image.open(io.BytesIO(example["image"]), formats=FORMATS) as picture:
            # Before it is unpacked: a few bytes may claim to be gigabytes of pixels.
            if picture.size != (SIDE, SIDE):
                raise ValueError(f"split {split} has an image of {picture.size} pixels; expected 28 x 28")
            image, label = np.asarray(picture), example["label"]
        if image.shape != (SIDE, SIDE) or image.dtype != np.uint8 or not 0 <= label < min(classes, 256):
            raise ValueError(
                f"split {split} has an image {image.dtype} {list(image.shape)} with label {label}; expected "
                f"uint8 [28, 28] and less than {classes} classes, at most 256"
            )
        images.append(image)
        labels.append(label)
    if not len(images) == count > 0:
        raise ValueError(f"split {split} has {len(images)} records, but {count} are declared")
    return np.stack(images), np.array(labels, np.uint8)


def _records(tfds: ModuleType, builder: Any, split: str) -> Iterable[bytes]:
    """The serialized examples of a split in stored order."""
    if builder.info.file_format.value == "tfrecord":
        return (record for path in builder.info.splits[split].filepaths for record in _tfrecords(Path(path)))
    source = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return source.__getitems__(range(len(source)))


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file, TFDS's default format, which TFDS reads only with TensorFlow.

    A record is its length (8 bytes), the length's CRC (4), the data and the data's CRC (4). The CRCs are not
    checked: every PNG has its own checksum, and records are counted.
    """
    content = path.read_bytes()
    at = 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        start, at = at + 12, at + 16 + length
        if at > len(content):
            raise ValueError(f"{path.name} is truncated")
        yield content[start : start + length]


def prepare(name: str, data_dir: Path) -> Path:
    """Downloads one of `PREPARABLE`, writes it as array_record and returns its directory.

    TFDS verifies the checksums.
    """
    if name not in PREPARABLE:
        raise DataError(
            f"TFDS set {name!r} is not prepared in {data_dir}; prepare it with TFDS, or choose one that "
            f"blacksmith can prepare: {', '.join(PREPARABLE)}"
        )
    tfds = _import_tfds()
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.image_classification import mnist

    stock_builder = getattr(mnist, PREPARABLE[name])
    if (reason := why_unreachable(stock_builder.URL)) is not None:
        raise DataError(
            f"TFDS set {name!r} is not prepared in {data_dir} and cannot be downloaded ({reason}); "
            "connect and run again, copy a prepared directory there, or use source='mnist5k'"
        )

    # TFDS's own builder reads and encodes with TensorFlow; this subclass does not. It has the same name and
    # must not be registered.
    with tfds.core.registered.skip_registration():

        class Builder(stock_builder):
            def _split_generators(self, dl_manager: Any) -> dict[str, Iterable]:
                paths = dl_manager.download([f"{self.URL}{name}.gz" for name in idx.NAMES])
                return {"train": _examples(*paths[:2]), "test": _examples(*paths[2:])}

    Builder.name = name
    downloader.MAX_RETRIES = 2  # TFDS's 10 retries with growing delays take over 200 s
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder = Builder(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        raise DataError(f"TFDS set {name!r} cannot be prepared in {data_dir} ({_summary(error)})") from error
    return Path(builder.data_path)


def _examples(images_path: Path, labels_path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    images, labels = idx.read_pair(Path(images_path), Path(labels_path))
    for index, (image, label) in enumerate(zip(images, labels)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        yield index, {"image": png.getvalue(), "label": int(label)}


def _import_tfds() -> ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(f"source 'tfds' needs {error.name}; run pip install '.[tfds]'") from error
    return tensorflow_datasets


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
