"""The grid field: equality with a renderer of plain loops, gradients, finer levels, occupancy and state."""

import math

import numpy as np
import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
from pinhole import camera_of

from blacksmith.datasets.blender.cameras import look_at
from blacksmith.models.pytorch.nerf.grid import GridField
from blacksmith.models.pytorch.nerf.occupancy import flat_cell, grid_points
from blacksmith.models.pytorch.nerf.rendering import camera_rays
from blacksmith.models.pytorch.nerf.vertices import level_shape, reachable_vertices

CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3])
BOX = torch.tensor([[-1.0, -0.6, -1.3], [1.2, 0.7, 1.0]])
WHITE, BLACK = torch.ones(3), torch.zeros(3)
ALPHA = 3e-3
ALL = (0.0, math.inf)  # the distances at which rays have samples


def _random_cells(resolution, share, seed):
    return torch.rand((resolution,) * 3, generator=torch.Generator().manual_seed(seed)) < share


def _all_cells(resolution):
    return torch.ones((resolution,) * 3, dtype=torch.bool)


def _field(level=9, bounds=BOX, cells=None, resolution=17, seed=0, **options):
    """A field with random numbers in all of its tables."""
    cells = _all_cells(8) if cells is None else cells
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"features": 5, "width": 8, "alpha": ALPHA, "rows": resolution**3 + 1} | options
        field = GridField(resolution=resolution, occupancy_resolution=len(cells), **options)
        field.begin(bounds, cells, level, ALL)
        with torch.no_grad():
            field.density_table.normal_(2, 3)
            field.feature_table[1:].normal_()
            for parameter in field.decoder.parameters():
                parameter.normal_(0, 0.4)
    return field


def _rays(count, seed, bounds=BOX):
    """Rays from around a box through random places in it."""
    generator = torch.Generator().manual_seed(seed)
    targets = bounds[0] + torch.rand(count, 3, generator=generator) * (bounds[1] - bounds[0])
    outwards = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    origins = bounds.mean(0) + 4 * outwards
    return origins, torch.nn.functional.normalize(targets - origins, dim=1)


