"""The vertices of a level of the grid: how many there are, which of them samples can use, and interpolation.

A level is a dense grid in the flat order of [z, y, x]. Places, [points, 3], are (x, y, z) in the unit box.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def level_shape(bounds: Tensor, resolution: int) -> tuple[int, int, int]:
    """Vertices along z, y and x of a grid of cubic voxels over a box: at most `resolution` ** 3 in total."""
    size = (bounds[1] - bounds[0]).double().cpu()
    voxel = float(size.prod()) ** (1 / 3) / resolution
    shape = [max(2, math.floor(float(side) / voxel + 1e-5)) for side in size.flip(0)]
    # Flat boxes are raised to two vertices across, which can make the product too large.
    while math.prod(shape) > resolution**3:
        shape[shape.index(max(shape))] -= 1
    return tuple(shape)


def reachable_vertices(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The vertices that samples in `cells`, bool [z, y, x], are interpolated from: bool of `shape`."""
    touched = cells.float()
    # A cell reaches a vertex if it does so along each axis, so the axes can be converted one after the other.
    for axis, count in enumerate(shape):
        first, last = _vertices_around(cells.shape[axis], count, cells.device)
        vertex = torch.arange(count, device=cells.device)[:, None]
        reached = ((vertex >= first) & (vertex <= last)).float()
        touched = (torch.tensordot(reached, touched, dims=([1], [axis])) > 0).float().movedim(0, axis)
    return (touched > 0).contiguous()


def highest_around(values: Tensor, cells: int) -> Tensor:
    """The largest of a grid's values, [z, y, x], at the vertices around each of `cells` ** 3 cells.

    Interpolated values in a cell are never above it.
    """
    for axis in range(3):
        first, last = _vertices_around(cells, values.shape[axis], values.device)
        offset = torch.arange(int((last - first).max()) + 1, device=values.device)
        vertex = torch.minimum(first[:, None] + offset, last[:, None])
        values = values.movedim(axis, 0)[vertex].amax(1).movedim(0, axis)
    return values.contiguous()


def _vertices_around(cells: int, vertices: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last vertex, along an axis, that places in each cell are interpolated from."""
    edges = torch.arange(cells + 1, device=device, dtype=torch.float64) / cells * (vertices - 1)
    # Slightly wider than exact, because a float32 place near an edge may be rounded across it.
    first = (edges[:-1] - 1e-3).floor().clamp(min=0).long()
    return first, (edges[1:] + 1e-3).ceil().clamp(max=vertices - 1).long()


def trilinear(table: Tensor, shape: tuple[int, int, int], unit: Tensor) -> Tensor:
    """Trilinear values, [points], of the numbers at the vertices: the leading rows of a flat table."""
    grid = table[: math.prod(shape)].view(1, 1, *shape)
    places = (unit * 2 - 1).view(1, 1, 1, -1, 3)
    return F.grid_sample(grid, places, align_corners=True).view(-1)


def corners(unit: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The eight vertices around each place: flat index int64 and trilinear weight float32, [points, 8]."""
    z, y, x = shape
    # Transposed to [3, points]: the values of an axis are contiguous, which CPU vector instructions need.
    last = torch.tensor([[x - 1], [y - 1], [z - 1]], device=unit.device, dtype=unit.dtype)
    place = (unit.T * last).contiguous()
    # A place at the far side belongs to the last voxel, with all weight on its upper vertex.
    low = torch.minimum(place.floor().clamp_(min=0), last - 1)
    above = place - low
    below = 1 - above
    low = low.long()
    first = (low[2] * y + low[1]) * x + low[0]
    offsets = torch.tensor([0, 1, x, x + 1, y * x, y * x + 1, y * x + x, y * x + x + 1], device=unit.device)
    sides = [below[1] * below[2], above[1] * below[2], below[1] * above[2], above[1] * above[2]]
    weight = torch.stack([part * side for side in sides for part in (below[0], above[0])], 1)
    return first[:, None] + offsets, weight


def random_corner(unit: Tensor, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One of the eight vertices around each place, drawn by its trilinear weight: flat, int64 [points].

    Pharr et al., Filtering After Shading With Stochastic Texture Filtering (2024).
    """
    z, y, x = shape
    last = torch.tensor([[x - 1], [y - 1], [z - 1]], device=unit.device, dtype=unit.dtype)
    place = unit.T * last
    # floor(p + u) with u uniform in [0, 1) is the upper vertex with probability frac(p): along each axis the
    # linear weight. The axes are independent, so the vertex has its trilinear weight as probability.
    place = torch.rand(place.shape, generator=generator, device=unit.device).add_(place).floor_()
    place = torch.minimum(place, last).long()
    return (place[2] * y + place[1]) * x + place[0]


# The backward passes are written by hand. They add gradients into the rows in place, one vertex at a time, so
# that memory never holds eight gradients per sample. And they drop the gradient of row 0, which stands for
# vertices without features and has to stay zero.


class PickRows(torch.autograd.Function):
    """Rows of a table, `table[index]`."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        table = gradient.new_zeros(ctx.shape).index_add_(0, index, gradient)
        table[0] = 0
        return table, None


class SumRows(torch.autograd.Function):
    """Weighted sums of rows of a table; see `sum_rows`. No gradient for the weights: samples do not move."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.shape = table.shape
        return sum_rows(table, index, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        table = gradient.new_zeros(ctx.shape)
        for rows, share in zip(index.T.contiguous(), weight.T.contiguous()):
            table.index_add_(0, rows, gradient * share[:, None])
        table[0] = 0
        return table, None, None


def sum_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of table rows, float32 [points, features]; index and weight are [points, 8]."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
