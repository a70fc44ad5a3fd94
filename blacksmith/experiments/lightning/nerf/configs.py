"""The configuration of the NeRF experiment. Loads no framework."""

import dataclasses
import itertools
import math
from typing import Literal

from blacksmith.config.sections import section, setting
from blacksmith.config.settings import (
    CheckpointConfig,
    LogConfig,
    RunConfig,
    ScheduleConfig,
    TorchOptimizerConfig,
    TrainConfig,
    check_warmup,
)
from blacksmith.errors import ConfigError

_GRID, _MLP = {"nerf.Model.field": "grid"}, {"nerf.Model.field": "mlp"}
_STEPS = "training is counted in steps"
_CLIPPING = "gradients are not clipped"


@section("nerf.Data")
class Data:
    """The scene: a directory in Blender's NeRF format, or the bundled anvil."""

    scene: str | None = setting(
        None,
        "directory with transforms_{train,val,test}.json; None: the anvil",
        resume_may_change=True,
        location=True,
    )
    downscale: int = setting(1, "shrink the images by this whole factor", ge=1, evaluation_may_change=True)
    background: Literal["white", "black", "random"] = setting(
        "white", "color behind the scene; random: a color per ray in training, white in evaluation"
    )
    hull: bool = setting(
        True, "start from the hull of the images' alpha, which the standard protocol ignores", only_with=_GRID
    )
    bounds: tuple[float, ...] | None = setting(
        None, "box around the scene, (x0, y0, z0, x1, y1, z1) in world units; None: from cameras and masks"
    )
    near: float | None = setting(
        None, "where rays start, in world units; None: in front of the box", ge=0, le=1e9
    )
    far: float | None = setting(None, "where rays end, in world units; None: behind the box", gt=0, le=1e9)


@section("nerf.Model")
class Model:
    """Which field learns the scene."""

    field: Literal["grid", "mlp"] = setting("grid", "grid: voxels, fast; mlp: the NeRF paper's networks")


@section("nerf.Grid", only_with=_GRID)
class Grid:
    """The grid field and its coarse-to-fine schedule."""

    resolutions: tuple[int, ...] = setting(
        (48, 80, 128), "resolution of each level: the side of a cube with as many vertices"
    )
    upsample_at: tuple[float, ...] = setting(
        (0.12, 0.35), "when each finer level starts, as a fraction of the training"
    )
    occupancy_resolution: int = setting(128, "cells along each side of the occupancy grid", ge=8, le=512)
    refresh_at: tuple[float, ...] = setting(
        (0.4, 0.6, 0.8), "when the occupancy grid is updated, as fractions of the training"
    )
    # Before that they read one random vertex, which is faster but blurs.
    interpolate_at: float = setting(
        0.7, "when samples start to interpolate features, as a fraction of the training", ge=0, le=1
    )
    refresh_threshold: float = setting(
        5e-3,
        "a cell stays occupied if its density, over 1/96 of the box, is more opaque than this",
        gt=0,
        lt=1,
    )
    features: int = setting(12, "numbers per vertex; the first three are a color", ge=3)
    rows: int | None = setting(
        None, "vertices that can have features; None: those of the hull, or a quarter of the grid", gt=0
    )
    width: int = setting(64, "width of the two hidden layers of the color network", gt=0)
    alpha: float = setting(3e-3, "opacity of 1/96 of the box before training", gt=0, lt=1)
    alpha_floor: float = setting(1e-3, "skip samples that are less opaque than this", ge=0, lt=1)
    weight_floor: float = setting(2e-4, "samples with less weight than this get no color", ge=0, lt=1)
    train_step: float = setting(1.0, "distance between samples in training, in voxels", gt=0)
    render_step: float = setting(0.5, "the same in evaluation, in voxels", gt=0, evaluation_may_change=True)


@section("nerf.Mlp", only_with=_MLP)
class Mlp:
    """The field of the NeRF paper."""

    width: int = setting(256, "width of the hidden layers", gt=1)
    depth: int = setting(8, "hidden layers before the density", gt=1)
    position_frequencies: int = setting(10, "octaves in the encoding of the position", gt=0)
    direction_frequencies: int = setting(4, "octaves in the encoding of the direction", gt=0)
    coarse_samples: int = setting(64, "samples per ray for the coarse network", gt=2)
    fine_samples: int = setting(128, "additional samples per ray for the fine network", gt=0)


@section(
    "nerf.Train",
    defaults={"epochs": None},
    unused={"epochs": f"{_STEPS}; set nerf.Train.steps", "batch_size": "set nerf.Train.rays"},
)
class Train(TrainConfig):
    """The training loop."""

    # A resumed run must not change it: levels and updates of the grid are fractions of it.
    steps: int = setting(1000, "optimizer steps", gt=0)
    rays: int = setting(16384, "rays per step; the maximum if `samples` is set", gt=0)
    samples: int | None = setting(
        65536, "samples per step, which set the number of rays; None: always `rays`", gt=0, only_with=_GRID
    )
    density_learning_rate: float = setting(0.5, "peak rate of the grid's density", gt=0, only_with=_GRID)
    feature_learning_rate: float = setting(0.1, "peak rate of the grid's features", gt=0, only_with=_GRID)
    distortion: float = setting(0.0, "weight of the distortion loss, which gathers a ray's weights", ge=0)
    total_variation: float = setting(0.0, "weight of the density's total variation", ge=0, only_with=_GRID)
    opacity_entropy: float = setting(0.0, "weight of the opacity's entropy, for empty or opaque rays", ge=0)
    precision: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "precision of the networks; weights, grids and compositing stay float32"
    )
    evaluate_every_steps: int | None = setting(
        None, "render the validation views every this many steps; None: ten times in all", gt=0
    )
    validation_views: int = setting(3, "how many views, evenly spaced in the validation set", ge=1)


