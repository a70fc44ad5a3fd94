"""Pinhole cameras in OpenGL axes: x right, y up, the camera looks along -z. NumPy only."""

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera without lens distortion."""

    pose: np.ndarray  # camera-to-world, float32 [3, 4]: a rotation and the position in world units
    width: int  # of the picture, in pixels
    height: int
    focal: tuple[float, float]  # (fx, fy), in pixels
    # (cx, cy), the principal point in pixels; the center of the first pixel is at (0.5, 0.5).
    center: tuple[float, float]

    def resized(self, width: int, height: int) -> "Camera":
        """The same view as a picture of `width` by `height` pixels."""
        x, y = width / self.width, height / self.height
        return dataclasses.replace(
            self,
            width=width,
            height=height,
            focal=(self.focal[0] * x, self.focal[1] * y),
            center=(self.center[0] * x, self.center[1] * y),
        )


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The pose, float32 [3, 4], of a camera at `position` that looks at `target` with z upwards."""
    back = np.asarray(position, np.float64) - target
    back /= np.linalg.norm(back)
    right = np.cross((0.0, 0.0, 1.0), back)
    # Looking along z leaves the roll open; the y axis decides it.
    if np.linalg.norm(right) < 1e-6:
        right = np.cross((0.0, 1.0, 0.0), back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, np.asarray(position)], axis=1).astype(np.float32)


def orbit(camera: Camera, center: np.ndarray, radius: float, elevation: float, frames: int) -> list[Camera]:
    """Cameras like `camera` on a circle around the z axis through `center`, float [3], which they look at.

    `radius` is the distance from the center in world units, `elevation` the degrees above the horizon.
    """
    height, out = np.sin(np.radians(elevation)), np.cos(np.radians(elevation))
    cameras = []
    for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False):
        position = center + radius * np.array([out * np.cos(angle), out * np.sin(angle), height])
        cameras.append(dataclasses.replace(camera, pose=look_at(position, center)))
    return cameras
