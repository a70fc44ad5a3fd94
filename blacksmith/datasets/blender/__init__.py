"""Scenes in the format of Blender and "NeRF synthetic", as NumPy arrays: pictures with their cameras.

`open_scene` checks a directory, or the bundled scene, without decoding a picture; the `views` of the `Scene`
that it returns decode pictures on demand.
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
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError
from blacksmith.files import file_sha256

SPLITS = ("train", "val", "test")

BUNDLED = Path(__file__).with_name("anvil")  # its README says how it was made

_DECODERS = 8  # threads; Pillow releases the interpreter's lock while decoding


@dataclass(frozen=True, eq=False)
class Views:
    """Decoded pictures of one split with their cameras."""

    pixels: np.ndarray  # RGBA with straight alpha, uint8 [views, height, width, 4]
    cameras: tuple[Camera, ...]
    names: tuple[str, ...]  # unique, and usable as file names

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
    """A checked picture: its name, its file, and its camera after `downscale`."""

    name: str
    file: Path
    camera: Camera


@dataclass(frozen=True, eq=False)
class Scene:
    """A checked scene whose pictures are not decoded yet."""

    info: SceneInfo
    shots: dict[str, tuple[Shot, ...]] = field(repr=False)  # by split, in the order of its file

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

    `info.sha256` is the hash of a list in the format of the program `sha256sum`: each split's JSON file, then
    its pictures in order, with names relative to the directory. It does not change when the scene is moved,
    and changes with any byte of it.

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
    frames = {split: transforms.read(file) for split, file in files.items()}
    found = {split: _inspected(directory, frames[split], needs_alpha) for split in SPLITS}
    width, height = _common_size([header for split in SPLITS for header in found[split].values()], downscale)
    size = (width // downscale, height // downscale)
    shots, listing = {}, ""
    for split, file in files.items():
        headers = found[split]
        names = _unique_names([header.file.stem for header in headers.values()])
        shots[split] = tuple(
            Shot(name, header.file, frame.camera(width, height).resized(*size))
            for name, header, frame in zip(names, headers.values(), frames[split])
        )
        listing += f"{file_sha256(file)}  {file.name}\n"
        listing += "".join(f"{header.sha256}  {name}\n" for name, header in headers.items())
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
    return Scene(info, shots)


def _inspected(
    directory: Path, frames: list[transforms.Frame], needs_alpha: bool
) -> dict[str, pictures.Header]:
    """The pictures of a split, in order, by their names relative to the directory."""
    found = {}
    for frame in frames:
        file, name = transforms.find(frame, directory)
        if name in found:
            raise DataError(f"{frame.where}: {frame.file_path!r} is named twice; remove one of the frames")
        found[name] = pictures.inspect(file, needs_alpha=needs_alpha)
    return found


def _common_size(found: list[pictures.Header], downscale: int) -> tuple[int, int]:
    """Width and height of all pictures, which `downscale` must divide."""
    first, width, height, _ = found[0]
    for picture in found:
        if (picture.width, picture.height) != (width, height):
            raise DataError(
                f"{picture.file}: {picture.width}x{picture.height} pixels, but {first} has "
                f"{width}x{height}; all pictures of a scene must have the same size"
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
