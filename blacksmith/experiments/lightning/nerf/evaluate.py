"""The modes that use a trained field: its scores, its mesh, the viewer."""

from typing import Any

import numpy as np

from blacksmith.experiments.lightning.nerf import fields
from blacksmith.experiments.lightning.nerf.data import open_scene_of
from blacksmith.experiments.lightning.nerf.results import score_views
from blacksmith.experiments.lightning.nerf.scores import find_lpips
from blacksmith.files import atomic_file, write_json
from blacksmith.run.loop import show
from blacksmith.run.run import Run


def evaluate(run: Run) -> int:
    """``--mode=eval``: scores the checkpoint on validation and test views, into `eval.json` and `eval/`."""
    lpips = find_lpips(run)
    scene = open_scene_of(run, lpips)
    field = fields.trained(run.config, run.resumed, run.device)
    run.trained_on_this_data()
    result: dict[str, Any] = {"checkpoint": str(run.resumed.path), "data": run.data}
    for split, directory in (("val", None), ("test", run.directory / "eval")):
        result[split] = score_views(run, field, scene, split, lpips, directory)
        if result[split] is None:
            return run.stopped()
    write_json(run.claim("eval.json"), result)
    for split in ("val", "test"):
        print(f"{split}: " + show({k: v for k, v in result[split].items() if isinstance(v, float)}))
    print(run.directory / "eval.json")
    return 0


def export(run: Run) -> int:
    """``--mode=export``: writes the checkpoint's surface as a colored mesh, `export/mesh.ply`."""
    from blacksmith.models.pytorch.nerf.mesh import extract_mesh  # trimesh takes a second to import

    settings = run.config.results
    field = fields.trained(run.config, run.resumed, run.device)
    threshold = float(-np.log1p(-settings.mesh_opacity)) / field.unit  # 1 - exp(-density * unit) = opacity
    mesh = extract_mesh(field, resolution=settings.mesh_resolution, threshold=threshold)
    path = run.claim("export/mesh.ply")
    with atomic_file(path) as stream:
        stream.write(mesh.export(file_type="ply", vertex_normal=False))
    print(f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles\n{path}")
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
