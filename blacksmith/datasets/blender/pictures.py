"""Picture files: a cheap check of each before training, and the pixels as RGBA when they are needed."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from blacksmith.errors import DataError
from blacksmith.files import file_sha256

FORMATS = ("PNG", "JPEG")

MODES = ("L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow's names of the pixels that are read: gray, palette and color; `I;16` is gray of 16 bits."""


class Header(NamedTuple):
    """Size of a picture in pixels, and the sha256 of its file."""

    width: int
    height: int
    sha256: str


def inspect(path: Path, *, needs_alpha: bool) -> Header:
    """Checks a picture without decoding it; for a PNG also its checksums.

    Raises:
      DataError: it cannot be read, is not a PNG or JPEG, is too large, has pixels of a mode not in `MODES`,
        or has no alpha channel although `needs_alpha` is set.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                (width, height), mode, alpha = image.size, image.mode, image.has_transparency_data
                if image.format == "PNG":
                    image.verify()  # finds a truncated file now, not at the first validation
        sha256 = file_sha256(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    if mode not in MODES:
        raise DataError(f"{path}: unsupported pixel mode {mode}; save it as PNG, 8 bits per channel")
    if needs_alpha and not alpha:
        raise DataError(
            f"{path}: has no alpha channel, which the hull and a random background need; set "
            'nerf.Data.hull = False and nerf.Data.background = "white" or "black" as it was rendered'
        )
    return Header(width, height, sha256)


def read(path: Path) -> np.ndarray:
    """The pixels as straight RGBA, uint8 [height, width, 4]; opaque if the file has no alpha.

    RGBA of 8 bits is returned unchanged, 16 bits are reduced to 8.

    Raises:
      DataError: it cannot be decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode != "I;16":
                return np.asarray(image.convert("RGBA"))
            # Pillow clips 16-bit gray to 255 instead of scaling it.
            deep = np.asarray(image).astype(np.int64)
            gray = (deep * 255 + 32767) // 65535
            alpha = (deep != image.info.get("transparency", -1)) * 255
            return np.stack([gray, gray, gray, alpha], axis=-1).astype(np.uint8)
    except Exception as error:
        raise _unreadable(path, error) from error


def reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Scales straight RGBA down by the mean over blocks, in premultiplied alpha.

    The color of a block is sum(alpha * rgb) / sum(alpha), so that hidden colors do not bleed in. The sums
    are whole numbers that float64 holds exactly; the only rounding is the one at the end, half up.

    Args:
      pixels: uint8 [height, width, 4].
      factor: side of a block; must divide height and width.

    Returns:
      uint8 [height / factor, width / factor, 4]; pixels with alpha 0 are black.
    """
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    weighted = pixels.reshape(height, factor, width, factor, 4).astype(np.float32)
    weighted[..., :3] *= weighted[..., 3:]
    sums = weighted.sum(1, dtype=np.float64).sum(2)
    color, weight = sums[..., :3], sums[..., 3:]
    result = np.empty((height, width, 4), np.uint8)
    # Assigning floats to uint8 cuts the fraction off, so adding a half first rounds.
    result[..., :3] = color / np.maximum(weight, 1) + 0.5
    result[..., 3:] = weight / factor**2 + 0.5
    result[result[..., 3] == 0] = 0
    return result


def _unreadable(path: Path, error: Exception) -> DataError:
    """One line for what Pillow raised: broken files make it raise many kinds of errors."""
    if isinstance(error, UnidentifiedImageError):
        return DataError(f"{path}: not a {' or '.join(FORMATS)} picture")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down")
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path}: cannot be read ({error.strerror})")
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: broken picture ({reason}); copy or render it again")
