"""Where a scene lies, from its cameras and masks: a box, and the stretch of each ray worth sampling."""

from collections.abc import Sequence

import numpy as np

from blacksmith.datasets.blender.cameras import Camera

PARALLEL = 1e-3  # axes count as parallel below this mean of sin^2 of the angle to their common direction
STRAY = 10  # a camera that is this many times as far from the middle of all as the median one does not count
CLOSE_UP = 0.75  # a camera that sees less than this fraction of what the median camera sees does not count
NEAREST = 0.05  # rays start at least this fraction of the distance to the box's middle away from a camera


def estimate_bounds(cameras: Sequence[Camera], masks: np.ndarray | None = None) -> np.ndarray:
    """The lower and the upper corner, float32 [2, 3] in world units, of a cube that nearly all cameras see.

    Its center is the point nearest to all optical axes, by least squares. If the axes are parallel, or meet
    behind most of the cameras, the center is the point of the mean axis nearest to the world's origin, but
    at least as far in front of the cameras as they are apart. Half its side is the smallest of the cameras'
    distance * tan(angle / 2), for the wider angle of view. Cameras that look away do not count, nor do
    close-ups and strays.

    The cube is enlarged to hold what `masks`, bool [cameras, height, width], show: as far from its center as
    in nine tenths of the views, among those that show it whole.
    """
    everyone, cameras = cameras, without_strays(cameras)
    positions, axes = _positions_and_axes(cameras)
    spread = float(np.linalg.norm(positions - positions.mean(0), axis=1).max())
    # The squared distance of a point x to an axis is (x - o)^T (I - d d^T) (x - o). Setting the gradient of
    # the sum over the cameras to zero gives sum(I - d d^T) x = sum((I - d d^T) o).
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    total = across.sum(0)
    ahead = np.zeros(len(cameras), bool)
    if np.linalg.eigvalsh(total)[0] > PARALLEL * len(cameras):
        center = np.linalg.solve(total, (across @ positions[:, :, None]).sum(0)[:, 0])
        # Cameras that only turn in place meet where they stand, up to rounding.
        ahead = ((center - positions) * axes).sum(1) > max(1e-3 * spread, 1e-6)
    if ahead.mean() <= 0.5:
        center = _ahead_of_the_mean(positions, axes, spread)
        ahead = ((center - positions) * axes).sum(1) > 0
    distance = np.linalg.norm(center - positions, axis=1)
    slope = np.array([max(c.width / c.focal[0], c.height / c.focal[1]) / 2 for c in cameras])
    sees = (distance * slope)[ahead if ahead.any() else slice(None)]
    half = sees[sees >= CLOSE_UP * np.median(sees)].min()
    if masks is not None:
        shown = [_reach(camera, mask, center) for camera, mask in zip(everyone, masks)]
        shown = [reach for reach in shown if reach is not None]
        if shown:
            half = max(half, np.quantile(shown, 0.9, method="higher"))
    return np.stack([center - half, center + half]).astype(np.float32)


def near_far(cameras: Sequence[Camera], bounds: np.ndarray) -> tuple[float, float]:
    """The distances, near and far in world units, between which rays of the cameras can meet a box, [2, 3].

    Near is the smallest distance of a camera to the box, but at least `NEAREST` times that to its middle; far
    is the largest distance of a camera to a corner.
    """
    positions, _ = _positions_and_axes(without_strays(cameras))
    low, high = np.asarray(bounds, np.float64)
    to_middle = np.linalg.norm(positions - (low + high) / 2, axis=1)
    to_box = np.linalg.norm(np.maximum(np.maximum(low - positions, positions - high), 0), axis=1)
    to_corner = np.linalg.norm(np.maximum(np.abs(positions - low), np.abs(positions - high)), axis=1)
    return float(np.maximum(to_box, NEAREST * to_middle).min()), float(to_corner.max())


def without_strays(cameras: Sequence[Camera]) -> list[Camera]:
    """The cameras without those that are far away from all others: one wrong position would move the rest."""
    positions = np.stack([camera.pose[:, 3] for camera in cameras]).astype(np.float64)
    distance = np.linalg.norm(positions - np.median(positions, axis=0), axis=1)
    typical = np.median(distance)
    return [c for c, away in zip(cameras, distance) if away <= STRAY * typical or not typical]


def _positions_and_axes(cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """The cameras' positions and unit viewing directions, float64 [cameras, 3] each."""
    poses = np.stack([camera.pose for camera in cameras]).astype(np.float64)
    axes = -poses[:, :, 2]
    return poses[:, :, 3], axes / np.linalg.norm(axes, axis=1, keepdims=True)


def _reach(camera: Camera, mask: np.ndarray, center: np.ndarray) -> float | None:
    """How far from a point, in world units along the picture's axes, a mask reaches at the point's depth.

    None if it says nothing: it is empty or touches the picture's edge, or the point is behind the camera.
    """
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    x, y, z = (center - camera.pose[:, 3]) @ camera.pose[:, :3].astype(np.float64)
    if not len(rows) or z >= 0:
        return None
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if top == 0 or left == 0 or bottom == camera.height or right == camera.width:
        return None
    # In the units of a picture at depth 1, relative to the point.
    across = (np.array([left, right]) - camera.center[0]) / camera.focal[0] - x / -z
    along = (np.array([top, bottom]) - camera.center[1]) / camera.focal[1] + y / -z
    return float(-z * max(np.abs(across).max(), np.abs(along).max()))


def _ahead_of_the_mean(positions: np.ndarray, axes: np.ndarray, spread: float) -> np.ndarray:
    """A point in front of the mean camera, float64 [3]."""
    position, axis = positions.mean(0), axes.mean(0)
    if np.linalg.norm(axis) < 1e-3:  # they look in all directions
        axis = axes[0]
    axis = axis / np.linalg.norm(axis)
    distance = max(-position @ axis, 2 * spread)
    return position + (distance if distance > 1e-6 else 1.0) * axis
