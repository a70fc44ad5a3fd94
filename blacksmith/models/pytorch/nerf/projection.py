"""Points and balls in the pictures of cameras, for masks: which pixels show them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blacksmith.datasets.blender.cameras import Camera

NEAR = 3  # depth, in radii, below which a ball may fill the picture


def project(camera: Camera, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Picture coordinates x and y in pixels, and depth in world units: float32 [points] each."""
    pose = torch.as_tensor(camera.pose, device=points.device)
    local = (points - pose[:, 3]) @ pose[:, :3]
    depth = -local[:, 2]
    safe = torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6), depth)
    x = local[:, 0] / safe * camera.focal[0] + camera.center[0]
    return x, -local[:, 1] / safe * camera.focal[1] + camera.center[1], depth


def pixels_across(camera: Camera, radius: float, depth: Tensor) -> int:
    """How far, in pixels, a pixel that shows a ball can be from the ball's projected center.

    For balls of radius r = `radius` with centers at these depths. A point of the ball at p' = x'/z' and the
    center at p = x/z with |x - x'| and |z - z'| up to r differ by (x - x' - p' (z - z')) / z, at most
    r (1 + |p'|) / z.
    """
    ahead = depth[depth > NEAR * radius]
    nearest = float(ahead.amin()) if len(ahead) else math.inf
    pixels = math.ceil(max(camera.focal) * radius * (1 + _steepest(camera)) / nearest) + 1
    return min(pixels, max(camera.width, camera.height))


def _steepest(camera: Camera) -> float:
    """The largest tangent, along x or y, of the angle between the optical axis and a ray of the picture."""
    x = max(camera.center[0], camera.width - camera.center[0]) / camera.focal[0]
    y = max(camera.center[1], camera.height - camera.center[1]) / camera.focal[1]
    return max(x, y, 0.0)


def contained(
    camera: Camera, x: Tensor, y: Tensor, margin: Tensor | int, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Which points x, y are farther than `margin` pixels from the rim of a picture, and its values there.

    `values` is [height, width]; those of points beside the picture mean nothing.
    """
    inside = (x >= margin) & (x < camera.width - margin) & (y >= margin) & (y < camera.height - margin)
    column, row = x.long().clamp(0, camera.width - 1), y.long().clamp(0, camera.height - 1)
    return inside, values.view(-1)[row * camera.width + column]


def grow(mask: Tensor, pixels: int) -> Tensor:
    """Marks everything within `pixels` of a marked pixel."""
    # A square maximum is one along rows, then one along columns: 2n operations per pixel instead of n^2.
    grown = F.max_pool2d(mask.float()[None, None], (1, 2 * pixels + 1), 1, (0, pixels))
    return F.max_pool2d(grown, (2 * pixels + 1, 1), 1, (pixels, 0))[0, 0] > 0


def splat(camera: Camera, points: Tensor, radius: float) -> Tensor:
    """Pixels within `radius` world units of a point, bool [height, width]."""
    x, y, depth = project(camera, points)
    away = (points - torch.as_tensor(camera.pose[:, 3], device=points.device)).norm(dim=1)
    # From inside a ball, or close to it, every pixel can show it.
    if bool((away < radius * (2 + NEAR) * (1 + _steepest(camera))).any()):
        return torch.ones(camera.height, camera.width, dtype=torch.bool, device=points.device)
    pixels = pixels_across(camera, radius, depth)
    # Balls with centers beside the picture can reach into it, hence the border of `pixels` on each side.
    row, column = (y.floor().long() + pixels), (x.floor().long() + pixels)
    height, width = camera.height + 2 * pixels, camera.width + 2 * pixels
    near = (depth > NEAR * radius) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = torch.zeros(height, width, dtype=torch.bool, device=points.device)
    mask[row[near], column[near]] = True
    return grow(mask, pixels)[pixels:-pixels, pixels:-pixels]
