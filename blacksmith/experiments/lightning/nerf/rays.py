"""Training rays: compact arrays on the device, and a loader that draws batches of them, resumably."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blacksmith.datasets.blender import Views
from blacksmith.run.order import generator


class RayBank:
    """All rays of some views: 4 bytes a pixel, and a pose and the intrinsics for each view.

    A ray is a number, (view * height + row) * width + column; its origin and direction are computed when it
    is asked for. 100 views of 800x800 take 256 MB.

    Args:
      views: all of one size.
      device: where the arrays are kept.
    """

    def __init__(self, views: Views, device: torch.device | str) -> None:
        self.height, self.width = views.pixels.shape[1:3]
        self.pixels = torch.from_numpy(views.pixels).to(device).view(-1, 4)
        self.cameras = cameras = views.cameras
        self._poses = torch.from_numpy(np.stack([c.pose for c in cameras])).to(device)
        intrinsics = np.array([(*c.focal, *c.center) for c in cameras], np.float32)
        self._intrinsics = torch.from_numpy(intrinsics).to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Origins [rays, 3], unit directions [rays, 3] and straight RGBA [rays, 4] in [0, 1], all float32."""
        area = self.height * self.width
        view = rays // area
        pose = self._poses[view]
        fx, fy, cx, cy = self._intrinsics[view].T
        x = (rays % self.width + 0.5 - cx) / fx
        y = (rays % area // self.width + 0.5 - cy) / fy
        local = torch.stack([x, -y, -torch.ones_like(x)], -1)
        # Not a matrix product: autocast would take that to half precision, which moves rays by pixels.
        turned = (pose[:, :, :3] * local[:, None, :]).sum(-1)
        directions = torch.nn.functional.normalize(turned, dim=-1)
        return pose[:, :, 3], directions, self.pixels[rays].float() / 255


class RayLoader:
    """Batches of ray numbers, one for each step, int64 [rays] on the device: what Lightning's Trainer takes.

    Each pass over the pool is in an order drawn from (seed, attempt, pass); what is left at its end and does
    not fill a batch is dropped. How many rays the next batch has is set as training goes (`size`); `drawn`
    counts them. Its state is what a resumed run needs to go on in the middle of a pass.

    Args:
      steps: how many batches there are in all.
      seed: of the order.
      size: rays of the first batch.
      rays: all there are; an epoch is as many.
    """

    steps_per_epoch = None  # batches have different sizes

    def __init__(self, steps: int, seed: int, size: int, *, rays: int) -> None:
        self.step = 0
        self.size = size
        self.attempt = 0
        self.passes = 0
        self.drawn = 0
        self._steps, self._seed, self._rays = steps, seed, rays
        self._cursor = 0
        self._pool = torch.zeros(0, dtype=torch.int64)
        self._order: Tensor | None = None

    def use_pool(self, pool: Tensor, *, reshuffle: bool = True) -> None:
        """Draws from these rays, int32 [rays], from now on; `reshuffle` starts a new pass.

        Raises:
          ValueError: the pool is empty.
        """
        if not len(pool):
            raise ValueError("no ray is left to draw from")
        self._pool, self._order = pool, None
        if reshuffle and self._cursor:
            self.passes, self._cursor = self.passes + 1, 0

    def epoch(self, step: int) -> float:
        """Rays drawn so far, in units of all there are; `step` is the present one."""
        return self.drawn / self._rays

    def examples_before(self, step: int) -> int:
        """Steps: how many rays later ones will see is not known."""
        return step

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Tensor]:
        while self.step < self._steps:
            yield self._next()

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, as plain numbers."""
        names = ("step", "size", "attempt", "passes")
        return {**{name: getattr(self, name) for name in names}, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place in the order; the pool has to be the one that it was in."""
        self.step, self.size = state["step"], state["size"]
        self.attempt, self.passes, self._cursor = state["attempt"], state["passes"], state["cursor"]
        self._order = None

    def _next(self) -> Tensor:
        size = min(self.size, len(self._pool))
        if self._cursor + size > len(self._pool):
            self.passes, self._cursor, self._order = self.passes + 1, 0, None
        if self._order is None:
            random = generator(self._seed, "order", self.attempt, self.passes)
            rows = np.arange(len(self._pool), dtype=np.int32)
            random.shuffle(rows)
            self._order = torch.from_numpy(rows).to(self._pool.device)
        rows = self._order[self._cursor : self._cursor + size]
        self._cursor += size
        self.drawn += size
        self.step += 1
        return self._pool[rows].long()
