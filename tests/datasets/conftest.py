"""A small MNIST with random images in the standard files."""

import gzip
import struct

import numpy as np
import pytest

from blacksmith.datasets.mnist import idx


class SmallMnist:
    """40 train and 12 test images, whose first pixel numbers them."""

    def __init__(self):
        images = np.random.default_rng(0).integers(0, 256, (52, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(52)
        labels = (np.arange(52) % 10).astype(np.uint8)
        self.train_images, self.test_images = images[:40], images[40:]
        self.train_labels, self.test_labels = labels[:40], labels[40:]

    def write(self, directory, *, compressed=True, dotted=False):
        """Writes the four idx files and returns the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        for name, array in zip(idx.NAMES, arrays):
            stem = name.replace("-idx", ".idx") if dotted else name
            content = idx_bytes(array)
            if compressed:
                (directory / f"{stem}.gz").write_bytes(gzip.compress(content))
            else:
                (directory / stem).write_bytes(content)
        return directory

    def numbers(self, split):
        """The numbers of the images in a split, in its order."""
        return split.images[:, 0, 0].tolist()


def idx_bytes(array):
    """An array of bytes in idx format."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="session")
def small_mnist():
    return SmallMnist()


@pytest.fixture
def own_directories(tmp_path, monkeypatch):
    """Gives a test its own cache and TFDS data directory."""
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
