"""Reads a scene's JSON files: where the pictures are, and the pose and intrinsics of the camera of each.

`open_scene` reads one file a split with `read`, and asks a frame for its camera once it knows how many pixels
the picture has. What a pinhole camera cannot be, a lens with distortion or a pose that is not a rigid motion,
is refused here.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError

RIGID_TOLERANCE = 1e-3
"""How far R R^T may be from the identity in any entry, and det R from 1."""

PINHOLE_MODELS = (
    "PINHOLE",
    "SIMPLE_PINHOLE",
    "OPENCV",
    "FULL_OPENCV",
    "RADIAL",
    "SIMPLE_RADIAL",
    "PERSPECTIVE",
)
"""Values of `camera_model` that are a pinhole camera when no distortion is left."""

_FOCAL = ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y")
_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")


@dataclass(frozen=True, eq=False)
class Frame:
    """One entry of `frames`, its intrinsics merged with those of the whole file.

    Attributes:
      where: the JSON file and the number of the frame, to begin an error with.
      file_path: as written in the file.
      pose: camera-to-world, float32 [3, 4].
      intrinsics: those that are given of `fl_x`, `fl_y`, `cx`, `cy`, `w`, `h` in pixels, `camera_angle_x` and
        `camera_angle_y` in radians; one of `fl_x` and `camera_angle_x` is.
    """

    where: str
    file_path: str
    pose: np.ndarray
    intrinsics: dict[str, float]

    def camera(self, width: int, height: int) -> Camera:
        """The camera for a picture of that many pixels.

        `fl_x` counts before `camera_angle_x`, pixels are square unless a second value says otherwise, and
        the principal point is the middle unless `cx` and `cy` are given. All of them are for a picture of `w`
        by `h` pixels, where the file has these.

        Raises:
          DataError: `w` and `h` are not the size of the picture, nor a whole multiple or fraction of it.
        """
        given = self.intrinsics
        stated_width, stated_height = int(given.get("w", width)), int(given.get("h", height))
        if not _same_shape((stated_width, stated_height), (width, height)):
            raise DataError(
                f"{self.where}: w and h say {stated_width}x{stated_height}, but {self.file_path!r} has "
                f"{width}x{height} pixels; they must be equal or one a whole multiple of the other"
            )
        if "fl_x" in given:
            focal_x = given["fl_x"]
            focal_y = given.get("fl_y", focal_x)
        else:
            focal_x = focal_y = _focal(stated_width, given["camera_angle_x"])
            if "camera_angle_y" in given:
                focal_y = _focal(stated_height, given["camera_angle_y"])
        centre = (given.get("cx", 0.5 * stated_width), given.get("cy", 0.5 * stated_height))
        camera = Camera(self.pose, stated_width, stated_height, (focal_x, focal_y), centre)
        return camera.resized(width, height)


def read(path: Path) -> list[Frame]:
    """The frames of one `transforms_*.json`, in their order; at least one.

    Raises:
      DataError: the file cannot be read, is not such a file, or has a camera that is no pinhole camera.
    """
    content = _object(path)
    if "frames" not in content:
        raise DataError(f"{path}: no `frames`; it must be a list with one entry for each picture")
    entries = content["frames"]
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else f"a {type(entries).__name__}"
        raise DataError(f"{path}: `frames` is {found}; it must be a list with one entry for each picture")
    shared = {key: value for key, value in content.items() if key != "frames"}
    return [_frame(f"{path}: frame {index}", entry, shared) for index, entry in enumerate(entries)]


def _object(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            content = json.loads(stream.read().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with `frames`, found {type(content).__name__}")
    return content


def _frame(where: str, entry: object, shared: dict[str, Any]) -> Frame:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object with `file_path`, found {type(entry).__name__}")
    file_path = entry.get("file_path")
    if not isinstance(file_path, str) or not file_path:
        found = f"is {file_path!r}" if "file_path" in entry else "is missing"
        raise DataError(f"{where}: `file_path` {found}; it must name a picture below the scene's directory")
    if "transform_matrix" not in entry:
        raise DataError(f"{where}: no `transform_matrix`; it must be the 4x4 matrix from camera to world")
    # A frame with a focal length of its own takes no part of it from the whole file.
    own_focal = not entry.keys().isdisjoint(_FOCAL)
    settings = {key: value for key, value in shared.items() if not (own_focal and key in _FOCAL)} | entry
    return Frame(where, file_path, _pose(where, entry["transform_matrix"]), _intrinsics(where, settings))


def _pose(where: str, rows: object) -> np.ndarray:
    """Checks a 4x4 matrix and returns its first three rows, float32 [3, 4]."""
    if (
        not isinstance(rows, list)
        or len(rows) != 4
        or not all(isinstance(row, list) and len(row) == 4 for row in rows)
    ):
        raise DataError(f"{where}: `transform_matrix` is not 4x4; it must be 4 rows of 4 numbers each")
    matrix = np.array([[_number(value) for value in row] for row in rows])
    # A place too far out for float32 is as unusable as one that is not finite.
    if not np.all(np.abs(matrix) < np.finfo(np.float32).max):
        raise DataError(f"{where}: `transform_matrix` must be 16 finite numbers")
    rotation, last = matrix[:3, :3], matrix[3]
    fault = None
    if np.abs(last - (0, 0, 0, 1)).max() > RIGID_TOLERANCE:
        fault = f"its last row is {_listed(last)}"
    elif (
        np.abs(rotation).max() > 1 + RIGID_TOLERANCE  # ahead of the product, which may overflow
        or np.abs(rotation @ rotation.T - np.eye(3)).max() > RIGID_TOLERANCE
        or abs(np.linalg.det(rotation) - 1) > RIGID_TOLERANCE
    ):
        lengths = [math.hypot(*column) for column in rotation.T]
        fault = (
            f"its axes have the lengths {_listed(lengths)}, its determinant is {np.linalg.det(rotation):.4g}"
        )
    if fault:
        raise DataError(
            f"{where}: `transform_matrix` is not a rigid motion: {fault}; it must be a rotation without "
            "scale or reflection, a position, and a last row of 0 0 0 1"
        )
    return matrix[:3].astype(np.float32)


def _intrinsics(where: str, settings: dict[str, Any]) -> dict[str, float]:
    model = settings.get("camera_model", PINHOLE_MODELS[0])
    if model not in PINHOLE_MODELS or settings.get("is_fisheye"):
        name = model if model not in PINHOLE_MODELS else "fisheye"
        raise DataError(
            f"{where}: a camera of model {name!r}; only pinhole cameras can be read, undistort first"
        )
    for key in _DISTORTION:
        if key in settings and _number(settings[key]) != 0:
            raise DataError(
                f"{where}: lens distortion, {key} = {settings[key]!r}; pictures are not undistorted here: "
                "undistort them and leave k1, k2, ..., p1, p2 out"
            )
    given = {}
    for key in (*_FOCAL, "cx", "cy", "w", "h"):
        if key not in settings:
            continue
        value = given[key] = _number(settings[key])
        if key.startswith("camera_angle"):
            fits, allowed = 0 < value < math.pi, "an angle in radians between 0 and pi"
        elif key in ("w", "h"):
            fits, allowed = 0 < value < math.inf and value == int(value), "a whole number of pixels above 0"
        elif key in ("cx", "cy"):
            fits, allowed = math.isfinite(value), "a number of pixels"
        else:
            fits, allowed = 0 < value < math.inf, "a number of pixels above 0"
        if not fits:
            raise DataError(f"{where}: {key} = {settings[key]!r}; it must be {allowed}")
    if "fl_x" not in given and "camera_angle_x" not in given:
        raise DataError(
            f"{where}: no intrinsics; `camera_angle_x` (radians) or `fl_x` (pixels) must be given, for the "
            "whole file or for each frame"
        )
    return given


def _number(value: object) -> float:
    """A JSON number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # whole numbers in JSON have no limit
        return math.inf


