"""Pinhole cameras in OpenGL axes: x right, y up, the camera looks along -z. NumPy only."""

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera without lens distortion.

    Attributes:
      pose: camera-to-world, float32 [3, 4]: a rotation and the camera's position in world units.
      width: of the picture, in pixels.
      height: of the picture, in pixels.
      focal: (fx, fy), in pixels.
      center: (cx, cy), the principal point in pixels from the upper left corner of the picture. The center
        of the first pixel is at (0.5, 0.5).
    """

    pose: np.ndarray
    width: int
    height: int
    focal: tuple[float, float]
    center: tuple[float, float]

    @classmethod
    def of_angle(cls, pose: np.ndarray, width: int, height: int, angle_x: float) -> "Camera":
        """A camera with square pixels whose picture is `angle_x` radians wide."""
        focal = 0.5 * width / float(np.tan(0.5 * angle_x))
        pose = np.asarray(pose, np.float32)[:3]
        return cls(pose, width, height, (focal, focal), (0.5 * width, 0.5 * height))

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

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where world points appear in the picture.

        Args:
          points: float [points, 3].

        Returns:
          Picture coordinates (x, y) in pixels, float [points, 2], and the depth along the optical axis in
          world units, float [points]: positive only in front of the camera.
        """
        local = (points - self.pose[:, 3]) @ self.pose[:, :3]
        depth = -local[:, 2]
        scale = np.asarray(self.focal) / np.where(depth == 0, np.finfo(np.float32).tiny, depth)[:, None]
        return local[:, :2] * (1, -1) * scale + self.center, depth


def look_at(
    position: np.ndarray, target: np.ndarray, up: tuple[float, float, float] = (0, 0, 1)
) -> np.ndarray:
    """The pose, float32 [3, 4], of a camera at `position` that looks at `target` with `up` upwards."""
    back = np.asarray(position, np.float64) - target
    back /= np.linalg.norm(back)
    right = np.cross(up, back)
    # Looking along `up` leaves the roll open; the y axis decides it.
    if np.linalg.norm(right) < 1e-6:
        right = np.cross((0.0, 1.0, 0.0), back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, np.asarray(position)], axis=1).astype(np.float32)


def orbit(camera: Camera, center: np.ndarray, radius: float, elevation: float, frames: int) -> list[Camera]:
    """Cameras on a circle around the vertical axis, all looking at `center`.

    Args:
      camera: gives the intrinsics.
      center: float [3].
      radius: distance from the center, in world units.
      elevation: angle above the horizon, in degrees.
      frames: number of cameras on the full circle.
    """
    height, out = np.sin(np.radians(elevation)), np.cos(np.radians(elevation))
    cameras = []
    for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False):
        position = center + radius * np.array([out * np.cos(angle), out * np.sin(angle), height])
        cameras.append(dataclasses.replace(camera, pose=look_at(position, center)))
    return cameras
