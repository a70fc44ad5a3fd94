"""The configuration of the NeRF experiment. Loads no framework."""

import dataclasses
import math
from typing import Literal

from blacksmith.config.sections import fields, section, setting
from blacksmith.config.settings import CheckpointConfig, LogConfig, RunConfig, check_log
from blacksmith.errors import ConfigError

BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}


@section("nerf.Data")
class Data:
    """The scene: a directory in Blender's NeRF format, or the anvil that comes with the package."""

    scene: str | None = setting(
        None, "directory with transforms_{train,val,test}.json; None: the anvil", evaluation_may_change=True
    )
    downscale: int = setting(
        1, "pictures are made smaller by this whole factor, each way", ge=1, evaluation_may_change=True
    )
    background: Literal["white", "black", "random"] = setting(
        "white", "what is behind the scene; random: another one for each ray, and white in evaluation"
    )
    hull: bool = setting(
        True,
        "start from the visual hull of the training pictures' alpha; the standard protocol does not read it",
    )
    bounds: tuple[float, ...] | None = setting(
        None,
        "the box that holds the scene, (x0, y0, z0, x1, y1, z1) in world units; None: what all cameras see",
    )
    near: float | None = setting(
        None, "rays begin at this distance, in world units; None: before the box", ge=0
    )
    far: float | None = setting(None, "rays end at this distance, in world units; None: behind the box", gt=0)


@section("nerf.Model")
class Model:
    """Which field learns the scene."""

    field: Literal["grid", "mlp"] = setting(
        "grid", "grid: density and features on voxels, fast; mlp: the networks of the NeRF paper"
    )


@section("nerf.Grid")
class Grid:
    """The grid field, and its way from coarse to fine."""

    resolutions: tuple[int, ...] = setting(
        (48, 80, 128), "side of each level, as that of a cube with as many vertices"
    )
    upsample_at: tuple[float, ...] = setting(
        (0.12, 0.35), "when each finer level begins, as a fraction of the training"
    )
    occupancy_resolution: int = setting(128, "cells along each side of the occupancy grid", ge=8, le=512)
    refresh_at: tuple[float, ...] = setting(
        (0.4, 0.6, 0.8), "when the occupancy is brought up to date, as fractions of the training"
    )
    interpolate_at: float = setting(
        0.7,
        "when samples begin to interpolate the features of eight vertices, as a fraction of the training; "
        "before, they take those of one, drawn: faster, and blurred",
        ge=0,
        le=1,
    )
    refresh_threshold: float = setting(
        5e-3, "cells stay occupied above this opacity over a 96th of the box", gt=0, lt=1
    )
    features: int = setting(12, "numbers at each vertex; the first three are a colour", ge=3)
    rows: int | None = setting(
        None,
        "vertices that can have features; None: those of the hull, or a quarter of the finest grid",
        gt=0,
    )
    width: int = setting(64, "of the two hidden layers of the colour network", gt=0)
    alpha: float = setting(3e-3, "opacity of a 96th of the box before training", gt=0, lt=1)
    alpha_floor: float = setting(1e-3, "samples less opaque than this are left out", ge=0, lt=1)
    weight_floor: float = setting(2e-4, "samples that weigh less than this have no colour", ge=0, lt=1)
    train_step: float = setting(1.0, "distance of the samples in training, in voxels", gt=0)
    render_step: float = setting(
        0.5, "distance of the samples in evaluation, in voxels", gt=0, evaluation_may_change=True
    )


@section("nerf.Mlp")
class Mlp:
    """The paper's field."""

    width: int = setting(256, "of the hidden layers", gt=1)
    depth: int = setting(8, "hidden layers before the density", gt=1)
    position_frequencies: int = setting(10, "octaves of the encoded position", gt=0)
    direction_frequencies: int = setting(4, "octaves of the encoded direction", gt=0)
    coarse_samples: int = setting(64, "samples of a ray for the coarse network", gt=2)
    fine_samples: int = setting(128, "further samples for the fine network", gt=0)


@section("nerf.Train")
class Train:
    """The training loop."""

    steps: int = setting(1000, "optimiser steps", gt=0)
    rays: int = setting(16384, "rays of a step; the most, where `samples` is set", gt=0)
    samples: int | None = setting(
        65536, "samples that a step is to have, by which its number of rays follows; None: `rays` it is", gt=0
    )
    density_learning_rate: float = setting(0.5, "of the grid's density", gt=0)
    feature_learning_rate: float = setting(0.1, "of the grid's features", gt=0)
    network_learning_rate: float = setting(2e-3, "of the networks", gt=0)
    final_fraction: float = setting(
        0.1, "the rates fall exponentially to this fraction of themselves at the end", gt=0, le=1
    )
    warmup_steps: int = setting(20, "steps over which the rates rise linearly", ge=0)
    beta_1: float = setting(0.9, "Adam's decay of the first moment", ge=0, lt=1)
    beta_2: float = setting(0.99, "Adam's decay of the second moment", ge=0, lt=1)
    epsilon: float = setting(1e-8, "added to Adam's denominator", gt=0)
    distortion: float = setting(
        0.0, "weight of the distortion loss, which pulls the weights of a ray together", ge=0
    )
    total_variation: float = setting(0.0, "weight of the density's total variation; grid only", ge=0)
    opacity_entropy: float = setting(
        0.0, "weight of the opacity's entropy, which pulls rays to empty or opaque", ge=0
    )
    precision: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "of the networks; weights, grids and compositing stay float32"
    )
    evaluate_every_steps: int | None = setting(
        None, "render validation views every so many steps; None: ten times in all", gt=0
    )
    validation_views: int = setting(3, "how many, spread over the validation set", ge=1)