def _focal(pixels: int, angle: float) -> float:
    return 0.5 * pixels / math.tan(0.5 * angle)


def _same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether the larger size is the smaller one times a whole number."""
    small, large = sorted((first, second))
    factor = large[0] // small[0]
    return large == (factor * small[0], factor * small[1])


def _listed(values: Iterable[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def find(frame: Frame, directory: Path) -> tuple[Path, str]:
    """The picture of a frame: `file_path` itself where it is a file, or with `.png` behind it.

    The scene's directory may be a link, and what is in it may link to elsewhere in it, but not out of it.

    Returns:
      The file, and what it is called relative to the directory when every link has been followed.

    Raises:
      DataError: there is none, or it is outside of the directory.
    """
    root = os.path.realpath(directory)
    for name in (frame.file_path, f"{frame.file_path}.png"):
        file = directory / name
        try:
            target = Path(os.path.realpath(file))
            if not target.is_relative_to(root):
                raise DataError(
                    f"{frame.where}: {name!r} leads out of the scene, to {str(target)!r}; the pictures "
                    f"must be in {directory}"
                )
            if file.is_file():
                return file, target.relative_to(root).as_posix()
        except OSError as error:
            raise DataError(f"{frame.where}: {name!r} cannot be read ({error.strerror})") from error
        except ValueError:  # a name that no file can have
            continue
    raise DataError(f"{frame.where}: no picture {frame.file_path!r} in {directory}, with or without .png")
