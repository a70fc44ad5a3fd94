"""The Lightning module: one training step, and what happens between steps.

In its hooks it refines the grid, updates its occupancy and calls the loop, which validates, logs and saves.
"""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from blacksmith.datasets.blender import Views
from blacksmith.errors import NotFinite, RunError
from blacksmith.experiments.lightning.nerf import fields
from blacksmith.experiments.lightning.nerf.pictures import panel_labels, panels, strip, write_png
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.experiments.lightning.nerf.scores import psnr
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mlp import MlpField
from blacksmith.models.pytorch.nerf.rendering import distortion, not_finite, render_image
from blacksmith.run.loop import Loop
from blacksmith.run.order import generator, seed_int
from blacksmith.run.run import Run
from blacksmith.run.schedule import learning_rate
from blacksmith.trainers.native_optimizers import make_optimizer
from blacksmith.trainers.torch_state import slot_fits

_CHECK_AT = 0.05  # when to check for a collapse, as a fraction of the training
_SMOOTHING = 0.9  # of the samples per ray, from which the number of rays follows
_FEWEST_RAYS = 512
_MATTER = 0.1  # opacity over 1/96 of the box above which a cell counts as matter, for a warning
_AT_FACES = 0.05  # more of the matter at the faces of the box than this is worth a warning
_OCCUPANCY_RAYS = 1 << 18


