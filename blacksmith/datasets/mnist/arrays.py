"""What every MNIST source returns: the official train and test sets in stored order, not split yet."""

import hashlib
from typing import NamedTuple

import numpy as np

SIDE = 28
"""Height and width of an image, in pixels."""


class Arrays(NamedTuple):
    """Images uint8 [samples, 28, 28] and labels uint8 [samples] of both official sets."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int

    def sha256(self) -> str:
        """A hash of the content, independent of the files it was read from.

        It covers, for each array in turn, the shape as text and the bytes in stored order.
        """
        digest = hashlib.sha256()
        for array in self[:4]:
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, np.uint8))
        return digest.hexdigest()
