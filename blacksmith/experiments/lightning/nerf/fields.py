"""Fields from a configuration: empty ones for a scene, and trained ones from a checkpoint."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import pydantic
import torch

from blacksmith.datasets.blender.bounds import estimate_bounds, near_far
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import CheckpointError, ConfigError, DataError, first_line
from blacksmith.experiments.lightning.nerf.configs import Config
from blacksmith.experiments.lightning.nerf.masks import Masks
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.hull import visual_hull
from blacksmith.models.pytorch.nerf.mlp import MlpField
from blacksmith.models.pytorch.nerf.occupancy import box_of
from blacksmith.models.pytorch.nerf.vertices import level_shape, reachable_vertices
from blacksmith.run.checkpoint import Saved, checked
from blacksmith.run.order import seed_int

WEIGHTS = "lightning.ckpt"  # the file of a checkpoint that Lightning writes and reads

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


def for_scene(
    config: Config, cameras: Sequence[Camera], masks: Masks | None, device: str, say: Callable[[str], None]
) -> GridField | MlpField:
    """An empty field for the scene that these cameras show, on a device; `say` prints a line about it.

    It starts from the hull of the cameras' masks, if given.

    Raises:
      DataError: the visual hull is empty.
      ConfigError: nothing lies between near and far, or no view shows the box.
    """
    data = config.data
    given = None if data.bounds is None else np.reshape(data.bounds, (2, 3)).astype(np.float32)
    if config.model.field == "mlp":
        box = estimate_bounds(cameras) if given is None else given
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
        _describe(say, box, f"from the {'cameras' if given is None else 'configuration'}")
        return field.to(device)
    resolution, finest, rows = config.grid.occupancy_resolution, config.grid.resolutions[-1], config.grid.rows
    if masks is not None:
        box = torch.from_numpy(masks.bounds if given is None else given).to(device)
        if given is None:
            # The coarse hull only fits the box, so that no cell of the fine one is wasted on empty space.
            box = box_of(visual_hull(masks.maybe, cameras, box, _COARSE_HULL), box)
        hull = visual_hull(masks.maybe, cameras, box, resolution)
        if not hull.any():
            raise DataError(
                "the visual hull of the training images is empty: their alpha, their cameras or "
                "nerf.Data.bounds are wrong; nerf.Data.hull = False trains without it"
            )
        rows = rows or int(reachable_vertices(hull, level_shape(box, finest)).sum())
    else:
        box = torch.from_numpy(estimate_bounds(cameras) if given is None else given).to(device)
        hull = torch.ones((resolution,) * 3, dtype=torch.bool, device=device)
        rows = rows or finest**3 // 4
    source = "configuration" if given is not None else "cameras" if masks is None else "alpha masks"
    _describe(say, box.cpu().numpy(), f"from the {source}")
    distances = (data.near or 0.0, math.inf if data.far is None else data.far)
    nearest, farthest = near_far(cameras, box.cpu().numpy())
    if distances[0] >= farthest or distances[1] <= nearest:
        raise ConfigError(
            f"nerf.Data.near = {data.near}, far = {data.far}: no ray would meet the box, which is "
            f"{nearest:.3f} to {farthest:.3f} away from the cameras"
        )
    field = build(config, rows + 1).to(device)  # the first row serves all vertices without features
    field.begin(box, hull, config.grid.resolutions[0], distances)
    if not any(bool(visible.any()) for visible in field.occupancy.visible_pixels(cameras)):
        raise ConfigError(
            f"nerf.Data.bounds = {data.bounds}: no training view shows any of this box; in the scene's world "
            f"units, the cameras look at {np.round(estimate_bounds(cameras), 3).tolist()}"
        )
    return field


def _describe(say: Callable[[str], None], box: np.ndarray, source: str) -> None:
    low, high = (", ".join(f"{at:.3f}" for at in corner) for corner in box)
    say(f"box {source}: ({low}) to ({high}) in world units; nerf.Data.bounds sets it")


class Restart(pydantic.BaseModel, strict=True):
    """A new start of a collapsed field."""

    step: pydantic.NonNegativeInt
    reason: str
    attempt: pydantic.NonNegativeInt  # 1 for the first one


class Own(pydantic.BaseModel, strict=True):
    """What a checkpoint holds beside Lightning's file: what must be known before Lightning reads that."""

    rows: pydantic.NonNegativeInt  # of the feature table; 0 for the mlp field
    restarts: list[Restart]  # after a collapse; at most one
    per_ray: Annotated[pydantic.NonNegativeFloat, pydantic.Field(allow_inf_nan=False)]  # samples, smoothed
    drawn: pydantic.NonNegativeInt  # rays so far


def own_of(saved: Saved) -> Own:
    """The experiment's values of a checkpoint, or a CheckpointError for the first that is wrong."""
    return checked(saved.own, Own, saved.path / "state.json", "own")


def trained(config: Config, saved: Saved, device: str) -> GridField | MlpField:
    """The field of a checkpoint.

    Raises:
      CheckpointError: the file cannot be read, does not fit the configuration, or has values that are not
        finite.
    """
    path, rows = saved.file(WEIGHTS), own_of(saved).rows
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {name.removeprefix("field."): value for name, value in content["state_dict"].items()}
        field = build(config, rows)
        field.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    # The grid field would show them as empty space, in pictures whose scores look right.
    for name, value in field.state_dict().items():
        # That rays have no end is what infinity means in `near_far`.
        if value.is_floating_point() and not name.endswith("near_far") and not value.isfinite().all():
            wrong = int((~value.isfinite()).sum())
            raise CheckpointError(
                f"{path}: {wrong:,} of the {value.numel():,} values of {name} are not finite; take an "
                "earlier checkpoint with --resume"
            )
    return field.to(device)
