"""Scenes in the format of Blender and "NeRF synthetic", as NumPy arrays: pictures with their cameras.

`open_scene` checks a directory, or the bundled scene, without decoding a picture; the `views` of the `Scene`
that it returns decode pictures on demand.
"""

import contextlib
import hashlib
import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blacksmith.datasets.blender import pictures, transforms
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError
from blacksmith.files import file_sha256

SPLITS = ("train", "val", "test")

BUNDLED = Path(__file__).with_name("anvil")  # its README says how it was made

_EXACT = 1e-4  # of the distance to the origin: float32 is exact to 6e-8, so to 6e-4 of what is this long
_DECODERS = 8  # threads; Pillow releases the interpreter's lock while decoding


@dataclass(frozen=True, eq=False)
class Views:
    """Decoded pictures of one split with their cameras."""

    pixels: np.ndarray  # RGBA with straight alpha, uint8 [views, height, width, 4]
    cameras: tuple[Camera, ...]
    names: tuple[str, ...]  # unique, and usable as file names
    used: np.ndarray  # pixels that count, in training and in scores: bool [views, height, width]

    def at(self, kept: np.ndarray) -> "Views":
        """The views at bool `kept`, [views]."""
        if kept.all():
            return self  # large scenes are not copied
        cameras, names = (
            [one for one, keep in zip(part, kept) if keep] for part in (self.cameras, self.names)
        )
        return Views(self.pixels[kept], tuple(cameras), tuple(names), self.used[kept])

    def picture(self, index: int, background: np.ndarray | tuple[float, float, float]) -> np.ndarray:
        """One view over a background in [0, 1], float [3]: float32 [height, width, 3] in [0, 1]."""
        pixels = self.pixels[index].astype(np.float32) / np.float32(255)
        rgb, alpha = pixels[..., :3], pixels[..., 3:]
        return rgb * alpha + np.asarray(background, np.float32) * (1 - alpha)


@dataclass(frozen=True)
class SceneInfo:
    """What is recorded about a scene; `train`, `validation` and `test` are numbers of views."""

    source: str  # `anvil` for the bundled scene, else `blender`
    name: str  # of the directory
    path: str | None  # of the directory; None for the bundled scene
    sha256: str  # of all files; see `open_scene`
    train: int
    validation: int
    test: int
    width: int  # of the pictures in pixels, after `downscale`
    height: int
    downscale: int

    def describe(self) -> str:
        """One line: which scene it is, how many views it has, and where it comes from."""
        scale = "" if self.downscale == 1 else f", scaled down by {self.downscale},"
        place = "from the package" if self.path is None else f"from {self.path}"
        return (
            f"scene {self.name}: {self.train:,} train, {self.validation:,} validation, {self.test:,} test "
            f"views of {self.width}x{self.height}{scale} {place}"
        )


class Shot(NamedTuple):
    """A checked picture: its name, its file and that of its mask, and its camera after `downscale`."""

    name: str
    file: Path
    mask: Path | None
    camera: Camera


@dataclass(frozen=True, eq=False)
class Scene:
    """A checked scene whose pictures are not decoded yet."""

    info: SceneInfo
    shots: dict[str, tuple[Shot, ...]] = field(repr=False)  # by split, in the order of its file
    notes: tuple[str, ...] = ()  # what the user should know about it, a line each

    def cameras(self, split: str) -> tuple[Camera, ...]:
        """The cameras of all views of a split, in the order of its file."""
        return tuple(shot.camera for shot in self.shots[split])

    def views(self, split: str, indices: Sequence[int] | None = None) -> Views:
        """Decodes the pictures of a split, or those at `indices`, in this order.

        Raises:
          DataError: a picture is broken or has changed since the scene was opened.
        """
        shots = self.shots[split]
        if indices is not None:
            shots = tuple(shots[index] for index in indices)
        width, height, factor = self.info.width, self.info.height, self.info.downscale
        pixels = np.empty((len(shots), height, width, 4), np.uint8)
        used = np.ones((len(shots), height, width), bool)

        def checked(array: np.ndarray, file: Path) -> np.ndarray:
            if array.shape[:2] != (height * factor, width * factor):
                raise DataError(f"{file}: changed since the scene was opened; start again")
            return array

        def decode(index: int) -> None:
            shot = shots[index]
            picture = checked(pictures.read(shot.file), shot.file)
            pixels[index] = picture if factor == 1 else pictures.reduce(picture, factor)
            if shot.mask:
                # A pixel is used if all of those that it is the mean of are.
                mask = checked(pictures.read_mask(shot.mask), shot.mask)
                used[index] = mask.reshape(height, factor, width, factor).all((1, 3))

        with ThreadPoolExecutor(_decoders()) as pool:
            list(pool.map(decode, range(len(shots))))
        return Views(pixels, tuple(shot.camera for shot in shots), tuple(shot.name for shot in shots), used)


