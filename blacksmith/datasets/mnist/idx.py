"""Reads the four standard idx files of MNIST, gzipped or not, and refuses anything else.

`load` serves `source="idx"`; preparing a TFDS set reads the downloads with `read_pair`.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from blacksmith.datasets.mnist.arrays import SIDE, Arrays
from blacksmith.errors import DataError

CLASSES = 10
DEFLATE_RATIO = 1032  # a gzip file cannot unpack to more than this many times its size

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def find(directory: Path, name: str) -> Path | None:
    """The file of that standard name, also as `train-images.idx3-ubyte` or with `.gz`; None if missing."""
    dotted = name.replace("-idx", ".idx")
    # Uncompressed files come first because they load faster.
    candidates = (directory / f"{stem}{end}" for end in ("", ".gz") for stem in (name, dotted))
    return next((path for path in candidates if path.is_file()), None)


def present(directory: Path) -> bool:
    """Whether the directory has any of the four files."""
    return any(find(directory, name) for name in NAMES)


def load(directory: Path) -> Arrays:
    """Reads both sets from a directory; a missing or broken file raises `DataError`."""
    paths = [find(directory, name) for name in NAMES]
    if None in paths:
        missing = NAMES[paths.index(None)]
        raise DataError(
            f"{directory}: no {missing} (nor {missing}.gz); `python -m blacksmith.assets mnist` fetches the "
            "four idx files of MNIST"
        )
    return Arrays(*read_pair(*paths[:2]), *read_pair(*paths[2:]), CLASSES)


def read_pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one set: images uint8 [samples, 28, 28], labels uint8 [samples].

    Raises:
      DataError: a file is broken, the images are not 28x28, a label is not 0 to 9, or the numbers differ.
    """
    images, labels = _read(images_path, (SIDE, SIDE)), _read(labels_path, ())
    if labels.max() >= CLASSES:
        raise DataError(f"{labels_path}: has a label {labels.max()}, expected 0 to {CLASSES - 1}")
    if len(images) != len(labels):
        raise DataError(
            f"{images_path}: has {len(images)} images, but {labels_path.name} has {len(labels)} labels"
        )
    return images, labels


def _read(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """Reads an idx file of bytes: uint8 [samples, *item].

    The file is big-endian: a magic number, the size of each dimension in 32 bits, then the bytes. No more is
    read than the header says, and nothing if the file cannot hold as much.
    """
    magic = 0x801 + len(item)  # 8 for unsigned bytes, then the number of dimensions
    start = 4 * (2 + len(item))
    try:
        packed = path.suffix == ".gz"
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(start)
            header = [int.from_bytes(head[i : i + 4], "big") for i in range(0, start, 4)]
            size = math.prod(header[1:])
            valid = [header[0], *header[2:]] == [magic, *item]
            room = path.stat().st_size * (DEFLATE_RATIO if packed else 1)
            # One byte more, which must not be there; at the end gzip compares its checksum.
            content = stream.read(size + 1) if valid and size <= room else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except MemoryError as error:
        raise DataError(f"{path}: cannot be read: not enough memory for {size:,} bytes") from error
    if not valid or not 0 < len(content) == size:
        after = f"more than {size:,}" if len(content) > size else f"only {len(content):,}"
        after = f" and {after} bytes after it" if valid and size <= room else ""
        raise DataError(
            f"{path}: not a complete idx file: it has {path.stat().st_size:,} bytes, the header {header}"
            f"{after}; expected {[magic, 'samples', *item]} and then one byte per element"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, *item)
