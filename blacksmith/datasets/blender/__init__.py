"""Scenes in the format of Blender and "NeRF synthetic", as NumPy arrays: pictures with their cameras.

`open_scene` checks a whole directory at once, without decoding a picture, and gives a `Scene`, whose `views`
are decoded when they are asked for; without a path it opens the scene that comes with the package. Nothing is
downloaded.
"""

import hashlib
import math
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blacksmith.datasets.blender import pictures, transforms
from blacksmith.datasets.blender.bounds import estimate_bounds, near_far
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError

__all__ = ["EMBEDDED", "SPLITS", "Camera", "Scene", "Views", "estimate_bounds", "near_far", "open_scene"]

SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""The splits by their names in the files, with the names that `Scene.info` counts them under."""

EMBEDDED = Path(__file__).with_name("anvil")
"""The scene that comes with the package; its README says how it was made."""

_DECODERS = 8  # threads; Pillow decodes without holding the interpreter's lock


@dataclass(frozen=True, eq=False)
class Views:
    """Pictures of one split.

    Attributes:
      pixels: RGBA with straight alpha, uint8 [views, height, width, 4].
      cameras: one for each picture, in the same order.
      names: one for each picture, unique and fit to name a file after.
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


class Shot(NamedTuple):
    """A picture that has been inspected: its name, its file, and the camera as `Views` will have it."""

    name: str
    file: Path
    camera: Camera


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene that has been checked, its pictures not yet decoded.

    Attributes:
      path: its directory.
      name: the directory's.
      info: JSON-serialisable: `source` (`anvil` for the embedded scene, else `blender`), `name`, `path` (None
        for the embedded scene), `sha256` (see `open_scene`), how many views are `train`, `validation` and
        `test`, `width` and `height` in pixels after `downscale`.
      shots: the pictures of each of `SPLITS`, in the order of its file.
    """

    path: Path
    name: str
    info: dict[str, Any]
    shots: dict[str, tuple[Shot, ...]] = field(repr=False)

    def cameras(self, split: str) -> tuple[Camera, ...]:
        """The cameras of all views of a split, in the order of its file."""
        return tuple(shot.camera for shot in self._split(split))

    def views(self, split: str, limit: int | Sequence[int] | None = None) -> Views:
        """Decodes pictures of a split.

        Args:
          split: one of `SPLITS`.
          limit: how many, from the first; or which, counted from 0, in the order wanted; None for all.

        Raises:
          DataError: there is no such split or view, or a picture is broken or has changed since.
        """
        shots = self._chosen(split, limit)
        width, height, factor = (self.info[key] for key in ("width", "height", "downscale"))
        pixels = np.empty((len(shots), height, width, 4), np.uint8)

        def decode(index: int) -> None:
            picture = pictures.read(shots[index].file)
            if picture.shape[:2] != (height * factor, width * factor):
                raise DataError(f"{shots[index].file}: changed since the scene was opened; start again")
            pixels[index] = picture if factor == 1 else pictures.reduce(picture, factor)

        with ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1)) as pool:
            list(pool.map(decode, range(len(shots))))
        return Views(pixels, tuple(shot.camera for shot in shots), tuple(shot.name for shot in shots))

    def describe(self) -> str:
        """One line: what the scene is, how many views it has, and where it comes from."""
        info = self.info
        scale = "" if info["downscale"] == 1 else f", scaled down by {info['downscale']},"
        place = "from the package" if info["path"] is None else f"from {info['path']}"
        return (
            f"scene {self.name}: {info['train']:,} train, {info['validation']:,} validation, "
            f"{info['test']:,} test views of {info['width']}x{info['height']}{scale} {place}"
        )

    def _split(self, split: str) -> tuple[Shot, ...]:
        if split not in self.shots:
            raise DataError(f"{self.path}: no split {split!r}; there are: {', '.join(self.shots)}")
        return self.shots[split]

    def _chosen(self, split: str, limit: int | Sequence[int] | None) -> tuple[Shot, ...]:
        shots = self._split(split)
        if limit is None:
            return shots
        if isinstance(limit, (int, np.integer)):
            if limit < 1:
                raise DataError(
                    f"{self.path}: {limit} views of split {split!r} asked for; allowed: 1 or more"
                )
            return shots[:limit]
        chosen = [operator.index(index) for index in limit]
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= i < len(shots) for i in chosen):
            raise DataError(
                f"{self.path}: views {chosen} of split {split!r} asked for; allowed: numbers from 0 to "
                f"{len(shots) - 1}, at least one, each once"
            )
        return tuple(shots[index] for index in chosen)


def open_scene(
    path: str | os.PathLike[str] | None = None, *, downscale: int = 1, needs_alpha: bool = True
) -> Scene:
    """Opens a scene and checks it, so that a run fails at once and not at its first validation.

    A scene is a directory with `transforms_train.json`, `transforms_val.json` and `transforms_test.json` and
    the pictures that they name. All of the JSON is parsed; of each picture the header is read and the bytes
    are hashed, but nothing is decoded.

    `info["sha256"]` is that of a list as the program `sha256sum` prints it, of each split's JSON file and
    then its pictures in their order, with names relative to the directory: it stays when the scene is moved
    and changes with any byte of it.

    Args:
      path: the directory; None for the scene that comes with the package.
      downscale: pictures become smaller by this whole factor, which must divide width and height.
      needs_alpha: refuse pictures without an alpha channel; otherwise they are opaque.

    Raises:
      DataError: anything is missing, broken, or not as described.
    """
    embedded = path is None
    directory = EMBEDDED if embedded else Path(os.path.expanduser(path)).absolute()
    files = _transforms_files(directory, embedded)
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
        listing.append((_sha256(file), file.name))
        listing.extend((picture.header.sha256, picture.name) for picture in found[split])
    lines = "".join(f"{sha256}  {name}\n" for sha256, name in listing)
    info = {
        "source": "anvil" if embedded else "blender",
        "name": directory.name,
        "path": None if embedded else str(directory),
        "sha256": hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(),
        **{label: len(shots[split]) for split, label in SPLITS.items()},
        "width": size[0],
        "height": size[1],
        "downscale": downscale,
    }
    return Scene(directory, directory.name, info, shots)


class _Inspected(NamedTuple):
    """A picture of a split: its name relative to the scene's directory, its file and its header."""

    name: str
    file: Path
    header: pictures.Header


