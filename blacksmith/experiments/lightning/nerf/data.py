"""The scene of a run, opened and checked."""

import numpy as np

from blacksmith.datasets.blender import Scene, open_scene
from blacksmith.errors import DataError
from blacksmith.experiments.lightning.nerf import scores
from blacksmith.run.run import Run


def open_scene_of(run: Run) -> Scene:
    """Opens and checks the whole scene, and prints which it is.

    Raises:
      DataError: it is missing or broken.
    """
    data, hull = run.config.data, run.config.hull
    needs_alpha = hull or data.background == "random"
    scene = open_scene(data.scene, downscale=data.downscale, needs_alpha=needs_alpha)
    smallest = scores.SSIM_WINDOW_PIXELS
    if min(scene.info.width, scene.info.height) < smallest:
        raise DataError(
            f"{scene.path}: pictures of {scene.info.width}x{scene.info.height} pixels are too small "
            f"for SSIM, which needs {smallest}; lower nerf.Data.downscale"
        )
    run.use_data(scene.info, alpha_hull=hull)
    return scene


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """`wanted` different numbers of 0 to count - 1, evenly spaced; all of them if there are fewer."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()})
