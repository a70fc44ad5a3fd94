"""MNIST, and sets of its shape, as NumPy arrays from a source chosen by name.

`load` returns disjoint train, validation and test splits and an `info` dictionary that says what
was read, with a hash; `describe` makes one line of it. Nothing is downloaded unless
`source="tfds"` asks for a set that is not on disk; the idx files are fetched by
`python -m blacksmith.assets mnist`.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith import files
from blacksmith.datasets.mnist import idx, mnist5k, tfds_source
from blacksmith.datasets.mnist.arrays import Arrays
from blacksmith.errors import DataError
from blacksmith.run import order

SOURCES = ("auto", "idx", "tfds", "mnist5k")

DEFAULT_VALIDATION = 5000
"""Train images held out by default: 5,000 of the full 60,000, and on mnist5k 500 of its 4,000."""

MNIST5K_VALIDATION = 500


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [samples, 28, 28], 0 background to 255 ink, and labels int32 [samples]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Mnist:
    """The three splits and what they were made from.

    Attributes:
        train: in an order shuffled by the seed.
        validation: held out of the official training set; or the test split itself, where
            `info["validation_is_test"]`.
        test: the official test set in its stored order; the same for every seed.
        info: JSON-serialisable: `source` (never `auto`), `name`, `path` (str or None), `sha256`
            (of the content before it was split, see `Arrays.sha256`), the sizes `train`,
            `validation` and `test`, `classes` and `validation_is_test`.
    """

    train: Split
    validation: Split
    test: Split
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """How many classes the labels come from."""
        return self.info["classes"]


def load(
    source: str = "auto",
    path: str | os.PathLike[str] | None = None,
    *,
    name: str = "mnist",
    validation: int | float | str = DEFAULT_VALIDATION,
    seed: int = 0,
) -> Mnist:
    """Loads a 28x28 greyscale classification set and splits it.

    Sources:
        idx: the four standard idx files in a directory, gzipped or not.
        tfds: a TensorFlow Datasets set, read without TensorFlow. `mnist`, `fashion_mnist` and
            `kmnist` are downloaded and prepared when they are not on disk, any other must be
            prepared already. TFDS shuffles a set when it prepares it: the same digits as `idx`,
            but in another order and therefore with another `sha256`.
        mnist5k: the 5,000 digits that come with the package. Every fifth digit of each class is a
            test digit: 1,000 of them, 100 per class, whatever the seed. The other 4,000 are train
            and validation.
        auto: the first of these that is there without a download: idx in `path` or in the cache, a
            prepared TFDS set in `path` or in TFDS's data directory, mnist5k. An explicit `path`
            that has neither is an error, and so is another `name` than mnist that is not prepared.

    Args:
        source: one of `SOURCES`.
        path: for idx the directory with the files, for tfds its data directory, for auto either;
            None for `blacksmith.files.cache_dir() / "mnist"` and TFDS's default respectively.
        name: TFDS name, with a configuration where the set has them (`emnist/balanced`).
        validation: how much of the official training set to hold out, drawn by the seed: a number
            of images, a fraction from 0 up to but not including 1, or "test" to hold out nothing
            and use the test set as validation set. The default of 5,000 is 500 on mnist5k.
        seed: decides which images are held out and the order of the train split.

    Returns:
        The splits; those of one seed are disjoint and the same on every machine.

    Raises:
        DataError: the source is unknown, missing or broken, or `validation` leaves nothing to
            train on.
    """
    if source not in SOURCES:
        raise DataError(f"unknown MNIST source {source!r}; there are: {', '.join(SOURCES)}")
    directory = None if path is None else Path(path).expanduser().absolute()
    if source == "auto":
        source = _first_available(directory, name)
    if source == "idx":
        arrays, origin = _load_idx(directory, name)
    elif source == "tfds":
        arrays, origin = tfds_source.load(name, directory or tfds_source.default_data_dir())
    else:
        if directory is not None or name != "mnist":
            raise DataError(
                "source 'mnist5k' is MNIST embedded in the package and takes no path and no other "
                f"name (path={path!r}, name={name!r})"
            )
        arrays, origin = mnist5k.load(), None
        if validation == DEFAULT_VALIDATION:
            validation = MNIST5K_VALIDATION

    held_out = _held_out(validation, len(arrays.train_labels))
    train, validation_split, test = _split(arrays, held_out, seed)
    info = {
        "source": source,
        "name": name,
        "path": None if origin is None else str(origin),
        "sha256": arrays.sha256(),
        "train": len(train),
        "validation": len(validation_split),
        "test": len(test),
        "classes": arrays.classes,
        "validation_is_test": held_out is None,
    }
    return Mnist(train, validation_split, test, info)


def describe(info: dict[str, Any]) -> str:
    """Returns one line for `Mnist.info`: what was read, how much, and what to know about it."""
    place = f" in {info['path']}" if info["path"] else ""
    if info["validation_is_test"]:
        held_out = "the test set as validation set"
    else:
        held_out = f"{info['validation']:,} validation"
    line = (
        f"data: {info['name']} from {info['source']}{place}: {info['train']:,} train, {held_out}, "
        f"{info['test']:,} test, sha256 {info['sha256'][:12]}"
    )
    if info["source"] == "mnist5k":
        line += "; a 5,000 digit subset, for the full set run `python -m blacksmith.assets mnist`"
    return line


def _first_available(directory: Path | None, name: str) -> str:
    """Resolves `auto` without importing or downloading anything.

    Raises:
        DataError: the directory has no data, or a set other than mnist is not prepared.
    """
    if directory is not None:
        if idx.present(directory):
            return "idx"
        if tfds_source.find_prepared(name, directory) is not None:
            return "tfds"
        raise DataError(f"{directory}: neither MNIST idx files nor a prepared TFDS set {name!r}")
    if name == "mnist":
        found = idx.present(_idx_cache())
        if found == len(idx.NAMES):
            return "idx"
        if found:
            _note(
                f"{_idx_cache()} has {found} of the {len(idx.NAMES)} idx files and is passed over; "
                "python -m blacksmith.assets mnist completes it"
            )
    prepared = tfds_source.find_prepared(name, tfds_source.default_data_dir())
    if prepared is not None:
        if tfds_source.readable(prepared):
            return "tfds"
        if name == "mnist":
            _note(f"{prepared} is passed over: reading it needs pip install '.[tfds]'")
    if name == "mnist":
        return "mnist5k"
    raise DataError(
        f"TFDS set {name!r} is not prepared in {tfds_source.default_data_dir()}; "
        "source='tfds' downloads and prepares it"
    )


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _idx_cache() -> Path:
    return files.cache_dir() / "mnist"


def _load_idx(directory: Path | None, name: str) -> tuple[Arrays, Path]:
    if directory is None:
        if name != "mnist":
            raise DataError(f"source 'idx' needs the path of the idx files of {name!r}")
        directory = _idx_cache()
    return idx.load(directory), directory


def _held_out(validation: int | float | str, size: int) -> int | None:
    """Returns how many of `size` train images to hold out; None to use the test set instead.

    Raises:
        DataError: not a count or fraction that leaves something to train on.
    """
    if validation == "test":
        return None
    count = validation
    if isinstance(validation, float) and 0 <= validation < 1:
        count = round(validation * size)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < size:
        raise DataError(
            f"validation={validation!r} with {size:,} train images; allowed: a whole number from 0 "
            f"to {size - 1:,}, a fraction from 0 up to but not including 1, or 'test'"
        )
    return count


def _split(arrays: Arrays, held_out: int | None, seed: int) -> tuple[Split, Split, Split]:
    """Returns train, validation and test; each owns its memory and is writable."""
    test = Split(arrays.test_images.copy(), arrays.test_labels.astype(np.int32))
    rows = order.generator(seed, "mnist.split").permutation(len(arrays.train_labels))
    parts = [
        Split(arrays.train_images[part], arrays.train_labels[part].astype(np.int32))
        for part in (rows[held_out or 0 :], rows[: held_out or 0])
    ]
    return parts[0], test if held_out is None else parts[1], test


def prepare(split: Split, scale: float, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as ``(pixel / scale - mean) / std``.

    Returns:
      Inputs float32 [samples, height, width], labels int32 [samples].
    """
    inputs = split.images.astype(np.float32)
    inputs *= np.float32(1 / (scale * std))
    if mean:
        inputs -= np.float32(mean / std)
    return inputs, split.labels.astype(np.int32)
