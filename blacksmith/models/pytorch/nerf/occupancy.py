"""Where a scene can have matter: the visual hull of its masks, and a grid of cells that rays step through.

A grid of bool cells spans a box. Rays look at blocks of 4x4x4 cells first and at single cells only where a
block, or one beside it, holds any; samples outside of the marked cells are never made.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.models.pytorch.nerf.rendering import Samples

BLOCK = 4
"""Side of a block, in cells."""

_NEAR = 3  # radii of depth below which a ball may fill the picture
_SEGMENT = 2 * BLOCK  # cells that one look at a block decides for: the block, and half of those beside it


class Segments(NamedTuple):
    """Stretches of rays that samples are taken from, ordered by ray and then by distance.

    Attributes:
      ray: int64 [segments].
      distance: of each segment's samples along the ray, float32 [segments, samples].
      start: the rays' origins in the box, where it runs from 0 to 1: float32 [3, rays].
      slope: the change of that with the distance, float32 [3, rays].
      step: distance between samples, in world units.
    """

    ray: Tensor
    distance: Tensor
    start: Tensor
    slope: Tensor
    step: float


class Occupancy(nn.Module):
    """Bool cells [z, y, x] over the box `bounds`, float32 [2, 3]: all marked in the unit box at first.

    Rays have samples between the two distances in `reach` only, float32 [2] in world units.

    Args:
      resolution: cells along each side.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.tensor([[0.0] * 3, [1.0] * 3]))
        self.register_buffer("reach", torch.tensor([0.0, math.inf]))
        self.register_buffer("cells", torch.ones((resolution,) * 3, dtype=torch.bool))
        blocks = math.ceil(resolution / BLOCK)
        self.register_buffer("blocks", torch.ones((blocks,) * 3, dtype=torch.bool), persistent=False)
        self._surface: tuple[Tensor, float] | None = None
        self.register_load_state_dict_post_hook(lambda grid, _: grid.set(grid.cells.clone()))

    @property
    def resolution(self) -> int:
        """Cells along each side."""
        return self.cells.shape[0]

    def _apply(self, *arguments: Any, **options: Any) -> "Occupancy":
        self._surface = None  # it lies where the grid lay
        return super()._apply(*arguments, **options)

    def set(self, cells: Tensor) -> None:
        """Marks exactly `cells`, bool [z, y, x]."""
        self.cells.copy_(cells)
        self._surface = None
        padding = self.blocks.shape[0] * BLOCK - self.resolution
        whole = F.pad(cells.float(), [0, padding] * 3)[None, None]
        self.blocks.copy_(F.max_pool3d(F.max_pool3d(whole, BLOCK), 3, 1, 1)[0, 0] > 0)

    def centres(self) -> Tensor:
        """World positions of the cells' centres, float32 [cells, 3], in the cells' flat order."""
        return grid_points(self.bounds, (self.resolution,) * 3, centred=True)

    def holds(self, points: Tensor) -> Tensor:
        """Whether world points [points, 3] lie in marked cells, bool [points]."""
        unit = (points - self.bounds[0]) / (self.bounds[1] - self.bounds[0])
        inside = ((unit >= 0) & (unit < 1)).all(-1)
        return inside & self.cells.view(-1)[flat_cell(unit, self.resolution)]

    @torch.no_grad()
    def segments(
        self, origins: Tensor, directions: Tensor, step: float, generator: torch.Generator | None = None
    ) -> "Segments":
        """The stretches of rays near marked cells.

        Args:
          origins: float32 [rays, 3].
          directions: unit vectors, float32 [rays, 3].
          step: distance between samples, in world units.
          generator: moves each ray's samples by a random part of a step; None puts them at half steps.
        """
        device, resolution = origins.device, self.resolution
        low, size = self.bounds[0], self.bounds[1] - self.bounds[0]
        count = max(1, int(_SEGMENT * float(size.min()) / resolution / step))
        # One row an axis: each is a contiguous run for the vector units.
        start = ((origins - low) / size).T.contiguous()
        slanted = torch.where(directions.abs() < 1e-6, torch.full_like(directions, 1e-6), directions)
        slope = (slanted / size).T.contiguous()
        enter, leave = -start / slope, (1 - start) / slope
        near = torch.minimum(enter, leave).amax(0).clamp(min=self.reach[0])
        far = torch.maximum(enter, leave).amin(0).clamp(max=self.reach[1])
        length = count * step
        longest = float((far - near).amax()) if len(near) else 0.0
        most = max(1, math.ceil(longest / length))
        begin = near[:, None] + torch.arange(most, device=device) * length
        block = torch.zeros(begin.shape, dtype=torch.int64, device=device)
        for axis in (2, 1, 0):
            place = torch.addcmul(start[axis, :, None], slope[axis, :, None], begin + length / 2)
            index = place.mul_(resolution / BLOCK).long().clamp_(0, self.blocks.shape[0] - 1)
            block.mul_(self.blocks.shape[0]).add_(index)
        active = self.blocks.view(-1)[block] & (begin < far[:, None])
        ray, segment = active.nonzero(as_tuple=True)
        if generator is None:
            shift = torch.full((len(origins),), 0.5, device=device)
        else:
            shift = torch.rand(len(origins), generator=generator, device=device)
        first = (begin[ray, segment] + shift[ray] * step)[:, None]
        distance = torch.arange(count, device=device) * step + first
        return Segments(ray, distance, start, slope, step)

    @torch.no_grad()
    def samples(self, segments: "Segments") -> tuple[Samples, Tensor]:
        """The samples of segments that lie in marked cells and within reach.

        Returns:
          The samples, and where they are in the box: float32 [3, samples], 0 to 1.
        """
        ray, distance = segments.ray, segments.distance
        cell = torch.zeros(distance.shape, dtype=torch.int64, device=distance.device)
        inside = distance < self.reach[1]
        places = []
        for axis in (2, 1, 0):
            start, slope = segments.start[axis][ray], segments.slope[axis][ray]
            place = torch.addcmul(start[:, None], slope[:, None], distance)
            inside &= (place >= 0) & (place < 1)
            cell.mul_(self.resolution).add_((place * self.resolution).long())
            places.append(place.view(-1))
        cell.clamp_(0, self.resolution**3 - 1)
        kept = (inside & self.cells.view(-1)[cell]).view(-1).nonzero()[:, 0]
        row = kept // distance.shape[1]
        unit = torch.stack([place[kept] for place in reversed(places)])
        return Samples(ray[row], distance.view(-1)[kept], segments.step), unit

    @torch.no_grad()
    def march(
        self, origins: Tensor, directions: Tensor, step: float, generator: torch.Generator | None = None
    ) -> tuple[Samples, Tensor]:
        """Evenly spaced samples of rays, those in marked cells only; arguments as for `segments`.

        Returns:
          The samples, and where they are in the box: float32 [samples, 3], 0 to 1.
        """
        samples, unit = self.samples(self.segments(origins, directions, step, generator))
        return samples, unit.T

    def visible_pixels(self, camera: Camera) -> Tensor:
        """Pixels whose rays may meet a marked cell, bool [height * width]; never too few."""
        if self._surface is None:
            self._surface = self._surface_points()
        points, radius = self._surface
        return _splat(camera, points, radius).reshape(-1)

    def _surface_points(self) -> tuple[Tensor, float]:
        """Centres of pairs^3 of cells on the surface of the marked region, and half of their diagonal."""
        pairs = -(-self.resolution // 2)
        whole = F.pad(self.cells.float(), [0, 2 * pairs - self.resolution] * 3)[None, None]
        marked = F.max_pool3d(whole, 2)
        empty_beside = F.max_pool3d(F.pad(1 - marked, [1] * 6, value=1.0), 3, 1)
        surface = ((marked > 0) & (empty_beside > 0)).view(-1).nonzero()[:, 0]
        side = 2 * (self.bounds[1] - self.bounds[0]) / self.resolution
        index = _unravel(surface, (pairs,) * 3)
        return self.bounds[0] + (index + 0.5) * side, float(side.norm()) / 2


def grid_points(bounds: Tensor, shape: Sequence[int], *, centred: bool = False) -> Tensor:
    """World positions of a grid's points, float32 [points, 3] in the flat order of [z, y, x].

    Args:
      bounds: float32 [2, 3].
      shape: points along z, y and x.
      centred: the points are the centres of as many cells; else they span the box from corner to corner.
    """
    flat = torch.arange(math.prod(shape), device=bounds.device)
    return grid_places(bounds, shape, flat, centred=centred)


def grid_places(bounds: Tensor, shape: Sequence[int], flat: Tensor, *, centred: bool = False) -> Tensor:
    """World positions of some of a grid's points, float32 [points, 3] of flat indices."""
    index = _unravel(flat, shape)
    count = torch.tensor(shape[::-1], device=bounds.device)
    unit = (index + 0.5) / count if centred else index / (count - 1).clamp(min=1)
    return bounds[0] + unit * (bounds[1] - bounds[0])


@torch.no_grad()
def visual_hull(masks: Tensor, cameras: Sequence[Camera], bounds: Tensor, resolution: int) -> Tensor:
    """The cells of a box that every view could have matter in, bool [z, y, x].

    A cell stays if it projects to within its own size of a masked pixel in each view that it falls into
    (Laurentini, The visual hull concept, 1994).

    Args:
      masks: bool [views, height, width], true where a picture is not empty.
      cameras: one for each view.
      bounds: the box, float32 [2, 3].
      resolution: cells along each side.
    """
    # Coarse cells first: what a view rules out there needs no look at its eighths.
    level = resolution
    while level % 2 == 0 and level > 32:
        level //= 2
    cells = torch.arange(level**3, device=bounds.device)
    while True:
        side = (bounds[1] - bounds[0]) / level
        for mask, camera in zip(masks, cameras):
            centres = bounds[0] + (_unravel(cells, (level,) * 3) + 0.5) * side
            x, y, depth = _project(camera, centres)
            radius = float(side.norm()) / 2
            pixels = _pixels_across(camera, radius, depth)
            grown = _grow(mask.to(bounds.device), pixels)
            column, row = x.long(), y.long()
            # Only a cell that lies in the picture as a whole can be ruled out by it.
            seen = (depth > _NEAR * radius) & (x >= pixels) & (x < camera.width - pixels)
            seen &= (y >= pixels) & (y < camera.height - pixels)
            place = row.clamp(0, camera.height - 1) * camera.width + column.clamp(0, camera.width - 1)
            cells = cells[~seen | grown.view(-1)[place]]
        hull = torch.zeros(level**3, dtype=torch.bool, device=bounds.device)
        hull[cells] = True
        if level == resolution:
            return hull.view((resolution,) * 3)
        level *= 2
        halves = hull.view((level // 2,) * 3)
        for axis in range(3):
            halves = halves.repeat_interleave(2, axis)
        cells = halves.reshape(-1).nonzero()[:, 0]


def box_of(cells: Tensor, bounds: Tensor, margin: float = 0.5) -> Tensor:
    """The box around the marked cells and `margin` cells more, float32 [2, 3]; `bounds` if none is marked."""
    marked = cells.nonzero()
    if not len(marked):
        return bounds
    side = (bounds[1] - bounds[0]) / torch.tensor(cells.shape[::-1], device=bounds.device)
    low, high = marked.amin(0).flip(0) - margin, marked.amax(0).flip(0) + 1 + margin
    return torch.stack([bounds[0] + low * side, bounds[0] + high * side])


def flat_cell(unit: Tensor, resolution: int) -> Tensor:
    """Flat index of the cell of a place in the unit box, clamped into it: int64 [points] of [points, 3]."""
    index = (unit * resolution).long().clamp_(0, resolution - 1)
    return (index[:, 2] * resolution + index[:, 1]) * resolution + index[:, 0]


def _unravel(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Indices (x, y, z), int64 [cells, 3], of flat indices into [z, y, x]."""
    _, y, x = shape
    return torch.stack([flat % x, flat // x % y, flat // (x * y)], -1)


def _project(camera: Camera, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Picture coordinates x and y in pixels and depth, float32 [points] each."""
    pose = torch.as_tensor(np.asarray(camera.pose), device=points.device)
    local = (points - pose[:, 3]) @ pose[:, :3]
    depth = -local[:, 2]
    safe = torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6), depth)
    x = local[:, 0] / safe * camera.focal[0] + camera.centre[0]
    return x, -local[:, 1] / safe * camera.focal[1] + camera.centre[1], depth


def _pixels_across(camera: Camera, radius: float, depth: Tensor) -> int:
    """How far apart, in pixels, a place in the picture and the centre of a ball seen there can be.

    For balls of `radius` world units with centres at these depths. A place p' = x'/z' and a centre p = x/z
    with |x - x'| and |z - z'| up to r differ by (x - x' - p' (z - z')) / z, at most r (1 + |p'|) / z.
    """
    ahead = depth[depth > _NEAR * radius]
    nearest = float(ahead.amin()) if len(ahead) else math.inf
    pixels = math.ceil(max(camera.focal) * radius * (1 + _steepest(camera)) / nearest) + 1
    return min(pixels, max(camera.width, camera.height))


def _steepest(camera: Camera) -> float:
    """The largest tangent of an angle, along x or y, between the optical axis and what the picture shows."""
    x = max(camera.centre[0], camera.width - camera.centre[0]) / camera.focal[0]
    y = max(camera.centre[1], camera.height - camera.centre[1]) / camera.focal[1]
    return max(x, y, 0.0)


def _grow(mask: Tensor, pixels: int) -> Tensor:
    """Marks everything within `pixels` of a marked pixel, along rows and then along columns."""
    grown = F.max_pool2d(mask.float()[None, None], (1, 2 * pixels + 1), 1, (0, pixels))
    return F.max_pool2d(grown, (2 * pixels + 1, 1), 1, (pixels, 0))[0, 0] > 0


def _splat(camera: Camera, points: Tensor, radius: float) -> Tensor:
    """Pixels within `radius` world units of a point, bool [height, width]."""
    x, y, depth = _project(camera, points)
    beside = (points - torch.as_tensor(np.asarray(camera.pose[:, 3]), device=points.device)).norm(dim=1)
    if bool((beside < radius * (2 + _NEAR) * (1 + _steepest(camera))).any()):
        return torch.ones(camera.height, camera.width, dtype=torch.bool, device=points.device)
    pixels = _pixels_across(camera, radius, depth)
    # Points beside the picture still reach into it.
    row, column = (y.floor().long() + pixels), (x.floor().long() + pixels)
    height, width = camera.height + 2 * pixels, camera.width + 2 * pixels
    near = (depth > _NEAR * radius) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = torch.zeros(height, width, dtype=torch.bool, device=points.device)
    mask[row[near], column[near]] = True
    return _grow(mask, pixels)[pixels:-pixels, pixels:-pixels]
