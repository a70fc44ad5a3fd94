"""What a trained field is used for: scores on test views, a video, a mesh, the viewer."""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from blacksmith.datasets.blender import Scene
from blacksmith.experiments.lightning.nerf import fields, results, scores
from blacksmith.experiments.lightning.nerf.data import open_scene_of
from blacksmith.files import write_json
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mesh import extract_mesh, write_ply
from blacksmith.models.pytorch.nerf.rendering import RadianceField
from blacksmith.run.loop import show
from blacksmith.run.run import Run

GIF_PIXELS = 240


def find_lpips(run: Run) -> scores.Lpips | None:
    """LPIPS if its weights are present.

    Raises:
      DataError: the file that the configuration names is missing or a different one.
    """
    path = scores.find_lpips_weights(run.config.results.lpips_weights)
    return None if path is None else scores.Lpips(path).to(run.device)


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
        on_image=progress_printer(run, len(views), "test views"),
        stop=run.stop,
    )


def film(run: Run, field: RadianceField, scene: Scene) -> bool:
    """Renders the orbit video; False if the run is to stop."""
    settings = run.config.results
    if not settings.video_frames:
        return True
    camera = scene.cameras("test")[0]
    width = settings.video_width or camera.width
    bounds = field.bounds.cpu().numpy()
    center = bounds.mean(0)
    cameras = scene.cameras("train")
    radius = float(np.mean([np.linalg.norm(view.pose[:, 3] - center) for view in cameras]))
    written = results.write_orbit(
        field,
        camera.resized(width, max(1, round(width * camera.height / camera.width))),
        run.directory / "images",
        center=center,
        radius=radius,
        elevation=settings.video_elevation,
        frames=settings.video_frames,
        fps=settings.video_fps,
        background=run.config.background,
        gif_width=min(GIF_PIXELS, width),
        on_frame=progress_printer(run, settings.video_frames, "video frames"),
        stop=run.stop,
    )
    return bool(written)


def evaluate(run: Run) -> int:
    """``--mode=eval``: the checkpoint on the validation and test views, into `eval.json` and `eval/`."""
    lpips = find_lpips(run)
    scene = open_scene_of(run)
    field = fields.trained(run.config, run.resumed, run.device)
    run.trained_on_this_data()
    held_out = scene.views("val")
    result: dict[str, Any] = {"checkpoint": str(run.resumed.path), "data": run.data}
    result["val"] = results.evaluate(
        field,
        held_out,
        None,
        background=run.config.background,
        lpips=lpips,
        on_image=progress_printer(run, len(held_out), "validation views"),
        stop=run.stop,
    )
    result["test"] = None if run.stop else score_test_views(run, field, scene, lpips, "eval")
    if result["test"] is None:
        return run.stopped()
    write_json(run.directory / "eval.json", result)
    for split in ("val", "test"):
        print(f"{split}: " + show({k: v for k, v in result[split].items() if isinstance(v, float)}))
    print(run.directory / "eval.json")
    return 0


def export(run: Run) -> int:
    """``--mode=export``: the checkpoint's surface as a colored mesh, `export/mesh.ply`."""
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

    scene = open_scene_of(run)
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


def progress_printer(run: Run, total: int, what: str, every_seconds: float = 5.0) -> Callable[..., None]:
    """A callback that prints ``12 of 20 test views`` at most every `every_seconds`."""
    last = time.perf_counter()

    def on_one(done: int, *_: Any) -> None:
        nonlocal last
        if run.config.log.progress != "off" and time.perf_counter() - last >= every_seconds:
            last = time.perf_counter()
            print(f"{done} of {total} {what}", file=sys.stderr)

    return on_one