def _transforms_files(directory: Path, embedded: bool) -> dict[str, Path]:
    """The JSON file of each split.

    Raises:
      DataError: the directory or a file is missing; the line says what was found instead.
    """
    try:
        present = os.listdir(directory)
    except NotADirectoryError as error:
        raise DataError(
            f"{directory}: not a directory; name the one with the transforms_*.json files"
        ) from error
    except (FileNotFoundError, ValueError) as error:
        hint = "the embedded scene is not installed, name one of your own" if embedded else "check the path"
        raise DataError(f"{str(directory)!r}: no such directory; {hint}") from error
    except OSError as error:
        raise DataError(f"{directory}: cannot be read ({error.strerror})") from error
    files = {split: directory / f"transforms_{split}.json" for split in SPLITS}
    missing = [file.name for file in files.values() if file.name not in present]
    if missing:
        below = sorted(path.parent.name for path in directory.glob("*/transforms_train.json"))
        if below:
            hint = f"there are scenes in it: {', '.join(below)}"
        elif "transforms.json" in present:
            hint = "divide the frames of its transforms.json into these three"
        else:
            hint = "a scene is a directory with one for each split"
        needed = ", ".join(file.name for file in files.values())
        raise DataError(f"{directory}: no {', '.join(missing)}; {needed} are needed, and {hint}")
    return files


def _inspected(directory: Path, frames: list[transforms.Frame], needs_alpha: bool) -> list[_Inspected]:
    """Finds and inspects the pictures of a split, in order; one that is named twice is refused."""
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
                f"{width}x{height}; all pictures of a scene must be of one size"
            )
    common = math.gcd(width, height)
    if not isinstance(downscale, int) or downscale < 1 or common % downscale:
        allowed = ", ".join(str(factor) for factor in range(1, common + 1) if common % factor == 0)
        raise DataError(f"{first}: {width}x{height} pixels, and downscale={downscale!r}; allowed: {allowed}")
    return width, height


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unique_names(stems: list[str]) -> list[str]:
    """The stems, numbered if two of them would be the same file on any system."""
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{index:04d}_{stem}" for index, stem in enumerate(stems)]