class NerfModule(L.LightningModule):
    """A field in training on the rays that `loader` draws; `validation` is rendered and scored on the way."""

    loop: Loop  # must be set before training

    def __init__(
        self, run: Run, field: GridField | MlpField, rays: RayBank, loader: RayLoader, validation: Views
    ) -> None:
        super().__init__()
        self.field = field
        self._run, self._config = run, run.config
        self._rays, self._loader, self._validation = rays, loader, validation
        self.register_buffer("background", torch.tensor(run.config.background), persistent=False)
        steps, grid = run.config.train.steps, run.config.grid
        self._check_at = math.ceil(_CHECK_AT * steps)
        self._levels: dict[int, int] = {}
        self._refreshes: set[int] = set()
        if isinstance(field, GridField):
            levels = zip(grid.upsample_at, grid.resolutions[1:])
            self._levels = {math.ceil(when * steps): resolution for when, resolution in levels}
            self._refreshes = {math.ceil(when * steps) for when in grid.refresh_at}
        self.restarts: list[fields.Restart] = []
        self.started = False  # and so restored, if the run was resumed
        self._per_ray = 0.0
        self._warned = False  # of matter at the faces of the box
        if run.resumed is not None:
            own = fields.own_of(run.resumed)
            self.restarts, self._per_ray, loader.drawn = own.restarts, own.per_ray, own.drawn

    # --- called by Lightning ---

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
        """Prepares the first step, now that Lightning has restored the field."""
        if self.global_step != self.loop.step:
            raise ValueError(f"it was written at step {self.global_step}, its state.json at {self.loop.step}")
        for parameter, state in self.optimizers().optimizer.state.items():
            if not all(slot_fits(slot, value, parameter) for slot, value in state.items()):
                raise ValueError("the optimizer's moments have other shapes than the weights")
        self.started = True
        # Lightning's own handler of SIGTERM would raise in the middle of a step.
        self._run.stop.listen()
        self._use_pool(reshuffle=False)
        # A resumed run repeats the steps after its checkpoint.
        self._run.clear(
            "images/val_*.png", where=lambda p: int(p.stem.removeprefix("val_")) > self.global_step
        )
        self.trainer.should_stop = not self.loop.between()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Brings the grid to the level and the occupancy that this step is trained with.

        Here and not after the previous step: a checkpoint between the two, from `on_train_batch_end`, then
        holds the old grid, and a resumed run repeats the change.
        """
        step = self.global_step
        # A restart at this very step has started at this level already.
        if step in self._levels and all(restart.step != step for restart in self.restarts):
            # Without hull and bounds the box is a guess from the cameras: fit it to what has been found.
            shrink = not self._config.data.hull and self._config.data.bounds is None
            if shrink:
                self._refresh_occupancy()
            reached = self.field.upsample(self._levels[step], shrink=shrink)
            if reached < self._levels[step]:
                self.loop.say(
                    f"step {step}: the level has resolution {reached} instead of {self._levels[step]}: more "
                    "would need a larger nerf.Grid.rows"
                )
            self._reset_moments([self.field.density_table, self.field.feature_table])
        if step in self._refreshes:
            self._refresh_occupancy()
        if step in self._levels or step in self._refreshes:
            self._use_pool()

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """The loss of a batch of ray numbers, int64 [rays], and what `on_train_batch_end` needs."""
        config, step = self._config, self.global_step
        # Seeded at each step, so that a resumed run draws the same numbers without a saved state.
        random = torch.Generator(batch.device)
        random.manual_seed(seed_int(config.run.seed, "step", self._loader.attempt, step) % 2**63)
        origins, directions, rgba = self._rays(batch)
        # The pixels have straight alpha: truth and render are composited over the same background. If its
        # color is random, only a field that is transparent where the pixels are can match.
        background = self.background
        if config.data.background == "random":
            background = torch.rand(len(batch), 3, generator=random, device=batch.device)
        truth = rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])
        if isinstance(self.field, GridField):
            step_length = self.field.voxel * self.field.train_step
            interpolate = step >= config.grid.interpolate_at * config.train.steps
            rendered = [self.field.trace(origins, directions, step_length, random, interpolate=interpolate)]
        else:
            # The coarse network, whose weights say where the fine one samples, has a loss of its own.
            rendered = self.field.trace(origins, directions, random)
        errors = []
        for seen in rendered:
            rgb = seen.over(background)
            errors.append(torch.nn.functional.mse_loss(rgb, truth))
        traced, reason = rendered[-1], None
        # Once, and once more after a restart.
        if step + 1 == self._check_at * (1 + len(self.restarts)):
            matter = (rgba[:, 3] > 0.5) & ((truth - background).abs().amax(1) > 0.1)
            reason = collapse(traced.opacity.detach(), rgb.detach(), truth, matter)
        return {
            "loss": sum(errors) + self._regularization(traced),
            "mse": errors[-1].detach(),
            "opacity": traced.opacity.detach().mean(),
            "samples": traced.num_samples,
            "collapse": reason,
        }

    def on_train_batch_end(self, outputs: dict[str, Any], batch: Tensor, batch_idx: int) -> None:
        """Logs the step; the loop validates and saves what is due after it."""
        if self._config.samples is not None:
            self._choose_batch_size(outputs["samples"] / len(batch))
        values = {name: outputs[name] for name in ("loss", "mse", "opacity")}
        if outputs["collapse"] is not None:
            self._restart(outputs["collapse"])
            values = {}  # they are those of the collapsed field
        self.loop.log(values, rays=len(batch))
        if not self.loop.between():
            self.trainer.should_stop = True

    # --- called by the loop ---

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes Lightning's checkpoint file; returns what must be known before Lightning restores it."""
        self.trainer.save_checkpoint(directory / fields.WEIGHTS)
        return fields.Own(
            rows=self._rows, restarts=self.restarts, per_ray=self._per_ray, drawn=self._loader.drawn
        ).model_dump()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Renders and scores the validation views; the first one is kept as a picture."""
        run, step, views = self._run, self.loop.step, self._validation
        errors, ratios = [], []
        for index, name in enumerate(views.names):
            rendered = render_image(self.field, views.cameras[index], self.background)
            if wrong := not_finite(rendered):
                raise NotFinite(f"val view {name}: {wrong}")
            rgb = rendered.rgb.clamp(0, 1).cpu()
            truth = views.picture(index, self._config.background)
            used = views.used[index]
            errors.append(float(np.square(rgb.numpy() - truth)[used].mean(dtype=np.float64)))
            ratios.append(psnr(rgb, truth, used))
            labels = panel_labels(f"val view {name}", ratios[-1])
            shown = strip(panels(truth, rendered).values(), labels.values())
            run.metrics.image(step, f"val/{name}", shown)
            if index == 0:
                write_png(run.claim(f"images/val_{step:08d}.png"), shown)
        return {"loss": float(np.mean(errors)), "psnr": float(np.mean(ratios))}

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
        """Frees field, rays and optimizer: the test needs the memory, and reads the best checkpoint."""
        self._loader.use_pool(torch.zeros(1, dtype=torch.int32))  # the pool has up to a number per pixel
        self.field = self._rays = self._validation = self.trainer = None

    # --- parts of a step ---

    @property
    def _rows(self) -> int:
        return len(self.field.feature_table) if isinstance(self.field, GridField) else 0

    def _rate(self, step: int) -> float:
        """The learning rate as a fraction of its peak; a restart repeats the warm-up."""
        config, restarted_at = self._config, self.restarts[-1].step if self.restarts else 0
        return learning_rate(config.schedule, 1.0, step, config.train.steps, restarted_at=restarted_at)

    def _regularization(self, traced: Any) -> Tensor | float:
        train, total = self._config.train, 0.0
        if train.distortion:
            size = float((self.field.bounds[1] - self.field.bounds[0]).mean())
            samples = traced.samples
            if isinstance(samples.length, Tensor):
                # The last sample of a ray through the mlp field stands for all the rest of the ray.
                samples = samples._replace(length=samples.length.clamp(max=size))
            per_ray = distortion(traced.weights, samples, len(traced.opacity), size)
            total = total + train.distortion * per_ray.mean()
        if train.total_variation:
            total = total + train.total_variation * self.field.total_variation()
        if train.opacity_entropy:
            opacity = traced.opacity.clamp(1e-5, 1 - 1e-5)
            entropy = -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log())
            total = total + train.opacity_entropy * entropy.mean()
        return total

    def _choose_batch_size(self, per_ray: float) -> None:
        """Sets the number of rays of the next batch, given the samples per ray of this one.

        A step costs about as much as it has samples, of which rays have fewer as training proceeds.
        """
        per_ray = max(per_ray, 1.0)
        self._per_ray = _SMOOTHING * self._per_ray + (1 - _SMOOTHING) * per_ray if self._per_ray else per_ray
        size = max(_FEWEST_RAYS, int(self._config.samples / self._per_ray))
        self._loader.size = min(size, self._config.train.rays)

    def _use_pool(self, *, reshuffle: bool = True) -> None:
        """Draws only rays that can meet something; all of them for the mlp field."""
        occupancy = self.field.occupancy if isinstance(self.field, GridField) else None
        self._loader.use_pool(self._rays.pool(occupancy), reshuffle=reshuffle)

    def _refresh_occupancy(self) -> None:
        """Keeps occupied only cells with matter that some of the training rays reach."""
        random = generator(self._config.run.seed, "occupancy", self.global_step)
        drawn = random.choice(len(self._rays), min(_OCCUPANCY_RAYS, len(self._rays)), replace=False)
        numbers = torch.from_numpy(drawn).to(self._rays.pixels.device)
        bundles = (self._rays(some)[:2] for some in numbers.split(1 << 14))
        threshold = self._config.grid.refresh_threshold
        if not self.field.refresh_occupancy(threshold, self.field.lit_cells(bundles)):
            self.loop.say(
                f"step {self.global_step}: nothing is denser than nerf.Grid.refresh_threshold = {threshold} "
                "yet; the occupancy stays as it was"
            )
            return
        share = self.field.share_at_faces(_MATTER)
        if share > _AT_FACES and not self._warned:
            self._warned = True
            self.loop.say(
                f"step {self.global_step}: {share:.0%} of the matter lies at the faces of the box, which may "
                "cut off what is beyond; if it does, set larger nerf.Data.bounds"
            )

    def _reset_moments(self, parameters: list[Tensor]) -> None:
        """Zeroes the optimizer's state of parameters whose entries now stand for something else."""
        state = self.optimizers().optimizer.state
        for parameter in parameters:
            for value in state.get(parameter, {}).values():
                value.zero_()

    def _restart(self, reason: str) -> None:
        """Replaces a collapsed field by an empty one from a different seed; the steps keep counting."""
        step = self.global_step
        if self.restarts:
            raise RunError(
                f"the field has collapsed again ({reason}); lower the learning rates in Optimizer "
                "and nerf.Train, raise nerf.Grid.alpha, or check nerf.Data.bounds and that cameras and "
                "images belong together"
            )
        self._loader.attempt += 1
        self.restarts.append(fields.Restart(step=step, reason=reason, attempt=self._loader.attempt))
        self.loop.say(
            f"step {step}: the field has collapsed ({reason}); restarting it with a different seed "
            f"(attempt {self._loader.attempt} of seed {self._config.run.seed})"
        )
        # In place, because the optimizer holds these parameters.
        field = self.field
        fresh = fields.build(self._config, self._rows, self._loader.attempt).to(self.background.device)
        with torch.no_grad():
            for old, new in zip(field.parameters(), fresh.parameters()):
                old.copy_(new)
        if isinstance(field, GridField):
            reached = (level for when, level in self._levels.items() if when <= step)
            first = max(reached, default=self._config.grid.resolutions[0])
            near_far = tuple(field.occupancy.near_far.tolist())
            field.begin(field.bounds.clone(), field.hull.clone(), first, near_far)
        self._reset_moments(list(field.parameters()))
        self.loop.discard()
        # Lightning has already set the rates of the next step, without the new warm-up.
        scheduler = self.lr_schedulers()
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
            group["lr"] = base * self._rate(step)
        self._use_pool()


def collapse(opacity: Tensor, rgb: Tensor, truth: Tensor, matter: Tensor) -> str | None:
    """Why a field has collapsed, or None.

    `opacity`, [rays], and `rgb`, [rays, 3], are rendered, `truth` is of the pixels, and `matter`, bool
    [rays], says which rays end at matter that differs from the background.
    """
    if not matter.any():
        return None
    seen = float(opacity[matter].mean())
    if not math.isfinite(seen):
        return "it is not finite"
    if seen < 0.02:
        return f"it is empty: rays that should meet something have an opacity of {seen:.4f}"
    varies, wanted = float(rgb[matter].std(0).mean()), float(truth[matter].std(0).mean())
    if wanted > 0.05 and varies < 1e-3:
        return f"it has one color everywhere: it varies by {varies:.4f}, the images by {wanted:.3f}"
    return None
