"""The scene of a run, opened and checked."""

from blacksmith.datasets.blender import Scene, open_scene
from blacksmith.errors import DataError
from blacksmith.experiments.lightning.nerf.scores import SSIM_WINDOW_PIXELS
from blacksmith.run.run import Run


def open_scene_of(run: Run) -> Scene:
    """Opens and checks the whole scene, and prints and records which it is.

    Raises:
      DataError: it is missing, broken or too small to be scored.
    """
    data, hull = run.config.data, run.config.hull
    needs_alpha = hull or data.background == "random"
    scene = open_scene(data.scene, downscale=data.downscale, needs_alpha=needs_alpha)
    info = scene.info
    if min(info.width, info.height) < SSIM_WINDOW_PIXELS:
        raise DataError(
            f"{scene.path}: images of {info.width}x{info.height} pixels are too small for SSIM, which needs "
            f"{SSIM_WINDOW_PIXELS}; lower nerf.Data.downscale"
        )
    run.use_data(info, alpha_hull=hull)
    return scene
