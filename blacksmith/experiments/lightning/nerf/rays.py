"""Training rays: compact arrays on the device, and a resumable loader that draws batches of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blacksmith.datasets.blender import Views
from blacksmith.errors import RunError
from blacksmith.models.pytorch.nerf.occupancy import Occupancy
from blacksmith.models.pytorch.nerf.rendering import rays_through
from blacksmith.run.order import generator


class RayBank:
    """All rays of some views of one size: 5 bytes per pixel, and the camera of each view.

    A ray is a number, (view * height + row) * width + column. 100 views of 800x800 take 320 MB.
    """

    def __init__(self, views: Views, device: torch.device | str) -> None:
        self.height, self.width = views.pixels.shape[1:3]
        self.pixels = torch.from_numpy(views.pixels).to(device).view(-1, 4)
        self._used = torch.from_numpy(views.used).to(device)
        self.cameras = cameras = views.cameras
        self._poses = torch.from_numpy(np.stack([c.pose for c in cameras])).to(device)
        intrinsics = np.array([(*c.focal, *c.center) for c in cameras], np.float32)
        self._intrinsics = torch.from_numpy(intrinsics).to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def pool(self, occupancy: Occupancy | None = None) -> Tensor:
        """The rays that training draws from, int32: of pixels that count and, given cells, can meet one."""
        used, area = self._used, self.height * self.width
        if occupancy is not None:
            used = (use & visible for use, visible in zip(used, occupancy.visible_pixels(self.cameras)))
        return torch.cat([(use.view(-1).nonzero()[:, 0] + i * area).int() for i, use in enumerate(used)])

    def __call__(self, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Origins [rays, 3], unit directions [rays, 3] and straight RGBA [rays, 4] in [0, 1], all float32."""
        area = self.height * self.width
        view = rays // area
        pose = self._poses[view]
        fx, fy, cx, cy = self._intrinsics[view].T
        x = (rays % self.width + 0.5 - cx) / fx
        y = (rays % area // self.width + 0.5 - cy) / fy
        return *rays_through(x, y, pose), self.pixels[rays].float() / 255


# `drawn` is missing: the run's loop needs it before Lightning restores the loader.
_STATE = ("step", "size", "attempt", "passes", "cursor")


class RayLoader:
    """What Lightning's Trainer iterates over: one batch of ray numbers per step, int64 [rays], on the device.

    Each pass over the pool has an order drawn from (seed, attempt, pass), so that a place in it is a few
    numbers, which Lightning saves and restores (`state_dict`). What does not fill a batch at the end of a
    pass is dropped. It is also the `loop.Batches` of the run's loop; `rays` make one epoch.
    """

    steps_per_epoch = None  # batches have different sizes

    def __init__(self, steps: int, seed: int, size: int, *, rays: int) -> None:
        self.size = size  # rays of the next batch; training changes it
        self.step = 0  # batches drawn so far
        self.attempt = 0  # 1 after a restart
        self.passes = 0  # over the pool so far
        self.cursor = 0  # rays drawn in this pass
        self.drawn = 0  # rays drawn so far
        self._steps, self._seed, self._rays = steps, seed, rays
        self._pool = torch.zeros(0, dtype=torch.int64)
        self._order: Tensor | None = None

    def use_pool(self, pool: Tensor, *, reshuffle: bool = True) -> None:
        """Draws from these rays, int32 [rays], from now on; `reshuffle` starts a new pass.

        Raises:
          RunError: there is none.
        """
        if not len(pool):
            raise RunError(
                "no training ray can meet anything: no camera sees the box in which the scene is learned, or "
                "what it contains has vanished; check nerf.Data.bounds, near and far, the alpha and the masks"
            )
        self._pool, self._order = pool, None
        if reshuffle and self.cursor:
            self.passes, self.cursor = self.passes + 1, 0

    def epoch(self, step: int) -> float:
        """Rays drawn so far, as a multiple of all rays; known only for the current step."""
        return self.drawn / self._rays

    def examples_before(self, step: int) -> int:
        """Steps, because how many rays later steps will see is not known."""
        return step

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Tensor]:
        while self.step < self._steps:
            size = min(self.size, len(self._pool))
            if self.cursor + size > len(self._pool):
                self.passes, self.cursor, self._order = self.passes + 1, 0, None
            if self._order is None:
                rows = np.arange(len(self._pool), dtype=np.int32)
                generator(self._seed, "order", self.attempt, self.passes).shuffle(rows)
                self._order = torch.from_numpy(rows).to(self._pool.device)
            rows = self._order[self.cursor : self.cursor + size]
            self.cursor += size
            self.drawn += size
            self.step += 1
            yield self._pool[rows].long()

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, as plain numbers."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a place in the order; the pool must be the same as then.

        Raises:
          ValueError: a number is not one that `state_dict` returns.
        """
        for name in _STATE:
            if not isinstance(state[name], int) or state[name] < (name == "size"):
                raise ValueError(f"{name} = {state[name]!r} is no place in an order of rays")
        vars(self).update({name: state[name] for name in _STATE})
        self._order = None
