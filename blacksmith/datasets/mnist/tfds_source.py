"""MNIST and sets of its shape from TensorFlow Datasets, without TensorFlow.

A prepared set is read from its directory and kept as plain arrays in the cache, so that later loads
take a fraction of a second and do not import tensorflow_datasets at all. `mnist`, `fashion_mnist`
and `kmnist` can also be prepared here, from the URLs and checksums that TFDS itself carries.
"""

import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from blacksmith import assets, files
from blacksmith.datasets.mnist import idx
from blacksmith.datasets.mnist.arrays import SIDE, Arrays
from blacksmith.errors import DataError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

PREPARABLE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
"""TFDS name -> class in `tensorflow_datasets.image_classification.mnist`; all are idx files."""

MAX_CLASSES = 256

_NAME = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")

_log = logging.getLogger(__name__)


def default_data_dir() -> Path:
    """Returns TFDS's own default: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """Returns the directory of the newest version prepared on disk, or None; imports nothing.

    Args:
        name: TFDS name, with a configuration where the set has them: `emnist/balanced`.
        data_dir: TFDS data directory.

    Raises:
        DataError: the name is not of that form.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"TFDS name {name!r} is not of the form `mnist` or `emnist/balanced` (set/config)")
    versions = [
        (tuple(map(int, match.groups())), path)
        for path in sorted((data_dir / name).glob("*"))
        if (match := _VERSION.fullmatch(path.name))
        and (path / "dataset_info.json").is_file()
        and (path / "features.json").is_file()
    ]
    return max(versions)[1] if versions else None


def load(name: str, data_dir: Path) -> tuple[Arrays, Path]:
    """Reads a TFDS set, preparing it first (a download) when it is not on disk.

    Returns:
        The arrays, in TFDS's own shuffled order, and the directory of the prepared set.

    Raises:
        DataError: it cannot be prepared or read, or is not a 28x28 greyscale classification set.
    """
    prepared = find_prepared(name, data_dir) or prepare(name, data_dir)
    return read(prepared), prepared


# --- reading ---


def read(prepared: Path) -> Arrays:
    """Reads a prepared set, through the array cache.

    Raises:
        DataError: tensorflow_datasets is needed and missing, the files are broken, or the set is
            not a 28x28 greyscale classification set with a train and a test split.
    """
    cached = _cache_path(prepared)
    try:
        with np.load(cached, allow_pickle=False) as archive:
            *parts, classes = (archive[field] for field in Arrays._fields)
            return Arrays(*parts, int(classes))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not cached yet, or damaged: read the original and write it anew
    arrays = _decode(prepared)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(cached) as stream:
            np.savez(stream, **arrays._asdict())
    except OSError as error:
        _log.warning("cannot keep %s in the cache, the next load is slow: %s", prepared, error)
    return arrays


def readable(prepared: Path) -> bool:
    """Whether `read` can: the set is in the array cache, or the packages that read it are installed."""
    modules = ("tensorflow_datasets", "array_record", "importlib_resources", "PIL")
    return _cache_path(prepared).exists() or all(importlib.util.find_spec(m) for m in modules)


