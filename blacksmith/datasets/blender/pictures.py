"""Picture files: a cheap check of each before training, and the pixels as RGBA when they are needed."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from blacksmith.errors import DataError, first_line
from blacksmith.files import file_sha256

FORMATS = ("PNG", "JPEG")
MODES = ("L", "LA", "P", "RGB", "RGBA")  # Pillow's names of the pixels that are read

# How the stored pixels must be turned to be seen as they were taken, by EXIF orientation; 1: not at all.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """A checked file: its size in pixels, turned by its EXIF orientation, and its hash."""

    file: Path
    width: int
    height: int
    sha256: str
    orientation: int  # 1 to 8, as in EXIF


def inspect(file: Path, *, needs_alpha: bool) -> Header:
    """Checks a picture without decoding it; for a PNG also its checksums.

    Raises:
      DataError: it is broken, too large, not a PNG or JPEG with pixels of one of `MODES`, or has no alpha
        channel although `needs_alpha` is set.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                (width, height), mode, alpha = image.size, image.mode, image.has_transparency_data
                orientation = _orientation(image)
                # A truncated file is found now, not at the first validation.
                if image.format == "PNG":
                    image.verify()
                else:
                    image.draft(mode, (1, 1))  # an eighth of the pixels, or fewer, are decoded
                    image.load()
        sha256 = file_sha256(file)
    except Exception as error:
        raise _unreadable(file, error) from error
    if mode not in MODES:
        raise DataError(f"{file}: unsupported pixel mode {mode}; save it as PNG, 8 bits per channel")
    if needs_alpha and not alpha:
        raise DataError(
            f"{file}: has no alpha channel, which the hull and a random background need; set "
            'nerf.Data.hull = False and nerf.Data.background = "white" or "black" as it was rendered'
        )
    if orientation > 4:
        width, height = height, width
    return Header(file, width, height, sha256, orientation)


def read(file: Path) -> np.ndarray:
    """The pixels as straight RGBA, uint8 [height, width, 4]: unchanged if they are, opaque without alpha.

    They are turned by the EXIF orientation.

    Raises:
      DataError: it cannot be decoded.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            turn = _TURNS.get(_orientation(image))
            pixels = image.convert("RGBA")
            return np.asarray(pixels if turn is None else pixels.transpose(turn))
    except Exception as error:
        raise _unreadable(file, error) from error


def read_mask(file: Path) -> np.ndarray:
    """Which pixels are to be used, bool [height, width]: those that are not black, as in nerfstudio.

    Raises:
      DataError: it is no mask, or it uses no pixel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                mode, used = image.mode, np.asarray(image.convert("L")) > 0
    except Exception as error:
        raise _unreadable(file, error) from error
    if mode not in ("1", "L", "P", "RGB"):
        raise DataError(f"{file}: unsupported pixel mode {mode}; save the mask as PNG, 8 bits, without alpha")
    if not used.any():
        raise DataError(f"{file}: the mask is black, so that no pixel would be used; remove the frame")
    return used


def reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Scales straight RGBA, uint8 [height, width, 4], down by the mean over blocks of `factor` pixels.

    The color of a block is sum(alpha * rgb) / sum(alpha), so that hidden colors do not bleed in; pixels with
    alpha 0 become black. The sums are whole numbers that float64 holds exactly, so only the result is
    rounded, half up.
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


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or none that can be read."""
    try:
        # That of a PNG class would decode the pixels to look for EXIF data behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def _unreadable(file: Path, error: Exception) -> DataError:
    """One line for what Pillow raised: broken files make it raise many kinds of errors."""
    return DataError(f"{file}: cannot be read as {' or '.join(FORMATS)} ({first_line(error)})")
