"""Cameras of tests: by their angle of view, and where points appear in their pictures."""

import numpy as np

from blacksmith.datasets.blender.cameras import Camera


def camera_of(pose, width, height, angle_x):
    """A camera with square pixels whose picture is `angle_x` radians wide."""
    focal = 0.5 * width / float(np.tan(0.5 * angle_x))
    pose = np.asarray(pose, np.float32)[:3]
    return Camera(pose, width, height, (focal, focal), (0.5 * width, 0.5 * height))


def project(camera, points):
    """Picture coordinates in pixels, [points, 2], and depth along the optical axis, [points]."""
    local = (points - camera.pose[:, 3]) @ camera.pose[:, :3]
    depth = -local[:, 2]
    scale = np.asarray(camera.focal) / np.where(depth == 0, np.finfo(np.float32).tiny, depth)[:, None]
    return local[:, :2] * (1, -1) * scale + camera.center, depth
