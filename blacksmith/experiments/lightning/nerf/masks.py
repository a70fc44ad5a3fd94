"""The masks of the training views, without those that are wrong: each of these is named."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blacksmith.datasets.blender import Views, listed
from blacksmith.datasets.blender.bounds import estimate_bounds
from blacksmith.errors import DataError
from blacksmith.models.pytorch.nerf.hull import contradicting_views

_MASK_ALPHA = 5  # of 255: pixels above it show matter
_TOO_MUCH = 0.05  # of a mask may show matter where others show none, more than in the median view


class Masks(NamedTuple):
    """The masks for the visual hull."""

    maybe: Tensor  # pixels that may show matter, bool [views, height, width]
    bounds: np.ndarray  # a cube around what they show, float32 [2, 3]


def without_bad_masks(views: Views, device: str, say: Callable[[str], None]) -> tuple[Views, Masks]:
    """The views whose alpha fits together, and their masks; `say` prints a line for each kind of the others.

    A wrong alpha would cut into the hull, and in training show the background where there is matter.

    Raises:
      DataError: none is left.
    """
    alpha = views.pixels[..., 3] > _MASK_ALPHA
    matter, maybe = alpha & views.used, alpha | ~views.used
    empty, opaque = ~matter.any((1, 2)), maybe.all((1, 2))
    told = ~(empty | opaque)
    left_out = "; left out of the visual hull and of training"
    if empty.any():
        say(f"alpha empty, as if nothing were there: {_named(views, empty)}{left_out}")
    if opaque.any():
        say(f"alpha opaque everywhere, as if there were no background: {_named(views, opaque)}{left_out}")
    if not told.any():
        raise DataError(
            f"all {len(told)} training views are opaque or empty, so that there is no visual hull; set "
            'nerf.Data.hull = False and nerf.Data.background = "white" or "black" as they were rendered'
        )
    bounds = estimate_bounds(views.cameras, np.where(told[:, None, None], matter, False))
    views, matter, maybe = views.at(told), torch.from_numpy(matter[told]), torch.from_numpy(maybe[told])
    box = torch.from_numpy(bounds).to(device)
    wrong, unexplained = (one.numpy() for one in contradicting_views(matter, maybe, views.cameras, box))
    if wrong.any():
        say(f"alpha lacking a part of what the other training views show: {_named(views, wrong)}{left_out}")
    # No ray outside of the hull trains, so these do no harm there.
    excess = (unexplained > _TOO_MUCH + np.median(unexplained)).nonzero()[0]
    if len(excess):
        named = listed(f"{views.names[index]} ({unexplained[index]:.0%})" for index in excess)
        say(f"alpha showing matter where the other training views show none, or outside of the box: {named}")
    return views.at(~wrong), Masks(maybe[~wrong], bounds)


def _named(views: Views, which: np.ndarray) -> str:
    return listed(name for name, one in zip(views.names, which) if one)
