"""The results of a trained field: scores on held-out views, picture strips for the report, an orbit video.

The stop flag is checked before every picture, and files are written atomically.
"""

import contextlib
import io
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from blacksmith.datasets.blender import Views
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import RunError
from blacksmith.experiments.lightning.nerf.pictures import panel_labels, panels, strip, to_bytes, write_png
from blacksmith.experiments.lightning.nerf.scores import psnr, ssim
from blacksmith.files import atomic_file
from blacksmith.models.pytorch.nerf.rendering import RadianceField, render_image
from blacksmith.run.signals import StopFlag

STRIP_PICTURE_PIXELS = 320  # width: four fit on a page of the report, and three strips take about 1 MB
GIF_PIXELS = 240  # width
GIF_BYTES = 2_000_000
GIF_FPS = 20


def evaluate(
    field: RadianceField,
    views: Views,
    directory: Path | None,
    *,
    background: tuple[float, float, float],
    lpips: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    on_image: Callable[[int], None] | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any] | None:
    """Renders every view and scores it against the true picture.

    Args:
      views: the true pictures and their cameras.
      directory: its PNG files are replaced by the `panels` of every view; None: nothing is written.
      background: color behind both pictures, in [0, 1].
      lpips: `scores.Lpips` or similar, on the field's device; None: LPIPS is left out.
      on_image: called after each view with the number of finished views.
      stop: ends the evaluation once it is true.

    Returns:
      Means over the views: ``psnr`` in dB, ``ssim``, ``lpips``; ``images``, the scores of each view with its
      ``name``; ``seconds_per_frame``, rendering only. None if stopped before the last view.
    """
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("*.png"):
            stale.unlink()
    behind = torch.tensor(background, dtype=torch.float32)
    images, seconds = [], 0.0
    for index, name in enumerate(views.names):
        if stop:
            return None
        start = time.perf_counter()
        rendered = render_image(field, views.cameras[index], behind)
        rgb = rendered.rgb.clamp(0, 1)
        float(rgb.sum())  # waits for the accelerator
        seconds += time.perf_counter() - start

        picture = views.picture(index, background)
        truth = torch.as_tensor(picture, device=rgb.device)
        scores = {"psnr": psnr(rgb, truth), "ssim": ssim(rgb, truth)}
        if lpips is not None:
            scores["lpips"] = lpips(rgb, truth)
        images.append({"name": name} | scores)
        if directory is not None:
            for kind, pixels in panels(rgb, picture, rendered.depth, rendered.opacity).items():
                write_png(directory / f"{name}{kind}.png", pixels)
        if on_image is not None:
            on_image(len(images))
    means = {score: statistics.fmean(image[score] for image in images) for score in scores}
    return means | {"images": images, "seconds_per_frame": seconds / len(images)}


