"""NeRF in native Lightning: a radiance field of a Blender scene, from its pictures to new views.

Scene, field, Lightning's Trainer, then the test views, a video and the report. The test pictures are not
decoded before training is done.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from blacksmith.datasets.blender import Scene
from blacksmith.errors import ConfigError
from blacksmith.experiments.lightning.nerf import fields, results
from blacksmith.experiments.lightning.nerf.data import evenly_spaced, open_scene_of
from blacksmith.experiments.lightning.nerf.evaluate import film, find_lpips, score_test_views
from blacksmith.experiments.lightning.nerf.module import NerfModule
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.run.checkpoint import Saved
from blacksmith.run.loop import Loop
from blacksmith.run.run import Run
from blacksmith.trainers.lightning import make_trainer

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def train(run: Run) -> int:
    """Trains a field of the scene, then renders and scores its test views; returns the exit status."""
    config = run.config
    check_device(run)
    lpips = find_lpips(run)
    scene = open_scene_of(run)
    module, loader, loop = prepare(run, scene)
    parameters = sum(p.numel() for p in module.field.parameters())
    run.begin()
    if not (loop.done and run.resumes_in_place):
        fit(run, module, loader)
        loop.between()  # a new directory needs a checkpoint also where no step was left to take
    module.release()

    def test(saved: Saved) -> dict[str, Any] | None:
        field = fields.trained(config, saved, run.device)
        scored = score_test_views(run, field, scene, lpips)
        if scored is None:
            return None
        results.write_gallery(run.directory / "test", run.directory / "images", scored)
        return scored if film(run, field, scene) else None

    return loop.finish(test, {"parameters": parameters, "restarts": module.restarts})


def prepare(run: Run, scene: Scene) -> tuple[NerfModule, RayLoader, Loop]:
    """Rays, field, and the loop over them, where the run stands."""
    config, settings = run.config, run.config.train
    pictures = scene.views("train")
    held_out = scene.views("val", evenly_spaced(len(scene.cameras("val")), settings.validation_views))
    rays = RayBank(pictures, run.device)
    first = settings.rays if config.samples is None else min(1024, settings.rays)
    loader = RayLoader(settings.steps, config.run.seed, first, rays=len(rays))
    if run.resumed is None:
        field = fields.for_scene(config, pictures, run.device)
    else:
        field = fields.build(config, run.resumed.own["rows"])
    module = NerfModule(run, field, rays, loader, held_out)
    module.loop = Loop(
        run,
        loader,
        end=settings.steps,
        validate=module.validate,
        save=module.save,
        validate_every=config.evaluate_every,
        histograms=module.histograms,
        summarize=module.summarize,
        unit="steps",
    )
    return module, loader, module.loop


def check_device(run: Run) -> None:
    """Raises a ConfigError if the device cannot do what the configuration asks for."""
    device = torch.device(run.device).type
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device={run.device}: this experiment needs float64, which only cpu and cuda have"
        )
    if run.config.train.precision == "float16" and device == "cpu":
        raise ConfigError('nerf.Train.precision = "float16" needs a GPU; set it to "float32" or "bfloat16"')


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
    resumed = None if run.resumed is None else run.resumed.path / fields.WEIGHTS
    trainer.fit(module, loader, ckpt_path=resumed, weights_only=True)
