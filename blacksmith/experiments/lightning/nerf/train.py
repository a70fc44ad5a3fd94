"""NeRF in native Lightning: from the images of a Blender scene to a field, its scores and a video."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch

from blacksmith.datasets.blender import Scene
from blacksmith.errors import CheckpointError, ConfigError, first_line, note
from blacksmith.experiments.lightning.nerf import fields
from blacksmith.experiments.lightning.nerf.data import open_scene_of
from blacksmith.experiments.lightning.nerf.masks import without_bad_masks
from blacksmith.experiments.lightning.nerf.module import NerfModule
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.experiments.lightning.nerf.results import film, score_views, write_gallery
from blacksmith.experiments.lightning.nerf.scores import find_lpips
from blacksmith.run.checkpoint import Saved
from blacksmith.run.loop import Loop
from blacksmith.run.run import Run
from blacksmith.trainers.lightning import make_trainer
from blacksmith.trainers.torch_state import weights_and_gradients

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def train(run: Run) -> int:
    """Trains a field of the scene, then renders and scores its test views; returns the exit status."""
    # What can be wrong is checked before training.
    check_device(run)
    lpips = find_lpips(run)
    scene = open_scene_of(run, lpips)

    module, loader, loop = prepare(run, scene)
    parameters = sum(p.numel() for p in module.field.parameters())
    run.begin()
    fit(run, module, loader)
    loop.between()  # a new directory gets a checkpoint even if no step was left to take
    module.release()

    def test(saved: Saved) -> dict[str, Any] | None:
        # Only here are the test images decoded.
        field = fields.trained(run.config, saved, run.device)
        scored = score_views(run, field, scene, "test", lpips, run.directory / "test")
        if scored is None:
            return None
        write_gallery(run, scored)
        return scored if film(run, field, scene) else None

    return loop.finish(
        test, {"parameters": parameters, "restarts": [restart.model_dump() for restart in module.restarts]}
    )


def check_device(run: Run) -> None:
    """Raises a ConfigError if the device cannot do what the configuration asks for."""
    device = torch.device(run.device).type
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device={run.device}: this experiment needs float64, which only cpu and cuda have"
        )
    if run.config.train.precision == "float16" and device == "cpu":
        raise ConfigError('nerf.Train.precision = "float16" needs a GPU; set it to "float32" or "bfloat16"')


def prepare(run: Run, scene: Scene) -> tuple[NerfModule, RayLoader, Loop]:
    """The field with its rays, and the loop over them from where the run stands."""
    config, settings = run.config, run.config.train

    # Rays of all training pixels stay on the device; a few validation views are rendered now and then.
    images, masks = scene.views("train"), None
    if config.hull:
        images, masks = without_bad_masks(images, run.device, note)
    rays = RayBank(images, run.device)
    first = settings.rays if config.samples is None else min(1024, settings.rays)
    loader = RayLoader(settings.steps, config.run.seed, first, rays=len(rays))
    count = len(scene.cameras("val"))
    wanted = min(settings.validation_views, count)
    held_out = scene.views("val", np.linspace(0, count - 1, wanted).round().astype(int))

    if run.resumed is None:
        field = fields.for_scene(config, images.cameras, masks, run.device, note)
    else:
        field = fields.trained(config, run.resumed, run.device)

    module = NerfModule(run, field, rays, loader, held_out)
    module.loop = Loop(
        run,
        loader,
        end=settings.steps,
        validate=module.validate,
        save=module.save,
        validate_every=config.evaluate_every,
        histograms=lambda: weights_and_gradients(dict(module.field.named_parameters())),
        summarize=module.summarize,
        unit="steps",
    )
    return module, loader, module.loop


def fit(run: Run, module: NerfModule, loader: RayLoader, callbacks: Sequence[L.Callback] = ()) -> None:
    """Runs Lightning's Trainer to the last step, or until the run is to stop."""
    trainer = make_trainer(
        run.device,
        run.directory,
        precision=_PRECISIONS[run.config.train.precision],
        max_epochs=1,
        max_steps=run.config.train.steps,
        callbacks=list(callbacks),
    )
    resumed = None if run.resumed is None else run.resumed.file(fields.WEIGHTS)
    try:
        trainer.fit(module, loader, ckpt_path=resumed, weights_only=True)
    except Exception as error:
        if resumed is None or module.started:
            raise
        raise CheckpointError(f"{resumed} does not fit this run: {first_line(error)}") from error
