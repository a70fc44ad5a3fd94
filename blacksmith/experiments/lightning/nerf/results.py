"""The results of a trained field: scores on held-out views, picture strips for the report, an orbit video.

The stop flag is checked before every picture, and files are written atomically.
"""

import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from blacksmith.datasets.blender import Scene
from blacksmith.datasets.blender.bounds import without_strays
from blacksmith.datasets.blender.cameras import Camera, orbit
from blacksmith.errors import CheckpointError, RunError
from blacksmith.experiments.lightning.nerf.configs import Results
from blacksmith.experiments.lightning.nerf.pictures import panel_labels, panels, strip, to_bytes, write_png
from blacksmith.experiments.lightning.nerf.scores import Lpips, psnr, ssim
from blacksmith.files import atomic_file, temporary_directory
from blacksmith.models.pytorch.nerf.rendering import RadianceField, Rendered, not_finite, render_image
from blacksmith.run.run import Run

STRIP_PICTURE_PIXELS = 320  # width: four fit on a page of the report, and three strips take about 1 MB
GIF_PIXELS = 240  # width; 60 frames of the anvil take about 1 MB
GIF_FRAMES = 60
PROGRESS_SECONDS = 5.0


def score_views(
    run: Run, field: RadianceField, scene: Scene, split: str, lpips: Lpips | None, directory: Path | None
) -> dict[str, Any] | None:
    """Renders every view of a split and scores it against the true picture.

    The PNG files that runs wrote in `directory`, if given, are replaced by the `panels` of every view.

    Returns:
      Means over the views: ``psnr`` in dB, ``ssim``, ``lpips`` if given; ``images``, the scores of each view
      with its ``name``; ``seconds_per_frame``, rendering only. None if the run is to stop.

    Raises:
      CheckpointError: a render is not finite.
    """
    if directory is not None:
        run.clear(directory.name)
    views, background = scene.views(split), run.config.background
    behind = torch.tensor(background, dtype=torch.float32)
    progress = _progress(run, f"{len(views.names)} {split} views")
    images, seconds = [], 0.0
    for index, name in enumerate(views.names):
        if run.stop:
            return None
        start = time.perf_counter()
        rendered = _rendered(field, views.cameras[index], behind, f"{split} view {name}")
        rgb = rendered.rgb.clamp(0, 1)
        float(rgb.sum())  # waits for the accelerator
        seconds += time.perf_counter() - start

        picture = views.picture(index, background)
        truth = torch.as_tensor(picture, device=rgb.device)
        used = torch.as_tensor(views.used[index], device=rgb.device)
        scores = {"psnr": psnr(rgb, truth, used)}
        # The others cannot leave pixels out: they are given the true ones.
        rgb = torch.where(used[..., None], rgb, truth)
        scores["ssim"] = ssim(rgb, truth)
        if lpips is not None:
            scores["lpips"] = lpips(rgb, truth)
        images.append({"name": name} | scores)
        if directory is not None:
            for kind, pixels in panels(picture, rendered).items():
                write_png(run.claim(directory / f"{name}{kind}.png"), pixels)
        progress(len(images))
    means = {score: statistics.fmean(image[score] for image in images) for score in scores}
    return means | {"images": images, "seconds_per_frame": seconds / len(images)}


