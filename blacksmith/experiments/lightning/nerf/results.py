"""What a trained field shows for itself: scores on held-out views, strips for the report, an orbit as video.

`train.main` calls these after training and in evaluation. Each looks at the stop flag before every picture;
what is written appears whole or not at all.
"""

import contextlib
import io
import math
import os
import re
import secrets
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from blacksmith.datasets.blender import Views
from blacksmith.datasets.blender.cameras import Camera, orbit
from blacksmith.errors import ConfigError, RunError
from blacksmith.experiments.lightning.nerf.pictures import (
    depth_colours,
    error_colours,
    labels_of,
    strip,
    to_bytes,
    write_png,
)
from blacksmith.experiments.lightning.nerf.scores import psnr, ssim
from blacksmith.files import atomic_file
from blacksmith.models.pytorch.nerf.rendering import RadianceField, render_image
from blacksmith.run.signals import StopFlag

# Of each picture in a strip of the report: four of them fit a page, and three strips take about 1 MB.
STRIP_PICTURE_PIXELS = 320
GIF_BYTES = 2_000_000
GIF_FPS = 20


def evaluate(
    field: RadianceField,
    views: Views,
    directory: Path | None,
    *,
    background: tuple[float, float, float],
    lpips: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    on_image: Callable[[int, dict[str, Any]], None] | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any] | None:
    """Renders every view and scores it against the true picture.

    Args:
      field: what is rendered, on its own device.
      views: what it should look like.
      directory: loses the pictures in it and gets `NAME.png`, `NAME_truth.png`, `NAME_error.png` and
        `NAME_depth.png` of every view; None: nothing is written.
      background: behind both pictures, in [0, 1].
      lpips: `scores.Lpips` or the like, on the field's device; None: LPIPS is left out.
      on_image: told after each view how many are done, and the scores of this one.
      stop: once true, the evaluation ends.

    Returns:
      ``psnr`` in dB, ``ssim`` and ``lpips``, means over the views; ``images``, the scores of each with its
      ``name``; ``seconds_per_frame`` for rendering alone. None when stopped before the last view, so that
      part of an evaluation is not taken for the whole.
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
        float(rgb.sum())  # waits for an accelerator
        seconds += time.perf_counter() - start

        picture = views.picture(index, background)
        truth = torch.as_tensor(picture, device=rgb.device)
        scores = {"psnr": psnr(rgb, truth), "ssim": ssim(rgb, truth)}
        if lpips is not None:
            scores["lpips"] = lpips(rgb, truth)
        images.append({"name": name} | scores)
        if directory is not None:
            render = rgb.cpu().numpy()
            depth = depth_colours(rendered.depth.cpu().numpy(), rendered.opacity.cpu().numpy())
            write_png(directory / f"{name}.png", to_bytes(render))
            write_png(directory / f"{name}_truth.png", to_bytes(picture))
            write_png(directory / f"{name}_error.png", error_colours(render, picture))
            write_png(directory / f"{name}_depth.png", depth)
        if on_image is not None:
            on_image(len(images), images[-1])
    means = {score: statistics.fmean(image[score] for image in images) for score in scores}
    return means | {"images": images, "seconds_per_frame": seconds / len(images)}


def write_gallery(results: Path, images: Path, scores: dict[str, Any], split: str = "test") -> list[Path]:
    """Puts the worst, the median and the best view by PSNR where the report finds them.

    Args:
      results: the directory that `evaluate` wrote.
      images: the run's `images/`; strips of this split from before are removed.
      scores: what `evaluate` returned.
      split: which views these are, the first word of the files' names.

    Returns:
      The files, `test_1_worst_r_7.png` and so on, each a strip of truth, render, error and depth; fewer than
      three when there are fewer views.
    """
    ranked = sorted(scores["images"], key=lambda image: image["psnr"])
    # In this order, so that with one or two views the worst and then the best keep theirs.
    places = {len(ranked) // 2: "2_median", len(ranked) - 1: "3_best", 0: "1_worst"}
    images.mkdir(parents=True, exist_ok=True)
    for stale in images.glob(f"{split}_[123]_*.png"):
        stale.unlink()
    written = []
    for rank, place in sorted(places.items()):
        image = ranked[rank]
        labels = labels_of(f"{split} view {image['name']}", image["psnr"])
        pictures = [_fitted(results / f"{image['name']}{kind}.png") for kind in labels]
        name = re.sub(r"[^\w.-]+", "_", image["name"])
        written.append(images / f"{split}_{place}_{name}.png")
        write_png(written[-1], strip(pictures, list(labels.values())))
    return written


def write_orbit(
    field: RadianceField,
    camera: Camera,
    directory: Path,
    *,
    centre: np.ndarray,
    radius: float,
    elevation: float,
    frames: int,
    fps: int,
    background: tuple[float, float, float],
    gif_width: int,
    on_frame: Callable[[int], None] | None = None,
    stop: StopFlag | None = None,
) -> list[Path]:
    """Flies once around the scene: `orbit.mp4` at full size and `orbit.gif`, small, which repeats.

    The video is H.264 in 4:2:0, which every browser and player shows; so width and height are rounded down to
    even numbers. The GIF has at most `GIF_FPS` frames a second and is narrowed until it has `GIF_BYTES`.

    Args:
      field: what is rendered.
      camera: gives width, height and focal length.
      directory: gets the two files, each when it is whole.
      centre: what the camera looks at, float [3], in world units.
      radius: the camera's distance from it, in world units.
      elevation: of the camera above the horizon, in degrees.
      frames: in the video.
      fps: frames a second.
      background: in [0, 1].
      gif_width: in pixels.
      on_frame: told after each frame how many are done.
      stop: once true, nothing is written.

    Returns:
      The two paths, or none of them when stopped.

    Raises:
      ConfigError: imageio-ffmpeg is not installed.
      RunError: ffmpeg failed, on a full disk for example.
    """
    ffmpeg = find_ffmpeg()
    directory.mkdir(parents=True, exist_ok=True)
    camera = camera.resized(*(max(2, side // 2 * 2) for side in (camera.width, camera.height)))
    gif_size = (gif_width, max(1, round(gif_width * camera.height / camera.width)))
    every = math.ceil(fps / GIF_FPS)
    behind = torch.tensor(background, dtype=torch.float32)
    small = []
    video = directory / "orbit.mp4"
    temporary = directory / f".orbit.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with _encoding(ffmpeg, temporary, camera.width, camera.height, fps) as write:
            for index, view in enumerate(orbit(camera, centre, radius, elevation, frames)):
                if stop:
                    return []
                pixels = to_bytes(render_image(field, view, behind).rgb.cpu().numpy())
                write(pixels)
                if index % every == 0:
                    small.append(Image.fromarray(pixels).resize(gif_size, Image.Resampling.LANCZOS))
                if on_frame is not None:
                    on_frame(index + 1)
        os.replace(temporary, video)
    finally:
        temporary.unlink(missing_ok=True)
    animation = directory / "orbit.gif"
    with atomic_file(animation) as stream:
        stream.write(_gif(small, every / fps, to_bytes(np.array(background)), GIF_BYTES))
    return [video, animation]


@contextlib.contextmanager
def _encoding(
    ffmpeg: str, path: Path, width: int, height: int, fps: int
) -> Iterator[Callable[[np.ndarray], object]]:
    """Encodes the frames, uint8 [height, width, 3], that the block writes; at its end the file is whole.

    Not imageio-ffmpeg's own writer: that one does not notice when ffmpeg fails at the end.

    Raises:
      RunError: ffmpeg failed.
    """
    command = [ffmpeg, "-y", "-v", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    # Colours in BT.709, and said to be: players guess otherwise by the size of the picture.
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    command += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,{tags}"]
    command += ["-c:v", "libx264", "-crf", "18", "-movflags", "+faststart"]
    command += ["-f", "mp4", str(path)]
    with tempfile.TemporaryFile() as errors:
        # In a session of its own, since Ctrl-C at the terminal is for us.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            # A broken pipe says that ffmpeg has ended; its status and its words say why.
            with contextlib.suppress(BrokenPipeError), process.stdin:
                yield process.stdin.write
            if status := process.wait():
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                reason = next((line.strip() for line in lines if line.strip()), f"exit status {status}")
                raise RunError(f"the video cannot be written: ffmpeg: {reason}")
        finally:
            process.kill()
            process.wait()


def find_ffmpeg() -> str:
    """The path of the ffmpeg program.

    Raises:
      ConfigError: there is none.
    """
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            "a video needs imageio-ffmpeg and its ffmpeg program: pip install '.[nerf]' in blacksmith's "
            "directory, or set nerf.Results.video_frames = 0"
        ) from error


def _gif(frames: list[Image.Image], seconds: float, background: np.ndarray, limit: int) -> bytes:
    """An endless animation of at most `limit` bytes, with one palette for all frames.

    No dithering: its pattern would flicker from frame to frame.
    """
    while True:
        sample = frames[:: math.ceil(len(frames) / 8)]
        width, height = frames[0].size
        sheet = Image.new("RGB", (width, height * len(sample)))
        for row, frame in enumerate(sample):
            sheet.paste(frame, (0, row * height))
        palette = sheet.quantize(255, Image.Quantize.MEDIANCUT)
        reduced = [_indexed(frame, palette, background) for frame in frames]
        stream = io.BytesIO()
        options = {"save_all": True, "append_images": reduced[1:], "optimize": True, "loop": 0}
        # The format counts in hundredths of a second.
        reduced[0].save(stream, "GIF", duration=10 * round(100 * seconds), **options)
        size = stream.tell()
        if size <= limit or width < 2:
            return stream.getvalue()
        # The bytes go with the number of pixels.
        shrink = 0.95 * math.sqrt(limit / size)
        smaller = (max(1, int(width * shrink)), max(1, int(height * shrink)))
        frames = [frame.resize(smaller, Image.Resampling.LANCZOS) for frame in frames]


def _indexed(frame: Image.Image, palette: Image.Image, background: np.ndarray) -> Image.Image:
    """A frame in the colours of a palette of 255 and, as the last one, the background.

    Pillow's nearest colour may be some levels off, which shows where the background meets that of a page.
    """
    colours = np.resize(np.array(palette.getpalette(), np.uint8), (256, 3))
    colours[255] = background
    indices = np.array(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    indices[(np.asarray(frame) == background).all(axis=-1)] = 255
    indexed = Image.fromarray(indices)
    indexed.putpalette(colours.tobytes())
    return indexed


def _fitted(path: Path) -> np.ndarray:
    """The picture in a file at `STRIP_PICTURE_PIXELS` width; small ones with their pixels visible."""
    with Image.open(path) as picture:
        height = max(1, round(picture.height * STRIP_PICTURE_PIXELS / picture.width))
        enlarged = picture.width < STRIP_PICTURE_PIXELS
        method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        return np.asarray(picture.convert("RGB").resize((STRIP_PICTURE_PIXELS, height), method))
