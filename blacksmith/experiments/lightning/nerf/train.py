"""NeRF in native Lightning: a radiance field of a Blender scene, from its pictures to new views.

`main` is what the launcher calls. Training reads top to bottom: scene, field, Lightning's Trainer, then the
test views, a video and the report. The test pictures are not decoded before training is done.
"""

import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch

from blacksmith.datasets.blender import Scene, Views, open_scene
from blacksmith.errors import ConfigError, DataError
from blacksmith.experiments.lightning.nerf import fields, results, scores
from blacksmith.experiments.lightning.nerf.configs import Config
from blacksmith.experiments.lightning.nerf.module import NerfModule
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.files import write_json
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mesh import extract_mesh, write_ply
from blacksmith.models.pytorch.nerf.rendering import RadianceField
from blacksmith.run.run import STOPPED, Run

GIF_PIXELS = 240

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def main(run: Run) -> int:
    """Runs the experiment in the given mode; returns the exit status."""
    modes = {"train": train, "eval": evaluate_checkpoint, "export": export, "view": view}
    return modes[run.mode](run)


def train(run: Run) -> int:
    """Learns a scene, then shows and scores its test views."""
    config = run.config
    if torch.device(run.device).type not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device={run.device}: this experiment needs float64, on a CPU or an NVIDIA or AMD GPU; say cpu"
        )
    if config.results.video_frames:
        results.find_ffmpeg()  # an error now, not after the training
    if config.train.precision == "float16" and torch.device(run.device).type == "cpu":
        raise ConfigError('nerf.Train.precision = "float16" needs a GPU; set it to "float32" or "bfloat16"')
    lpips = find_lpips(config, run.device)
    scene = scene_of(run)
    pictures = scene.views("train")
    held_out = scene.views("val", spread(len(scene.cameras("val")), config.train.validation_views))
    module, loader = prepare(run, pictures, held_out)
    if run.resumed is None or run.resumed.step < config.train.steps:
        fit(run, module, loader)
    else:
        print(f"already finished at step {run.resumed.step}: testing again", file=sys.stderr)
    if run.stop:
        run.finish("stopped", {"step": run.checkpoints.newest().step})
        print(f"stopped; the same command with --workdir={run.directory} goes on")
        return STOPPED
    restarts = module.restarts
    del module, loader, pictures  # their rays, pools and moments are not needed to test
    return conclude(run, scene, restarts, lpips)


def scene_of(run: Run) -> Scene:
    """Opens and checks the whole scene, and says which it is.

    Raises:
      DataError: it is not there, or broken.
    """
    data = run.config.data
    needs_alpha = data.hull or data.background == "random"
    scene = open_scene(data.scene, downscale=data.downscale, needs_alpha=needs_alpha)
    smallest = scores.SSIM_WINDOW_PIXELS
    if min(scene.info.width, scene.info.height) < smallest:
        raise DataError(
            f"{scene.path}: pictures of {scene.info.width}x{scene.info.height} pixels are too small "
            f"for SSIM, which needs {smallest}; lower nerf.Data.downscale"
        )
    run.use_data({**dataclasses.asdict(scene.info), "alpha_hull": data.hull}, scene.info.describe())
    return scene


def prepare(run: Run, pictures: Views, held_out: Views) -> tuple[NerfModule, RayLoader]:
    """An empty field, or one with the sizes of the checkpoint to go on from, and what trains it."""
    config = run.config
    if run.resumed is None:
        field = fields.for_scene(config, pictures, run.device)
    else:
        field = fields.build(config, run.resumed.state["loop"]["rows"])
    train = config.train
    first = train.rays if train.samples is None else min(1024, train.rays)
    loader = RayLoader(train.steps, config.run.seed, first)
    module = NerfModule(run, field, RayBank(pictures, run.device), loader, held_out)
    if run.resumed is not None:
        module.restarts = list(run.resumed.state["loop"]["restarts"])
    return module, loader


def fit(run: Run, module: NerfModule, loader: RayLoader, callbacks: Sequence[L.Callback] = ()) -> None:
    """Runs Lightning's Trainer to the last step, or until the run is to stop."""
    # Its hints (more workers, a logger) do not fit: rays are on the device and metrics are ours.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device = torch.device(run.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        trainer = L.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1 if device.index is None else [device.index],
            precision=_PRECISIONS[run.config.train.precision],
            max_epochs=1,
            max_steps=run.config.train.steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=list(callbacks),
            default_root_dir=run.directory,
        )
        _ = run.metrics  # from here on the directory is this run's
        resumed = None if run.resumed is None else run.resumed.path / fields.WEIGHTS
        trainer.fit(module, loader, ckpt_path=resumed, weights_only=True)


def conclude(run: Run, scene: Scene, restarts: list[dict[str, Any]], lpips: scores.Lpips | None) -> int:
    """Scores the best checkpoint on the test views, films it, and writes the result."""
    config = run.config
    _ = run.metrics  # also where no step was left to take
    newest = run.checkpoints.newest()
    saved = run.checkpoints.chosen()
    field = fields.trained(config, saved, run.device)
    test = score_test_views(run, field, scene, lpips)
    if test is None:
        run.finish("stopped", {"step": newest.step})
        print(f"stopped; the same command with --workdir={run.directory} tests again")
        return STOPPED
    results.write_gallery(run.directory / "test", run.directory / "images", test)
    means = {name: value for name, value in test.items() if name != "images"}
    scored = {name: value for name, value in means.items() if name != "seconds_per_frame"}
    run.metrics.write(newest.step, newest.state["loop"]["epoch"], "test", scored)
    result = {
        "step": newest.step,
        "parameters": sum(p.numel() for p in field.parameters()),
        "restarts": restarts,
        "tested_checkpoint": saved.path.name,
        "final": dict(newest.state["metrics"]),
        "test": test,
    }
    filmed = film(run, field, scene)
    run.finish("done" if filmed else "stopped", result)
    if not filmed:
        print(
            f"stopped before the video; the same command with --workdir={run.directory} tests and films again"
        )
        return STOPPED
    print(f"test {describe(means)} ({saved.path.name}, {run.metrics.seconds:.1f} s)")
    print(run.directory / "report.html")
    return 0


