"""Scene files in JSON: for each picture its file, and the pose and intrinsics of its camera.

What is not a pinhole camera (lens distortion, or a pose that is not a rigid motion) is refused here, and so
are the keys of nerfstudio's and instant-ngp's formats that change the meaning of a scene in ways that are not
supported.
"""

import json
import math
import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError, first_line

RIGID_TOLERANCE = 1e-3  # how far R R^T may be from the identity in any entry, and det R from 1

_FOCAL = {"fl_x", "fl_y", "camera_angle_x", "camera_angle_y"}

# Keys that change the meaning of a scene and are not supported, by the advice that their refusal gives. They
# are accepted if they say nothing: false, 0, or a list of zeros.
_REFUSED = {
    "only pinhole cameras are supported: undistort the pictures": (
        *("distortion_params", "latlong", "equirectangular", "orthographic", "fisheye_crop_radius"),
        *(f"ftheta_p{index}" for index in range(6)),
    ),
    "moving scenes and cameras are not supported": (
        *("time", "rolling_shutter", "transform_matrix_start", "transform_matrix_end"),
    ),
    "give fl_x, fl_y, cx and cy in pixels instead": ("K", "intrinsic_matrix", "intrinsics", "x_fov", "y_fov"),
    "give poses in OpenGL axes instead": ("from_na", "from_mitsuba", "normal_mts_args"),
    "change the pictures themselves instead": (
        *("white_transparent", "black_transparent", "mask_color", "fix_premult", "sharpen", "envmap"),
    ),
    "the light must be the same in all pictures": ("driver_parameters", "lightdir"),
    "remove the frames that are not to be used instead": (
        *("train_filenames", "val_filenames", "test_filenames", "sharpness_discard_threshold"),
    ),
}
_ADVICE = {key: advice for advice, keys in _REFUSED.items() for key in keys}

# Known keys without a meaning here: notes of the tools that wrote the file, and how nerfstudio and
# instant-ngp move the scene into their own box.
_NOTES = {"rotation", "sharpness", "colmap_im_id", "ply_file_path", "aabb_scale", "scale", "offset"} | {
    *("applied_transform", "applied_scale", "orientation_override", "auto_scale_poses_override", "n_frames"),
}


def _rigid(rows: list[list[float]]) -> list[list[float]]:
    matrix = np.array(rows)
    rotation, last = matrix[:3, :3], matrix[3]
    errors = [last - (0, 0, 0, 1), rotation @ rotation.T - np.eye(3), np.linalg.det(rotation) - 1]
    if max(np.abs(error).max() for error in errors) > RIGID_TOLERANCE:
        raise ValueError(
            "must be a rotation without scale or reflection, a position, and a last row of 0 0 0 1"
        )
    return rows


# Products of much larger or smaller numbers would be infinite or 0 in float32.
_Number = Annotated[float, Field(ge=-1e9, le=1e9)]
_Row = Annotated[list[_Number], Field(min_length=4, max_length=4)]
_Matrix = Annotated[list[_Row], Field(min_length=4, max_length=4), AfterValidator(_rigid)]
_Length = Annotated[float, Field(ge=1e-3, le=1e9, description="focal length in pixels")]
_Angle = Annotated[float, Field(ge=1e-6, le=3.1415, description="angle of view in radians")]
_Pixels = Annotated[float, Field(gt=0, le=1e9, multiple_of=1, description="size of the picture in pixels")]
_Zero = Annotated[Literal[0], Field(description="lens distortion is not supported: undistort the pictures")]


