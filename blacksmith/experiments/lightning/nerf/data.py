"""The scene of a run, opened and checked."""

from blacksmith.datasets.blender import Scene, open_scene
from blacksmith.errors import DataError, note
from blacksmith.experiments.lightning.nerf.scores import LPIPS_SMALLEST_PIXELS, SSIM_WINDOW_PIXELS, Lpips
from blacksmith.run.run import Run


def open_scene_of(run: Run, lpips: Lpips | None = None) -> Scene:
    """Opens and checks the whole scene, and prints and records which it is.

    Raises:
      DataError: it is missing, broken, or too small for SSIM or, if given, for LPIPS.
    """
    data, hull = run.config.data, run.config.hull
    needs_alpha = hull or data.background == "random"
    scene = open_scene(data.scene, downscale=data.downscale, needs_alpha=needs_alpha)
    info = scene.info
    smallest = SSIM_WINDOW_PIXELS if lpips is None else LPIPS_SMALLEST_PIXELS
    if min(info.width, info.height) < smallest:
        raise DataError(
            f"scene {info.name}: images of {info.width}x{info.height} pixels are too small to be scored, "
            f"which needs {smallest}; lower nerf.Data.downscale"
        )
    run.use_data(info, alpha_hull=hull)
    for line in scene.notes:
        note(line)
    return scene