@section(
    "Optimizer",
    defaults={"beta_2": 0.99},
    unused={"clip_norm": _CLIPPING, "global_clip_norm": _CLIPPING, "clip_value": _CLIPPING},
)
class Optimizer(TorchOptimizerConfig):
    """Adam by default, with different learning rates for networks and grid."""

    learning_rate: float = setting(2e-3, "peak rate of the networks; the grid's are in `nerf.Train`", gt=0)


@section("Schedule", defaults={"name": "exponential", "warmup_steps": 20, "final_fraction": 0.1})
class Schedule(ScheduleConfig):
    """The learning rates over the training."""


@section(
    "Checkpoint",
    defaults={"every_epochs": None},
    unused={"every_epochs": f"{_STEPS}; set Checkpoint.every_steps"},
)
class Checkpoint(CheckpointConfig):
    """When checkpoints are written and which are kept."""

    metric: Literal["val_psnr", "val_loss"] = setting("val_psnr", "the metric that decides which is best")


@section("nerf.Results")
class Results:
    """What is made from a trained field."""

    lpips_weights: str | None = setting(
        None, "alexnet-owt-7be5be79.pth; None: the one in the cache, if any", resume_may_change=True
    )
    video_frames: int = setting(60, "frames of the orbit video; 0: no video", ge=0, resume_may_change=True)
    video_fps: int = setting(20, "frames per second of the video", gt=0, resume_may_change=True)
    video_elevation: float = setting(25.0, "degrees above the horizon", gt=-90, lt=90, resume_may_change=True)
    video_width: int | None = setting(None, "pixels; None: that of the images", gt=0, resume_may_change=True)
    mesh_resolution: int = setting(192, "cells on the box's longest side", ge=8, resume_may_change=True)
    mesh_opacity: float = setting(
        0.1, "the mesh lies where 1/96 of the box would be this opaque", gt=0, lt=1, resume_may_change=True
    )


@section("nerf.View")
class View:
    """The viewer of --mode=view, which has no password."""

    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0: any", min_length=1, resume_may_change=True
    )
    port: int = setting(8080, "TCP port; 0: any free port", ge=0, le=65535, resume_may_change=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of the NeRF experiment."""

    run: RunConfig
    data: Data
    model: Model
    grid: Grid
    mlp: Mlp
    train: Train
    optimizer: Optimizer
    schedule: Schedule
    results: Results
    view: View
    checkpoint: Checkpoint
    log: LogConfig

    @property
    def background(self) -> tuple[float, float, float]:
        """The background in evaluation: red, green and blue from 0 to 1."""
        return (0.0, 0.0, 0.0) if self.data.background == "black" else (1.0, 1.0, 1.0)

    @property
    def hull(self) -> bool:
        """Whether the visual hull is used; only the grid field can."""
        return self.data.hull and self.model.field == "grid"

    @property
    def samples(self) -> int | None:
        """Samples per step, or None if the number of rays is fixed, as for the mlp field."""
        return self.train.samples if self.model.field == "grid" else None

    @property
    def evaluate_every(self) -> int:
        """Steps between two validations."""
        return self.train.evaluate_every_steps or max(1, math.ceil(self.train.steps / 10))

    def check(self) -> None:
        """Checks the rules that span fields; raises ConfigError for the first that is broken."""
        data, grid = self.data, self.grid
        if data.bounds is not None:
            low, high = data.bounds[:3], data.bounds[3:]
            if len(data.bounds) != 6 or any(not -1e9 <= a < b <= 1e9 for a, b in zip(low, high)):
                raise ConfigError(
                    f"nerf.Data.bounds = {data.bounds}: must be (x0, y0, z0, x1, y1, z1) with x0 < x1, "
                    "y0 < y1 and z0 < z1, within 1e9"
                )
        if data.near is not None and data.far is not None and data.near >= data.far:
            raise ConfigError(f"nerf.Data.near = {data.near} is not below nerf.Data.far = {data.far}")
        # With the mlp field these are the defaults, which pass.
        if not grid.resolutions or not _rises(3, *grid.resolutions):
            raise ConfigError(f"nerf.Grid.resolutions = {grid.resolutions}: must rise, starting at 4 or more")
        if len(grid.upsample_at) != len(grid.resolutions) - 1:
            raise ConfigError(
                f"nerf.Grid.upsample_at = {grid.upsample_at}: must have one entry per level after the first, "
                f"which is {len(grid.resolutions) - 1}"
            )
        for name in ("upsample_at", "refresh_at"):
            if not _rises(0.0, *getattr(grid, name), 1.0):
                raise ConfigError(f"nerf.Grid.{name} = {getattr(grid, name)}: must rise, between 0 and 1")
        check_warmup(self.schedule, self.train.steps)


def _rises(*values: float) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
