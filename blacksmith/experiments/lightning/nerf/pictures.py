"""Pictures from arrays: colours of errors and depths, strips with labels, PNG files.

NumPy and Pillow alone; the scores, the training loop and the viewer draw with it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blacksmith.files import atomic_file

# The mean absolute error that is drawn brightest. It is fixed, so that two error maps compare.
ERROR_SCALE = 0.25
# Pixels as opaque as this count as hit when the range of depths is chosen.
HIT_OPACITY = 0.5
# The percentiles of the depths of hit pixels that are drawn brightest and darkest.
DEPTH_PERCENTILES = (1.0, 99.0)

GAP_PIXELS = 4
LABEL_PIXELS = 20


def _colour_map(*anchors: int) -> np.ndarray:
    """256 colours, float64 [256, 3] in [0, 1], linear between evenly spaced anchors 0xRRGGBB."""
    colours = [[anchor >> 16, anchor >> 8 & 255, anchor & 255] for anchor in anchors]
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), channel) for channel in np.transpose(colours)]
    return np.stack(channels, axis=-1) / 255


# Ten and nine colours of "inferno" and "viridis" (van der Walt and Smith 2015, CC0): even in lightness.
_INFERNO = _colour_map(
    *(0x000004, 0x1B0C42, 0x4B0C6B, 0x781C6D, 0xA52C60, 0xCF4446, 0xED6925, 0xFB9A06, 0xF7D03C, 0xFCFFA4)
)
_VIRIDIS = _colour_map(
    *(0x440154, 0x472D7B, 0x3B528B, 0x2C728E, 0x21918C, 0x28AE80, 0x5EC962, 0xADDC30, 0xFDE725)
)


def _look_up(colours: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The colours, float [..., 3], of values [...] from 0 to 1; what lies beyond is clipped."""
    return colours[(np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)]


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    """Float colours [..., 3] in [0, 1] as uint8 of the same shape: clipped, then rounded half up."""
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def error_colours(render: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The mean absolute error of each pixel, from black (0) to pale yellow (`ERROR_SCALE` and more).

    Args:
      render: float [height, width, 3] in [0, 1].
      truth: the same.

    Returns:
      uint8 [height, width, 3].
    """
    error = np.abs(np.asarray(render) - truth).mean(axis=-1)
    return to_bytes(_look_up(_INFERNO, error / ERROR_SCALE))


def depth_colours(depth: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Depths from yellow (near) to dark violet (far), over white by opacity.

    The range is that of the hit pixels without the outermost percent, so every picture has its own.

    Args:
      depth: float [height, width], in world units, along the ray.
      opacity: float [height, width] in [0, 1].

    Returns:
      uint8 [height, width, 3]; white where nothing is hit.
    """
    depth, opacity = np.asarray(depth), np.clip(opacity, 0, 1)[..., None]
    hit = depth[opacity[..., 0] >= HIT_OPACITY]
    near, far = np.percentile(hit, DEPTH_PERCENTILES) if hit.size else (0.0, 1.0)
    # A flat picture has no range: all of it is near.
    colours = _look_up(_VIRIDIS, 1 - (depth - near) / max(far - near, 1e-6))
    return to_bytes(colours * opacity + (1 - opacity))


def strip(pictures: Sequence[np.ndarray], labels: Sequence[str] = ()) -> np.ndarray:
    """Pictures side by side, a small white gap between them, and above each its label if there are any.

    Args:
      pictures: uint8 [height, width, 3] each, all of one height.
      labels: one for each picture, or none.

    Returns:
      uint8 [height (and `LABEL_PIXELS` more with labels), total width, 3].
    """
    height, top = pictures[0].shape[0], LABEL_PIXELS if labels else 0
    width = sum(picture.shape[1] for picture in pictures) + GAP_PIXELS * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, top + height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LABEL_PIXELS * 0.6)
    left = 0
    for picture, label in zip(pictures, labels or [""] * len(pictures), strict=True):
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left + 2, top / 2), label, fill="black", font=font, anchor="lm")
        left += picture.shape[1] + GAP_PIXELS
    return np.asarray(sheet)


def labels_of(view: str, ratio: float) -> dict[str, str]:
    """What stands above truth, render, error and depth of a view, by the endings of their files' names.

    Args:
      view: split and name.
      ratio: PSNR of the render, in dB.
    """
    return {
        "_truth": f"truth, {view}",
        "": f"render, {ratio:.2f} dB",
        "_error": f"error, 0 to {ERROR_SCALE:g}",
        "_depth": "depth, near is bright",
    }


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [height, width, 3] (or 4) as PNG, under a temporary name until it is whole.

    Raises:
      OSError: the file cannot be written.
    """
    with atomic_file(path) as stream:
        Image.fromarray(pixels).save(stream, format="PNG")
