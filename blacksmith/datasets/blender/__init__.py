"""Scenes in the format of Blender and "NeRF synthetic", as NumPy arrays: pictures with their cameras.

`open_scene` checks a whole directory without decoding a picture and returns a `Scene`, whose `views` decode
pictures on demand. Without a path it opens the bundled scene. Nothing is downloaded.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blacksmith.datasets.blender import pictures, transforms
from blacksmith.datasets.blender.bounds import estimate_bounds, near_far
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError
from blacksmith.files import file_sha256

__all__ = [
    "BUNDLED",
    "SPLITS",
    "Camera",
    "Scene",
    "SceneInfo",
    "Views",
    "estimate_bounds",
    "near_far",
    "open_scene",
]

SPLITS = ("train", "val", "test")

BUNDLED = Path(__file__).with_name("anvil")
"""The scene that comes with the package; its README says how it was made."""

_DECODERS = 8  # threads; Pillow releases the interpreter's lock while decoding


@dataclass(frozen=True, eq=False)
class Views:
    """Decoded pictures of one split with their cameras.

    Attributes:
      pixels: RGBA with straight alpha, uint8 [views, height, width, 4].
      cameras: one per picture, in the same order.
      names: one per picture, unique and usable as file names.
    """

    pixels: np.ndarray
    cameras: tuple[Camera, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.cameras)

    def picture(self, index: int, background: np.ndarray | tuple[float, float, float]) -> np.ndarray:
        """One view over a background, float32 [height, width, 3] in [0, 1].

        Args:
          index: of the view.
          background: float [3] or [height, width, 3], in [0, 1].
        """
        pixels = self.pixels[index].astype(np.float32) / np.float32(255)
        rgb, alpha = pixels[..., :3], pixels[..., 3:]
        return rgb * alpha + np.asarray(background, np.float32) * (1 - alpha)


@dataclass(frozen=True)
class SceneInfo:
    """What is recorded about a scene.

    Attributes:
      source: `anvil` for the bundled scene, else `blender`.
      name: of the directory.
      path: of the directory; None for the bundled scene.
      sha256: of all files of the scene; see `open_scene`.
      train: number of training views.
      validation: number of validation views.
      test: number of test views.
      width: of the pictures in pixels, after `downscale`.
      height: the same.
      downscale: the factor by which the pictures are scaled down.
    """

    source: str
    name: str
    path: str | None
    sha256: str
    train: int
    validation: int
    test: int
    width: int
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
    """A checked picture: its name, its file, and its camera after `downscale`."""

    name: str
    file: Path
    camera: Camera


@dataclass(frozen=True, eq=False)
class Scene:
    """A checked scene whose pictures are not decoded yet.

    Attributes:
      path: its directory.
      info: what is recorded about it.
      shots: the pictures of each of `SPLITS`, in the order of its file.
    """

    path: Path
    info: SceneInfo
    shots: dict[str, tuple[Shot, ...]] = field(repr=False)

    def cameras(self, split: str) -> tuple[Camera, ...]:
        """The cameras of all views of a split, in the order of its file."""
        return tuple(shot.camera for shot in self.shots[split])

    def views(self, split: str, indices: Sequence[int] | None = None) -> Views:
        """Decodes pictures of a split.

        Args:
          split: one of `SPLITS`.
          indices: which pictures, in this order; None for all.

        Raises:
          DataError: a picture is broken or has changed since the scene was opened.
        """
        shots = self.shots[split]
        if indices is not None:
            shots = tuple(shots[index] for index in indices)
        width, height, factor = self.info.width, self.info.height, self.info.downscale
        pixels = np.empty((len(shots), height, width, 4), np.uint8)

        def decode(index: int) -> None:
            picture = pictures.read(shots[index].file)
            if picture.shape[:2] != (height * factor, width * factor):
                raise DataError(f"{shots[index].file}: changed since the scene was opened; start again")
            pixels[index] = picture if factor == 1 else pictures.reduce(picture, factor)

        with ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1)) as pool:
            list(pool.map(decode, range(len(shots))))
        return Views(pixels, tuple(shot.camera for shot in shots), tuple(shot.name for shot in shots))


def open_scene(
    path: str | os.PathLike[str] | None = None, *, downscale: int = 1, needs_alpha: bool = True
) -> Scene:
    """Opens and checks a scene, so that a run fails at once and not at its first validation.

    A scene is a directory with `transforms_train.json`, `transforms_val.json`, `transforms_test.json` and the
    pictures that they name. The JSON is parsed completely; of each picture the header is read and the bytes
    are hashed, but nothing is decoded.

    `info.sha256` is the hash of a list in the format of the program `sha256sum`: each split's JSON file, then
    its pictures in order, with names relative to the directory. It does not change when the scene is moved,
    and changes with any byte of it.

    Args:
      path: the directory; None for the bundled scene.
      downscale: scale pictures down by this whole factor, which must divide width and height.
      needs_alpha: refuse pictures without an alpha channel; otherwise they are opaque.

    Raises:
      DataError: anything is missing, broken, or not as described.
    """
    bundled = path is None
    directory = BUNDLED if bundled else Path(os.path.expanduser(path)).absolute()
    files = _transforms_files(directory)
    frames = {split: transforms.read(file) for split, file in files.items()}
    found = {split: _inspected(directory, frames[split], needs_alpha) for split in SPLITS}
    width, height = _common_size([picture for split in SPLITS for picture in found[split]], downscale)
    size = (width // downscale, height // downscale)
    shots, listing = {}, []
    for split, file in files.items():
        names = _unique_names([picture.file.stem for picture in found[split]])
        shots[split] = tuple(
            Shot(name, picture.file, frame.camera(width, height).resized(*size))
            for name, picture, frame in zip(names, found[split], frames[split])
        )
        listing.append((file_sha256(file), file.name))
        listing.extend((picture.header.sha256, picture.name) for picture in found[split])
    lines = "".join(f"{sha256}  {name}\n" for sha256, name in listing)
    info = SceneInfo(
        source="anvil" if bundled else "blender",
        name=directory.name,
        path=None if bundled else str(directory),
        sha256=hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(),
        train=len(shots["train"]),
        validation=len(shots["val"]),
        test=len(shots["test"]),
        width=size[0],
        height=size[1],
        downscale=downscale,
    )
    return Scene(directory, info, shots)


class _Inspected(NamedTuple):
    """A picture's name relative to the scene's directory, its file and its header."""

    name: str
    file: Path
    header: pictures.Header


def _transforms_files(directory: Path) -> dict[str, Path]:
    """The JSON file of each split; if one is missing, the error says what was found instead."""
    files = {split: directory / f"transforms_{split}.json" for split in SPLITS}
    missing = [file.name for file in files.values() if not os.path.isfile(file)]
    if not missing:
        return files
    if not os.path.isdir(directory):
        raise DataError(f"{str(directory)!r}: no such directory; name one with {', '.join(missing)}")
    below = sorted(path.parent.name for path in directory.glob("*/transforms_train.json"))
    if below:
        hint = f"there are scenes in it: {', '.join(below)}"
    elif (directory / "transforms.json").exists():
        hint = "divide the frames of its transforms.json into one file per split"
    else:
        hint = "a scene is a directory with one file per split"
    raise DataError(f"{directory}: no {', '.join(missing)}; {hint}")


def _inspected(directory: Path, frames: list[transforms.Frame], needs_alpha: bool) -> list[_Inspected]:
    """Finds and inspects the pictures of a split, in order."""
    found: dict[str, _Inspected] = {}
    for frame in frames:
        file, name = transforms.find(frame, directory)
        if name in found:
            raise DataError(f"{frame.where}: {frame.file_path!r} is named twice; remove one of the frames")
        found[name] = _Inspected(name, file, pictures.inspect(file, needs_alpha=needs_alpha))
    return list(found.values())


def _common_size(found: list[_Inspected], downscale: int) -> tuple[int, int]:
    """Width and height of all pictures, which `downscale` must divide."""
    first = found[0].file
    width, height, _ = found[0].header
    for picture in found:
        if picture.header[:2] != (width, height):
            raise DataError(
                f"{picture.file}: {picture.header.width}x{picture.header.height} pixels, but {first} has "
                f"{width}x{height}; all pictures of a scene must have the same size"
            )
    common = math.gcd(width, height)
    if not isinstance(downscale, int) or downscale < 1 or common % downscale:
        allowed = ", ".join(str(factor) for factor in range(1, common + 1) if common % factor == 0)
        raise DataError(f"{first}: {width}x{height} pixels, and downscale={downscale!r}; allowed: {allowed}")
    return width, height


def _unique_names(stems: list[str]) -> list[str]:
    """The stems, numbered if two of them would be the same file on a system that ignores case."""
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{index:04d}_{stem}" for index, stem in enumerate(stems)]