def score_test_views(
    run: Run, field: RadianceField, scene: Scene, lpips: scores.Lpips | None, directory: str = "test"
) -> dict[str, Any] | None:
    """Renders and scores every test view into a directory of the run; None if the run is to stop."""
    views = scene.views("test")
    return results.evaluate(
        field,
        views,
        run.directory / directory,
        background=run.config.background,
        lpips=lpips,
        on_image=told(run, len(views), "test views"),
        stop=run.stop,
    )


def film(run: Run, field: RadianceField, scene: Scene) -> bool:
    """Makes the orbit video; False if the run is to stop."""
    settings = run.config.results
    if not settings.video_frames:
        return True
    camera = scene.cameras("test")[0]
    width = settings.video_width or camera.width
    bounds = field.bounds.cpu().numpy()
    centre = bounds.mean(0)
    cameras = scene.cameras("train")
    radius = float(np.mean([np.linalg.norm(view.pose[:, 3] - centre) for view in cameras]))
    written = results.write_orbit(
        field,
        camera.resized(width, max(1, round(width * camera.height / camera.width))),
        run.directory / "images",
        centre=centre,
        radius=radius,
        elevation=settings.video_elevation,
        frames=settings.video_frames,
        fps=settings.video_fps,
        background=run.config.background,
        gif_width=min(GIF_PIXELS, width),
        on_frame=told(run, settings.video_frames, "video frames"),
        stop=run.stop,
    )
    return bool(written)


def evaluate_checkpoint(run: Run) -> int:
    """``--mode=eval``: the checkpoint on the validation and test views, into `eval.json` and `eval/`."""
    lpips = find_lpips(run.config, run.device)
    scene = scene_of(run)
    field = fields.trained(run.config, run.resumed, run.device)
    trained_on = run.resumed.state["data"]
    if trained_on.get("sha256") != run.data["sha256"]:
        print(f"note: the field was trained on another scene, {trained_on.get('name')}", file=sys.stderr)
    held_out = scene.views("val")
    result: dict[str, Any] = {"checkpoint": str(run.resumed.path), "data": run.data}
    result["val"] = results.evaluate(
        field,
        held_out,
        None,
        background=run.config.background,
        lpips=lpips,
        on_image=told(run, len(held_out), "validation views"),
        stop=run.stop,
    )
    result["test"] = None if run.stop else score_test_views(run, field, scene, lpips, "eval")
    if result["test"] is None:
        return STOPPED
    write_json(run.directory / "eval.json", result)
    for split in ("val", "test"):
        print(f"{split}: {describe(result[split])}")
    print(run.directory / "eval.json")
    return 0


def export(run: Run) -> int:
    """``--mode=export``: the checkpoint's surface as a coloured mesh, `export/mesh.ply`."""
    settings = run.config.results
    field = fields.trained(run.config, run.resumed, run.device)
    size = float((field.bounds[1] - field.bounds[0]).mean())
    unit = field.unit if isinstance(field, GridField) else size / 96
    threshold = float(-np.log1p(-settings.mesh_opacity)) / unit
    mesh = extract_mesh(field, resolution=settings.mesh_resolution, threshold=threshold)
    directory = run.directory / "export"
    directory.mkdir(exist_ok=True)
    write_ply(directory / "mesh.ply", mesh)
    print(f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles\n{directory / 'mesh.ply'}")
    return 0


def view(run: Run) -> int:
    """``--mode=view``: the checkpoint in the browser, until a signal comes."""
    from blacksmith.experiments.lightning.nerf.viewer import serve

    scene = scene_of(run)
    field = fields.trained(run.config, run.resumed, run.device)
    settings = run.config.view
    serve(
        field,
        scene.cameras("test")[0],
        background=run.config.background,
        host=settings.host,
        port=settings.port,
        stop=lambda: bool(run.stop),
    )
    return 0


def find_lpips(config: Config, device: str) -> scores.Lpips | None:
    """LPIPS where its weights are present.

    Raises:
      DataError: the file that the configuration names is not there, or another one.
    """
    path = scores.find_lpips_weights(config.results.lpips_weights)
    return None if path is None else scores.Lpips(path).to(device)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers of 0 to count - 1, evenly spread, each once; all if there are fewer."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()})


def told(run: Run, total: int, what: str, every_seconds: float = 5.0) -> Callable[..., None]:
    """A callback that says on the console, now and then, how far something has come."""
    last = time.perf_counter()

    def on_one(done: int, *_: Any) -> None:
        nonlocal last
        if run.config.log.progress != "off" and time.perf_counter() - last >= every_seconds:
            last = time.perf_counter()
            print(f"{done} of {total} {what}", file=sys.stderr)

    return on_one


def describe(means: dict[str, Any]) -> str:
    """The mean scores in one line."""
    parts = [f"PSNR {means['psnr']:.2f} dB", f"SSIM {means['ssim']:.4f}"]
    if "lpips" in means:
        parts.append(f"LPIPS {means['lpips']:.4f}")
    return ", ".join(parts) + f", {means['seconds_per_frame']:.3f} s a frame"
