"""A scene of known pictures: a ball, lit from above, whose color is its surface normal."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pinhole import camera_of

from blacksmith.datasets.blender import Camera
from blacksmith.datasets.blender.cameras import look_at

ANGLE = 0.7
DISTANCE = 4.0
RADIUS = 1.0


def picture(camera: Camera) -> np.ndarray:
    """RGBA of the ball, uint8 [height, width, 4], four by four rays a pixel."""
    fine = camera.resized(4 * camera.width, 4 * camera.height)
    rows, columns = np.mgrid[: fine.height, : fine.width] + 0.5
    x, y = (columns - fine.center[0]) / fine.focal[0], (rows - fine.center[1]) / fine.focal[1]
    directions = np.stack([x, -y, -np.ones_like(x)], -1) @ camera.pose[:, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    origin = camera.pose[:, 3]
    along = directions @ origin
    under = along**2 - (origin @ origin - RADIUS**2)
    hit = under > 0
    distance = -along - np.sqrt(np.maximum(under, 0))
    normal = (origin + directions * distance[..., None]) / RADIUS
    rgba = np.concatenate([0.5 + 0.5 * normal, np.ones_like(normal[..., :1])], -1) * hit[..., None]
    rgba = rgba.reshape(camera.height, 4, camera.width, 4, 4).mean((1, 3))
    alpha = rgba[..., 3:]
    rgba[..., :3] = np.where(alpha > 0, rgba[..., :3] / np.maximum(alpha, 1e-9), 0)
    return (rgba * 255 + 0.5).astype(np.uint8)


def write(
    directory: Path, *, width: int = 32, height: int = 32, views: tuple[int, int, int] = (24, 3, 3)
) -> Path:
    """Writes the scene in Blender's format."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), views):
        (directory / split).mkdir(parents=True)
        frames = []
        for index in range(count):
            up = random.uniform(-0.9, 0.9)
            angle = random.uniform(0, 2 * np.pi)
            flat = np.sqrt(1 - up**2)
            position = DISTANCE * np.array([flat * np.cos(angle), flat * np.sin(angle), up])
            pose = look_at(position, np.zeros(3))
            name = f"{split}/r_{index}"
            camera = camera_of(pose, width, height, ANGLE)
            Image.fromarray(picture(camera)).save(directory / f"{name}.png")
            matrix = [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]
            frames.append({"file_path": f"./{name}", "transform_matrix": matrix})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (directory / f"transforms_{split}.json").write_text(json.dumps(content))
    return directory
