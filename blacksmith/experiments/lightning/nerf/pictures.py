"""Pictures from arrays: error maps, depth maps, strips with labels, PNG files."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blacksmith.files import atomic_file
from blacksmith.models.pytorch.nerf.rendering import Rendered

ERROR_SCALE = 0.25  # the mean absolute error that is drawn brightest: fixed, so that maps can be compared
HIT_OPACITY = 0.5  # pixels at least this opaque determine the range of depths
DEPTH_PERCENTILES = (1.0, 99.0)  # of their depths: drawn brightest and darkest

GAP_PIXELS = 4
LABEL_PIXELS = 20


def _color_map(*anchors: int) -> np.ndarray:
    """256 colors, float64 [256, 3] in [0, 1], interpolated between evenly spaced anchors 0xRRGGBB."""
    colors = [[anchor >> 16, anchor >> 8 & 255, anchor & 255] for anchor in anchors]
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), channel) for channel in np.transpose(colors)]
    return np.stack(channels, axis=-1) / 255


# Ten colors of "inferno" and nine of "viridis" (van der Walt and Smith 2015, CC0).
_INFERNO = _color_map(
    *(0x000004, 0x1B0C42, 0x4B0C6B, 0x781C6D, 0xA52C60, 0xCF4446, 0xED6925, 0xFB9A06, 0xF7D03C, 0xFCFFA4)
)
_VIRIDIS = _color_map(
    *(0x440154, 0x472D7B, 0x3B528B, 0x2C728E, 0x21918C, 0x28AE80, 0x5EC962, 0xADDC30, 0xFDE725)
)


def _look_up(colors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The colors, float [..., 3], of values [...], which are clipped to [0, 1]."""
    return colors[(np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)]


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    """Converts float colors [..., 3] in [0, 1] to uint8 of the same shape: clipped, then rounded half up."""
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def error_colors(render: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The mean absolute error of each pixel, from black (0) to pale yellow (`ERROR_SCALE` or more).

    Takes float [height, width, 3] in [0, 1]; returns uint8 of this shape.
    """
    error = np.abs(np.asarray(render) - truth).mean(axis=-1)
    return to_bytes(_look_up(_INFERNO, error / ERROR_SCALE))


def depth_colors(depth: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Depths from yellow (near) to dark violet (far), blended with white by opacity: uint8 [..., 3].

    Each picture has its own range of depths, from the 1st to the 99th percentile of its opaque pixels.
    """
    depth, opacity = np.asarray(depth), np.clip(opacity, 0, 1)[..., None]
    hit = depth[opacity[..., 0] >= HIT_OPACITY]
    near, far = np.percentile(hit, DEPTH_PERCENTILES) if hit.size else (0.0, 1.0)
    # All pixels of a picture without a range of depths are near.
    colors = _look_up(_VIRIDIS, 1 - (depth - near) / max(far - near, 1e-6))
    return to_bytes(colors * opacity + (1 - opacity))


def strip(pictures: Iterable[np.ndarray], labels: Iterable[str]) -> np.ndarray:
    """Pictures of one height, uint8 [height, width, 3], side by side with a label above each."""
    pictures = list(pictures)
    height = pictures[0].shape[0]
    width = sum(picture.shape[1] for picture in pictures) + GAP_PIXELS * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, LABEL_PIXELS + height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LABEL_PIXELS * 0.6)
    left = 0
    for picture, label in zip(pictures, labels, strict=True):
        sheet.paste(Image.fromarray(picture), (left, LABEL_PIXELS))
        draw.text((left + 2, LABEL_PIXELS / 2), label, fill="black", font=font, anchor="lm")
        left += picture.shape[1] + GAP_PIXELS
    return np.asarray(sheet)


def panels(truth: np.ndarray, rendered: Rendered) -> dict[str, np.ndarray]:
    """Truth, render, error and depth of a view, uint8 [height, width, 3], by suffix of the file name."""
    render, opacity, depth = (part.cpu().numpy() for part in rendered)
    render = np.clip(render, 0, 1)
    return {
        "_truth": to_bytes(truth),
        "": to_bytes(render),
        "_error": error_colors(render, truth),
        "_depth": depth_colors(depth, opacity),
    }


def panel_labels(view: str, psnr: float) -> dict[str, str]:
    """The labels of `panels`: `view` is its split and name, `psnr` that of the render in dB."""
    return {
        "_truth": f"truth, {view}",
        "": f"render, {psnr:.2f} dB",
        "_error": f"error, 0 to {ERROR_SCALE:g}",
        "_depth": "depth, near is bright",
    }


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [height, width, 3 or 4] as PNG, atomically."""
    with atomic_file(path) as stream:
        Image.fromarray(pixels).save(stream, format="PNG")
