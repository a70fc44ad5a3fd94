"""The Lightning module: one step, and what happens between steps.

Lightning owns the loop, the optimiser, mixed precision and the checkpoint file. Between steps the module
brings the grid to its next level, keeps the occupancy up to date, renders validation views and books metrics.
"""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from blacksmith.datasets.blender import Views
from blacksmith.errors import RunError
from blacksmith.experiments.lightning.nerf import fields
from blacksmith.experiments.lightning.nerf.pictures import (
    depth_colors,
    error_colors,
    labels_of,
    strip,
    to_bytes,
    write_png,
)
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.experiments.lightning.nerf.scores import psnr
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mlp import MlpField
from blacksmith.models.pytorch.nerf.rendering import distortion, render_image
from blacksmith.run.loop import Loop
from blacksmith.run.order import generator, seed_int
from blacksmith.run.run import Run
from blacksmith.run.schedule import learning_rate
from blacksmith.trainers.native_optimizers import make_optimizer

CHECKED_AT = 0.05
"""When a field is looked at for having collapsed, as a fraction of the training."""

_SMOOTHING = 0.9  # of the samples per ray that the size of the next batch follows from
_FEWEST_RAYS = 512
_OCCUPANCY_RAYS = 1 << 18


class NerfModule(L.LightningModule):
    """A field in training.

    Args:
      run: configuration, metrics and checkpoints.
      field: what is trained.
      rays: the training pixels, or None where the module only restores a field.
      loader: draws batches of them.
      validation: views that are looked at as training goes.
    """

    def __init__(
        self, run: Run, field: GridField | MlpField, rays: RayBank, loader: RayLoader, validation: Views
    ) -> None:
        super().__init__()
        self.field = field
        self._run, self._config = run, run.config
        self._rays, self._loader, self._validation = rays, loader, validation
        steps, grid = run.config.train.steps, run.config.grid
        is_grid = run.config.model.field == "grid"
        levels = zip(grid.upsample_at, grid.resolutions[1:]) if is_grid else ()
        self._levels = {math.ceil(when * steps): resolution for when, resolution in levels}
        self._refreshes = {math.ceil(when * steps) for when in grid.refresh_at} if is_grid else set()
        self._check_at = math.ceil(CHECKED_AT * steps)
        background = torch.tensor(run.config.background)
        self.register_buffer("background", background, persistent=False)
        self.loop: Loop | None = None
        self.restarts: list[dict[str, Any]] = []
        self._per_ray = 0.0
        if run.resumed is not None:
            own = run.resumed.own
            self.restarts, self._per_ray, loader.drawn = list(own["restarts"]), own["per_ray"], own["drawn"]
        self._values: dict[str, Tensor] = {}
        self._collapse: str | None = None
        self._dense = 0

    # --- what Lightning calls ---

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer with a learning rate per kind of parameter, all on the same schedule."""
        config, field = self._config, self.field
        train, rate = config.train, config.optimizer.learning_rate
        if isinstance(field, GridField):
            groups = [
                {"params": [field.density_table], "lr": train.density_learning_rate},
                {"params": [field.feature_table], "lr": train.feature_learning_rate},
                {"params": list(field.decoder.parameters()), "lr": rate},
            ]
        else:
            groups = [{"params": list(field.parameters()), "lr": rate}]
        optimizer = make_optimizer(config.optimizer, groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Takes SIGTERM back, which Lightning handles in the middle of a step, and finds the rays to draw."""
        self._run.stop.listen()
        self._use_pool(reshuffle=False)
        for old in (self._run.directory / "images").glob("val_*.png"):
            if int(old.stem.removeprefix("val_")) > self.global_step:
                old.unlink()
        # Not before: only now has Lightning restored the field, and can save it.
        self.trainer.should_stop = not self.loop.between()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Takes the field to the level and the occupancy that this step is trained with."""
        del batch, batch_idx
        step = self.global_step
        if step in self._levels and step not in {restart["step"] for restart in self.restarts}:
            fits = not self._config.data.hull and self._config.data.bounds is None
            if fits:
                self._refresh_occupancy()
            reached = self.field.upsample(self._levels[step], shrink=fits)
            if reached < self._levels[step]:
                self.loop.say(
                    f"step {step}: the level has resolution {reached} instead of {self._levels[step]}: more "
                    "would need a larger nerf.Grid.rows"
                )
            self._forget_moments([self.field.density_table, self.field.feature_table])
        if step in self._refreshes:
            self._refresh_occupancy()
        if step in self._levels or step in self._refreshes:
            self._use_pool()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of some rays, int64 [rays]."""
        del batch_idx
        config, step = self._config, self.global_step
        random = torch.Generator(batch.device)
        random.manual_seed(seed_int(config.run.seed, "step", self._loader.attempt, step) % 2**63)
        origins, directions, rgba = self._rays(batch)
        background = self.background
        if config.data.background == "random":
            background = torch.rand(len(batch), 3, generator=random, device=batch.device)
        truth = rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])
        if isinstance(self.field, GridField):
            step_length = self.field.voxel * self.field.train_step
            interpolate = step >= config.grid.interpolate_at * config.train.steps
            traced = self.field.trace(origins, directions, step_length, random, interpolate=interpolate)
            self._dense = traced.num_samples
            rendered = [traced]
        else:
            rendered = list(self.field.trace(origins, directions, random))
            traced = rendered[-1]
        errors = []
        for seen in rendered:
            rgb = seen.rgb + (1 - seen.opacity[:, None]) * background
            errors.append(torch.nn.functional.mse_loss(rgb, truth))
        loss = sum(errors) + self._regularisation(traced)
        if step + 1 == self._next_check:
            matter = (rgba[:, 3] > 0.5) & ((truth - background).abs().amax(1) > 0.1)
            self._collapse = collapse(traced.opacity.detach(), rgb.detach(), truth, matter)
        values = {"loss": loss, "mse": errors[-1], "opacity": traced.opacity.mean()}
        self._values = {name: value.detach() for name, value in values.items()}
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Logs the step; the loop validates and saves what is due after it."""
        del outputs, batch_idx
        self._choose_size(len(batch))
        if self.global_step == self._next_check and self._collapse is not None:
            self._restart(self._collapse)
            self._values = {}  # of the field that collapsed
        self.loop.log(self._values, rays=len(batch))
        if not self.loop.between():
            self.trainer.should_stop = True

    # --- what the loop calls ---

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes Lightning's checkpoint file; returns what a resumed run has to know apart from it."""
        self.trainer.save_checkpoint(directory / fields.WEIGHTS)
        rows = len(self.field.feature_table) if isinstance(self.field, GridField) else 0
        return {
            "rows": rows,
            "restarts": self.restarts,
            "per_ray": self._per_ray,
            "drawn": self._loader.drawn,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Renders and scores the validation views; the first of them is kept as a picture."""
        run, step, background = self._run, self.loop.step, self._config.background
        errors, ratios = [], []
        for index, camera in enumerate(self._validation.cameras):
            rendered = render_image(self.field, camera, self.background)
            rgb = rendered.rgb.clamp(0, 1).cpu().numpy()
            truth = self._validation.picture(index, background)
            errors.append(float(np.square(rgb - truth).mean(dtype=np.float64)))
            ratios.append(psnr(rgb, truth))
            depth = depth_colors(rendered.depth.cpu().numpy(), rendered.opacity.cpu().numpy())
            pictures = [to_bytes(truth), to_bytes(rgb), error_colors(rgb, truth), depth]
            name = self._validation.names[index]
            shown = strip(pictures, list(labels_of(f"val view {name}", ratios[-1]).values()))
            run.metrics.image(step, f"val/{name}", shown)
            if index == 0:
                (run.directory / "images").mkdir(exist_ok=True)
                write_png(run.directory / "images" / f"val_{step:08d}.png", shown)
        return {"loss": float(np.mean(errors)), "psnr": float(np.mean(ratios))}

    def histograms(self) -> dict[str, np.ndarray]:
        """Weights and, after the first step, their gradients."""
        named = list(self.field.named_parameters())
        arrays = {f"weights/{name}": value.detach() for name, value in named}
        arrays |= {f"gradients/{name}": value.grad for name, value in named if value.grad is not None}
        return {name: array.float().cpu().numpy() for name, array in arrays.items()}

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """The values of a training line from their means."""
        return {
            "loss": means["loss"],
            "psnr": -10 * math.log10(max(means["mse"], 1e-12)),
            "opacity": means["opacity"],
            "rays": self._loader.size,
            "learning_rate": self.optimizers().param_groups[0]["lr"],
        }

    def release(self) -> None:
        """Lets go of field, rays and optimizer: testing reads the best checkpoint and needs the memory."""
        self._loader.use_pool(torch.zeros(1, dtype=torch.int32))  # the pool has up to a number per pixel
        self.field = self._rays = self._validation = self.trainer = None

    # --- what it is made of ---

    @property
    def _next_check(self) -> int:
        """The step after which the field is looked at for having collapsed; a second time after a restart."""
        return self._check_at * (1 + len(self.restarts))

    def _rate(self, step: int) -> float:
        config, begun = self._config, self.restarts[-1]["step"] if self.restarts else 0
        return learning_rate(config.schedule, 1.0, step, config.train.steps, restarted_at=begun)

    def _regularisation(self, traced: Any) -> Tensor | float:
        train, total = self._config.train, 0.0
        if train.distortion:
            size = float((self.field.bounds[1] - self.field.bounds[0]).mean())
            weights, samples = traced.weights.reshape(-1), traced.samples
            if isinstance(samples.length, Tensor):
                samples = samples._replace(length=samples.length.clamp(max=size))
            spread = distortion(weights, samples, len(traced.opacity), size)
            total = total + train.distortion * spread.mean()
        if train.total_variation:
            total = total + train.total_variation * self.field.total_variation()
        if train.opacity_entropy:
            opacity = traced.opacity.clamp(1e-5, 1 - 1e-5)
            entropy = -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log())
            total = total + train.opacity_entropy * entropy.mean()
        return total

    def _choose_size(self, rays: int) -> None:
        """As many rays next as should give the samples that a step is to have."""
        samples, most = self._config.samples, self._config.train.rays
        if samples is None:
            return
        now = max(self._dense / rays, 1.0)
        self._per_ray = now if not self._per_ray else _SMOOTHING * self._per_ray + (1 - _SMOOTHING) * now
        self._loader.size = min(max(_FEWEST_RAYS, int(samples / self._per_ray)), most)

    def _use_pool(self, *, reshuffle: bool = True) -> None:
        """Draws from the rays that can meet something; all of them for the mlp field."""
        device = self._rays.pixels.device
        if not isinstance(self.field, GridField):
            pool = torch.arange(len(self._rays), dtype=torch.int32, device=device)
        else:
            parts, area = [], self._rays.height * self._rays.width
            for number, camera in enumerate(self._rays.cameras):
                visible = self.field.occupancy.visible_pixels(camera).nonzero()[:, 0]
                parts.append((visible + number * area).int())
            pool = torch.cat(parts)
        self._loader.use_pool(pool, reshuffle=reshuffle)

    def _refresh_occupancy(self) -> None:
        """Marks what some of the training rays see."""
        random = generator(self._config.run.seed, "occupancy", self.global_step)
        drawn = random.choice(len(self._rays), min(_OCCUPANCY_RAYS, len(self._rays)), replace=False)
        numbers = torch.from_numpy(drawn).to(self._rays.pixels.device)
        bundles = (self._rays(some)[:2] for some in numbers.split(1 << 14))
        threshold = self._config.grid.refresh_threshold
        if not self.field.refresh_occupancy(threshold, bundles):
            self.loop.say(
                f"step {self.global_step}: nothing is denser than nerf.Grid.refresh_threshold = {threshold} "
                "yet; the occupancy stays as it was"
            )

    def _forget_moments(self, parameters: list[Tensor]) -> None:
        """Adam's moments of parameters that have got another meaning start anew."""
        state = self.optimizers().optimizer.state
        for parameter in parameters:
            for value in state.get(parameter, {}).values():
                value.zero_()

    def _restart(self, reason: str) -> None:
        """Begins once more with another seed, at this step of the schedule."""
        step = self.global_step
        if self.restarts:
            raise RunError(
                f"the field has collapsed again ({reason}); lower the learning rates in Optimizer "
                "and nerf.Train, raise nerf.Grid.alpha, or check that cameras and pictures belong together"
            )
        self._loader.attempt += 1
        self.restarts.append({"step": step, "reason": reason, "attempt": self._loader.attempt})
        self.loop.say(
            f"step {step}: the field has collapsed ({reason}); starting once more with another seed "
            f"(attempt {self._loader.attempt} of seed {self._config.run.seed})"
        )
        field = self.field
        rows = len(field.feature_table) if isinstance(field, GridField) else 0
        fresh = fields.build(self._config, rows, self._loader.attempt).to(self.background.device)
        with torch.no_grad():
            for old, new in zip(field.parameters(), fresh.parameters()):
                old.copy_(new)
        if isinstance(field, GridField):
            reached = (level for when, level in self._levels.items() if when <= step)
            first = max(reached, default=self._config.grid.resolutions[0])
            near_far = tuple(field.occupancy.near_far.tolist())
            field.begin(field.bounds.clone(), field.hull.clone(), first, near_far)
        self._forget_moments(list(field.parameters()))
        self.loop.discard()
        self._collapse = None
        # Lightning has set the rates of the next step already, without the new warm-up.
        scheduler = self.lr_schedulers()
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
            group["lr"] = base * self._rate(step)
        self._use_pool()


def collapse(opacity: Tensor, rgb: Tensor, truth: Tensor, matter: Tensor) -> str | None:
    """Why a field has collapsed, or None.

    Args:
      opacity: float32 [rays].
      rgb: what was rendered, float32 [rays, 3].
      truth: what should have been.
      matter: rays that end at something, bool [rays].
    """
    if not matter.any():
        return None
    seen = float(opacity[matter].mean())
    if not math.isfinite(seen):
        return "it is not finite"
    if seen < 0.02:
        return f"it is empty: rays that should meet something have an opacity of {seen:.4f}"
    spread, wanted = float(rgb[matter].std(0).mean()), float(truth[matter].std(0).mean())
    if wanted > 0.05 and spread < 1e-3:
        return f"it has one colour everywhere: it varies by {spread:.4f}, the pictures by {wanted:.3f}"
    return None
