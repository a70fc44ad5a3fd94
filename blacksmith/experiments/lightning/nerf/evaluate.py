"""What is made of a trained field: scores, a video, a mesh, the viewer."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith.datasets.blender import Scene
from blacksmith.datasets.blender.cameras import orbit
from blacksmith.experiments.lightning.nerf import fields, results, scores
from blacksmith.experiments.lightning.nerf.data import open_scene_of
from blacksmith.files import atomic_file, write_json
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.mesh import extract_mesh
from blacksmith.models.pytorch.nerf.rendering import RadianceField
from blacksmith.run.loop import show
from blacksmith.run.run import Run


def find_lpips(run: Run) -> scores.Lpips | None:
    """LPIPS, if its weights are present; raises DataError if the configuration names a wrong file."""
    path = scores.find_lpips_weights(run.config.results.lpips_weights)
    return None if path is None else scores.Lpips(path).to(run.device)


def score_views(
    run: Run,
    field: RadianceField,
    scene: Scene,
    split: str,
    lpips: scores.Lpips | None,
    directory: Path | None,
) -> dict[str, Any] | None:
    """Renders and scores the views of a split, see `results.evaluate`; None if the run is to stop."""
    views = scene.views(split)
    return results.evaluate(
        field,
        views,
        directory,
        background=run.config.background,
        lpips=lpips,
        on_image=progress_printer(run, f"{len(views)} {split} views"),
        stop=run.stop,
    )


def film(run: Run, field: RadianceField, scene: Scene) -> bool:
    """Renders the orbit video, if there is to be one; False if the run is to stop."""
    settings = run.config.results
    if not settings.video_frames:
        return True
    center = field.bounds.cpu().numpy().mean(0)
    radius = float(np.mean([np.linalg.norm(camera.pose[:, 3] - center) for camera in scene.cameras("train")]))
    camera = scene.cameras("test")[0]
    width = settings.video_width or camera.width
    camera = camera.resized(width, max(1, round(width * camera.height / camera.width)))
    return results.write_orbit(
        field,
        orbit(camera, center, radius, settings.video_elevation, settings.video_frames),
        run.directory / "images",
        fps=settings.video_fps,
        background=run.config.background,
        on_frame=progress_printer(run, f"{settings.video_frames} video frames"),
        stop=run.stop,
    )


def evaluate(run: Run) -> int:
    """``--mode=eval``: scores the checkpoint on validation and test views, into `eval.json` and `eval/`."""
    lpips = find_lpips(run)
    scene = open_scene_of(run)
    field = fields.trained(run.config, run.resumed, run.device)
    run.trained_on_this_data()
    result: dict[str, Any] = {"checkpoint": str(run.resumed.path), "data": run.data}
    for split, directory in (("val", None), ("test", run.directory / "eval")):
        result[split] = score_views(run, field, scene, split, lpips, directory)
        if result[split] is None:
            return run.stopped()
    write_json(run.directory / "eval.json", result)
    for split in ("val", "test"):
        print(f"{split}: " + show({k: v for k, v in result[split].items() if isinstance(v, float)}))
    print(run.directory / "eval.json")
    return 0


def export(run: Run) -> int:
    """``--mode=export``: writes the checkpoint's surface as a colored mesh, `export/mesh.ply`."""
    settings = run.config.results
    field = fields.trained(run.config, run.resumed, run.device)
    unit = (
        field.unit if isinstance(field, GridField) else float((field.bounds[1] - field.bounds[0]).mean()) / 96
    )
    threshold = float(-np.log1p(-settings.mesh_opacity)) / unit  # 1 - exp(-density * unit) = opacity
    mesh = extract_mesh(field, resolution=settings.mesh_resolution, threshold=threshold)
    directory = run.directory / "export"
    directory.mkdir(exist_ok=True)
    with atomic_file(directory / "mesh.ply") as stream:
        stream.write(mesh.export(file_type="ply", vertex_normal=False))
    print(f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles\n{directory / 'mesh.ply'}")
    return 0


def view(run: Run) -> int:
    """``--mode=view``: shows the checkpoint in the browser until a signal comes."""
    from blacksmith.experiments.lightning.nerf.viewer import serve  # viser takes a second to import

    config = run.config
    camera = open_scene_of(run).cameras("test")[0]
    field = fields.trained(config, run.resumed, run.device)
    options = {"background": config.background, "host": config.view.host, "port": config.view.port}
    serve(field, camera, **options, stop=lambda: bool(run.stop))
    return 0


def progress_printer(run: Run, what: str, every_seconds: float = 5.0) -> Callable[[int], None]:
    """A callback that prints the number done, ``12 of 20 test views``, at most every `every_seconds`."""
    last = time.perf_counter()

    def on_one(done: int) -> None:
        nonlocal last
        if run.config.log.progress != "off" and time.perf_counter() - last >= every_seconds:
            last = time.perf_counter()
            print(f"{done} of {what}", file=sys.stderr)

    return on_one
