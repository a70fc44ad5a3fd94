"""Fields from a configuration: empty ones for a scene, and trained ones from a checkpoint."""

import math

import numpy as np
import torch

from blacksmith.datasets.blender import Views
from blacksmith.datasets.blender.bounds import estimate_bounds, near_far
from blacksmith.errors import CheckpointError, ConfigError, DataError, first_line
from blacksmith.experiments.lightning.nerf.configs import Config
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mlp import MlpField
from blacksmith.models.pytorch.nerf.occupancy import box_of, visual_hull
from blacksmith.models.pytorch.nerf.vertices import level_shape, reachable_vertices
from blacksmith.run.checkpoint import Saved
from blacksmith.run.order import seed_int

WEIGHTS = "lightning.ckpt"  # the file of a checkpoint that Lightning writes and reads

_MASK_ALPHA = 5  # of 255: pixels above it are in the masks of the visual hull
_COARSE_HULL = 64  # cells along each side of the hull that the box is fitted to


def build(config: Config, rows: int, attempt: int = 0) -> GridField | MlpField:
    """An empty field whose networks are initialized from the seed and the attempt, 1 after a restart.

    `rows` is the size of the grid's feature table.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_int(config.run.seed, "weights", attempt) % 2**63)
        if config.model.field == "mlp":
            return MlpField(**vars(config.mlp))
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
    """An empty field for the scene that these views show, on a device.

    Raises:
      DataError: the visual hull is empty.
      ConfigError: nothing lies between near and far.
    """
    data, cameras = config.data, views.cameras
    if data.bounds is None:
        box = estimate_bounds(cameras)
    else:
        box = np.reshape(data.bounds, (2, 3)).astype(np.float32)
    if config.model.field == "mlp":
        near, far = near_far(cameras, box)
        near = near if data.near is None else data.near
        far = far if data.far is None else data.far
        if near >= far:
            raise ConfigError(
                f"rays would start at {near:.3f} and end at {far:.3f}; set nerf.Data.near and far"
            )
        field = build(config, rows=0)
        field.near_far.copy_(torch.tensor([near, far]))
        field.bounds.copy_(torch.from_numpy(box))
        return field.to(device)
    box, resolution = torch.from_numpy(box).to(device), config.grid.occupancy_resolution
    finest, rows = config.grid.resolutions[-1], config.grid.rows
    if data.hull:
        masks = torch.from_numpy(views.pixels[..., 3] > _MASK_ALPHA)
        # The coarse hull only fits the box, so that no cell of the fine one is wasted on empty space.
        coarse = visual_hull(masks, cameras, box, _COARSE_HULL)
        if data.bounds is None:
            box = box_of(coarse, box)
        hull = visual_hull(masks, cameras, box, resolution)
        if not hull.any():
            raise DataError(
                "the visual hull of the training images is empty: their alpha, their cameras or "
                "nerf.Data.bounds are wrong; nerf.Data.hull = False trains without it"
            )
        rows = rows or int(reachable_vertices(hull, level_shape(box, finest)).sum())
    else:
        hull = torch.ones((resolution,) * 3, dtype=torch.bool, device=device)
        rows = rows or finest**3 // 4
    field = build(config, rows + 1).to(device)  # the first row serves all vertices without features
    distances = (data.near or 0.0, math.inf if data.far is None else data.far)
    field.begin(box, hull, config.grid.resolutions[0], distances)
    return field


def trained(config: Config, saved: Saved, device: str) -> GridField | MlpField:
    """The field of a checkpoint, for rendering.

    Raises:
      CheckpointError: the file cannot be read or does not fit the configuration.
    """
    path = saved.path / WEIGHTS
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {name.removeprefix("field."): value for name, value in content["state_dict"].items()}
        field = build(config, saved.own["rows"])
        field.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    return field.to(device).eval()
