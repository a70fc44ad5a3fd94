"""Fields from a configuration: empty ones for a scene, and trained ones from a checkpoint."""

import math

import numpy as np
import torch

from blacksmith.datasets.blender import Views, estimate_bounds, near_far
from blacksmith.errors import CheckpointError, ConfigError, DataError
from blacksmith.experiments.lightning.nerf.configs import Config
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mlp import MlpField
from blacksmith.models.pytorch.nerf.occupancy import box_of, visual_hull
from blacksmith.models.pytorch.nerf.vertices import level_shape, reachable_vertices
from blacksmith.run.checkpoint import Saved
from blacksmith.run.order import seed_int

WEIGHTS = "lightning.ckpt"
"""The file of a checkpoint that Lightning writes and reads."""

_MASKED = 5  # alpha, of 255, above which a pixel shows matter
_COARSE_HULL = 64  # cells each way of the hull that the box is fitted to


def build(config: Config, rows: int, attempt: int = 0) -> GridField | MlpField:
    """An empty field; the seed of its networks depends on the attempt.

    Args:
      config: the run's.
      rows: of the grid's feature table; see `rows_of`.
      attempt: 0, or 1 after a restart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_int(config.run.seed, "weights", attempt) % 2**63)
        if config.model.field == "mlp":
            mlp = config.mlp
            return MlpField(
                coarse_samples=mlp.coarse_samples,
                fine_samples=mlp.fine_samples,
                width=mlp.width,
                depth=mlp.depth,
                position_frequencies=mlp.position_frequencies,
                direction_frequencies=mlp.direction_frequencies,
            )
        grid = config.grid
        return GridField(
            resolution=grid.resolutions[-1],
            rows=rows,
            occupancy_resolution=grid.occupancy_resolution,
            features=grid.features,
            width=grid.width,
            alpha=grid.alpha,
            alpha_floor=grid.alpha_floor,
            weight_floor=grid.weight_floor,
            train_step=grid.train_step,
            render_step=grid.render_step,
        )


def for_scene(config: Config, views: Views, device: str) -> GridField | MlpField:
    """An empty field for the scene that these pictures show, on a device.

    Raises:
      DataError: no place agrees with all of the masks.
      ConfigError: nothing lies between near and far.
    """
    cameras = views.cameras
    bounds = config.data.bounds
    box = estimate_bounds(cameras) if bounds is None else np.reshape(bounds, (2, 3)).astype(np.float32)
    near, far = config.data.near, config.data.far
    if config.model.field == "mlp":
        estimated = near_far(cameras, box)
        field = build(config, rows=0)
        near = estimated[0] if near is None else near
        far = estimated[1] if far is None else far
        if near >= far:
            raise ConfigError(
                f"rays would begin at {near:.3f} and end at {far:.3f}; set nerf.Data.near and far"
            )
        field.near_far.copy_(torch.tensor([near, far]))
        field.bounds.copy_(torch.from_numpy(box))
        return field.to(device)
    box = torch.from_numpy(box).to(device)
    resolution = config.grid.occupancy_resolution
    if config.data.hull:
        masks = torch.from_numpy(views.pixels[..., 3] > _MASKED)
        coarse = visual_hull(masks, cameras, box, _COARSE_HULL)
        if bounds is None:
            box = box_of(coarse, box)
        hull = visual_hull(masks, cameras, box, resolution)
        if not hull.any():
            raise DataError(
                "no place agrees with the masks of all training pictures: their alpha, their cameras or "
                "nerf.Data.bounds are wrong; nerf.Data.hull = False does without the masks"
            )
    else:
        hull = torch.ones((resolution,) * 3, dtype=torch.bool, device=device)
    field = build(config, rows=rows_of(config, box, hull)).to(device)
    distances = (near or 0.0, math.inf if far is None else far)
    field.begin(box, hull, config.grid.resolutions[0], distances)
    return field


def rows_of(config: Config, box: torch.Tensor, hull: torch.Tensor) -> int:
    """Rows of the feature table: one for every vertex of the hull at the finest level, where there is one."""
    finest = config.grid.resolutions[-1]
    if config.grid.rows is not None:
        return config.grid.rows + 1
    if not config.data.hull:
        return finest**3 // 4 + 1
    return int(reachable_vertices(hull, level_shape(box, finest)).sum()) + 1


def trained(config: Config, saved: Saved, device: str) -> GridField | MlpField:
    """The field of a checkpoint, for rendering.

    Raises:
      CheckpointError: the file cannot be read or does not fit the configuration.
    """
    path = saved.path / WEIGHTS
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {
            name.removeprefix("field."): value
            for name, value in content["state_dict"].items()
            if name.startswith("field.")
        }
        field = build(config, rows=saved.own["rows"])
        field.load_state_dict(state)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {line}") from error
    return field.to(device).eval()