def write_gallery(run: Run, scores: dict[str, Any]) -> None:
    """Writes strips of the worst, the median and the best view in `test/` into `images/`, for the report.

    They are `test_1_worst_NAME.png` and so on, made from the files and scores of `score_views`; PSNR ranks
    the views.
    """
    ranked = sorted(scores["images"], key=lambda image: image["psnr"])
    # A rank that occurs twice keeps its last place: the worst comes first, then the best.
    places = {len(ranked) // 2: "2_median", len(ranked) - 1: "3_best", 0: "1_worst"}
    for rank, place in places.items():
        image = ranked[rank]
        labels = panel_labels(f"test view {image['name']}", image["psnr"])
        pictures = [_fitted(run.directory / "test" / f"{image['name']}{kind}.png") for kind in labels]
        name = re.sub(r"[^\w.-]+", "_", image["name"])
        write_png(run.claim(f"images/test_{place}_{name}.png"), strip(pictures, labels.values()))


def film(run: Run, field: RadianceField, scene: Scene) -> bool:
    """Renders an orbit around the scene, if there is to be one: `orbit.mp4` and a small, looping `orbit.gif`.

    Returns:
      False if the run is to stop; then nothing is written.

    Raises:
      CheckpointError: a render is not finite.
      RunError: the video could not be written, for example because the disk is full.
    """
    settings = run.config.results
    frames, fps = settings.video_frames, settings.video_fps
    if not frames:
        return True
    cameras = _orbit(settings, field, scene)
    # Browsers slow a GIF down if its frames follow each other faster than about 20 a second.
    every = max(math.ceil(frames / GIF_FRAMES), math.ceil(settings.video_fps / 20))
    behind = torch.tensor(run.config.background, dtype=torch.float32)
    progress, small = _progress(run, f"{frames} video frames"), []
    video = run.claim("images/orbit.mp4")
    with temporary_directory(video) as folder:
        temporary = folder / video.name
        try:
            # faststart: the index comes first, so that a browser can play the video before it has all of it.
            with av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as file:
                stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
                # In 4:2:0 every browser plays it.
                stream.width, stream.height, stream.pix_fmt = cameras[0].width, cameras[0].height, "yuv420p"
                # 1 is BT.709, and the limited range, in ITU-T H.273. Otherwise players guess from the size.
                codec = stream.codec_context
                codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
                for index, camera in enumerate(cameras):
                    if run.stop:
                        return False
                    rendered = _rendered(field, camera, behind, f"frame {index} of the video")
                    pixels = to_bytes(rendered.rgb.cpu().numpy())
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                    file.mux(stream.encode(frame))
                    if index % every == 0:
                        small.append(Image.fromarray(pixels))
                        small[-1].thumbnail((GIF_PIXELS, camera.height), Image.Resampling.LANCZOS)
                    progress(index + 1)
                file.mux(stream.encode())
        except av.FFmpegError as error:
            raise RunError(f"cannot write the video: {error.strerror}") from error
        os.replace(temporary, video)
    duration = 10 * round(100 * every / fps)  # milliseconds; the format counts in hundredths of a second
    with atomic_file(run.claim("images/orbit.gif")) as stream:
        small[0].save(stream, "GIF", save_all=True, append_images=small[1:], duration=duration, loop=0)
    return True


def _rendered(field: RadianceField, camera: Camera, background: torch.Tensor, view: str) -> Rendered:
    """Renders a picture of a trained field, whose weights are finite; the picture must be so too.

    Clipped to [0, 1] it would look as if it were.
    """
    rendered = render_image(field, camera, background)
    if wrong := not_finite(rendered):
        raise CheckpointError(f"{view}: {wrong}, although all weights are: the field's activations overflow")
    return rendered


def _orbit(settings: Results, field: RadianceField, scene: Scene) -> list[Camera]:
    """The cameras of the video, at the mean distance of the training cameras."""
    center = field.bounds.cpu().numpy().mean(0)
    near = without_strays(scene.cameras("train"))
    radius = float(np.mean([np.linalg.norm(camera.pose[:, 3] - center) for camera in near]))
    camera = scene.cameras("test")[0]
    width = settings.video_width or camera.width
    height = round(width * camera.height / camera.width)
    # 4:2:0 needs an even width and height.
    camera = camera.resized(*(max(2, side // 2 * 2) for side in (width, height)))
    return orbit(camera, center, radius, settings.video_elevation, settings.video_frames)


def _progress(run: Run, what: str) -> Callable[[int], None]:
    """A function that prints the number done, ``12 of 20 test views``, every few seconds."""
    last = time.perf_counter()

    def show(done: int) -> None:
        nonlocal last
        if run.config.log.progress != "off" and time.perf_counter() - last >= PROGRESS_SECONDS:
            last = time.perf_counter()
            print(f"{done} of {what}", file=sys.stderr)

    return show


def _fitted(path: Path) -> np.ndarray:
    """Reads a picture and scales it to `STRIP_PICTURE_PIXELS` width; pixels of small pictures stay sharp."""
    with Image.open(path) as picture:
        size = (STRIP_PICTURE_PIXELS, max(1, round(picture.height * STRIP_PICTURE_PIXELS / picture.width)))
        enlarged = picture.width < STRIP_PICTURE_PIXELS
        method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        return np.asarray(picture.resize(size, method))
