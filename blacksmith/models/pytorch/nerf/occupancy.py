"""Where a scene can have matter: a grid of cells that rays step through.

Rays have samples only in marked cells. Blocks of 4x4x4 cells are tested first; single cells only where a
block or one of its neighbors contains a marked cell.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.models.pytorch.nerf.projection import splat
from blacksmith.models.pytorch.nerf.rendering import Samples

BLOCK = 4  # side of a block, in cells

_SEGMENT = 2 * BLOCK  # length of a ray's segment, in cells


class Occupancy(nn.Module):
    """Bool cells [z, y, x] over a box, `resolution` along each side; all are marked at first."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.tensor([[0.0] * 3, [1.0] * 3]))  # the box
        # The distances between which rays have samples, in world units.
        self.register_buffer("near_far", torch.tensor([0.0, math.inf]))
        self.register_buffer("cells", torch.ones((resolution,) * 3, dtype=torch.bool))  # `set` changes them
        # Blocks of cells that contain a marked cell or touch such a block.
        blocks = math.ceil(resolution / BLOCK)
        self.register_buffer("blocks", torch.ones((blocks,) * 3, dtype=torch.bool), persistent=False)
        self.register_load_state_dict_post_hook(lambda grid, _: grid.set(grid.cells.clone()))

    @property
    def resolution(self) -> int:
        """Cells along each side."""
        return self.cells.shape[0]

    def set(self, cells: Tensor) -> None:
        """Marks exactly `cells`, bool [z, y, x]."""
        self.cells.copy_(cells)
        padding = self.blocks.shape[0] * BLOCK - self.resolution
        whole = F.pad(cells.float(), [0, padding] * 3)[None, None]
        self.blocks.copy_(F.max_pool3d(F.max_pool3d(whole, BLOCK), 3, 1, 1)[0, 0] > 0)

    @torch.no_grad()
    def samples(
        self, origins: Tensor, directions: Tensor, step: float, generator: torch.Generator | None = None
    ) -> tuple[Samples, Tensor]:
        """The samples, `step` apart, in marked cells between near and far, and their places, [3, samples].

        Rays are origins and unit directions, [rays, 3]; places are in the unit box. The generator shifts each
        ray's samples by a random part of a step; without one they are at half steps.
        """
        rays, device = len(origins), origins.device
        start, slope, near, far = self._within(origins, directions)
        # Rays are cut into segments of `count` samples, at most two blocks long.
        count = max(
            1, int(_SEGMENT * float((self.bounds[1] - self.bounds[0]).min()) / self.resolution / step)
        )
        ray, begin = self._segments(start, slope, near, far, count * step)
        if generator is None:
            shift = torch.full((rays,), 0.5, device=device)
        else:
            shift = torch.rand(rays, generator=generator, device=device)
        distance = torch.arange(count, device=device) * step + (begin + shift[ray] * step)[:, None]

        # Now the cell of each sample in these segments.
        cell = torch.zeros(distance.shape, dtype=torch.int64, device=device)
        inside = distance < self.near_far[1]
        places = []
        for axis in (2, 1, 0):
            place = torch.addcmul(start[axis][ray][:, None], slope[axis][ray][:, None], distance)
            inside &= (place >= 0) & (place < 1)
            cell.mul_(self.resolution).add_((place * self.resolution).long())
            places.append(place.view(-1))
        cell.clamp_(0, self.resolution**3 - 1)
        kept = (inside & self.cells.view(-1)[cell]).view(-1).nonzero()[:, 0]
        unit = torch.stack([place[kept] for place in reversed(places)])
        return Samples(ray[kept // count], distance.view(-1)[kept], step), unit

    def _within(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rays in the unit box, start + distance * slope, [3, rays], and between which distances, [rays]."""
        low, size = self.bounds[0], self.bounds[1] - self.bounds[0]
        # Transposed to [3, rays]: the values of an axis are contiguous, which CPU vector instructions need.
        start = ((origins - low) / size).T.contiguous()
        # A direction along an axis is tilted a little, so that nothing below divides by zero.
        slanted = torch.where(directions.abs() < 1e-6, torch.full_like(directions, 1e-6), directions)
        slope = (slanted / size).T.contiguous()
        # A ray crosses the two planes of an axis at -start / slope and (1 - start) / slope. It is inside from
        # the last entry to the first exit (the slab method, Kay and Kajiya 1986).
        enter, leave = -start / slope, (1 - start) / slope
        near = torch.minimum(enter, leave).amax(0).clamp(min=self.near_far[0])
        far = torch.maximum(enter, leave).amin(0).clamp(max=self.near_far[1])
        return start, slope, near, far

    def _segments(
        self, start: Tensor, slope: Tensor, near: Tensor, far: Tensor, length: float
    ) -> tuple[Tensor, Tensor]:
        """The segments of rays, `length` long, near marked cells: ray and distance where they begin.

        One lookup at the middle of a segment decides for all of its samples: they lie within one block of the
        middle, and `blocks` marks the neighbors of marked blocks too.
        """
        blocks = self.blocks.shape[0]
        longest = float((far - near).amax()) if len(near) else 0.0
        most = max(1, math.ceil(longest / length))
        begin = near[:, None] + torch.arange(most, device=near.device) * length
        block = torch.zeros(begin.shape, dtype=torch.int64, device=near.device)
        for axis in (2, 1, 0):
            place = torch.addcmul(start[axis, :, None], slope[axis, :, None], begin + length / 2)
            block.mul_(blocks).add_(place.mul_(self.resolution / BLOCK).long().clamp_(0, blocks - 1))
        ray, segment = (self.blocks.view(-1)[block] & (begin < far[:, None])).nonzero(as_tuple=True)
        return ray, begin[ray, segment]

    def visible_pixels(self, cameras: Sequence[Camera]) -> Iterator[Tensor]:
        """For each camera, which rays can meet a marked cell, bool [height, width]; may include others."""
        # A ray that meets the region crosses its surface, and cells of 2x2x2 are an eighth of the points.
        pairs = -(-self.resolution // 2)
        whole = F.pad(self.cells.float(), [0, 2 * pairs - self.resolution] * 3)[None, None]
        marked = F.max_pool3d(whole, 2)
        empty_beside = F.max_pool3d(F.pad(1 - marked, [1] * 6, value=1.0), 3, 1)
        surface = ((marked > 0) & (empty_beside > 0)).view(-1).nonzero()[:, 0]
        side = 2 * (self.bounds[1] - self.bounds[0]) / self.resolution
        points = self.bounds[0] + (unravel(surface, (pairs,) * 3) + 0.5) * side
        radius = float(side.norm()) / 2
        for camera in cameras:
            yield splat(camera, points, radius)


def grid_points(
    bounds: Tensor, shape: Sequence[int], flat: Tensor | None = None, *, centered: bool = False
) -> Tensor:
    """World positions, float32 [points, 3], of a grid's points, or of those at flat indices into [z, y, x].

    If `centered`, they are the centers of cells that fill the box; otherwise they reach its corners.
    """
    if flat is None:
        flat = torch.arange(math.prod(shape), device=bounds.device)
    index = unravel(flat, shape)
    count = torch.tensor(shape[::-1], device=bounds.device)
    unit = (index + 0.5) / count if centered else index / (count - 1).clamp(min=1)
    return bounds[0] + unit * (bounds[1] - bounds[0])


def box_of(cells: Tensor, bounds: Tensor, margin: float = 0.5) -> Tensor:
    """The box around the marked cells plus `margin` cells, float32 [2, 3]; `bounds` if none is marked."""
    marked = cells.nonzero()
    if not len(marked):
        return bounds
    side = (bounds[1] - bounds[0]) / torch.tensor(cells.shape[::-1], device=bounds.device)
    low, high = marked.amin(0).flip(0) - margin, marked.amax(0).flip(0) + 1 + margin
    return torch.stack([bounds[0] + low * side, bounds[0] + high * side])


def flat_cell(unit: Tensor, resolution: int) -> Tensor:
    """Flat index, int64 [points], of the cells of places in the unit box, [points, 3]; clamped to the box."""
    index = (unit * resolution).long().clamp_(0, resolution - 1)
    return (index[:, 2] * resolution + index[:, 1]) * resolution + index[:, 0]


def unravel(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Indices (x, y, z), int64 [cells, 3], of flat indices into [z, y, x]."""
    _, y, x = shape
    return torch.stack([flat % x, flat // x % y, flat // (x * y)], -1)
