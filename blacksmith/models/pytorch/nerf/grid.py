"""The fast field: an explicit density grid and a sparse feature grid, coarse to fine, coloured once per ray.

Density is one number at each vertex of a dense grid, interpolated and then made positive, as in Sun et al.,
Direct Voxel Grid Optimization (2022). Features live only at vertices that the scene can reach, as rows of
one table. They are added up along the ray, and one small network turns the sum and the direction into colour,
after Hedman et al., Baking Neural Radiance Fields (2021). For most of the training each sample takes the
features of one of the eight vertices around it, drawn by its trilinear weight: right on average, for an
eighth of the memory traffic (Pharr et al., Filtering After Shading With Stochastic Texture Filtering, 2024).
The squared error of a draw has its variance besides, which blurs; interpolating at the end takes that away.

Both tables have their final size from the start: a coarser level uses their leading rows, so that parameters
keep their shapes for the optimiser, checkpoints and DDP.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blacksmith.models.pytorch.nerf.encoding import encoded_size, perceptron, positional_encoding
from blacksmith.models.pytorch.nerf.occupancy import Occupancy, box_of, flat_cell, grid_places
from blacksmith.models.pytorch.nerf.rendering import (
    Rendered,
    Samples,
    expected_depth,
    sum_along_rays,
    transmittance,
)

DIRECTION_FREQUENCIES = 4

_DARK = 1e-3  # transmittance below which what lies behind is left out
_POINTS = 1 << 18  # points that are looked up at a time where a whole grid is


class Traced(NamedTuple):
    """What a bundle of rays meets, with gradients.

    Attributes:
      rgb: colour without background, float32 [rays, 3].
      opacity: float32 [rays].
      weights: float32 [samples].
      samples: those that the weights belong to, the ones with a colour.
      dense: how many samples had a density with a gradient.
    """

    rgb: Tensor
    opacity: Tensor
    weights: Tensor
    samples: Samples
    dense: int


class GridField(nn.Module):
    """Density and features on grids inside a box; `begin` or `load_state_dict` makes one ready.

    Args:
      resolution: of the finest level, as the side of a cube with as many vertices; the box is divided into
        cubic voxels whatever its shape.
      rows: rows of the feature table. The first stays zero and serves the vertices without one.
      occupancy_resolution: cells along each side of the occupancy grid.
      features: numbers at each vertex; the first three are its own colour, before the sigmoid.
      width: of the colour network, which has two hidden layers.
      alpha: opacity, before training, of a stretch of a 96th of the box. Below 1e-3 nothing weighs enough to
        get a gradient, and the field stays empty.
      alpha_floor: training samples less opaque than this are left out; shorter ones in proportion.
      weight_floor: training samples that weigh less than this have no colour; shorter ones in proportion.
      train_step: distance between samples in training, in voxels.
      render_step: the same in evaluation.
    """

    def __init__(
        self,
        *,
        resolution: int,
        rows: int,
        occupancy_resolution: int = 128,
        features: int = 12,
        width: int = 64,
        alpha: float = 3e-3,
        alpha_floor: float = 1e-3,
        weight_floor: float = 2e-4,
        train_step: float = 1.0,
        render_step: float = 0.5,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.alpha_floor, self.weight_floor = alpha_floor, weight_floor
        self.train_step, self.render_step = train_step, render_step
        self._shift = math.log(1 / (1 - alpha) - 1)
        cube = (occupancy_resolution,) * 3
        self.occupancy = Occupancy(occupancy_resolution)
        self.register_buffer("hull", torch.ones(cube, dtype=torch.bool))
        self.register_buffer("allocated", torch.ones(cube, dtype=torch.bool))
        self.register_buffer("shape", torch.tensor([2, 2, 2]))
        self.register_buffer("unit_length", torch.tensor(1.0))
        self.register_buffer("row", torch.zeros(resolution**3, dtype=torch.int32), persistent=False)
        self.density_table = nn.Parameter(torch.zeros(resolution**3))
        self.feature_table = nn.Parameter(torch.zeros(rows, features))
        self.decoder = perceptron(features + encoded_size(3, DIRECTION_FREQUENCIES), width, 3, layers=2)
        self.register_load_state_dict_post_hook(lambda field, _: field._refresh())
        self._refresh()

    @property
    def bounds(self) -> Tensor:
        """The box, float32 [2, 3]."""
        return self.occupancy.bounds

    @property
    def unit(self) -> float:
        """A 96th of the box that the field began with, in world units: what opacities of space refer to."""
        return self._unit_length

    @property
    def voxel(self) -> float:
        """Side of a voxel of the current level, in world units."""
        return self._voxel

    @torch.no_grad()
    def begin(
        self,
        bounds: Tensor,
        hull: Tensor,
        resolution: int,
        reach: tuple[float, float] = (0.0, math.inf),
    ) -> int:
        """Starts an empty field.

        Args:
          bounds: the box, float32 [2, 3].
          hull: cells that may hold matter, bool [z, y, x].
          resolution: of the first level.
          reach: the distances where rays begin and end, in world units.

        Returns:
          The resolution of the level: a coarser one than asked for if the feature table has too few rows.
        """
        self.occupancy.bounds.copy_(bounds)
        self.occupancy.reach.copy_(torch.tensor(reach))
        self.occupancy.set(hull)
        self.hull.copy_(hull)
        self.unit_length.fill_(float((bounds[1] - bounds[0]).mean()) / 96)
        self.density_table.zero_()
        self.feature_table.zero_()
        return self._allocate(resolution)

    @torch.no_grad()
    def upsample(self, resolution: int, *, shrink: bool = False) -> int:
        """Carries the field over to a finer grid, in place; the optimiser's moments belong to the old one.

        Args:
          resolution: of the new level.
          shrink: first fit the box to the occupied cells.

        Returns:
          The resolution of the level: a coarser one than asked for if the feature table has too few rows.
        """
        density, table, row = self.density_table.clone(), self.feature_table.clone(), self.row.clone()
        shape, bounds = self._shape, self.bounds.clone()
        if shrink:
            self._fit_box()
        resolution = self._allocate(resolution)
        self.density_table.zero_()
        self.feature_table.zero_()
        vertices = math.prod(self._shape)
        for first in range(0, vertices, _POINTS):
            place = torch.arange(first, min(first + _POINTS, vertices), device=bounds.device)
            points = grid_places(self.bounds, self._shape, place)
            unit = ((points - bounds[0]) / (bounds[1] - bounds[0])).clamp_(0, 1)
            self.density_table[place] = _interpolate(density, shape, unit)
            target = self.row[place]
            stored = target > 0
            index, weight = _corners(unit[stored], shape)
            # A vertex at the rim takes after those beside it that have features.
            weight = weight * (row[index] > 0)
            weight /= weight.sum(1, keepdim=True).clamp(min=1e-6)
            self.feature_table[target[stored].long()] = _lookup(table, row[index], weight)
        return resolution

    @torch.no_grad()
    def refresh_occupancy(
        self, threshold: float, rays: Iterable[tuple[Tensor, Tensor]] | None = None
    ) -> bool:
        """Marks the cells that have matter that can be seen, of those that the level has features for.

        Args:
          threshold: the opacity of a stretch of a 96th of the box that counts as matter.
          rays: origins and unit directions, float32 [rays, 3] each, that have to light a cell, or one beside
            it, before they are dark: the inside of things is left out. None: all matter counts.

        Returns:
          Whether there is any; if not, everything stays as it was.
        """
        occupancy, resolution = self.occupancy, self.occupancy.resolution
        z, y, x = self._shape
        opacity = -torch.expm1(-F.softplus(self.density_table[: z * y * x] + self._shift))
        # Interpolated values are never above those of the vertices around.
        cells = (highest_around(opacity.view(z, y, x), resolution) > threshold) & self.allocated
        if rays is not None:
            lit = torch.zeros(resolution**3, device=self.bounds.device)
            step = self._voxel * self.train_step
            for origins, directions in rays:
                _, unit = self._lit_samples(origins, directions, step, None)
                lit[flat_cell(unit, resolution)] = 1
            cells &= F.max_pool3d(lit.view(1, 1, *cells.shape), 3, 1, 1)[0, 0] > 0
        if not cells.any():
            return False
        occupancy.set(cells)
        return True

    def trace(
        self,
        origins: Tensor,
        directions: Tensor,
        step: float,
        generator: torch.Generator | None = None,
        *,
        interpolate: bool = False,
    ) -> Traced:
        """Follows rays through the field, with gradients for the samples that matter.

        Args:
          origins: float32 [rays, 3].
          directions: unit vectors, float32 [rays, 3].
          step: distance between samples, in world units.
          generator: moves the samples along the ray and draws the vertices that give features; without one
            samples are at half steps and features are interpolated.
          interpolate: features are, also with a generator.
        """
        rays = len(origins)
        samples, unit = self._lit_samples(origins, directions, step, generator)
        dense = len(unit)
        reaching, alpha = transmittance(self._extinction(unit) * step, samples.ray, rays)
        weights = reaching * alpha
        coloured = (weights.detach() > self.weight_floor * self._share(step)).nonzero()[:, 0]
        samples, unit, weights = samples.take(coloured), unit[coloured], weights[coloured]
        if generator is None or interpolate:
            features = _Interpolate.apply(self.feature_table, *self._rows(unit))
        else:
            corner = _random_corner(unit, self._shape, generator)
            features = _Pick.apply(self.feature_table, self.row[corner])
        opacity = sum_along_rays(weights, samples.ray, rays)
        own = sum_along_rays(torch.sigmoid(features[:, :3]) * weights[:, None], samples.ray, rays)
        summed = sum_along_rays(features * weights[:, None], samples.ray, rays)
        rgb = own + opacity[:, None] * self._view_dependent(summed, directions)
        return Traced(rgb, opacity, weights, samples, dense)

    @torch.no_grad()
    def _lit_samples(
        self, origins: Tensor, directions: Tensor, step: float, generator: torch.Generator | None
    ) -> tuple[Samples, Tensor]:
        """The samples that light reaches and that stop some of it, and their places, [samples, 3]."""
        segments = self.occupancy.segments(origins, directions, step, generator)
        samples, unit = self.occupancy.samples(segments)
        reaching, alpha = transmittance(self._extinction(unit.T) * step, samples.ray, len(origins))
        kept = ((reaching > _DARK) & (alpha > self.alpha_floor * self._share(step))).nonzero()[:, 0]
        return samples.take(kept), unit[:, kept].T

    @torch.no_grad()
    def render(
        self, origins: Tensor, directions: Tensor, background: Tensor, *, quality: float = 1.0
    ) -> Rendered:
        """Renders rays; see `RadianceField`."""
        traced = self.trace(origins, directions, self._voxel * self.render_step / quality)
        rgb = traced.rgb + (1 - traced.opacity[:, None]) * background
        return Rendered(rgb, traced.opacity, expected_depth(traced.weights, traced.samples, traced.opacity))

    def density(self, points: Tensor) -> Tensor:
        """Extinction per world unit; see `RadianceField`. Space outside of the occupied cells counts too."""
        unit = (points - self.bounds[0]) / (self.bounds[1] - self.bounds[0])
        inside = ((unit >= 0) & (unit <= 1)).all(-1)
        return self._extinction(unit.clamp(0, 1)) * inside

    @torch.no_grad()
    def colour(self, points: Tensor, directions: Tensor) -> Tensor:
        """Colour of single points, as of a ray that stops there; see `RadianceField`."""
        unit = ((points - self.bounds[0]) / (self.bounds[1] - self.bounds[0])).clamp(0, 1)
        features = _lookup(self.feature_table, *self._rows(unit))
        return (torch.sigmoid(features[:, :3]) + self._view_dependent(features, directions)).clamp(0, 1)

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighbouring density values, over the three axes."""
        z, y, x = self._shape
        grid = self.density_table[: z * y * x].view(z, y, x)
        return sum(grid.diff(dim=axis).square().mean() for axis in range(3))

    def _share(self, step: float) -> float:
        """Of a training step: the floors are for one, and what two half steps hold must not vanish."""
        return step / (self._voxel * self.train_step)

    def _extinction(self, unit: Tensor) -> Tensor:
        raw = _interpolate(self.density_table, self._shape, unit)
        return F.softplus(raw + self._shift) / self._unit_length

    def _rows(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = _corners(unit, self._shape)
        return self.row[index], weight

    def _view_dependent(self, features: Tensor, directions: Tensor) -> Tensor:
        """What is added to the own colour for one direction, float32 [rays, 3] in [-1, 1]."""
        encoded = positional_encoding(directions, DIRECTION_FREQUENCIES)
        return torch.tanh(self.decoder(torch.cat([features, encoded], -1)).float())

    def _fit_box(self) -> None:
        """Fits the box, and with it the hull, to the occupied cells."""
        old, occupancy = self.bounds.clone(), self.occupancy
        cells, hull = occupancy.cells.clone(), self.hull.clone()
        box = box_of(cells, old, margin=1.0)
        occupancy.bounds.copy_(torch.stack([torch.maximum(box[0], old[0]), torch.minimum(box[1], old[1])]))
        unit = (occupancy.centres() - old[0]) / (old[1] - old[0])
        index = (unit * occupancy.resolution).long().clamp_(0, occupancy.resolution - 1)
        for target, source in ((occupancy.set, cells), (self.hull.copy_, hull)):
            # A cell of the new box may reach over the edge of the old cell that its centre lies in.
            grown = F.max_pool3d(source.float()[None, None], 3, 1, 1)[0, 0] > 0
            target(grown[index[:, 2], index[:, 1], index[:, 0]].view(cells.shape))

    def _allocate(self, resolution: int) -> int:
        """Makes a level over the occupied cells, the finest up to `resolution` that the tables can hold.

        Returns:
          Its resolution.

        Raises:
          ValueError: they cannot hold any.
        """
        self.allocated.copy_(self.occupancy.cells)
        resolution = min(resolution, self.resolution)
        while resolution >= 2:
            self.shape.copy_(torch.tensor(level_shape(self.bounds, resolution)))
            self._refresh()
            if int(self.row.max()) < len(self.feature_table):
                return resolution
            resolution -= max(1, resolution // 32)
        raise ValueError(f"{len(self.feature_table)} rows are too few for any level")

    def _refresh(self) -> None:
        """Derives from the buffers what is not stored: the row of each vertex, and plain numbers."""
        self._shape = tuple(self.shape.tolist())
        self._unit_length = float(self.unit_length)
        size = self.bounds[1] - self.bounds[0]
        self._voxel = float(size.mean()) / (sum(self._shape) / 3 - 1)
        self.row.zero_()
        vertices = reachable_vertices(self.allocated, self._shape).view(-1).nonzero()[:, 0]
        rows = torch.arange(1, len(vertices) + 1, dtype=torch.int32, device=self.row.device)
        self.row[vertices] = rows


def level_shape(bounds: Tensor, resolution: int) -> tuple[int, int, int]:
    """Vertices along z, y and x of a grid of cubic voxels over a box: at most `resolution` ** 3 in all."""
    size = (bounds[1] - bounds[0]).double().cpu()
    voxel = float(size.prod()) ** (1 / 3) / resolution
    shape = [max(2, math.floor(float(side) / voxel + 1e-5)) for side in size.flip(0)]
    while math.prod(shape) > resolution**3:
        shape[shape.index(max(shape))] -= 1
    return tuple(shape)


def reachable_vertices(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The vertices that samples in `cells`, bool [z, y, x], are interpolated from, bool `shape`."""
    touched = cells.float()
    for axis, count in enumerate(shape):
        first, last = _vertices_around(cells.shape[axis], count, cells.device)
        vertex = torch.arange(count, device=cells.device)[:, None]
        reached = ((vertex >= first) & (vertex <= last)).float()
        touched = (torch.tensordot(reached, touched, dims=([1], [axis])) > 0).float().movedim(0, axis)
    return (touched > 0).contiguous()


def highest_around(values: Tensor, cells: int) -> Tensor:
    """The largest of a grid's values, [z, y, x], at the vertices around each of `cells` ** 3 cells."""
    for axis in range(3):
        first, last = _vertices_around(cells, values.shape[axis], values.device)
        offset = torch.arange(int((last - first).max()) + 1, device=values.device)
        vertex = torch.minimum(first[:, None] + offset, last[:, None])
        values = values.movedim(axis, 0)[vertex].amax(1).movedim(0, axis)
    return values.contiguous()


def _vertices_around(cells: int, vertices: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last vertex, along an axis, that places in each cell are interpolated from."""
    edges = torch.arange(cells + 1, device=device, dtype=torch.float64) / cells * (vertices - 1)
    # A hair wider than exact: a float32 place on an edge must not fall outside.
    first = (edges[:-1] - 1e-3).floor().clamp(min=0).long()
    return first, (edges[1:] + 1e-3).ceil().clamp(max=vertices - 1).long()


def _interpolate(table: Tensor, shape: tuple[int, int, int], unit: Tensor) -> Tensor:
    """Trilinear values of the leading `shape` of a flat table at places in the unit box: [points]."""
    grid = table[: math.prod(shape)].view(1, 1, *shape)
    places = (unit * 2 - 1).view(1, 1, 1, -1, 3)
    return F.grid_sample(grid, places, align_corners=True).view(-1)


def _corners(unit: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The eight vertices around places in the unit box: flat index int64 and weight float32, [points, 8]."""
    z, y, x = shape
    # One row an axis: each is a contiguous run for the vector units.
    last = torch.tensor([[x - 1], [y - 1], [z - 1]], device=unit.device, dtype=unit.dtype)
    place = (unit.T * last).contiguous()
    low = torch.minimum(place.floor().clamp_(min=0), last - 1)
    above = place - low
    below = 1 - above
    low = low.long()
    first = (low[2] * y + low[1]) * x + low[0]
    offsets = torch.tensor([0, 1, x, x + 1, y * x, y * x + 1, y * x + x, y * x + x + 1], device=unit.device)
    sides = [below[1] * below[2], above[1] * below[2], below[1] * above[2], above[1] * above[2]]
    weight = torch.stack([part * side for side in sides for part in (below[0], above[0])], 1)
    return first[:, None] + offsets, weight


def _random_corner(unit: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One of the eight vertices around each place, drawn by its trilinear weight: flat, int64 [points]."""
    z, y, x = shape
    last = torch.tensor([[x - 1], [y - 1], [z - 1]], device=unit.device, dtype=unit.dtype)
    place = unit.T * last
    place = torch.rand(place.shape, generator=generator, device=unit.device).add_(place).floor_()
    place = torch.minimum(place, last).long()
    return (place[2] * y + place[1]) * x + place[0]


class _Pick(torch.autograd.Function):
    """Rows of a table; the backward pass adds into the rows in place."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        table = gradient.new_zeros(ctx.shape).index_add_(0, index, gradient)
        table[0] = 0
        return table, None


class _Interpolate(torch.autograd.Function):
    """Weighted sums of a table's rows; the backward pass adds into the rows in place."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, table: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.shape = table.shape
        return _lookup(table, index, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        table = gradient.new_zeros(ctx.shape)
        # Vertex by vertex: all at once would be eight times the features in memory.
        for rows, share in zip(index.T.contiguous(), weight.T.contiguous()):
            table.index_add_(0, rows, gradient * share[:, None])
        table[0] = 0
        return table, None, None


def _lookup(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of table rows: float32 [points, features]."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
