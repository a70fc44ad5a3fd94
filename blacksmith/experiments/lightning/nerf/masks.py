"""The masks of the training views, without those that are wrong: each of these is named."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blacksmith.datasets.blender import Views, listed
from blacksmith.datasets.blender.bounds import estimate_bounds
from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import DataError
from blacksmith.models.pytorch.nerf.hull import contradicting_views

_MASK_ALPHA = 5  # of 255: pixels above it show matter
_TOO_MUCH = 0.05  # of a mask may show matter where others show none, more than in the median view


class Masks(NamedTuple):
    """The masks for the visual hull."""

    maybe: Tensor  # pixels that may show matter, bool [views, height, width]
    cameras: Sequence[Camera]
    bounds: np.ndarray  # a cube around what they show, float32 [2, 3]


def masks_of(views: Views, device: str, say: Callable[[str], None]) -> Masks:
    """The masks from the alpha of views; `say` prints a line for each kind of masks that are left out.

    Raises:
      DataError: none is left.
    """
    alpha = views.pixels[..., 3] > _MASK_ALPHA
    used = np.ones_like(alpha) if views.used is None else views.used
    matter, maybe = alpha & used, alpha | ~used
    empty, opaque = ~matter.any((1, 2)), maybe.all((1, 2))
    told = ~(empty | opaque)
    left_out = "; left out of the visual hull"
    if empty.any():
        say(f"alpha empty, as if nothing were there: {_named(views, empty)}{left_out}")
    if opaque.any():
        say(f"alpha opaque everywhere, as if there were no background: {_named(views, opaque)}{left_out}")
    if not told.any():
        raise DataError(
            f"all {len(told)} training views are opaque or empty, so that there is no visual hull; set "
            'nerf.Data.hull = False and nerf.Data.background = "white" or "black" as they were rendered'
        )
    cameras = [camera for camera, tells in zip(views.cameras, told) if tells]
    bounds = estimate_bounds(views.cameras, np.where(told[:, None, None], matter, False))
    masks = torch.from_numpy(maybe[told])
    box = torch.from_numpy(bounds).to(device)
    wrong, unexplained = contradicting_views(torch.from_numpy(matter[told]), masks, cameras, box)
    names = [name for name, tells in zip(views.names, told) if tells]
    if wrong.any():
        lacking = [name for name, one in zip(names, wrong) if one]
        say(f"alpha lacking a part of what the other training views show: {listed(lacking)}{left_out}")
    excess = unexplained > _TOO_MUCH + unexplained.median()
    if excess.any():
        named = listed(f"{names[i]} ({unexplained[i]:.0%})" for i in excess.nonzero()[:, 0])
        say(f"alpha showing matter where the other training views show none, or outside of the box: {named}")
    kept = ~wrong
    return Masks(masks[kept], [camera for camera, keep in zip(cameras, kept) if keep], bounds)


def _named(views: Views, which: np.ndarray) -> str:
    return listed(name for name, one in zip(views.names, which) if one)
