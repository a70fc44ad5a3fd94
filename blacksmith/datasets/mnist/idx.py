"""Reads the four standard idx files of MNIST, gzipped or not, and refuses anything else.

The format is described with the original dataset: a big-endian magic number, a 32-bit count per dimension,
then the bytes. `load` serves `source="idx"`. Preparing a TFDS set reads the downloads with `read_pair`.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from blacksmith.datasets.mnist.arrays import SIDE, Arrays
from blacksmith.errors import DataError

CLASSES = 10

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

_IMAGES_MAGIC = 0x00000803  # unsigned byte, 3 dimensions
_LABELS_MAGIC = 0x00000801  # unsigned byte, 1 dimension


def find(directory: Path, name: str) -> Path | None:
    """The file of that standard name, or None.

    `train-images.idx3-ubyte` is the same as `train-images-idx3-ubyte`, and either may end in `.gz`. The plain
    file is preferred because it loads faster.
    """
    dotted = name.replace("-idx", ".idx")
    candidates = (directory / f"{stem}{end}" for end in ("", ".gz") for stem in (name, dotted))
    return next((path for path in candidates if path.is_file()), None)


def present(directory: Path) -> int:
    """How many of the four files the directory has."""
    return sum(find(directory, name) is not None for name in NAMES)


def load(directory: Path) -> Arrays:
    """Reads both sets from a directory.

    Raises:
      DataError: a file is missing or broken, or images and labels differ in number.
    """
    train_images, train_labels = _read_pair(directory, TRAIN_IMAGES, TRAIN_LABELS)
    test_images, test_labels = _read_pair(directory, TEST_IMAGES, TEST_LABELS)
    return Arrays(train_images, train_labels, test_images, test_labels, CLASSES)


def _read_pair(directory: Path, images: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    return read_pair(_required(directory, images), _required(directory, labels))


def _required(directory: Path, name: str) -> Path:
    path = find(directory, name)
    if path is None:
        raise DataError(
            f"{directory}: no {name} (nor {name}.gz); `python -m blacksmith.assets mnist` fetches the four "
            "idx files of MNIST"
        )
    return path


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one set: images uint8 [samples, 28, 28], labels uint8 [samples].

    Raises:
      DataError: either file is broken, or they differ in number.
    """
    images, labels = read_images(images_path), read_labels(labels_path)
    if len(images) != len(labels):
        raise DataError(
            f"{images_path}: {len(images)} images, but {labels_path.name} has {len(labels)} labels"
        )
    return images, labels


def read_images(path: Path) -> np.ndarray:
    """Reads an idx3 file: uint8 [samples, 28, 28].

    Raises:
      DataError: the file is not idx3, truncated, too long or empty, or its images are not 28x28.
    """
    (count, height, width), body = _read(path, _IMAGES_MAGIC, dimensions=3)
    if (height, width) != (SIDE, SIDE):
        raise DataError(f"{path}: images of {height}x{width} pixels, expected {SIDE}x{SIDE}")
    return _items(path, body, count, SIDE * SIDE).reshape(count, SIDE, SIDE)


def read_labels(path: Path) -> np.ndarray:
    """Reads an idx1 file: uint8 [samples], each from 0 to 9.

    Raises:
      DataError: the file is not idx1, truncated, too long or empty, or a label is out of range.
    """
    (count,), body = _read(path, _LABELS_MAGIC, dimensions=1)
    labels = _items(path, body, count, 1)
    if labels.max() >= CLASSES:
        at = int(np.argmax(labels >= CLASSES))
        raise DataError(f"{path}: label {labels[at]} at position {at}, expected 0 to {CLASSES - 1}")
    return labels


def _read(path: Path, magic: int, dimensions: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the counts in the header and the bytes after it: uint8 [bytes]."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path}: truncated, {len(content)} bytes where the header alone is {header}")
    found, *counts = struct.unpack_from(f">{1 + dimensions}I", content)
    if found != magic:
        raise DataError(f"{path}: magic number {found:#010x}, expected {magic:#010x}")
    return tuple(counts), np.frombuffer(content, np.uint8, offset=header)


def _items(path: Path, body: np.ndarray, count: int, item_bytes: int) -> np.ndarray:
    if count == 0:
        raise DataError(f"{path}: empty, its header says 0 items")
    expected = count * item_bytes
    if len(body) != expected:
        fault = "truncated" if len(body) < expected else "trailing bytes"
        raise DataError(f"{path}: {fault}, {len(body)} bytes of data where {count} items need {expected}")
    return body