@section("nerf.Results")
class Results:
    """What is made of a trained field."""

    lpips_weights: str | None = setting(
        None,
        "AlexNet's ImageNet weights for LPIPS (alexnet-owt-7be5be79.pth); None: the cache, if they are there",
        resume_may_change=True,
    )
    video_frames: int = setting(60, "of the orbit video; 0: no video", ge=0, resume_may_change=True)
    video_fps: int = setting(20, "frames per second of the video", gt=0, resume_may_change=True)
    video_elevation: float = setting(
        25.0,
        "degrees above the horizon that the video is seen from",
        gt=-90,
        lt=90,
        resume_may_change=True,
    )
    video_width: int | None = setting(
        None,
        "of the video, in pixels; None: that of the pictures",
        gt=0,
        resume_may_change=True,
    )
    mesh_resolution: int = setting(
        192,
        "cells along the longest side for --mode=export",
        ge=8,
        resume_may_change=True,
    )
    mesh_opacity: float = setting(
        0.1,
        "the mesh lies where a 96th of the box would be this opaque",
        gt=0,
        lt=1,
        resume_may_change=True,
    )


@section("nerf.View")
class View:
    """The viewer of --mode=view."""

    host: str = setting(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 lets other machines in, without a password",
        min_length=1,
        resume_may_change=True,
    )
    port: int = setting(8080, "TCP port; 0 takes a free one", ge=0, le=65535, resume_may_change=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the NeRF experiment is given."""

    run: RunConfig
    data: Data
    model: Model
    grid: Grid
    mlp: Mlp
    train: Train
    results: Results
    view: View
    checkpoint: CheckpointConfig
    log: LogConfig

    @property
    def background(self) -> tuple[float, float, float]:
        """The background of evaluation, red, green and blue from 0 to 1."""
        return BACKGROUNDS.get(self.data.background, BACKGROUNDS["white"])

    @property
    def evaluate_every(self) -> int:
        """Steps between two looks at the validation views."""
        return self.train.evaluate_every_steps or max(1, math.ceil(self.train.steps / 10))

    def check(self) -> None:
        """The rules that span fields.

        Raises:
          ConfigError: the first that is broken.
        """
        check_log(self.log)
        data, train = self.data, self.train
        if self.checkpoint.metric not in ("val_psnr", "val_loss"):
            raise ConfigError(
                f"Checkpoint.metric = {self.checkpoint.metric!r}: this experiment has val_psnr and val_loss"
            )
        if self.checkpoint.every_epochs not in (None, fields(CheckpointConfig)["every_epochs"].default):
            raise ConfigError(
                f"Checkpoint.every_epochs = {self.checkpoint.every_epochs} has no effect here, where "
                "training is counted in steps; set Checkpoint.every_steps"
            )
        if data.bounds is not None:
            low, high = data.bounds[:3], data.bounds[3:]
            if len(data.bounds) != 6 or any(not a < b for a, b in zip(low, high)):
                raise ConfigError(
                    f"nerf.Data.bounds = {data.bounds}: must be (x0, y0, z0, x1, y1, z1), each first "
                    "below its second"
                )
        if data.near is not None and data.far is not None and data.near >= data.far:
            raise ConfigError(f"nerf.Data.near = {data.near} is not below nerf.Data.far = {data.far}")
        self._check_unused()
        if self.model.field == "grid":
            self._check_grid()
        elif train.samples is not None:
            raise ConfigError(
                f"nerf.Train.samples = {train.samples} has no effect on the mlp field, whose rays all "
                "have the same number; set it to None, and nerf.Train.rays"
            )
        if train.warmup_steps >= train.steps:
            raise ConfigError(
                f"nerf.Train.warmup_steps = {train.warmup_steps} is not less than "
                f"nerf.Train.steps = {train.steps}"
            )

    def _check_unused(self) -> None:
        """Refuses settings of the field that is not chosen."""
        if self.model.field == "mlp" and self.data.hull:
            raise ConfigError(
                "nerf.Data.hull = True has no effect on nerf.Model.field = 'mlp'; set it to False"
            )
        unused = {
            "grid": [("nerf.Mlp", self.mlp)],
            "mlp": [("nerf.Grid", self.grid), ("nerf.Train", self.train)],
        }[self.model.field]
        of_grid = ("density_learning_rate", "feature_learning_rate", "total_variation")
        for title, values in unused:
            for name, field in fields(type(values)).items():
                if title == "nerf.Train" and name not in of_grid:
                    continue
                value = getattr(values, name)
                if value != field.default:
                    raise ConfigError(
                        f"{title}.{name} = {value!r} has no effect on nerf.Model.field = {self.model.field!r}"
                    )

    def _check_grid(self) -> None:
        grid = self.grid
        if not grid.resolutions or any(b <= a for a, b in zip((3, *grid.resolutions), grid.resolutions)):
            raise ConfigError(f"nerf.Grid.resolutions = {grid.resolutions}: must rise, from 4 at least")
        if len(grid.upsample_at) != len(grid.resolutions) - 1:
            raise ConfigError(
                f"nerf.Grid.upsample_at = {grid.upsample_at}: there are {len(grid.resolutions) - 1} levels "
                "after the first"
            )
        for name in ("upsample_at", "refresh_at"):
            times = getattr(grid, name)
            if any(b <= a for a, b in zip((0.0, *times), times)) or any(t >= 1 for t in times):
                raise ConfigError(f"nerf.Grid.{name} = {times}: must rise, between 0 and 1")