def _points(count, seed, bounds=BOX, cells=None):
    """Random places in a box, or only those in marked cells."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(count, 3, generator=generator) * 0.999 + 0.0005
    if cells is not None:
        x, y, z = (unit * len(cells)).long().T
        unit = unit[cells[z, y, x]]
    return bounds[0] + unit * (bounds[1] - bounds[0])


def _unit(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)


def _vertices(field):
    return grid_points(field.bounds, field.shape.tolist())


def _marked(field, points):
    """Whether world points are inside the box and in marked cells."""
    unit = (points - field.bounds[0]) / (field.bounds[1] - field.bounds[0])
    cells = field.occupancy.cells
    return ((unit >= 0) & (unit < 1)).all(1) & cells.view(-1)[flat_cell(unit, len(cells))]


# --- tables ---


def test_every_reachable_vertex_has_its_own_row():
    cells = _random_cells(8, 0.3, seed=2)
    field = _field(cells=cells, level=13)
    shape = tuple(field.shape.tolist())
    reachable = reachable_vertices(cells, shape).view(-1)
    rows = field.row[: math.prod(shape)]
    assert torch.equal(rows > 0, reachable)
    assert sorted(rows[reachable].tolist()) == list(range(1, int(reachable.sum()) + 1))
    assert (field.row[math.prod(shape) :] == 0).all()


def test_tables_keep_their_shapes_at_every_level():
    field = _field(level=5)
    shapes = {name: value.shape for name, value in field.state_dict().items()}
    identities = {name: id(value) for name, value in field.named_parameters()}
    for resolution, shrink in ((9, False), (12, True), (17, False)):
        _refresh(field, 0.5)
        field.upsample(resolution, shrink=shrink)
        assert {name: value.shape for name, value in field.state_dict().items()} == shapes
        assert {name: id(value) for name, value in field.named_parameters()} == identities


# --- densities and colors ---


def test_an_empty_field_has_the_given_opacity():
    field = GridField(resolution=16, rows=5000, occupancy_resolution=8, alpha=0.02)
    field.begin(CUBE, _all_cells(8), 16, ALL)
    assert field.voxel == pytest.approx(2 / 15)
    assert field.unit == pytest.approx(2 / 96)
    opacity = -torch.expm1(-field.density(_points(100, 0, CUBE)) * 2 / 96)
    torch.testing.assert_close(opacity, torch.full((100,), 0.02), rtol=1e-4, atol=0)


def test_densities_at_vertices_by_hand():
    field = _field()
    points = _vertices(field)
    raw = field.density_table[: len(points)].detach().double()
    # softplus of the stored number, shifted so that 0 is ALPHA, for each 96th of the box.
    shifted = raw + math.log(1 / (1 - ALPHA) - 1)
    unit_length = float((BOX[1] - BOX[0]).mean()) / 96
    expected = torch.log1p(shifted.exp()) / unit_length
    # Places are rounded by 1e-6 voxels, where neighbors differ by up to 20.
    torch.testing.assert_close(field.density(points).detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_density_is_0_outside_of_the_box_and_only_there():
    field = _field()
    for axis in range(3):
        for side, away in ((0, -0.01), (1, 0.01)):
            points = _points(200, 1) * 0.98
            points[:, axis] = BOX[side, axis] + away
            assert (field.density(points) == 0).all()
            points[:, axis] = BOX[side, axis] - away
            assert (field.density(points) > 0).all()
    nothing = torch.zeros(0, 3)
    assert field.density(nothing).shape == (0,)
    assert field.color(nothing, nothing).shape == (0, 3)


def _decode(field, features, direction):
    """The color network in NumPy, float64."""
    values = [np.asarray(direction, np.float64)]
    for octave in range(4):
        values += [np.sin(2**octave * values[0]), np.cos(2**octave * values[0])]
    x = np.concatenate([features, *values])
    layers = [p.detach().double().numpy() for p in field.decoder.parameters()]
    for number in range(0, len(layers), 2):
        x = layers[number] @ x + layers[number + 1]
        x = np.maximum(x, 0) if number < len(layers) - 2 else x
    return np.tanh(x)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_colors_at_vertices_by_hand():
    field = _field()
    points = _vertices(field)[::7]
    directions = _unit(len(points), 2)
    rows = field.row[: math.prod(field.shape.tolist())][::7].long()
    features = field.feature_table.detach()[rows].double().numpy()
    expected = [
        np.clip(_sigmoid(f[:3]) + _decode(field, f, d), 0, 1) for f, d in zip(features, directions.numpy())
    ]
    # As for densities: places are rounded by 1e-6 voxels.
    np.testing.assert_allclose(field.color(points, directions).numpy(), expected, rtol=0, atol=1e-4)


def test_total_variation_by_hand():
    # 2 vertices along z, 4 along y, 8 along x.
    field = _field(bounds=torch.tensor([[0.0, 0, 0], [4.0, 2.0, 1.0]]), level=4)
    assert tuple(field.shape.tolist()) == (2, 4, 8)
    with torch.no_grad():
        field.density_table.zero_()
        # What other levels left behind the vertices of this level does not count.
        field.density_table[64:] = 99.0
        field.density_table[0], field.density_table[1] = 2.0, 5.0
    # Of 2*4*7 differences along x there are 3 and 5; of 2*3*8 along y, and of 4*8 along z, there are 2 and 5.
    expected = (9 + 25) / 56 + (4 + 25) / 48 + (4 + 25) / 32
    assert float(field.total_variation().detach()) == pytest.approx(expected, rel=1e-6)


# --- rendering against plain loops ---


def _trilinear(field, place):
    """The eight vertices around a place in voxels, as (flat index, weight) pairs; axes x, y, z."""
    z, y, x = field.shape.tolist()
    low = [min(int(p), count - 2) for p, count in zip(place, (x, y, z))]
    pairs = []
    for dx in (0, 1):
        for dy in (0, 1):
            for dz in (0, 1):
                weight = 1.0
                for p, start, offset in zip(place, low, (dx, dy, dz)):
                    weight *= p - start if offset else 1 - (p - start)
                pairs.append((((low[2] + dz) * y + low[1] + dy) * x + low[0] + dx, weight))
    return pairs


def _march(field, origin, direction, step):
    """Color without background, opacity and mean distance of one ray, sample by sample in float64."""
    low, high = field.bounds.double().numpy()
    counts = np.array(field.shape.tolist()[::-1])
    cells = field.occupancy.cells.numpy()
    raw = field.density_table.detach().double().numpy()
    table, row = field.feature_table.detach().double().numpy(), field.row.numpy()
    shift, unit_length = math.log(1 / (1 - ALPHA) - 1), float((BOX[1] - BOX[0]).mean()) / 96
    first, second = (low - origin) / direction, (high - origin) / direction
    near, far = np.minimum(first, second).max(), np.maximum(first, second).min()
    light, own, summed, distance_sum = 1.0, np.zeros(3), np.zeros(table.shape[1]), 0.0
    for distance in np.arange(near + 0.5 * step, far, step):
        unit = (origin + distance * direction - low) / (high - low)
        x, y, z = np.clip((unit * len(cells)).astype(int), 0, len(cells) - 1)
        if not cells[z, y, x]:
            continue
        pairs = _trilinear(field, unit * (counts - 1))
        tau = math.log1p(math.exp(sum(w * raw[i] for i, w in pairs) + shift)) / unit_length * step
        weight = light * -math.expm1(-tau)
        light *= math.exp(-tau)
        features = sum(w * table[row[i]] for i, w in pairs)
        own += weight * _sigmoid(features[:3])
        summed += weight * features
        distance_sum += weight * distance
    opacity = 1 - light
    rgb = own + opacity * _decode(field, summed, direction)
    return rgb, opacity, distance_sum / opacity if opacity > 1e-4 else 0.0


@pytest.fixture(scope="module")
def compared():
    """A field without floors, rays, and what plain loops see along them."""
    field = _field(cells=_random_cells(8, 0.6, seed=1), level=13, alpha_floor=0.0, weight_floor=0.0)
    origins, directions = _rays(40, 4)
    step = 0.5 * field.voxel
    seen = [_march(field, o, d, step) for o, d in zip(origins.double().numpy(), directions.double().numpy())]
    rgb, opacity, depth = (torch.tensor(np.array(part)) for part in zip(*seen))
    return field, origins, directions, rgb, opacity, depth


@pytest.mark.parametrize("background", [BLACK, torch.tensor([0.2, 0.5, 0.9])])
def test_rendering_agrees_with_plain_loops(compared, background):
    field, origins, directions, rgb, opacity, depth = compared
    assert opacity.amin() < 0.5
    assert opacity.amax() > 0.999
    found = field.render(origins, directions, background)
    # Samples that less than 1e-3 of the light reaches are left out; colors are 2 at most.
    expected = rgb + (1 - opacity[:, None]) * background
    torch.testing.assert_close(found.rgb.double(), expected, rtol=0, atol=2.5e-3)
    torch.testing.assert_close(found.opacity.double(), opacity, rtol=0, atol=1.1e-3)
    # The box is 3.5 across.
    torch.testing.assert_close(found.depth.double(), depth, rtol=0, atol=4e-3)
    # Where light passes nothing is left out: up to 60 samples, of numbers that are rounded to 1e-6.
    thin = opacity < 1 - 2e-3
    assert thin.sum() > 5
    torch.testing.assert_close(found.rgb[thin].double(), expected[thin], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.opacity[thin].double(), opacity[thin], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.depth[thin].double(), depth[thin], rtol=0, atol=1e-4)


@pytest.mark.parametrize("quality", [0.5, 2.0])
def test_quality_divides_the_step(compared, quality):
    field, origins, directions, *_ = compared
    found = field.render(origins, directions, BLACK, quality=quality)
    with torch.no_grad():
        expected = field.trace(origins, directions, 0.5 * field.voxel / quality)
    assert torch.equal(found.rgb, expected.rgb)


def test_floors_leave_out_only_what_is_below_them(compared):
    field, origins, directions, *_ = compared
    floored = _field(cells=field.occupancy.cells, level=13, alpha_floor=1e-3, weight_floor=2e-4)
    floored.load_state_dict(field.state_dict())
    with torch.no_grad():
        exact = field.trace(origins, directions, 0.5 * field.voxel)
        found = floored.trace(origins, directions, 0.5 * field.voxel)
    assert len(found.weights) < found.num_samples < exact.num_samples
    assert float(found.weights.amin()) > 2e-4
    counts = [torch.bincount(traced.samples.ray, minlength=40) for traced in (exact, found)]
    lost = int((counts[0] - counts[1]).amax())
    assert lost == 2
    # Each of them absorbs 1e-3 of the light at most, or weighs 2e-4; colors are 2 at most.
    assert float((found.opacity - exact.opacity).abs().amax()) < lost * 1e-3
    assert float((found.rgb - exact.rgb).abs().amax()) < lost * 2e-3


def test_rays_that_meet_nothing_show_exactly_the_background():
    field = _field(cells=_random_cells(8, 0.05, seed=3))
    origins, directions = _rays(200, 6)
    background = torch.tensor([0.25, 0.5, 1.0])
    rendered = field.render(origins, directions, background)
    empty = rendered.opacity == 0
    assert 20 < int(empty.sum()) < 180
    assert (rendered.rgb[empty] == background).all()
    assert (rendered.depth[empty] == 0).all()
    away = field.render(origins, -directions, background)
    assert (away.rgb == background).all()
    assert (away.opacity == 0).all()
    none = field.render(origins[:0], directions[:0], background)
    assert [part.shape for part in none] == [(0, 3), (0,), (0,)]


@pytest.mark.parametrize("interpolate", [False, True])
def test_a_batch_that_meets_nothing_has_gradients_of_0(interpolate):
    field = _field()
    origins, directions = _rays(20, 6)
    generator = torch.Generator().manual_seed(0)
    traced = field.trace(origins, -directions, field.voxel, generator, interpolate=interpolate)
    assert traced.num_samples == 0
    assert (traced.rgb == 0).all()
    ((traced.rgb + 1).square().sum() + traced.opacity.sum()).backward()
    for name, parameter in field.named_parameters():
        # DDP waits for the gradient of every parameter.
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


# --- training ---


def test_results_depend_on_the_generator_only():
    field = _field()
    origins, directions = _rays(100, 7)

    def step(seed):
        field.zero_grad()
        traced = field.trace(origins, directions, field.voxel, torch.Generator().manual_seed(seed))
        traced.rgb.square().sum().backward()
        return [traced.rgb.detach(), *(p.grad.clone() for p in field.parameters())]

    before, first = torch.random.get_rng_state(), step(0)
    for a, b in zip(first, step(0)):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], step(1)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drawing_and_interpolating_differ_only_in_features():
    field = _field(level=5)
    origins, directions = _rays(40, 8)

    def rgb(interpolate):
        generator = torch.Generator().manual_seed(0)
        return field.trace(origins, directions, field.voxel, generator, interpolate=interpolate).rgb.detach()

    assert float((rgb(False) - rgb(True)).abs().amax()) > 0.1
    with torch.no_grad():
        field.feature_table[1:] = field.feature_table[1]
    torch.testing.assert_close(rgb(False), rgb(True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("name", ["density_table", "feature_table", "decoder.0.weight", "decoder.4.bias"])
def test_gradients_are_finite_differences(name, interpolate):
    # Thin enough that light reaches every sample.
    field = _field(cells=_random_cells(8, 0.6, seed=1), level=5, alpha_floor=0.0, weight_floor=0.0)
    with torch.no_grad():
        field.density_table.mul_(0.2)
    origins, directions = _rays(60, 8)
    parameter = dict(field.named_parameters())[name]

    def score():
        generator = torch.Generator().manual_seed(3)
        traced = field.trace(origins, directions, field.voxel, generator, interpolate=interpolate)
        assert traced.opacity.amax() < 0.99
        return (traced.rgb.double().square().sum() + traced.opacity.double().square().sum()) / 10

    score().backward()
    flat, step = parameter.data.view(-1), 1e-2
    for index in parameter.grad.view(-1).abs().topk(3).indices.tolist():
        slopes, before = [], float(flat[index])
        for side in (step, -step):
            flat[index] = before + side
            slopes.append(float(score().detach()))
        flat[index] = before
        found = (slopes[0] - slopes[1]) / (2 * step)
        # Rounding of 60 colors: 1e-6 / 0.02; curvature adds as little to slopes of order 0.1.
        assert float(parameter.grad.view(-1)[index]) == pytest.approx(found, rel=1e-2, abs=1e-3)
        assert abs(found) > 5e-3


# --- finer levels ---


@pytest.mark.parametrize("level", [(5, 9), (9, 10), (12, 17)])
@pytest.mark.parametrize("shrink", [False, True])
def test_any_finer_level_has_the_same_linear_field(level, shrink):
    field = _field(level=level[0])
    # Interpolation keeps numbers that are linear in the position on any grid.
    unit = (_vertices(field) - BOX[0]) / (BOX[1] - BOX[0])
    rows = field.row[: len(unit)].long()
    slopes = torch.randn(3, field.feature_table.shape[1], generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        field.density_table[: len(unit)] = unit @ torch.tensor([4.0, -3.0, 2.0]) + 3
        field.feature_table[rows] = unit @ slopes
        field.feature_table[0] = 0
    marked = torch.zeros(8, 8, 8, dtype=torch.bool)
    marked[2:5, 3:7, 1:6] = True
    field.occupancy.set(marked)
    points = _points(4000, 12, cells=marked)
    assert len(points) > 200
    directions = _unit(len(points), 13)
    density, color = field.density(points).detach(), field.color(points, directions)
    field.upsample(level[1], shrink=shrink)
    assert torch.equal(field.bounds, BOX) != shrink
    # Sums of a few numbers below 10 in float32, in a box that may have become smaller.
    torch.testing.assert_close(field.density(points).detach(), density, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(field.color(points, directions), color, rtol=0, atol=1e-4)
    assert (field.feature_table[0] == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_constant_color_stays_so_up_to_the_rim_of_the_cells(share):
    cells = _random_cells(13, share, seed=1)
    field = _field(level=9, cells=cells)
    with torch.no_grad():
        field.feature_table[1:] = torch.tensor([1.5, -1.0, 0.5, 2.0, -0.7])
    points = _points(20000, 14, cells=cells)
    directions = _unit(len(points), 15)
    color = field.color(points, directions)
    field.upsample(12)
    torch.testing.assert_close(field.color(points, directions), color, rtol=0, atol=1e-3)


def test_too_few_rows_make_a_level_coarser():
    field = _field(level=9, rows=1200)
    assert field.begin(BOX, _all_cells(8), 9, ALL) == 9
    found = field.upsample(17)
    assert tuple(field.shape.tolist()) == level_shape(BOX, found)
    # Every vertex has a row here. The next finer level would not fit.
    assert 900 < math.prod(field.shape.tolist()) == int(field.row.max()) < 1200
    with pytest.raises(ValueError, match="8 rows are too few"):
        _field(level=9, rows=8)


@pytest.mark.parametrize("low", [(3, 4, 5), (8, 2, 0)], ids=["in the middle", "at the border"])
def test_a_box_that_shrinks_keeps_its_marked_cells(low):
    cells = torch.zeros(13, 13, 13, dtype=torch.bool)
    region = tuple(slice(at, at + size) for at, size in zip(low, (5, 4, 4)))
    cells[region] = _random_cells(5, 0.5, 0)[:, :4, :4]
    field = _field(cells=_all_cells(13))
    field.hull.copy_(cells)
    field.occupancy.set(cells)
    points = _points(30000, 0, cells=cells)
    assert _marked(field, points).all()
    field.upsample(9, shrink=True)
    assert _marked(field, points).all()
    # The hull is in the new box, too.
    field.occupancy.set(field.hull)
    assert _marked(field, points).all()
    # One more of the old cells on each side, unless the box ends there.
    side = (BOX[1] - BOX[0]) / 13
    marked = cells.nonzero().flip(1)
    low, high = (marked.amin(0) - 1).clamp(min=0), (marked.amax(0) + 2).clamp(max=13)
    expected = torch.stack([BOX[0] + low * side, BOX[0] + high * side])
    torch.testing.assert_close(field.bounds, expected, rtol=0, atol=1e-5)


# --- the occupancy of a field ---


def _make_matter(field, matter):
    """Raw density 10 at some vertices, bool [z, y, x]: 98.5 percent of a 96th; nothing elsewhere."""
    with torch.no_grad():
        field.density_table.fill_(-10.0)
        field.density_table[: matter.numel()][matter.view(-1)] = 10.0


def _ball(field, center, radius):
    return ((_vertices(field) - center).norm(dim=1) < radius).view(field.shape.tolist())


def _refresh(field, threshold):
    """Refreshes the occupancy as if light reached everything."""
    return field.refresh_occupancy(threshold, torch.ones_like(field.occupancy.cells))


@pytest.mark.parametrize("thing", ["a sheet", "a rod", "a dot"])
@pytest.mark.parametrize(("level", "cells"), [(17, 16), (12, 32), (24, 16)])
def test_refreshing_loses_nothing_that_is_one_vertex_thick(thing, level, cells):
    lost = []
    field = _field(bounds=CUBE, level=level, cells=_all_cells(cells), resolution=level)
    for index in range(level):
        matter = torch.zeros((level,) * 3, dtype=torch.bool)
        matter[{"a sheet": (index,), "a rod": (index, index), "a dot": (index, index, index)}[thing]] = True
        _make_matter(field, matter)
        field.occupancy.set(_all_cells(cells))
        # A vertex on the box's upper face belongs to the last cell.
        places = _vertices(field)[matter.view(-1)].clamp(-0.999, 0.999)
        if not _refresh(field, 5e-3) or not _marked(field, places).all():
            lost.append(index)
    assert lost == []


def test_refreshing_marks_nothing_outside_of_the_hull():
    hull = _random_cells(16, 0.3, seed=5)
    field = _field(bounds=CUBE, level=16, cells=hull)
    _make_matter(field, torch.ones(16, 16, 16, dtype=torch.bool))
    field.occupancy.set(hull & _random_cells(16, 0.5, seed=6))
    _refresh(field, 5e-3)
    assert torch.equal(field.occupancy.cells, hull)


def test_the_share_of_matter_at_the_faces_by_hand():
    field = _field(bounds=CUBE, level=9, cells=_all_cells(8))
    matter = torch.zeros(9, 9, 9, dtype=torch.bool)
    matter[4, 4, 4] = True  # marks the 4x4x4 cells around it
    _make_matter(field, matter)
    _refresh(field, 5e-3)
    assert field.share_at_faces(0.1) == 0.0
    matter[0, 4, 4] = True  # marks 2x4x4 cells, half of them at a face
    _make_matter(field, matter)
    _refresh(field, 5e-3)
    assert field.share_at_faces(0.1) == pytest.approx(16 / (64 + 32))
    assert field.share_at_faces(0.999) == 0.0


def test_refreshing_an_empty_field_changes_nothing_and_says_so():
    field = GridField(resolution=16, rows=5000, occupancy_resolution=8, alpha=ALPHA)
    cells = _random_cells(8, 0.5, seed=7)
    field.begin(CUBE, cells, 16, ALL)
    assert _refresh(field, 0.9 * ALPHA)
    assert not _refresh(field, 1.1 * ALPHA)
    origins, directions = _rays(20, 1, CUBE)
    assert not field.refresh_occupancy(0.9 * ALPHA, field.lit_cells([(origins, -directions)]))
    assert torch.equal(field.occupancy.cells, cells)


@pytest.mark.parametrize("shrink", [False, True])
def test_marked_cells_have_features_after_every_upsampling(shrink):
    field = _field(bounds=CUBE, level=5, cells=_all_cells(16), resolution=17)
    _make_matter(field, _ball(field, torch.tensor([0.1, -0.2, 0.0]), 0.4))
    for resolution in (9, 17):
        _refresh(field, 5e-3)
        field.upsample(resolution, shrink=shrink)
        kept = field.density_table.detach().clone()
        with torch.no_grad():
            field.density_table.fill_(10.0)  # even if matter is everywhere
        _refresh(field, 5e-3)
        shape = tuple(field.shape.tolist())
        needed = reachable_vertices(field.occupancy.cells, shape).view(-1)
        assert (field.row[: math.prod(shape)][needed] > 0).all()
        with torch.no_grad():
            field.density_table.copy_(kept)


def _orbit(count, distance, size=32, angle=0.7, offset=0.0):
    """Cameras spread over a sphere around the origin, all looking at it."""
    number = np.arange(count) + 0.5
    height = 1 - 2 * number / count
    turn, out = np.pi * (1 + 5**0.5) * number + offset, np.sqrt(1 - height**2)
    places = np.stack([out * np.cos(turn), out * np.sin(turn), height], 1) * distance
    return [camera_of(look_at(place, np.zeros(3)), size, size, angle) for place in places]


def _all_rays(cameras):
    bundles = [camera_rays(camera, torch.arange(camera.width * camera.height)) for camera in cameras]
    return torch.cat([o for o, _ in bundles]), torch.cat([d for _, d in bundles])


@pytest.mark.parametrize(("level", "cells"), [(12, 32), (33, 16)])
def test_refreshing_by_rays_hollows_things_and_changes_no_picture(level, cells):
    field = _field(bounds=CUBE, level=level, cells=_all_cells(cells), resolution=level)
    _make_matter(field, _ball(field, torch.zeros(3), 0.6))
    with torch.no_grad():
        field.density_table.mul_(3)
    rays = _all_rays(_orbit(20, 3.0, size=28))
    unseen = _all_rays(_orbit(3, 3.0, size=28, offset=1.0))
    before = [field.render(*bundle, WHITE) for bundle in (rays, unseen)]
    field.refresh_occupancy(5e-3, field.lit_cells(zip(rays[0].split(5000), rays[1].split(5000))))
    for bundle, old in zip((rays, unseen), before):
        new = field.render(*bundle, WHITE)
        # The 1e-3 of light that is not followed, and samples below the floors, in and out.
        assert float((new.opacity - old.opacity).abs().amax()) < 5e-3
        assert float((new.rgb - old.rgb).abs().amax()) < 2e-2
        torch.testing.assert_close(new.depth, old.depth, rtol=0, atol=2e-2)
    # Opaque in a third of a voxel: what lies deeper than a voxel, two steps and two cells is dark.
    deep = 0.6 - 3 * 2 / (level - 1) - math.sqrt(3) * 2 * 2 / cells
    occupied = field.occupancy.cells.view(-1)
    assert not occupied[grid_points(CUBE, (cells,) * 3, centered=True).norm(dim=1) < deep].any()
    assert 50 < int(occupied.sum()) < len(occupied)


# --- state ---


def test_a_loaded_field_renders_and_continues_with_the_same_bits():
    # At the second of three levels, in a box that has shrunk, with cells that were refreshed.
    field = _field(level=9, cells=_random_cells(13, 0.7, seed=1))
    field.upsample(12, shrink=True)
    with torch.no_grad():
        field.density_table.normal_(0, 6, generator=torch.Generator().manual_seed(3))
    _refresh(field, 0.3)
    fresh = _field(level=9, bounds=CUBE, cells=_all_cells(13), seed=9)
    fresh.load_state_dict(field.state_dict())
    origins, directions = _rays(200, 17)
    points = _points(200, 18)
    for _ in range(2):
        results = [
            [*one.render(origins, directions, WHITE), one.density(points), one.color(points, directions)]
            for one in (field, fresh)
        ]
        assert results[0][1].amax() > 0.9
        for a, b in zip(*results):
            assert torch.equal(a, b)
        assert fresh.voxel == field.voxel
        for one in (field, fresh):
            one.upsample(17)
            _refresh(one, 0.3)
    for a, b in zip(field.state_dict().values(), fresh.state_dict().values()):
        assert torch.equal(a, b)


def test_beginning_again_keeps_only_the_network():
    field = _field(level=9)
    field.upsample(17, shrink=True)
    field.begin(CUBE, _all_cells(8), 5, near_far=(1.0, 7.0))
    assert tuple(field.shape.tolist()) == (5, 5, 5)
    assert torch.equal(field.bounds, CUBE)
    assert field.occupancy.near_far.tolist() == [1.0, 7.0]
    assert (field.density_table == 0).all()
    assert (field.feature_table == 0).all()
    opacity = -torch.expm1(-field.density(_points(50, 0, CUBE)) * 2 / 96)
    torch.testing.assert_close(opacity, torch.full((50,), ALPHA), rtol=1e-4, atol=0)
