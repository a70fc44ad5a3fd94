"""A coloured triangle mesh of a radiance field: marching cubes on its density, written as PLY.

Any `RadianceField` will do. The surface lies where the density passes a threshold; what it looks like from
straight in front becomes the colour of its vertices.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from blacksmith.errors import RunError
from blacksmith.files import atomic_file
from blacksmith.models.pytorch.nerf.rendering import RadianceField

# How many points the field is asked for at once.
CHUNK_POINTS = 1 << 18


class Mesh(NamedTuple):
    """Triangles with a colour at each vertex.

    Attributes:
      vertices: float32 [vertices, 3], in world units.
      faces: int32 [faces, 3], vertices counter-clockwise as seen from outside.
      colours: uint8 [vertices, 3].
    """

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray


@torch.no_grad()
def extract_mesh(
    field: RadianceField, *, resolution: int = 256, threshold: float, smallest_part: float = 0.01
) -> Mesh:
    """The surface on which the density equals a threshold (Lorensen and Cline 1987, Lewiner et al. 2003).

    The surface is closed, also where the scene reaches the side of its box. The memory needed is 4 bytes for
    each point of the grid, 70 MB at the default resolution, besides the mesh.

    Args:
      field: density and colour are asked in chunks, on its own device.
      resolution: cells along the longest side of the field's box; they are cubes but for rounding.
      threshold: in extinction per world unit: at 10 a layer 0.1 world units thick lets 1/e of the light pass.
      smallest_part: separate parts with fewer vertices, relative to the largest, are left out; 0 keeps all.

    Raises:
      RunError: the density is above the threshold nowhere.
    """
    from skimage.measure import marching_cubes

    lower, upper = field.bounds.cpu().double().numpy()
    cells = np.maximum(1, np.ceil(resolution * (upper - lower) / (upper - lower).max() - 1e-6)).astype(int)
    spacing = (upper - lower) / cells
    # One more layer of emptiness around the box closes the surface.
    volume = np.zeros(cells + 3, np.float32)
    axes = [np.linspace(lower[axis], upper[axis], cells[axis] + 1) for axis in range(3)]
    slab = max(1, CHUNK_POINTS // math.prod(cells[1:] + 1))
    for start in range(0, cells[0] + 1, slab):
        grid = np.meshgrid(axes[0][start : start + slab], axes[1], axes[2], indexing="ij")
        points = torch.from_numpy(np.stack(grid, -1).reshape(-1, 3).astype(np.float32))
        density = torch.cat(
            [
                field.density(chunk.to(field.bounds.device)).float().cpu()
                for chunk in points.split(CHUNK_POINTS)
            ]
        )
        volume[1 + start : 1 + start + len(grid[0]), 1:-1, 1:-1] = density.view(grid[0].shape).numpy()
    if not volume.max() > threshold:
        raise RunError(
            f"no mesh: nothing in the field is denser than the threshold of {threshold:g} per world unit "
            f"(densest: {volume.max():.3g}); lower the threshold or train longer"
        )
    # "ascent", as scikit-image counts the corners of "descent" by the left hand.
    vertices, faces, normals, _ = marching_cubes(
        volume, threshold, gradient_direction="ascent", allow_degenerate=False
    )
    vertices, normals, faces = _large_parts(vertices, normals, faces, smallest_part)
    # From indices of the grid with its margin; what the margin closes is brought back onto the box.
    vertices = np.clip(lower + (vertices - 1) * spacing, lower, upper).astype(np.float32)
    return Mesh(vertices, faces.astype(np.int32), _colours(field, vertices, normals))


def _large_parts(
    vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, smallest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts with at least `smallest` times the vertices of the largest one, numbered anew."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    links = coo_array((np.ones(len(edges), bool), tuple(edges.T)), shape=(len(vertices),) * 2)
    _, part = connected_components(links, directed=False)
    sizes = np.bincount(part)
    kept = (sizes >= smallest * sizes.max())[part]
    number = np.cumsum(kept) - 1
    return vertices[kept], normals[kept], number[faces[kept[faces[:, 0]]]]


def _colours(field: RadianceField, vertices: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """What is seen at the vertices along their inward normals, uint8 [vertices, 3]."""
    normals = torch.nn.functional.normalize(
        torch.from_numpy(np.ascontiguousarray(normals, np.float32)), dim=-1
    )
    device, colours = field.bounds.device, []
    for points, outward in zip(
        torch.from_numpy(vertices).split(CHUNK_POINTS), normals.split(CHUNK_POINTS), strict=True
    ):
        rgb = field.colour(points.to(device), -outward.to(device))
        colours.append((rgb.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu())
    return torch.cat(colours).numpy()


def write_ply(path: Path, mesh: Mesh) -> None:
    """Writes a mesh as binary PLY with vertex colours, under a temporary name until it is whole.

    Raises:
      OSError: the file cannot be written.
    """
    vertices = np.empty(len(mesh.vertices), [("position", "<f4", 3), ("colour", "u1", 3)])
    vertices["position"], vertices["colour"] = mesh.vertices, mesh.colours
    faces = np.empty(len(mesh.faces), [("corners", "u1"), ("vertices", "<i4", 3)])
    faces["corners"], faces["vertices"] = 3, mesh.faces
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {channel}" for channel in ("red", "green", "blue")]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    with atomic_file(path) as stream:
        stream.write("\n".join(header).encode("ascii"))
        stream.write(vertices.tobytes())
        stream.write(faces.tobytes())
