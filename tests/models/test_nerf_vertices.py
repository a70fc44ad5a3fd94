"""Vertices of a grid level: its shape, which vertices samples use, and interpolation with its gradients."""

import math

import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from blacksmith.models.pytorch.nerf.occupancy import grid_points
from blacksmith.models.pytorch.nerf.vertices import (
    PickRows,
    SumRows,
    corners,
    highest_around,
    level_shape,
    random_corner,
    reachable_vertices,
    trilinear,
)

SHAPE = (4, 5, 3)


def test_the_shape_of_a_level_by_hand():
    # Along z, y and x.
    assert level_shape(torch.tensor([[0.0, 0, 0], [4.0, 2.0, 1.0]]), 16) == (8, 16, 32)
    flat = level_shape(torch.tensor([[0.0, 0, 0], [4.0, 4.0, 0.01]]), 16)
    assert flat[0] == 2
    assert math.prod(flat) <= 16**3
    # The three sides of a cube differ by float32's rounding, depending on where it is.
    places = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    assert {level_shape(torch.stack([at, at + 1.7]), 80) for at in places} == {(80, 80, 80)}


@pytest.mark.parametrize(
    ("cells", "shape"), [(5, (3, 4, 2)), (5, (8, 9, 7)), (16, (16, 17, 15)), (16, (30, 23, 19))]
)
def test_reachable_vertices_are_those_that_samples_in_cells_use(cells, shape):
    generator = torch.Generator().manual_seed(0)
    marked = torch.rand((cells,) * 3, generator=generator) < 0.02
    marked[0, cells - 1, 0] = True
    reachable = reachable_vertices(marked, shape)
    assert reachable.shape == shape
    # Places in marked cells: random ones, and some exactly in their corners.
    z, y, x = marked.nonzero().T
    corner = torch.stack([x, y, z], 1)
    within = torch.rand(len(corner), 200, 3, generator=generator)
    within[:, :20] = within[:, :20].round()
    unit = ((corner[:, None] + within) / cells).view(-1, 3).clamp(0, 1 - 1e-7)
    index, weight = corners(unit, shape)
    assert reachable.view(-1)[index[weight > 0].unique()].all()
    # And no others: a cell reaches no further than the voxels that it touches.
    places = grid_points(torch.tensor([[0.0] * 3, [1.0] * 3]), shape)
    size = 1 / (torch.tensor(shape).flip(0) - 1)
    near = torch.zeros(len(places), dtype=torch.bool)
    for one in corner:
        near |= ((places - (one + 0.5) / cells).abs() < 0.5 / cells + size * 1.01).all(1)
    assert not reachable.view(-1)[~near].any()


@pytest.mark.parametrize("cells", [3, 16])
def test_no_value_in_a_cell_is_above_the_highest_around_it(cells):
    generator = torch.Generator().manual_seed(0)
    values, unit = torch.randn(SHAPE, generator=generator), torch.rand(20000, 3, generator=generator)
    x, y, z = (unit * cells).long().T
    highest = highest_around(values, cells)
    assert highest.shape == (cells,) * 3
    # Interpolation rounds a few times.
    assert (trilinear(values.view(-1), SHAPE, unit) <= highest[z, y, x] + 1e-5).all()
    # Each is the value of some vertex, not just any bound.
    assert torch.isin(highest, values).all()


def test_corners_by_hand():
    # Two voxels along x, one along y and z.
    index, weight = corners(torch.tensor([[0.625, 0.5, 0.0], [1.0, 1.0, 1.0]]), (2, 2, 3))
    # 0.625 * 2 = 1.25: between vertices 1 and 2; y half-way, z at the first.
    found = dict(zip(index[0].tolist(), weight[0].tolist()))
    assert {i: w for i, w in found.items() if w} == {1: 0.375, 2: 0.125, 4: 0.375, 5: 0.125}
    found = dict(zip(index[1].tolist(), weight[1].tolist()))
    assert {i: w for i, w in found.items() if w} == {11: 1.0}


def test_interpolated_numbers_are_weighted_sums_over_the_corners():
    generator = torch.Generator().manual_seed(0)
    # The table is longer than the level; what is behind it does not count.
    table, unit = torch.randn(100, generator=generator), torch.rand(500, 3, generator=generator)
    index, weight = corners(unit, SHAPE)
    expected = (table[index] * weight).sum(1)
    torch.testing.assert_close(trilinear(table, SHAPE, unit), expected, rtol=1e-5, atol=1e-5)


def _table():
    """A table of two features with a row for each vertex but one, and some places."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1 + math.prod(SHAPE), 2, generator=generator).requires_grad_()
    row = torch.arange(1, 1 + math.prod(SHAPE), dtype=torch.int32)
    unit = torch.rand(40, 3, generator=generator)
    unit[0] = torch.tensor([0.0, 0.5, 1.0])
    unit[1] = 1.0
    # One vertex has no row: its features are those of row 0, which learns nothing.
    row[int(corners(unit, SHAPE)[0][2, 3])] = 0
    return table, row, unit, generator


def test_the_vertex_drawn_for_a_sample_is_right_on_average():
    table, row, unit, generator = _table()
    unit, draws = unit[:6], 20000
    corner = random_corner(unit.repeat(draws, 1), SHAPE, generator)
    picked = PickRows.apply(table, row[corner])
    index, weight = corners(unit, SHAPE)
    expected = (table[row[index].long()] * weight[..., None]).sum(1).detach()
    mean = picked.detach().view(draws, 6, 2).mean(0)
    # The features spread by 1; 5 standard deviations of the mean of 20000.
    torch.testing.assert_close(mean, expected, rtol=0, atol=5 / math.sqrt(draws))
    picked.sum().backward()
    share = torch.zeros(len(table))
    share.index_add_(0, row[index].view(-1).long(), weight.view(-1))
    share[0] = 0
    # 5 standard deviations of a share, six of which may fall together.
    torch.testing.assert_close(table.grad[:, 0] / draws, share, rtol=0, atol=6 * 2.5 / math.sqrt(draws))
    assert (table.grad[0] == 0).all()
    # Exactly on a vertex there is no choice.
    assert (corner.view(draws, 6)[:, 1] == math.prod(SHAPE) - 1).all()


def test_interpolated_features_and_gradients_are_weighted_sums():
    table, row, unit, generator = _table()
    index, weight = corners(unit, SHAPE)
    expected = (table[row[index].long()] * weight[..., None]).sum(1)
    outwards = torch.randn(40, 2, generator=generator)
    (wanted,) = torch.autograd.grad(expected, table, outwards)
    found = SumRows.apply(table, row[index], weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward(outwards)
    torch.testing.assert_close(table.grad[1:], wanted[1:], rtol=1e-5, atol=1e-6)
    assert (table.grad[0] == 0).all()
    assert (wanted[0] != 0).all()
