"""Pictures of a scene: a cheap look at a file before training, and its pixels as straight RGBA when needed.

`open_scene` inspects every picture once, reading the header and hashing the bytes; `Scene.views` decodes.
"""

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from blacksmith.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM")
"""Pillow's names of what is read; its other formats are documents, icons or need other programs."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "I;16", "I;16B", "I")
"""Pillow's names of the kinds of pixels that are read, 8 bits a channel but for grey of 16 bits."""


class Header(NamedTuple):
    """What a file says about its picture: its size in pixels, and the sha256 of all its bytes."""

    width: int
    height: int
    sha256: str


def inspect(path: Path, *, needs_alpha: bool) -> Header:
    """Looks at a picture without decoding it; of a PNG all checksums are checked.

    Raises:
      DataError: it cannot be read, is no picture, is too large or of another kind than `MODES`, or has no
        alpha channel though it needs one.
    """
    try:
        with open(path, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=FORMATS) as image:
                (width, height), mode, alpha = image.size, image.mode, _has_alpha(image)
                # Until Pillow 11 this was the mode of 16-bit grey in a PNG; elsewhere it is one of 32 bits.
                known = mode in MODES and (mode != "I" or image.format == "PNG")
                if image.format == "PNG":
                    image.verify()  # the checksums of its parts: a picture cut short is found now
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except Exception as error:
        raise _unreadable(path, error) from error
    if not known:
        raise DataError(
            f"{path}: pixels of mode {mode}, which are not read; save it as PNG, 8 bits a channel"
        )
    if needs_alpha and not alpha:
        raise DataError(
            f"{path}: has no alpha channel, which the hull and a random background need; set "
            'nerf.Data.hull = False and nerf.Data.background = "white" or "black" as it was rendered'
        )
    return Header(width, height, sha256)


def read(path: Path) -> np.ndarray:
    """The pixels as straight RGBA, uint8 [height, width, 4]; alpha is 255 where the file has none.

    What is stored as 8-bit RGBA comes out as it is; 16 bits are reduced to 8.

    Raises:
      DataError: it cannot be decoded.
    """
    try:
        with open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
            return _rgba(image)
    except Exception as error:
        raise _unreadable(path, error) from error


def reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Scales straight RGBA down by the mean over blocks, in premultiplied alpha.

    The colour of a block is that of its visible part: sum(alpha * rgb) / sum(alpha). All sums are whole
    numbers that float64 holds, so the result is exact but for one rounding, half up, at the end.

    Args:
      pixels: uint8 [height, width, 4].
      factor: side of a block; it divides height and width.

    Returns:
      uint8 [height / factor, width / factor, 4]; where alpha is 0 so is the colour.
    """
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    weighted = pixels.reshape(height, factor, width, factor, 4).astype(np.float32)
    weighted[..., :3] *= weighted[..., 3:]
    sums = weighted.sum(1, dtype=np.float64).sum(2)
    colour, weight = sums[..., :3], sums[..., 3:]
    result = np.empty((height, width, 4), np.uint8)
    # The conversion to uint8 cuts the fraction off.
    result[..., :3] = colour / np.maximum(weight, 1) + 0.5
    result[..., 3:] = weight / factor**2 + 0.5
    result[result[..., 3] == 0] = 0
    return result


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _rgba(image: Image.Image) -> np.ndarray:
    if not image.mode.startswith("I"):
        return np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))
    grey = np.asarray(image).astype(np.int64)
    opaque = grey != image.info.get("transparency", -1)
    grey = (grey * 255 + 32767) // 65535
    return np.stack([grey, grey, grey, opaque * 255], axis=-1).astype(np.uint8)


def _unreadable(path: Path, error: Exception) -> DataError:
    """One line for whatever Pillow raised: a broken file makes it raise errors of many kinds."""
    if isinstance(error, UnidentifiedImageError):
        empty = path.stat().st_size == 0
        return DataError(
            f"{path}: {'empty' if empty else 'no picture'}; it must be one of {', '.join(FORMATS)}"
        )
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        return DataError(f"{path}: more than {limit} pixels, which no picture of a scene has; scale it down")
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path}: cannot be read ({error.strerror})")
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: broken picture ({reason}); copy or render it again")
