"""The fast field: an explicit density grid and a sparse feature grid, coarse to fine, colored once per ray.

Density is one number at each vertex of a dense grid, interpolated and then made positive, as in Sun et al.,
Direct Voxel Grid Optimization (2022). Features exist only at vertices that samples can use, as rows of one
table. They are summed along the ray, and one small network turns the sum and the direction into a color,
after Hedman et al., Baking Neural Radiance Fields (2021). Both tables have their final size from the start
and a coarser level uses their leading rows, so that the parameters keep their shapes for the optimizer,
checkpoints and DDP.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blacksmith.models.pytorch.nerf.encoding import encoded_size, positional_encoding
from blacksmith.models.pytorch.nerf.occupancy import Occupancy, box_of, flat_cell, grid_points
from blacksmith.models.pytorch.nerf.rendering import (
    Rendered,
    Samples,
    Traced,
    sum_along_rays,
    transmittance,
)
from blacksmith.models.pytorch.nerf.vertices import (
    PickRows,
    SumRows,
    corners,
    highest_around,
    level_shape,
    random_corner,
    reachable_vertices,
    sum_rows,
    trilinear,
)

DIRECTION_FREQUENCIES = 4

_DARK = 1e-3  # samples that less light than this reaches are left out
_POINTS = 1 << 18  # number of a grid's points that are processed at a time


class GridField(nn.Module):
    """Density and features on grids inside a box; call `begin` or `load_state_dict` before use.

    Args:
      resolution: of the finest level, as the side of a cube with the same number of vertices; the box is
        divided into cubic voxels whatever its shape.
      rows: of the feature table. The first stays zero and serves all vertices without features.
      occupancy_resolution: cells along each side of the occupancy grid.
      features: numbers at each vertex; the first three are its own color, before the sigmoid.
      width: of the color network, which has two hidden layers.
      alpha: opacity of the length `unit` before training. Below 1e-3 no sample weighs enough to get a
        gradient, and the field stays empty.
      alpha_floor: samples less opaque than this are left out, at the step length of training.
      weight_floor: samples that weigh less than this get no color, at the step length of training.
      train_step: distance between samples in training, in voxels.
      render_step: the same in evaluation.

    Attributes:
      unit: a 96th of the box that the field began with, in world units: opacities are given for this length.
      voxel: side of a voxel of the current level, in world units.
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
        # With density = softplus(raw + shift) / unit, a raw value of 0 has an opacity of exactly alpha over
        # the length `unit`: 1 - exp(-softplus(shift)) = alpha, the low-density initialization of Sun et al.
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
        inputs = features + encoded_size(3, DIRECTION_FREQUENCIES)
        self.decoder = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )
        # `row` and the plain numbers follow from other buffers and are not stored.
        self.register_load_state_dict_post_hook(lambda field, _: field._refresh())
        self._refresh()

    @property
    def bounds(self) -> Tensor:
        """The box, float32 [2, 3]."""
        return self.occupancy.bounds

    @torch.no_grad()
    def begin(
        self,
        bounds: Tensor,
        hull: Tensor,
        resolution: int,
        near_far: tuple[float, float],
    ) -> int:
        """Starts an empty field; returns the resolution of its level, see `upsample`.

        Matter can be in the cells of the hull, bool [z, y, x], of a box, float32 [2, 3]. Rays begin and end
        at the distances `near_far`.
        """
        self.occupancy.bounds.copy_(bounds)
        self.occupancy.near_far.copy_(torch.tensor(near_far))
        self.occupancy.set(hull)
        self.hull.copy_(hull)
        self.unit_length.fill_(float((bounds[1] - bounds[0]).mean()) / 96)
        self.density_table.zero_()
        self.feature_table.zero_()
        return self._allocate(resolution)

    @torch.no_grad()
    def upsample(self, resolution: int, *, shrink: bool = False) -> int:
        """Resamples the field on a finer grid, in place; `shrink` first fits the box to the occupied cells.

        Returns the resolution of the level: lower than requested if the feature table has too few rows. The
        optimizer's moments still belong to the old grid.
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
            points = grid_points(self.bounds, self._shape, place)
            unit = ((points - bounds[0]) / (bounds[1] - bounds[0])).clamp_(0, 1)
            self.density_table[place] = trilinear(density, shape, unit)
            target = self.row[place]
            stored = target > 0
            index, weight = corners(unit[stored], shape)
            # At the rim some of the old vertices have no features: take the mean over those that have.
            weight = weight * (row[index] > 0)
            weight /= weight.sum(1, keepdim=True).clamp(min=1e-6)
            self.feature_table[target[stored].long()] = sum_rows(table, row[index], weight)
        return resolution

    @torch.no_grad()
    def lit_cells(self, rays: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The cells that the light of some rays reaches and their neighbors, bool [z, y, x].

        Those inside of things are not among them. The rays come in bundles, origins and unit directions
        [rays, 3].
        """
        resolution, step = self.occupancy.resolution, self.voxel * self.train_step
        lit = torch.zeros(resolution**3, device=self.bounds.device)
        for origins, directions in rays:
            _, unit = self._lit_samples(origins, directions, step, None)
            lit[flat_cell(unit, resolution)] = 1
        return F.max_pool3d(lit.view(1, 1, *[resolution] * 3), 3, 1, 1)[0, 0] > 0

    @torch.no_grad()
    def refresh_occupancy(self, threshold: float, lit: Tensor) -> bool:
        """Marks the cells, among those with features, that are more opaque than `threshold` over `unit`.

        Only cells of `lit`, bool [z, y, x], are marked; see `lit_cells`. Returns whether there is any; if
        not, nothing changes.
        """
        cells = (self._opacity_of_cells() > threshold) & self.allocated & lit
        if not cells.any():
            return False
        self.occupancy.set(cells)
        return True

    @torch.no_grad()
    def share_at_faces(self, opacity: float) -> float:
        """How much of the matter, the occupied cells of at least this opacity over `unit`, touches the box.

        Where matter reaches a face of the box, the box may cut it off.
        """
        matter = self.occupancy.cells & (self._opacity_of_cells() > opacity)
        inside = int(matter[1:-1, 1:-1, 1:-1].sum())
        total = int(matter.sum())
        return (total - inside) / total if total else 0.0

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
          generator: shifts the samples along the ray and draws the vertex that provides features. Without
            one, samples are at half steps and features are interpolated.
          interpolate: interpolate features also with a generator. A drawn vertex is correct on average, for
            an eighth of the memory traffic, but the variance of the draw blurs the result.
        """
        rays = len(origins)
        # Most samples are in empty or hidden space. A first pass without gradients finds the others, so that
        # only these are kept for the backward pass.
        samples, unit = self._lit_samples(origins, directions, step, generator)
        num_samples = len(unit)
        reaching, alpha = transmittance(self._extinction(unit) * step, samples.ray, rays)
        weights = reaching * alpha
        # Features cost more than density: they are fetched only where the weight matters.
        colored = (weights.detach() > self.weight_floor * self._share(step)).nonzero()[:, 0]
        samples, unit, weights = samples.take(colored), unit[colored], weights[colored]
        if generator is None or interpolate:
            features = SumRows.apply(self.feature_table, *self._rows(unit))
        else:
            corner = random_corner(unit, self._shape, generator)
            features = PickRows.apply(self.feature_table, self.row[corner])
        # rgb = sum_i w_i sigmoid(f_i[:3]) + (sum_i w_i) tanh(decoder(sum_i w_i f_i, direction)): the network
        # runs once per ray instead of once per sample (deferred, as in Hedman et al.).
        opacity = sum_along_rays(weights, samples.ray, rays)
        own = sum_along_rays(torch.sigmoid(features[:, :3]) * weights[:, None], samples.ray, rays)
        summed = sum_along_rays(features * weights[:, None], samples.ray, rays)
        rgb = own + opacity[:, None] * self._view_dependent(summed, directions)
        return Traced(rgb, opacity, weights, samples, num_samples)

    @torch.no_grad()
    def _lit_samples(
        self, origins: Tensor, directions: Tensor, step: float, generator: torch.Generator | None
    ) -> tuple[Samples, Tensor]:
        """The samples that light reaches and that absorb some of it, and their places, [samples, 3]."""
        samples, unit = self.occupancy.samples(origins, directions, step, generator)
        reaching, alpha = transmittance(self._extinction(unit.T) * step, samples.ray, len(origins))
        kept = ((reaching > _DARK) & (alpha > self.alpha_floor * self._share(step))).nonzero()[:, 0]
        return samples.take(kept), unit[:, kept].T

    @torch.no_grad()
    def render(
        self, origins: Tensor, directions: Tensor, background: Tensor, *, quality: float = 1.0
    ) -> Rendered:
        """Renders rays; see `RadianceField`."""
        return self.trace(origins, directions, self.voxel * self.render_step / quality).rendered(background)

    def density(self, points: Tensor) -> Tensor:
        """Extinction per world unit, also outside of the occupied cells; see `RadianceField`."""
        unit = (points - self.bounds[0]) / (self.bounds[1] - self.bounds[0])
        inside = ((unit >= 0) & (unit <= 1)).all(-1)
        return self._extinction(unit.clamp(0, 1)) * inside

    @torch.no_grad()
    def color(self, points: Tensor, directions: Tensor) -> Tensor:
        """Color of single points, as seen by a ray that ends there; see `RadianceField`."""
        unit = ((points - self.bounds[0]) / (self.bounds[1] - self.bounds[0])).clamp(0, 1)
        features = sum_rows(self.feature_table, *self._rows(unit))
        return (torch.sigmoid(features[:, :3]) + self._view_dependent(features, directions)).clamp(0, 1)

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighboring density values, summed over the three axes."""
        z, y, x = self._shape
        grid = self.density_table[: z * y * x].view(z, y, x)
        return sum(grid.diff(dim=axis).square().mean() for axis in range(3))

    def _opacity_of_cells(self) -> Tensor:
        """The highest opacity over `unit` in each cell of the occupancy grid, float32 [z, y, x]."""
        z, y, x = self._shape
        opacity = -torch.expm1(-F.softplus(self.density_table[: z * y * x] + self._shift))
        return highest_around(opacity.view(z, y, x), self.occupancy.resolution)

    def _share(self, step: float) -> float:
        """The length of a step relative to training, so that half steps do not lose what whole steps keep."""
        return step / (self.voxel * self.train_step)

    def _extinction(self, unit: Tensor) -> Tensor:
        raw = trilinear(self.density_table, self._shape, unit)
        return F.softplus(raw + self._shift) / self.unit

    def _rows(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = corners(unit, self._shape)
        return self.row[index], weight

    def _view_dependent(self, features: Tensor, directions: Tensor) -> Tensor:
        """What is added to the own color for one direction, float32 [rays, 3] in [-1, 1]."""
        encoded = positional_encoding(directions, DIRECTION_FREQUENCIES)
        return torch.tanh(self.decoder(torch.cat([features, encoded], -1)).float())

    def _fit_box(self) -> None:
        """Fits the box, and with it the hull, to the occupied cells."""
        old, occupancy = self.bounds.clone(), self.occupancy
        cells, hull = occupancy.cells.clone(), self.hull.clone()
        box = box_of(cells, old, margin=1.0)
        occupancy.bounds.copy_(torch.stack([torch.maximum(box[0], old[0]), torch.minimum(box[1], old[1])]))
        centers = grid_points(self.bounds, cells.shape, centered=True)
        index = flat_cell((centers - old[0]) / (old[1] - old[0]), occupancy.resolution)
        for target, source in ((occupancy.set, cells), (self.hull.copy_, hull)):
            # A new cell may extend beyond the old cell that contains its center, so its neighbors count too.
            grown = F.max_pool3d(source.float()[None, None], 3, 1, 1)[0, 0] > 0
            target(grown.view(-1)[index].view(cells.shape))

    def _allocate(self, resolution: int) -> int:
        """Makes the finest level over the occupied cells, up to `resolution`, that the tables can hold."""
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
        self.unit = float(self.unit_length)
        size = self.bounds[1] - self.bounds[0]
        if min(self._shape) < 2 or not bool((size > 0).all()):
            raise ValueError(f"a grid of {self._shape} vertices over {self.bounds.tolist()}")
        self.voxel = float(size.mean()) / (sum(self._shape) / 3 - 1)
        self.row.zero_()
        vertices = reachable_vertices(self.allocated, self._shape).view(-1).nonzero()[:, 0]
        rows = torch.arange(1, len(vertices) + 1, dtype=torch.int32, device=self.row.device)
        self.row[vertices] = rows
