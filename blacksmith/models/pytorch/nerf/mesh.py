"""A colored triangle mesh of a radiance field: marching cubes on its density."""

import numpy as np
import torch
import trimesh
from skimage.measure import marching_cubes

from blacksmith.errors import CheckpointError, RunError
from blacksmith.models.pytorch.nerf.rendering import RadianceField

CHUNK_POINTS = 1 << 18  # vertices that are colored at a time
SMALLEST_PART = 0.01  # of the vertices of the largest part: smaller separate parts are removed


@torch.no_grad()
def extract_mesh(field: RadianceField, *, resolution: int, threshold: float) -> trimesh.Trimesh:
    """The surface on which the density equals a threshold (Lorensen and Cline 1987, Lewiner et al. 2003).

    Args:
      field: any field, on any device.
      resolution: cells along the longest side of the field's box; a grid point takes 4 bytes of memory.
      threshold: in extinction per world unit: at 10, a layer of 0.1 world units transmits 1/e of the light.

    Returns:
      A mesh in world units that is closed, also where the scene touches the side of its box. `faces` are
      counter-clockwise as seen from outside; `visual.vertex_colors` is what is seen along the inward normals.

    Raises:
      CheckpointError: a density or a color is not finite.
      RunError: the density is nowhere above the threshold.
    """
    lower, upper = field.bounds.cpu().double().numpy()
    volume = _density_volume(field, lower, upper, resolution)
    _check_finite("density", volume)
    if not volume.max() > threshold:
        raise RunError(
            f"no mesh: nothing in the field is denser than the threshold of {threshold:g} per world unit "
            f"(densest: {volume.max():.3g}); lower the threshold or train longer"
        )
    # "ascent", because scikit-image orders the corners of "descent" clockwise.
    vertices, faces, normals, _ = marching_cubes(
        volume, threshold, gradient_direction="ascent", allow_degenerate=False
    )
    # From grid indices, which start with the margin, to world units. The margin's faces move onto the box.
    spacing = (upper - lower) / (np.array(volume.shape) - 3)
    vertices = np.clip(lower + (vertices - 1) * spacing, lower, upper)
    mesh = trimesh.Trimesh(
        vertices.astype(np.float32), faces, vertex_attributes={"normal": normals}, process=False
    )
    part = trimesh.graph.connected_component_labels(mesh.edges, node_count=len(mesh.vertices))
    sizes = np.bincount(part)
    kept = (sizes >= SMALLEST_PART * sizes.max())[part]
    mesh.update_faces(kept[mesh.faces[:, 0]])
    mesh.remove_unreferenced_vertices()
    mesh.visual.vertex_colors = _colors(field, mesh.vertices, mesh.vertex_attributes.pop("normal"))
    return mesh


def _density_volume(
    field: RadianceField, lower: np.ndarray, upper: np.ndarray, resolution: int
) -> np.ndarray:
    """Densities on a grid over the field's box, float32 [x, y, z], with a margin of zeros."""
    cells = np.maximum(1, np.ceil(resolution * (upper - lower) / (upper - lower).max() - 1e-6)).astype(int)
    # The margin, one layer of emptiness around the box, closes the surface.
    volume = np.zeros(cells + 3, np.float32)
    xs, ys, zs = (np.linspace(lower[axis], upper[axis], cells[axis] + 1) for axis in range(3))
    for index, x in enumerate(xs, start=1):
        plane = np.stack(np.meshgrid(x, ys, zs, indexing="ij"), -1).reshape(-1, 3)
        density = field.density(torch.from_numpy(plane.astype(np.float32)).to(field.bounds.device))
        volume[index, 1:-1, 1:-1] = density.float().cpu().numpy().reshape(len(ys), len(zs))
    return volume


def _colors(field: RadianceField, vertices: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """What is seen at the vertices along their inward normals, uint8 [vertices, 3]."""
    points = torch.from_numpy(vertices.astype(np.float32))
    outward = torch.nn.functional.normalize(torch.from_numpy(normals.astype(np.float32)), dim=-1)
    device, colors = field.bounds.device, []
    for some, normal in zip(points.split(CHUNK_POINTS), outward.split(CHUNK_POINTS), strict=True):
        rgb = field.color(some.to(device), -normal.to(device))
        _check_finite("color", rgb.cpu().numpy())
        colors.append((rgb.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu())
    return torch.cat(colors).numpy()


def _check_finite(name: str, values: np.ndarray) -> None:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise CheckpointError(
            f"no mesh: the field's {name} is not finite at {wrong:,} of {values.size:,} points"
        )
