"""The 5,000 bundled MNIST digits: the first 500 of each in the official training set.

`tools/make_mnist5k.py` wrote the file; `docs/data.md` has provenance and license (CC BY-SA 3.0).
"""

from pathlib import Path

import numpy as np

from blacksmith.datasets.mnist import idx
from blacksmith.datasets.mnist.arrays import Arrays


def load() -> Arrays:
    """Loads 4,000 train and 1,000 test digits, always the same.

    Every fifth row of the file, which is sorted by label, is a test digit, in the order 0 to 9, 0 to 9, and
    so on. A model trained on the full MNIST has seen them, since all 5,000 are training digits.
    """
    with np.load(Path(__file__).with_name("mnist5k.npz"), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    rows = np.arange(len(labels))
    train = rows[rows % 5 != 4]
    test = rows[rows % 5 == 4].reshape(idx.CLASSES, -1).T.reshape(-1)
    return Arrays(images[train], labels[train], images[test], labels[test], idx.CLASSES)
