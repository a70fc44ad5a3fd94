"""MNIST, and datasets of the same shape, as NumPy arrays from a source chosen by name.

`load` returns the train, validation and test splits with an `Info` that identifies the data. Only
`source="tfds"` downloads anything; `python -m blacksmith.assets mnist` fetches the idx files.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blacksmith import files
from blacksmith.datasets.mnist import idx, mnist5k, tfds_source
from blacksmith.datasets.mnist.arrays import Arrays
from blacksmith.errors import DataError, note
from blacksmith.run import order

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
        hint = "; a 5,000-digit subset, for the full set run `python -m blacksmith.assets mnist`"
        return (
            f"data: {self.name} from {self.source}{place}: {self.train:,} train, {validation}, "
            f"{self.test:,} test, sha256 {self.sha256[:12]}{hint if self.source == 'mnist5k' else ''}"
        )


@dataclass(frozen=True, eq=False)
class Mnist:
    """The three splits and their record."""

    train: Split  # in an order shuffled by the seed
    validation: Split  # held out of the official training set, or the test split itself
    test: Split  # the official test set in stored order
    info: Info


def load(
    source: str = "auto",
    path: str | os.PathLike[str] | None = None,
    *,
    name: str = "mnist",
    validation: int | str = DEFAULT_VALIDATION,
    seed: int = 0,
) -> Mnist:
    """Loads a 28x28 grayscale classification set and splits it.

    The sources:
      idx: the four standard idx files in a directory, gzipped or not.
      tfds: a TensorFlow Datasets set, in TFDS's own order. `mnist`, `fashion_mnist` and `kmnist` are
        downloaded and prepared if necessary; any other set must be prepared already.
      mnist5k: the 5,000 bundled digits, 1,000 of them for testing.
      auto: the first of these that `path`, or without it the cache and TFDS's data directory, have.

    Args:
      source: one of these.
      path: the directory of the idx files, or TFDS's data directory; None for the cache or TFDS's default.
      name: TFDS name, with the configuration if the set has any (`emnist/balanced`).
      validation: how many training images to hold out, or "test" to validate on the test set. The default of
        5,000 means 500 on mnist5k.
      seed: decides which images are held out, and the order of the train split.

    Raises:
      DataError: the source is missing or broken, or `validation` leaves nothing to train on.
    """
    directory = None if path is None else files.absolute(path)
    if name != "mnist" and source != "tfds":
        raise DataError(f"the set {name!r} needs source 'tfds', not {source!r}")
    try:
        if source == "auto":
            source = _first_available(directory)
        arrays, origin = _read(source, name, directory)
    except OSError as error:  # a path that is too long, say, or may not be looked at
        raise DataError(f"{directory or source}: cannot be read ({error.strerror})") from error
    if source == "mnist5k" and validation == DEFAULT_VALIDATION:
        validation = MNIST5K_VALIDATION

    size = len(arrays.train_labels)
    held_out = 0 if validation == "test" else validation
    if not 0 <= held_out < size:
        raise DataError(f"validation={validation} of {size:,} train images; allowed: 0 to {size - 1:,}")
    rows = order.generator(seed, "mnist.split").permutation(size)
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


def _read(source: str, name: str, directory: Path | None) -> tuple[Arrays, Path | None]:
    """The arrays of one source, and where they were, if they are not bundled."""
    if source == "idx":
        directory = directory or files.cache_dir() / "mnist"
        return idx.load(directory), directory
    if source == "tfds":
        return tfds_source.load(name, directory or tfds_source.default_data_dir())
    if source != "mnist5k":
        raise DataError(f"no MNIST source {source!r}; allowed: auto, idx, tfds, mnist5k")
    if directory is not None:
        raise DataError("the source mnist5k is bundled; remove the path, or choose idx or tfds")
    return mnist5k.load(), None


def _first_available(directory: Path | None) -> str:
    """Resolves `auto` without importing or downloading anything."""
    if idx.present(directory or files.cache_dir() / "mnist"):
        return "idx"
    prepared = tfds_source.find_prepared("mnist", directory or tfds_source.default_data_dir())
    if prepared and (directory or tfds_source.readable(prepared)):
        return "tfds"
    if directory:
        raise DataError(f"{directory}: neither MNIST's idx files nor a prepared TFDS set 'mnist'")
    if prepared:
        note(f"note: {prepared} is skipped: reading it needs pip install '.[tfds]'")
    return "mnist5k"


def prepare(split: Split, scale: float, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Inputs ``(pixel / scale - mean) / std``, float32 [samples, 28, 28], and labels int32 [samples]."""
    inputs = split.images.astype(np.float32)
    inputs *= np.float32(1 / (scale * std))
    if mean:
        inputs -= np.float32(mean / std)
    return inputs, split.labels