class Frame(BaseModel):
    """One of the `frames` of a scene file, merged with the settings of the whole file.

    `None` means that a value is not given; an explicit null is refused, because defaults are not validated.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

    where: str  # the file and the index of the frame, for error messages
    file_path: str = Field(min_length=1, description="a picture in the scene's directory")
    mask_path: str = Field(
        None, min_length=1, description="a picture in the scene's directory whose black pixels are not used"
    )
    transform_matrix: _Matrix = Field(description="camera to world, 4 rows of 4 numbers")
    # The models of COLMAP and nerfstudio that are a pinhole camera when all distortion is 0.
    camera_model: Literal[
        "PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "FULL_OPENCV", "RADIAL", "SIMPLE_RADIAL", "PERSPECTIVE"
    ] = Field("PINHOLE", description="only pinhole cameras are supported: undistort the pictures")
    is_fisheye: Literal[False, None] = Field(False, description="only pinhole cameras are supported")
    k1: _Zero = 0
    k2: _Zero = 0
    k3: _Zero = 0
    k4: _Zero = 0
    k5: _Zero = 0
    k6: _Zero = 0
    p1: _Zero = 0
    p2: _Zero = 0
    fl_x: _Length = None
    fl_y: _Length = None
    camera_angle_x: _Angle = None
    camera_angle_y: _Angle = None
    cx: _Number = Field(None, description="principal point in pixels")
    cy: _Number = Field(None, description="principal point in pixels")
    w: _Pixels = None
    h: _Pixels = None

    @model_validator(mode="after")
    def _has_focal(self) -> "Frame":
        if self.fl_x is None and self.camera_angle_x is None:
            raise ValueError("needs `camera_angle_x` (radians) or `fl_x` (pixels), in the frame or the file")
        return self

    def camera(self, width: int, height: int) -> Camera:
        """The camera, for a picture of `width` by `height` pixels.

        `fl_x` takes precedence over `camera_angle_x`. Pixels are square unless a second value says
        otherwise, and the principal point is the middle unless `cx` and `cy` are given. All are in pixels
        of a picture of `w` by `h`, if the file gives these.

        Raises:
          DataError: `w` and `h` are neither the size of the picture nor a whole multiple or fraction of it.
        """
        stated = (int(self.w or width), int(self.h or height))
        small, large = sorted((stated, (width, height)))
        factor = large[0] // small[0]
        if large != (factor * small[0], factor * small[1]):
            raise DataError(
                f"{self.where}: w and h say {stated[0]}x{stated[1]}, but {self.file_path!r} has "
                f"{width}x{height} pixels; one must be a whole multiple of the other"
            )
        if self.fl_x is not None:
            focal = (self.fl_x, self.fl_y or self.fl_x)
        else:
            x = _focal(stated[0], self.camera_angle_x)
            focal = (x, x if self.camera_angle_y is None else _focal(stated[1], self.camera_angle_y))
        given = (self.cx, self.cy)
        center = tuple(0.5 * size if at is None else at for at, size in zip(given, stated))
        pose = np.array(self.transform_matrix[:3], np.float32)
        return Camera(pose, *stated, focal, center).resized(width, height)


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    frames: list[dict[str, Any]] = Field(min_length=1, description="one entry per picture")


_SHARED = Frame.model_fields.keys() - {"where", "file_path", "transform_matrix"}


def read(path: Path) -> tuple[list[Frame], set[str]]:
    """The frames of one `transforms_*.json`, in their order, at least one; and the keys that are not used.

    Raises:
      DataError: the file cannot be read, is not a scene file, has a camera that is not a pinhole camera, or
        a key that would change the meaning of the scene and is not supported.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({first_line(error)})") from error
    file = _validated(_File, content, str(path))
    whole = file.model_extra
    _refuse(whole, str(path))
    if whole.get("n_frames", len(file.frames)) != len(file.frames):
        raise DataError(
            f"{path}: n_frames = {reprlib.repr(whole['n_frames'])}, but there are {len(file.frames)} frames; "
            "remove those that are not to be used"
        )
    shared = {key: value for key, value in whole.items() if key in _SHARED}
    frames, unused = [], whole.keys() - _SHARED
    for index, entry in enumerate(file.frames):
        where = f"{path}: frame {index}"
        _refuse(entry, where)
        # A frame with any focal length of its own takes none from the whole file.
        own = _FOCAL if _FOCAL & entry.keys() else set()
        inherited = {key: value for key, value in shared.items() if key not in own}
        frames.append(_validated(Frame, inherited | entry | {"where": where}, where))
        unused = unused | (entry.keys() - Frame.model_fields.keys())
    return frames, unused - _NOTES - _ADVICE.keys()


def find(
    where: str, name: str, directory: Path, extensions: tuple[str, ...] = ("", ".png")
) -> tuple[Path, str]:
    """The file `name` of a scene, or if that is not a file, with the first extension that makes it one.

    Returns the file, and its name relative to the directory after following all links.

    Raises:
      DataError: there is none, or it is outside of the directory.
    """
    root = os.path.realpath(directory)
    for candidate in (name + extension for extension in extensions):
        file = directory / candidate
        try:
            target = Path(os.path.realpath(file))
            if not target.is_relative_to(root):
                raise DataError(
                    f"{where}: {candidate!r} leads out of the scene, to {str(target)!r}; the pictures "
                    f"must be in {directory}"
                )
            if file.is_file():
                return file, target.relative_to(root).as_posix()
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: {candidate!r} cannot be read ({error})") from error
    tried = ", with or without .png" if len(extensions) > 1 else ""
    raise DataError(f"{where}: no picture {name!r} in {directory}{tried}")


def refuse_unnamed(frame: Frame, file: Path, directory: Path) -> None:
    """Raises a DataError for a file that instant-ngp would find by the name of the frame's picture."""
    invert = "name it as mask_path, with the pixels that are not to be used in black"
    for beside, advice in (
        (directory / f"{frame.file_path}.alpha{file.suffix}", "put it into the picture's alpha channel"),
        (file.with_name(f"dynamic_mask_{file.stem}.png"), None if frame.mask_path else invert),
        (file.with_name(f"rays_{file.stem}.dat"), "only pinhole cameras are supported"),
    ):
        if advice and os.path.exists(beside):
            raise DataError(
                f"{beside}: instant-ngp would use this file with {frame.file_path!r}, which is not "
                f"supported: {advice}, or remove it"
            )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that it has twice would be read differently by different programs."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {reprlib.repr(repeated)} occurs twice")
    return content


def _refuse(content: dict[str, Any], where: str) -> None:
    """Raises a DataError for the first key that is not supported and says something."""
    for key, value in content.items():
        if key not in _ADVICE:
            continue
        if any(value) if isinstance(value, list) else value:
            raise DataError(f"{where}: {key} = {reprlib.repr(value)} is not supported: {_ADVICE[key]}")


def _validated(model: type[BaseModel], content: Any, where: str) -> Any:
    """An instance of the model; the first mistake in the content becomes a one-line DataError."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").partition(" or instance of")[0]
    message = message.replace("Input should be", "must be").replace("Field required", "is missing")
    if not first["loc"]:
        raise DataError(f"{where}: {message}")
    field, *place = first["loc"]
    name = str(field) + "".join(f"[{index}]" for index in place)
    if first["type"] != "missing":
        name += f" = {reprlib.repr(first['input'])}"
    raise DataError(f"{where}: {name}: {message} ({model.model_fields[field].description})")


def _focal(pixels: int, angle: float) -> float:
    return 0.5 * pixels / math.tan(0.5 * angle)
