"""The visual hull of a scene's masks, and which of the masks contradict the others."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.models.pytorch.nerf.occupancy import grid_points, unravel
from blacksmith.models.pytorch.nerf.projection import NEAR, contained, grow, pixels_across, project, splat

_COMPARED_CELLS = (32, 64)  # along each side of the box, coarse to fine, when masks are compared
_COMPARED_PIXELS = 128  # of the longer side of a mask, at most
_MOST_WRONG = 1 / 3  # of the views that see a place can be wrong about it
_FEWEST = 1 / 4  # of all views must see a place, or it says nothing about the masks
_FARTHEST = 16  # pixels from a mask that are told apart; views that are closer to a place do not count


@torch.no_grad()
def visual_hull(masks: Tensor, cameras: Sequence[Camera], bounds: Tensor, resolution: int) -> Tensor:
    """The cells of a box in which no view rules out matter, bool [z, y, x].

    A cell stays if it projects to within its own size of a masked pixel in each view that contains it
    (Laurentini, The visual hull concept, 1994). `masks`, bool [views, height, width], are true where a
    picture is not empty.
    """
    # Coarse to fine: if a view rules out a cell, its eight parts need no test.
    level = resolution
    while level % 2 == 0 and level > 32:
        level //= 2
    cells = torch.arange(level**3, device=bounds.device)
    while True:
        side = (bounds[1] - bounds[0]) / level
        for mask, camera in zip(masks, cameras):
            centers = bounds[0] + (unravel(cells, (level,) * 3) + 0.5) * side
            x, y, depth = project(camera, centers)
            radius = float(side.norm()) / 2
            pixels = pixels_across(camera, radius, depth)
            # A view can rule out only cells that are completely inside its picture.
            inside, masked = contained(camera, x, y, pixels, grow(mask.to(bounds.device), pixels))
            cells = cells[~(inside & (depth > NEAR * radius)) | masked]
        if level == resolution:
            hull = torch.zeros(level**3, dtype=torch.bool, device=bounds.device)
            hull[cells] = True
            return hull.view((resolution,) * 3)
        cells = _parts(cells, level)
        level *= 2


@torch.no_grad()
def contradicting_views(
    matter: Tensor, maybe: Tensor, cameras: Sequence[Camera], bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Which views hide matter that the others show, and how much each shows where the others show none.

    Masks that fit together explain each other: each masked pixel shows a cell of the visual hull. Where one
    mask lacks a part of an object, pixels of the others are left that show no cell of the hull, although
    all but a few views have something there. Those few are found, view after view.

    Args:
      matter: pixels that show matter, bool [views, height, width].
      maybe: the same and those that say nothing.

    Returns:
      Bool [views], and float32 [views]: the share of a view's matter that no cell explains.
    """
    matter, maybe, cameras = _reduced(matter.cpu(), maybe.cpu(), cameras)
    cells, distances = torch.arange(_COMPARED_CELLS[0] ** 3, device=bounds.device), _distances(maybe)
    for level in _COMPARED_CELLS:
        radius = float((bounds[1] - bounds[0]).norm()) / level / 2
        centers = grid_points(bounds, (level,) * 3, cells, centered=True)
        seen, empty = _votes(distances, cameras, centers, radius)
        # What more views rule out than can be wrong is outside, and so are its parts. What few views see
        # would explain everything.
        left = empty.sum(0) <= seen.sum(0) * _MOST_WRONG
        if level != _COMPARED_CELLS[-1]:
            cells = _parts(cells[left], level)
    left &= seen.sum(0) >= max(2, _FEWEST * len(cameras))
    centers, seen, empty = centers[left], seen[:, left], empty[:, left]
    wrong = torch.zeros(len(cameras), dtype=torch.bool)
    while True:
        votes, voters = empty[~wrong].sum(0), seen[~wrong].sum(0)
        hull = centers[votes == 0]
        unexplained = torch.stack(
            [m & ~splat(camera, hull, radius / 2).cpu() for m, camera in zip(matter, cameras)]
        )
        if unexplained.any():
            # How many views need matter in a cell that fewer rule out.
            doubtful = ((votes > 0) & (votes <= voters * _MOST_WRONG)).nonzero()[:, 0]
            visible, off = _votes(_distances(unexplained), cameras, centers[doubtful], radius)
            doubtful = doubtful[(visible & ~off)[~wrong].sum(0) > votes[doubtful]]
        if not unexplained.any() or not len(doubtful):
            return wrong, unexplained.sum((1, 2)) / matter.sum((1, 2)).clamp(min=1)
        # Cells that the fewest rule out come first: these few are wrong most likely.
        blame = empty[:, doubtful[votes[doubtful] == votes[doubtful].min()]].sum(1).cpu() * ~wrong
        wrong |= blame > 0.5 * blame.max()


def _votes(
    distances: Tensor, cameras: Sequence[Camera], centers: Tensor, radius: float
) -> tuple[Tensor, Tensor]:
    """Which views see balls completely, and which of them see no masked pixel there: bool [views, balls]."""
    seen, empty = [], []
    for distance, camera in zip(distances, cameras):
        x, y, depth = project(camera, centers)
        slope = torch.maximum(
            (x - camera.center[0]).abs() / camera.focal[0], (y - camera.center[1]).abs() / camera.focal[1]
        )
        # The bound of `pixels_across`, for each ball instead of the nearest.
        pixels = (max(camera.focal) * radius * (1 + slope) / depth.clamp(min=NEAR * radius)).ceil() + 1
        inside, nearest = contained(camera, x, y, pixels, distance.to(centers.device))
        seen.append(inside & (depth > NEAR * radius) & (pixels <= _FARTHEST))
        empty.append(seen[-1] & (nearest > pixels))
    return torch.stack(seen), torch.stack(empty)


def _distances(masks: Tensor) -> Tensor:
    """How far the next masked pixel is, along rows or columns: float32 [views, height, width], at most
    `_FARTHEST` + 1."""
    grown, distances = masks.float(), (~masks).float()
    for _ in range(_FARTHEST):
        grown = F.max_pool2d(grown, 3, 1, 1)
        distances += 1 - grown
    return distances


def _reduced(matter: Tensor, maybe: Tensor, cameras: Sequence[Camera]) -> tuple[Tensor, Tensor, list[Camera]]:
    """Smaller masks: a pixel is set if any of its parts is."""
    height, width = matter.shape[1:]
    factor = -(-max(height, width) // _COMPARED_PIXELS)
    rows, columns = -(-height // factor), -(-width // factor)
    padding = [0, columns * factor - width, 0, rows * factor - height]

    def smaller(masks: Tensor) -> Tensor:
        return torch.stack(
            [F.max_pool2d(F.pad(mask.float()[None], padding), factor)[0] > 0 for mask in masks]
        )

    whole = [dataclasses.replace(c, width=columns * factor, height=rows * factor) for c in cameras]
    return smaller(matter), smaller(maybe), [c.resized(columns, rows) for c in whole]


def _parts(cells: Tensor, level: int) -> Tensor:
    """The cells of a level twice as fine that make up these, in increasing order; all are flat indices."""
    marked = torch.zeros(level**3, dtype=torch.bool, device=cells.device)
    marked[cells] = True
    marked = marked.view((level,) * 3)
    for axis in range(3):
        marked = marked.repeat_interleave(2, axis)
    return marked.view(-1).nonzero()[:, 0]
