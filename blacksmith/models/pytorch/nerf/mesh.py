"""A colored triangle mesh of a radiance field: marching cubes on its density, written as PLY."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from blacksmith.errors import RunError
from blacksmith.files import atomic_file
from blacksmith.models.pytorch.nerf.rendering import RadianceField

if TYPE_CHECKING:
    from trimesh import Trimesh

CHUNK_POINTS = 1 << 18
"""Number of points that the field evaluates at a time."""


@torch.no_grad()
def extract_mesh(
    field: RadianceField, *, resolution: int = 256, threshold: float, smallest_part: float = 0.01
) -> "Trimesh":
    """The surface on which the density equals a threshold (Lorensen and Cline 1987, Lewiner et al. 2003).

    The surface is closed, also where the scene touches the side of its box. The color of a vertex is what is
    seen along its inward normal. Needs 4 bytes of memory per point of the grid, 70 MB at the default
    resolution, plus the mesh.

    Args:
      field: any field; evaluated on its own device.
      resolution: cells along the longest side of the field's box; they are cubes up to rounding.
      threshold: in extinction per world unit: at 10, a layer of 0.1 world units transmits 1/e of the light.
      smallest_part: separate parts with fewer vertices than this fraction of the largest part's are removed;
        0 keeps all.

    Returns:
      The mesh in world units: `faces` are counter-clockwise as seen from outside, the colors are
      `visual.vertex_colors`.

    Raises:
      RunError: the density is nowhere above the threshold.
    """
    # Here, because they take a second to import and only the export needs them.
    import trimesh
    from skimage.measure import marching_cubes

    volume, lower, upper = _density_volume(field, resolution)
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
    kept = (sizes >= smallest_part * sizes.max())[part]
    mesh.update_faces(kept[mesh.faces[:, 0]])
    mesh.remove_unreferenced_vertices()
    mesh.visual.vertex_colors = _colors(field, mesh.vertices, mesh.vertex_attributes.pop("normal"))
    return mesh


def write_ply(path: Path, mesh: "Trimesh") -> None:
    """Writes a mesh as binary PLY with vertex colors, atomically.

    Raises:
      OSError: the file cannot be written.
    """
    with atomic_file(path) as stream:
        stream.write(mesh.export(file_type="ply", vertex_normal=False))


def _density_volume(field: RadianceField, resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Densities on a grid over the field's box with a margin of zeros, and the corners of the box."""
    lower, upper = field.bounds.cpu().double().numpy()
    cells = np.maximum(1, np.ceil(resolution * (upper - lower) / (upper - lower).max() - 1e-6)).astype(int)
    # The margin, one layer of emptiness around the box, closes the surface.
    volume = np.zeros(cells + 3, np.float32)
    axes = [np.linspace(lower[axis], upper[axis], cells[axis] + 1) for axis in range(3)]
    slab = max(1, CHUNK_POINTS // math.prod(cells[1:] + 1))
    for start in range(0, cells[0] + 1, slab):
        grid = np.meshgrid(axes[0][start : start + slab], axes[1], axes[2], indexing="ij")
        points = torch.from_numpy(np.stack(grid, -1).reshape(-1, 3).astype(np.float32))
        density = [
            field.density(chunk.to(field.bounds.device)).float().cpu() for chunk in points.split(CHUNK_POINTS)
        ]
        inside = volume[1 + start : 1 + start + len(grid[0]), 1:-1, 1:-1]
        inside[:] = torch.cat(density).view(inside.shape).numpy()
    return volume, lower, upper


def _colors(field: RadianceField, vertices: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """What is seen at the vertices along their inward normals, uint8 [vertices, 3]."""
    points = torch.from_numpy(vertices.astype(np.float32))
    outward = torch.nn.functional.normalize(torch.from_numpy(normals.astype(np.float32)), dim=-1)
    device, colors = field.bounds.device, []
    for some, normal in zip(points.split(CHUNK_POINTS), outward.split(CHUNK_POINTS), strict=True):
        rgb = field.color(some.to(device), -normal.to(device))
        colors.append((rgb.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu())
    return torch.cat(colors).numpy()