def open_scene(
    path: str | os.PathLike[str] | None = None, *, downscale: int = 1, needs_alpha: bool = True
) -> Scene:
    """Opens and checks a scene, so that a run fails at once and not at its first validation.

    `info.sha256` is the hash of a list in the format of the program `sha256sum`: each split's JSON file, then
    its pictures in order, each followed by its mask if it has one, with names relative to the directory. It
    does not change when the scene is moved, and changes with any byte of it.

    Args:
      path: a directory with `transforms_{train,val,test}.json` and the pictures that they name; None for the
        bundled scene.
      downscale: scale pictures down by this whole factor, which must divide width and height.
      needs_alpha: refuse pictures without an alpha channel; otherwise they are opaque.

    Raises:
      DataError: anything is missing, broken, or not as described.
    """
    directory = BUNDLED if path is None else Path(os.path.expanduser(path)).absolute()
    files = {split: directory / f"transforms_{split}.json" for split in SPLITS}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"{directory}: no {', '.join(missing)}; a scene is a directory with a file per split")
    read = {split: transforms.read(file) for split, file in files.items()}
    found = {split: _inspected(directory, frames, needs_alpha) for split, (frames, _) in read.items()}
    width, height = _common_size([shot for part in found.values() for shot in part.shots], downscale)
    size = (width // downscale, height // downscale)
    _check_memory(directory, max(len(part.shots) for part in found.values()), width * height, math.prod(size))
    shots, listing = {}, ""
    for split, file in files.items():
        part = found[split]
        names = _unique_names([shot.name for shot in part.shots])
        shots[split] = tuple(
            shot._replace(name=name, camera=shot.camera.resized(*size))
            for name, shot in zip(names, part.shots)
        )
        listing += f"{file_sha256(file)}  {file.name}\n{part.listing}"
    _check_places(directory, [shot.camera for split in SPLITS for shot in shots[split]])
    info = SceneInfo(
        source="anvil" if path is None else "blender",
        name=directory.name,
        path=None if path is None else str(directory),
        sha256=hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        train=len(shots["train"]),
        validation=len(shots["val"]),
        test=len(shots["test"]),
        width=size[0],
        height=size[1],
        downscale=downscale,
    )
    notes = []
    turned = [name for part in found.values() for name in part.turned]
    if turned:
        notes.append(f"turned as their EXIF orientation says: {listed(turned)}")
    trained = {os.path.realpath(shot.file) for shot in shots["train"]}
    if seen := [shot.name for shot in shots["test"] if os.path.realpath(shot.file) in trained]:
        notes.append(f"test pictures that are also trained on: {listed(seen)}")
    if unused := sorted(set().union(*(keys for _, keys in read.values()))):
        notes.append(f"keys of the scene's files that are not used: {listed(map(reprlib.repr, unused))}")
    return Scene(info, shots, tuple(f"scene {directory.name}: {note}" for note in notes))


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are: ``a, b and 3 more``."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:most])} and {rest} more"


class _Split(NamedTuple):
    """The checked pictures of a split."""

    shots: list[Shot]  # in their full size
    listing: str  # their lines in what is hashed
    turned: list[str]  # those with an EXIF orientation


def _inspected(directory: Path, frames: list[transforms.Frame], needs_alpha: bool) -> _Split:
    """Checks the pictures and masks that the frames of a split name."""
    shots: dict[str, Shot] = {}
    listing, turned = "", []
    for frame in frames:
        file, name = transforms.find(frame.where, frame.file_path, directory)
        if name in shots:
            raise DataError(f"{frame.where}: {frame.file_path!r} is named twice; remove one of the frames")
        transforms.refuse_unnamed(frame, file, directory)
        header = pictures.inspect(file, needs_alpha=needs_alpha)
        listing += f"{header.sha256}  {name}\n"
        mask = None
        if frame.mask_path is not None:
            mask, mask_name = transforms.find(frame.where, frame.mask_path, directory, ("",))
            height, width = pictures.read_mask(mask).shape
            if (width, height) != (header.width, header.height):
                raise DataError(
                    f"{mask}: {width}x{height} pixels, but {file} has {header.width}x{header.height}; a mask "
                    "must have the size of its picture"
                )
            listing += f"{file_sha256(mask)}  {mask_name}\n"
        if header.orientation > 1:
            turned.append(name)
        shots[name] = Shot(file.stem, file, mask, _camera(frame, header))
    return _Split(list(shots.values()), listing, turned)


def _camera(frame: transforms.Frame, header: pictures.Header) -> Camera:
    """The camera of a picture, whose EXIF orientation must not contradict the intrinsics."""
    width, height = header.width, header.height
    if header.orientation == 1:
        return frame.camera(width, height)
    with contextlib.suppress(DataError):  # w and h contradict it
        camera = frame.camera(width, height)
        # Without w and h, the other intrinsics must not fit the picture as stored better.
        if header.orientation <= 4 or frame.w or frame.h:
            return camera
        if _oddness(camera) <= _oddness(frame.camera(height, width)) + 1e-6:
            return camera
    raise DataError(
        f"{header.file}: its EXIF orientation {header.orientation} turns it to {width}x{height} pixels, "
        "which contradicts the intrinsics in the scene's file; if those are of the pixels as stored, remove "
        "the orientation (exiftool -Orientation= FILE), otherwise correct w, h, cx and cy"
    )


def _oddness(camera: Camera) -> float:
    """How far a camera is from one with square pixels and the principal point in the middle."""
    (fx, fy), (cx, cy) = camera.focal, camera.center
    return abs(math.log(fx / fy)) + abs(cx / camera.width - 0.5) + abs(cy / camera.height - 0.5)


def _check_places(directory: Path, cameras: list[Camera]) -> None:
    """Raises a DataError if the cameras are so far from the origin that float32 would move them."""
    positions = np.stack([camera.pose[:, 3] for camera in cameras])
    away, apart = np.abs(positions).max(), np.ptp(positions, axis=0).max()
    if 0 < apart < _EXACT * away:
        raise DataError(
            f"{directory}: the cameras are within {apart:.4g} of one another, but {away:.4g} away from the "
            "origin, which is too far to be exact in float32; subtract the same offset from all positions"
        )


def _check_memory(directory: Path, views: int, full: int, reduced: int) -> None:
    """Raises a DataError if this machine cannot hold the pixels of the largest split.

    `full` and `reduced` are the pixels of a picture before and after `downscale`. A small file can stand for
    a large picture, so the sizes of the files say nothing.
    """
    # 5 bytes a pixel that is kept; decoding and scaling down take up to 24 at a time.
    needed = 5 * views * reduced + 24 * full * _decoders()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise DataError(
            f"{directory}: {views:,} pictures of {full:,} pixels need {needed / 2**30:,.1f} GiB of memory, "
            f"and this machine has {memory / 2**30:,.1f}; raise nerf.Data.downscale, or use fewer or smaller "
            "pictures"
        )


def _decoders() -> int:
    return min(_DECODERS, os.cpu_count() or 1)


def _common_size(shots: list[Shot], downscale: int) -> tuple[int, int]:
    """Width and height of all pictures, which `downscale` must divide."""
    first, (width, height) = shots[0].file, (shots[0].camera.width, shots[0].camera.height)
    for _, file, _, camera in shots:
        if (camera.width, camera.height) != (width, height):
            raise DataError(
                f"{file}: {camera.width}x{camera.height} pixels, but {first} has {width}x{height}; all "
                "pictures of a scene must have the same size"
            )
    common = math.gcd(width, height)
    if common % downscale:
        allowed = ", ".join(str(factor) for factor in range(1, common + 1) if common % factor == 0)
        raise DataError(f"{first}: {width}x{height} pixels, and downscale={downscale}; allowed: {allowed}")
    return width, height


def _unique_names(stems: list[str]) -> list[str]:
    """The stems, numbered if two of them would be the same file on a system that ignores case."""
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{index:04d}_{stem}" for index, stem in enumerate(stems)]
