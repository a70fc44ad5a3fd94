"""MNIST, and datasets of the same shape, as NumPy arrays from a source chosen by name.

`load` returns the train, validation and test splits with an `Info` that identifies the data. Only
`source="tfds"` downloads anything; `python -m blacksmith.assets mnist` fetches the idx files.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blacksmith import files
from blacksmith.datasets.mnist import idx, mnist5k, tfds_source
from blacksmith.errors import DataError
from blacksmith.run import order

SOURCES = ("auto", "idx", "tfds", "mnist5k")

DEFAULT_VALIDATION = 5000
MNIST5K_VALIDATION = 500  # takes the place of the default on mnist5k, which has only 4,000 train images


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [samples, 28, 28], 0 background to 255 ink, and labels int32 [samples]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Info:
    """What was read, for the record of a run."""

    source: str  # never `auto`
    name: str
    path: str | None  # None for the bundled digits
    sha256: str  # `Arrays.sha256`, before splitting
    train: int
    validation: int
    test: int
    classes: int
    validation_is_test: bool

    def describe(self) -> str:
        """One line for the console."""
        place = f" in {self.path}" if self.path else ""
        validation = (
            "validation on the test set" if self.validation_is_test else f"{self.validation:,} validation"
        )
        line = (
            f"data: {self.name} from {self.source}{place}: {self.train:,} train, {validation}, "
            f"{self.test:,} test, sha256 {self.sha256[:12]}"
        )
        if self.source == "mnist5k":
            line += "; a 5,000-digit subset, for the full set run `python -m blacksmith.assets mnist`"
        return line


@dataclass(frozen=True, eq=False)
class Mnist:
    """The three splits and their record."""

    train: Split  # in an order shuffled by the seed
    validation: Split  # held out of the official training set, or the test split itself
    test: Split  # the official test set in stored order, the same for every seed
    info: Info


def load(
    source: str = "auto",
    path: str | os.PathLike[str] | None = None,
    *,
    name: str = "mnist",
    validation: int | float | str = DEFAULT_VALIDATION,
    seed: int = 0,
) -> Mnist:
    """Loads a 28x28 grayscale classification set and splits it.

    The sources:
      idx: the four standard idx files in a directory, gzipped or not.
      tfds: a TensorFlow Datasets set, in TFDS's own order. `mnist`, `fashion_mnist` and `kmnist` are
        downloaded and prepared if necessary; any other set must be prepared already.
      mnist5k: the 5,000 bundled digits, 1,000 of them for testing.
      auto: the first of these that needs no download: idx in `path` or in the cache, a prepared TFDS set in
        `path` or in TFDS's data directory, mnist5k. It is an error if `path` has neither, or if a set other
        than mnist is not prepared.

    Args:
      source: one of `SOURCES`.
      path: the directory of the idx files, or TFDS's data directory; None for the cache or TFDS's default.
      name: TFDS name, with the configuration if the set has any (`emnist/balanced`).
      validation: how much of the official training set to hold out, drawn by the seed: a number of images, a
        fraction in [0, 1), or "test" to hold out nothing and validate on the test set. The default of 5,000
        means 500 on mnist5k.
      seed: decides which images are held out, and the order of the train split.

    Returns:
      The splits, disjoint unless `validation` is "test", and the same for a seed on every machine.

    Raises:
      DataError: the source is unknown, missing or broken, or `validation` leaves nothing to train on.
    """
    if source not in SOURCES:
        raise DataError(f"unknown MNIST source {source!r}; allowed: {', '.join(SOURCES)}")
    directory = None if path is None else Path(path).expanduser().absolute()
    if source == "auto":
        source = _first_available(directory, name)
    if source == "idx":
        if directory is None and name != "mnist":
            raise DataError(f"source 'idx' needs the path of the idx files of {name!r}")
        origin = directory or files.cache_dir() / "mnist"
        arrays = idx.load(origin)
    elif source == "tfds":
        arrays, origin = tfds_source.load(name, directory or tfds_source.default_data_dir())
    else:
        if directory is not None or name != "mnist":
            raise DataError(
                "source 'mnist5k' is bundled and takes neither a path nor a name other than mnist "
                f"(path={path!r}, name={name!r})"
            )
        arrays, origin = mnist5k.load(), None
        if validation == DEFAULT_VALIDATION:
            validation = MNIST5K_VALIDATION

    held_out = _held_out(validation, len(arrays.train_labels))
    rows = order.generator(seed, "mnist.split").permutation(len(arrays.train_labels))
    train, validation_split = (
        Split(arrays.train_images[part], arrays.train_labels[part].astype(np.int32))
        for part in (rows[held_out:], rows[:held_out])
    )
    test = Split(arrays.test_images.copy(), arrays.test_labels.astype(np.int32))
    if validation == "test":
        validation_split = test
    info = Info(
        source=source,
        name=name,
        path=None if origin is None else str(origin),
        sha256=arrays.sha256(),
        train=len(train),
        validation=len(validation_split),
        test=len(test),
        classes=arrays.classes,
        validation_is_test=validation == "test",
    )
    return Mnist(train, validation_split, test, info)


def _first_available(directory: Path | None, name: str) -> str:
    """Resolves `auto` without importing or downloading anything."""
    if directory is not None:
        if idx.present(directory):
            return "idx"
        if tfds_source.find_prepared(name, directory) is not None:
            return "tfds"
        raise DataError(f"{directory}: neither MNIST idx files nor a prepared TFDS set {name!r}")
    if name == "mnist":
        cache = files.cache_dir() / "mnist"
        found = idx.present(cache)
        if found == len(idx.NAMES):
            return "idx"
        if found:
            _note(
                f"{cache} is skipped: it has {found} of the {len(idx.NAMES)} idx files; "
                "python -m blacksmith.assets mnist fetches the others"
            )
    prepared = tfds_source.find_prepared(name, tfds_source.default_data_dir())
    if prepared is not None:
        if tfds_source.readable(prepared):
            return "tfds"
        if name == "mnist":
            _note(f"{prepared} is skipped: reading it needs pip install '.[tfds]'")
    if name == "mnist":
        return "mnist5k"
    raise DataError(
        f"TFDS set {name!r} is not prepared in {tfds_source.default_data_dir()}; "
        "source='tfds' downloads and prepares it"
    )


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _held_out(validation: int | float | str, size: int) -> int:
    """How many of `size` train images to hold out."""
    if validation == "test":
        return 0
    count = validation
    if isinstance(validation, float) and 0 <= validation < 1:
        count = round(validation * size)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < size:
        raise DataError(
            f"validation={validation!r} with {size:,} train images; allowed: a whole number from 0 "
            f"to {size - 1:,}, a fraction from 0 up to but not including 1, or 'test'"
        )
    return count


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
