"""What every MNIST source returns: the official train and test sets in stored order, not split yet."""

import hashlib
from typing import NamedTuple

import numpy as np

SIDE = 28  # height and width of an image, in pixels


class Arrays(NamedTuple):
    """Images uint8 [samples, 28, 28] and labels uint8 [samples] of both official sets."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int

    def sha256(self) -> str:
        """A hash of each array's shape as text and bytes in stored order, whatever files they come from."""
        digest = hashlib.sha256()
        for array in self[:4]:
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, np.uint8))
        return digest.hexdigest()
