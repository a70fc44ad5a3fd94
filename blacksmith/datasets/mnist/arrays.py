"""What every MNIST source returns before it is split: the official train and test sets, in stored order.

`idx`, `tfds_source` and `mnist5k` produce `Arrays`; `blacksmith.datasets.mnist.load` splits them.
"""

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
        """A hash of the content, which does not depend on the container it came from.

        It covers images then labels of train then test: of each the shape as text, then the bytes in stored
        order.
        """
        digest = hashlib.sha256()
        for array in self[:4]:
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, np.uint8))
        return digest.hexdigest()
