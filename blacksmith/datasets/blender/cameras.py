"""Pinhole cameras in OpenGL axes: x right, y up, the camera looks along -z. NumPy only."""

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Camera:
    """One pinhole camera without distortion.

    Attributes:
      pose: camera-to-world, float32 [3, 4]: a rotation and the camera's position in world units.
      width: of the picture, in pixels.
      height: of the picture, in pixels.
      focal: (fx, fy), in pixels.
      centre: (cx, cy), the principal point in pixels from the upper left corner of the picture; the first
        pixel's own centre is at (0.5, 0.5).
    """

    pose: np.ndarray
    width: int
    height: int
    focal: tuple[float, float]
    centre: tuple[float, float]

    @classmethod
    def of_angle(cls, pose: np.ndarray, width: int, height: int, angle_x: float) -> "Camera":
        """A camera with square pixels whose picture is `angle_x` radians wide."""
        focal = 0.5 * width / float(np.tan(0.5 * angle_x))
        pose = np.asarray(pose, np.float32)[:3]
        return cls(pose, width, height, (focal, focal), (0.5 * width, 0.5 * height))

    def resized(self, width: int, height: int) -> "Camera":
        """The same view at another number of pixels, at least one each way."""
        x, y = width / self.width, height / self.height
        return dataclasses.replace(
            self,
            width=width,
            height=height,
            focal=(self.focal[0] * x, self.focal[1] * y),
            centre=(self.centre[0] * x, self.centre[1] * y),
        )

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where world points appear.

        Args:
          points: float [points, 3].

        Returns:
          Picture coordinates (x, y) in pixels, float [points, 2], and the depth along the optical axis in
          world units, float [points]: not positive for points that are not in front of the camera.
        """
        local = (points - self.pose[:, 3]) @ self.pose[:, :3]
        depth = -local[:, 2]
        scale = np.asarray(self.focal) / np.where(depth == 0, np.finfo(np.float32).tiny, depth)[:, None]
        return local[:, :2] * (1, -1) * scale + self.centre, depth


def look_at(
    position: np.ndarray, target: np.ndarray, up: tuple[float, float, float] = (0, 0, 1)
) -> np.ndarray:
    """The pose, float32 [3, 4], of a camera at `position` that looks at `target`, `up` up in its picture.

    A camera that looks along `up` itself is turned about it by the y axis instead.
    """
    back = np.asarray(position, np.float64) - target
    back /= np.linalg.norm(back)
    right = np.cross(up, back)
    if np.linalg.norm(right) < 1e-6:
        right = np.cross((0.0, 1.0, 0.0), back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, np.asarray(position)], axis=1).astype(np.float32)


def orbit(camera: Camera, centre: np.ndarray, radius: float, elevation: float, frames: int) -> list[Camera]:
    """Cameras on a circle around the vertical axis, all looking at `centre`.

    Args:
      camera: gives the intrinsics.
      centre: float [3].
      radius: distance from the centre, in world units.
      elevation: angle above the horizon, in degrees.
      frames: how many cameras; the one after the last would be the first again.
    """
    height, out = np.sin(np.radians(elevation)), np.cos(np.radians(elevation))
    cameras = []
    for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False):
        position = centre + radius * np.array([out * np.cos(angle), out * np.sin(angle), height])
        cameras.append(dataclasses.replace(camera, pose=look_at(position, centre)))
    return cameras