def _cache_path(prepared: Path) -> Path:
    """Returns a path named after the prepared set and everything that changes when it does."""
    digest = hashlib.sha256()
    for path in sorted(prepared.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name in ("dataset_info.json", "features.json"):
        digest.update((prepared / name).read_bytes())
    try:
        name = json.loads((prepared / "dataset_info.json").read_bytes())["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{prepared / 'dataset_info.json'}: broken ({error})") from error
    label = re.sub(r"[^a-z0-9_]", "_", str(name))
    return files.cache_dir() / "tfds" / f"{label}-{prepared.name}-{digest.hexdigest()[:16]}.npz"


def _decode(prepared: Path) -> Arrays:
    tfds = _import_tfds()
    try:
        builder = tfds.builder_from_directory(prepared)
        features, splits = builder.info.features, builder.info.splits
    except Exception as error:
        raise DataError(f"{prepared}: TFDS cannot read it ({_first_line(error)})") from error
    classes = _check_features(tfds, prepared, features)
    if not {"train", "test"} <= set(splits):
        raise DataError(f"{prepared}: splits {sorted(splits)}, expected train and test")
    parts = []
    for split in ("train", "test"):
        try:
            records = _records(tfds, builder, split)
            images, labels = _decode_split(tfds, features, records, splits[split].num_examples)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{prepared}: split {split} cannot be read ({_first_line(error)})") from error
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(f"{prepared}: split {split} has labels outside 0 to {classes - 1}")
        parts += [images, labels.astype(np.uint8)]
    return Arrays(*parts, classes)


def _check_features(tfds: ModuleType, prepared: Path, features: Any) -> int:
    """Returns the number of classes of a set that has the right features.

    Raises:
        DataError: it has others.
    """
    named = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = named.get("image"), named.get("label")
    if (
        not isinstance(image, tfds.features.Image)
        or tuple(image.shape) not in {(SIDE, SIDE), (SIDE, SIDE, 1)}
        or np.dtype(image.np_dtype) != np.uint8
    ):
        raise DataError(f"{prepared}: feature `image` is {image}, expected a uint8 28x28x1 image")
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise DataError(f"{prepared}: feature `label` is {label}, expected a class label")
    if label.num_classes > MAX_CLASSES:
        raise DataError(f"{prepared}: {label.num_classes} classes, at most {MAX_CLASSES} are read")
    return int(label.num_classes)


def _records(tfds: ModuleType, builder: "tfds.core.DatasetBuilder", split: str) -> Iterable[bytes]:
    """Returns the serialised examples of a split in stored order."""
    if builder.info.file_format.value == "tfrecord":
        paths = [Path(path) for path in builder.info.splits[split].filepaths]
        return (record for path in paths for record in _tfrecords(path))
    source = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return source.__getitems__(range(len(source)))


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file: length (8 bytes), its CRC (4), data, its CRC (4).

    TFDS reads this format, its default, with TensorFlow only. The CRCs are left unchecked:
    CRC-32C is not in the standard library, every image is a PNG with a checksum, and records are
    counted.

    Raises:
        DataError: the file ends within a record.
    """
    content = memoryview(path.read_bytes())
    at = 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        start, at = at + 12, at + 16 + length
        if at > len(content):
            raise DataError(f"{path}: truncated")
        yield bytes(content[start : start + length])


def _decode_split(
    tfds: ModuleType,
    features: Any,
    records: Iterable[bytes],
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [count, 28, 28] and labels int64 [count].

    Raises:
        ValueError: another number of records, or another image size.
    """
    from PIL import Image

    skip = {"image": tfds.decode.SkipDecoding()}
    images = np.empty((count, SIDE, SIDE), np.uint8)
    labels = np.empty(count, np.int64)
    seen = 0
    for record in records:
        if seen == count:
            raise ValueError(f"more records than the {count} announced")
        example = features.deserialize_example_np(record, decoders=skip)
        pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
        if pixels.shape != (SIDE, SIDE) or pixels.dtype != np.uint8:
            raise ValueError(f"record {seen} has an image {pixels.dtype} {list(pixels.shape)}")
        images[seen], labels[seen] = pixels, example["label"]
        seen += 1
    if seen != count or count == 0:
        raise ValueError(f"{seen} records where {count} are announced")
    return images, labels


# --- preparing ---


def prepare(name: str, data_dir: Path, base_url: str | None = None) -> Path:
    """Downloads a set with TFDS and writes it as array_record.

    The stock builders decode with TensorFlow, so a subclass of each, of the same name and version,
    reads the idx files with NumPy and hands over PNG bytes. TFDS checks the downloads against the
    checksums it carries.

    Args:
        name: one of `PREPARABLE`.
        data_dir: TFDS data directory.
        base_url: where the four files are instead of TFDS's own URL; its files have no checksum.

    Returns:
        The directory of the prepared set, such as `data_dir/mnist/3.0.1`.

    Raises:
        DataError: the name is not one of these, tensorflow_datasets is missing, the host cannot be
            reached (said within a few seconds), or the download is not what it should be.
    """
    if name not in PREPARABLE:
        raise DataError(
            f"TFDS set {name!r} is not prepared in {data_dir}; prepare it with TFDS, or take one "
            f"that can be prepared here: {', '.join(PREPARABLE)}"
        )
    tfds = _import_tfds()
    from tensorflow_datasets.image_classification import mnist as stock

    stock_builder = getattr(stock, PREPARABLE[name])
    url = base_url or stock_builder.URL
    if (reason := assets.why_unreachable(url)) is not None:
        raise DataError(
            f"TFDS set {name!r} is not prepared in {data_dir} and cannot be downloaded ({reason}); "
            "connect and run again, copy a prepared directory there, or use source='mnist5k'"
        )
    try:
        with _few_retries(), _quiet_unless_terminal(tfds):
            builder = _builder_class(tfds, name, stock_builder, url)(
                data_dir=data_dir, file_format="array_record"
            )
            builder.download_and_prepare()
    except Exception as error:
        # Another process may have finished the same preparation meanwhile.
        if (prepared := find_prepared(name, data_dir)) is not None:
            return prepared
        raise DataError(
            f"TFDS set {name!r} cannot be prepared in {data_dir} ({_first_line(error)})"
        ) from error
    return Path(builder.data_path)


def _builder_class(
    tfds: ModuleType, name: str, stock_builder: type, url: str
) -> "type[tfds.core.GeneratorBasedBuilder]":
    with tfds.core.registered.skip_registration():

        class Builder(stock_builder):
            """Idx files read with NumPy, images handed over as PNG."""

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterable]:
                got = dl_manager.download({stem: f"{url}{stem}.gz" for stem in idx.NAMES})
                return {
                    "train": _examples(got[idx.TRAIN_IMAGES], got[idx.TRAIN_LABELS]),
                    "test": _examples(got[idx.TEST_IMAGES], got[idx.TEST_LABELS]),
                }

        Builder.name = name
    return Builder


def _examples(images_path: Path, labels_path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from PIL import Image

    images, labels = idx.read_pair(Path(images_path), Path(labels_path))
    for index, (image, label) in enumerate(zip(images, labels)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        yield index, {"image": png.getvalue(), "label": int(label)}


@contextmanager
def _few_retries() -> Iterator[None]:
    """Keeps TFDS from retrying a failed download ten times with growing pauses (over 200 s)."""
    from tensorflow_datasets.core.download import downloader

    before, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 1
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before


@contextmanager
def _quiet_unless_terminal(tfds: ModuleType) -> Iterator[None]:
    """Turns progress bars off where they would fill a log file."""
    if sys.stderr.isatty():
        yield
        return
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _import_tfds() -> ModuleType:
    try:
        import array_record  # noqa: F401
        import PIL  # noqa: F401
        import tensorflow_datasets
        import tensorflow_datasets.image_classification.mnist
    except ImportError as error:
        raise DataError(
            f"source 'tfds' needs a package that is not installed ({error}); run pip install '.[tfds]'"
        ) from error
    return tensorflow_datasets


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