def write_gallery(results: Path, images: Path, scores: dict[str, Any], split: str = "test") -> list[Path]:
    """Writes strips of the `panels` of the worst, the median and the best view, which the report shows.

    Args:
      results: the directory that `evaluate` wrote.
      images: the run's `images/`, from which older strips of this split are removed.
      scores: what `evaluate` returned; PSNR ranks the views.
      split: the split of the views, the first word of the file names.

    Returns:
      The files, `test_1_worst_r_7.png` and so on; fewer than three if there are fewer views.
    """
    ranked = sorted(scores["images"], key=lambda image: image["psnr"])
    # A rank that occurs twice keeps its last place: the worst comes first, then the best.
    places = {len(ranked) // 2: "2_median", len(ranked) - 1: "3_best", 0: "1_worst"}
    images.mkdir(parents=True, exist_ok=True)
    for stale in images.glob(f"{split}_[123]_*.png"):
        stale.unlink()
    written = []
    for rank, place in sorted(places.items()):
        image = ranked[rank]
        labels = panel_labels(f"{split} view {image['name']}", image["psnr"])
        pictures = [_fitted(results / f"{image['name']}{kind}.png") for kind in labels]
        name = re.sub(r"[^\w.-]+", "_", image["name"])
        written.append(images / f"{split}_{place}_{name}.png")
        write_png(written[-1], strip(pictures, list(labels.values())))
    return written


def write_orbit(
    field: RadianceField,
    cameras: Sequence[Camera],
    directory: Path,
    *,
    fps: int,
    background: tuple[float, float, float],
    on_frame: Callable[[int], None] | None = None,
    stop: StopFlag | None = None,
) -> bool:
    """Renders one orbit around the scene: `orbit.mp4` at full size and a small, looping `orbit.gif`.

    The video is H.264 in 4:2:0, which every browser plays. It needs an even width and height, so both are
    rounded down. The GIF has at most `GIF_PIXELS` of width, `GIF_FPS` frames per second and `GIF_BYTES`.

    Args:
      cameras: one per frame, all of one size.
      directory: receives the two files, each when it is complete.
      background: color behind the field in [0, 1].
      on_frame: called after each frame with the number of finished frames.
      stop: checked before each frame.

    Returns:
      False if stopped; then nothing is written.

    Raises:
      RunError: the video could not be written, for example because the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    gif_width = min(GIF_PIXELS, cameras[0].width)
    width, height = (max(2, side // 2 * 2) for side in (cameras[0].width, cameras[0].height))
    gif_size = (gif_width, max(1, round(gif_width * height / width)))
    every = math.ceil(fps / GIF_FPS)
    behind = torch.tensor(background, dtype=torch.float32)
    small = []
    with tempfile.TemporaryDirectory(prefix=".orbit-", dir=directory) as folder:
        temporary = Path(folder) / "orbit.mp4"
        with _encoder(temporary, width, height, fps) as encode:
            for index, camera in enumerate(cameras):
                if stop:
                    return False
                rendered = render_image(field, camera.resized(width, height), behind)
                pixels = to_bytes(rendered.rgb.cpu().numpy())
                encode(pixels)
                if index % every == 0:
                    small.append(Image.fromarray(pixels).resize(gif_size, Image.Resampling.LANCZOS))
                if on_frame is not None:
                    on_frame(index + 1)
        os.replace(temporary, directory / "orbit.mp4")
    with atomic_file(directory / "orbit.gif") as stream:
        stream.write(_gif(small, every / fps))
    return True


@contextlib.contextmanager
def _encoder(path: Path, width: int, height: int, fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that adds a frame, uint8 [height, width, 3], to a video; raises RunError."""
    try:
        # faststart: the index comes first, so that a browser can play the video before it has all of it.
        with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as file:
            stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # 1 is BT.709, and the limited range, in ITU-T H.273. Without them, players guess from the size.
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1

            def encode(pixels: np.ndarray) -> None:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                file.mux(stream.encode(frame))

            yield encode
            file.mux(stream.encode())
    except av.FFmpegError as error:
        raise RunError(f"cannot write the video: {error.strerror}") from error


def _gif(frames: list[Image.Image], seconds: float) -> bytes:
    """A looping GIF that shows each frame for `seconds`, scaled down until it fits in `GIF_BYTES`."""
    duration = 10 * round(100 * seconds)  # milliseconds; the format counts in hundredths of a second
    while True:
        stream = io.BytesIO()
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        if stream.tell() <= GIF_BYTES or min(frames[0].size) < 2:
            return stream.getvalue()
        # The size of the file is about proportional to the number of pixels.
        shrink = 0.95 * math.sqrt(GIF_BYTES / stream.tell())
        smaller = tuple(max(1, int(side * shrink)) for side in frames[0].size)
        frames = [frame.resize(smaller, Image.Resampling.LANCZOS) for frame in frames]


def _fitted(path: Path) -> np.ndarray:
    """Reads a picture and scales it to `STRIP_PICTURE_PIXELS` width; pixels of small pictures stay sharp."""
    with Image.open(path) as picture:
        height = max(1, round(picture.height * STRIP_PICTURE_PIXELS / picture.width))
        enlarged = picture.width < STRIP_PICTURE_PIXELS
        method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        return np.asarray(picture.convert("RGB").resize((STRIP_PICTURE_PIXELS, height), method))
