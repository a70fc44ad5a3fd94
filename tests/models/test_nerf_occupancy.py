"""Marching through marked cells, held against every step of every ray; hulls and visible pixels never miss.

Expectations are computed in float64. Where a place lies within `NEAR_BORDER` of a cell's border, float32 may
put it into either cell, and the tests take both.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest

# Without the extra `nerf` none of this is collected, so its modules come after the question.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.models.pytorch.nerf.occupancy import (
    Occupancy,
    box_of,
    grid_points,
    visual_hull,
)
from blacksmith.models.pytorch.nerf.rendering import camera_rays

NEAR_BORDER = 1e-3
"""In cells: what float32 makes of positions of up to 50 cells, seen from a few boxes away."""

BOX = torch.tensor([[-1.0, -0.6, -1.3], [1.2, 0.7, 1.0]])
CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3])


def _occupancy(cells, bounds=BOX, reach=(0.0, math.inf)):
    occupancy = Occupancy(len(cells))
    occupancy.bounds.copy_(bounds)
    occupancy.reach.copy_(torch.tensor(reach))
    occupancy.set(cells)
    return occupancy


def _random_cells(resolution, share, seed):
    return torch.rand((resolution,) * 3, generator=torch.Generator().manual_seed(seed)) < share


def _one_cell(resolution, x, y, z):
    cells = torch.zeros((resolution,) * 3, dtype=torch.bool)
    cells[z, y, x] = True
    return cells


def _random_rays(count, seed, bounds=BOX, inside=False):
    """Rays from around a box, or from inside of it, through random places in it."""
    generator = torch.Generator().manual_seed(seed)
    low, size = bounds[0], bounds[1] - bounds[0]
    targets = low + torch.rand(count, 3, generator=generator) * size
    if inside:
        origins = low + torch.rand(count, 3, generator=generator) * size
    else:
        outwards = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
        origins = bounds.mean(0) + 1.8 * float(size.norm()) * outwards
    return origins, torch.nn.functional.normalize(targets - origins, dim=1)


def _steps(occupancy, origins, directions, step, shift=0.5):
    """All places of a ray at even steps from where it enters the box, and how deep in marked cells they are.

    Returns:
      Distances [rays, steps] and, in cells, how deep a place is inside of the marked cell that it is in
      [rays, steps], NaN in unmarked cells; the distances where rays enter [rays, 1].
    """
    low, high = occupancy.bounds.double()
    origins, directions = origins.double(), directions.double()
    first = (low - origins) / directions
    second = (high - origins) / directions
    outside = (directions == 0) & ((origins < low) | (origins >= high))
    enter = torch.minimum(first, second).nan_to_num(-math.inf).amax(1)
    leave = torch.maximum(first, second).nan_to_num(math.inf).amin(1)
    near = enter.clamp(min=float(occupancy.reach[0]))
    far = leave.clamp(max=float(occupancy.reach[1]))
    far[outside.any(1)] = -1
    near[outside.any(1)] = 0
    most = max(1, int(float((far - near).amax()) / step) + 2)
    distance = near[:, None] + (torch.arange(most) + shift) * step
    place = (origins[:, None] + directions[:, None] * distance[..., None] - low) / (high - low)
    place = place * occupancy.resolution
    cell = place.floor()
    within = ((cell >= 0) & (cell < occupancy.resolution)).all(-1) & (distance < far[:, None])
    x, y, z = cell.long().clamp(0, occupancy.resolution - 1).unbind(-1)
    marked = occupancy.cells[z, y, x] & within
    deep = torch.minimum(place - cell, cell + 1 - place).amin(-1)
    return distance, torch.where(marked, deep, math.nan), near[:, None]


def _check_march(occupancy, origins, directions, step):
    """Asserts that a march finds exactly the places that `_steps` does; returns how many those are."""
    samples, unit = occupancy.march(origins, directions, step)
    _, deep, near = _steps(occupancy, origins, directions, step)
    number = (samples.distance.double() - near[samples.ray, 0]) / step - 0.5
    index = number.round().long()
    # 2e-6: float32's rounding of distances of up to 16.
    assert len(index) == 0 or float((number - index).abs().amax()) * step < 2e-5
    key = samples.ray * (deep.shape[1] + 1) + index
    assert (key.diff() > 0).all()
    found = torch.zeros(deep.shape, dtype=torch.bool)
    found[samples.ray, index] = True
    missed = (deep > NEAR_BORDER) & ~found
    assert not missed.any(), f"{int(missed.sum())} of {int((deep > NEAR_BORDER).sum())} places are missing"
    _check_marked(occupancy, origins, directions, samples, unit)
    return int((deep > NEAR_BORDER).sum())


def _check_marked(occupancy, origins, directions, samples, unit):
    """Asserts that every sample is in a marked cell, or on its border, and where it is said to be."""
    low, high = occupancy.bounds.double()
    points = origins[samples.ray].double() + directions[samples.ray].double() * samples.distance[:, None]
    place = (points - low) / (high - low)
    torch.testing.assert_close(unit.double(), place, rtol=0, atol=1e-5)
    assert ((unit >= 0) & (unit < 1)).all()
    within = torch.zeros(len(place), dtype=torch.bool)
    for dx, dy, dz in torch.cartesian_prod(*[torch.tensor([-NEAR_BORDER, NEAR_BORDER])] * 3):
        near = (place * occupancy.resolution + torch.stack([dx, dy, dz])).floor().long()
        x, y, z = near.clamp(0, occupancy.resolution - 1).unbind(-1)
        within |= occupancy.cells[z, y, x]
    assert within.all()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of PyTorch's would spend their time waiting for one another, where tests share few cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- marching ---


def test_a_ray_through_one_cell_has_its_samples_there_by_hand():
    # Cells of 1; the marked one is x in [2, 3), y in [1, 2), z in [0, 1).
    occupancy = _occupancy(_one_cell(4, 2, 1, 0), torch.tensor([[0.0] * 3, [4.0] * 3]))
    origins = torch.tensor([[-2.0, 1.25, 0.5], [-2.0, 2.25, 0.5]])
    directions = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    samples, unit = occupancy.march(origins, directions, 0.5)
    # The ray enters at 2 and has samples at 2.25, 2.75, ...: in the cell those at 4.25 and 4.75.
    assert samples.ray.tolist() == [0, 0]
    assert samples.ray.dtype == torch.int64
    assert samples.length == 0.5
    torch.testing.assert_close(samples.distance, torch.tensor([4.25, 4.75]), rtol=0, atol=1e-6)
    expected = torch.tensor([[2.25, 1.25, 0.5], [2.75, 1.25, 0.5]]) / 4
    torch.testing.assert_close(unit, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "resolution"), [(BOX, 8), (BOX, 13), (BOX, 30), (CUBE, 13)], ids=["8", "13", "30", "a cube"]
)
@pytest.mark.parametrize("cells_per_step", [0.5, 1.0, 2.7, 7.0, 11.0])
def test_a_march_finds_every_step_in_a_marked_cell_and_no_other(bounds, resolution, cells_per_step):
    step = cells_per_step * float((bounds[1] - bounds[0]).min()) / resolution
    total = 0
    for share in (0.002, 0.05, 1.0):
        occupancy = _occupancy(_random_cells(resolution, share, seed=resolution), bounds)
        total += _check_march(occupancy, *_random_rays(100, 1, bounds), step)
        total += _check_march(occupancy, *_random_rays(50, 2, bounds, inside=True), step)
    assert total > 100


def test_no_single_cell_is_missed_wherever_it_lies():
    resolution, found = 11, 0
    step = 0.4 * float((BOX[1] - BOX[0]).min()) / resolution
    for seed in range(30):
        x, y, z = np.random.default_rng(seed).integers(0, resolution, 3).tolist()
        occupancy = _occupancy(_one_cell(resolution, x, y, z))
        centre = BOX[0] + (torch.tensor([x, y, z]) + 0.5) / resolution * (BOX[1] - BOX[0])
        origins, _ = _random_rays(20, seed)
        directions = torch.nn.functional.normalize(centre - origins, dim=1)
        count = _check_march(occupancy, origins, directions, step)
        # A ray through the middle of a cell is in it for at least its shortest side.
        assert count >= 20
        found += count
    assert found > 600


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rays_along_an_axis_find_every_step_too(axis, sign):
    origins, _ = _random_rays(100, 3, inside=True)
    directions = torch.zeros(100, 3)
    directions[:, axis] = sign
    # Half of them begin outside, and some of those beside the box.
    origins[:50, axis] -= sign * 4
    origins[40:50, axis - 1] += 5
    occupancy = _occupancy(_random_cells(13, 0.1, seed=7))
    assert _check_march(occupancy, origins, directions, 0.05) > 100
    samples, _ = occupancy.march(origins[40:50], directions[40:50], 0.05)
    assert len(samples.ray) == 0


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("resolution", [13, 26])
def test_no_cell_is_missed_by_a_ray_along_an_axis_which_stays_in_one_row_of_blocks(axis, resolution):
    # Its segments are the longest in cells, and blocks beside their middles the only ones to see the cell.
    size = BOX[1] - BOX[0]
    step = 0.9 * float(size.min()) / resolution
    found = 0
    for number in range(resolution):
        place = [1, resolution // 2, resolution - 2]
        place[axis] = number
        occupancy = _occupancy(_one_cell(resolution, *place))
        origins = (BOX[0] + (torch.tensor(place) + 0.5) / resolution * size).repeat(16, 1)
        directions = torch.zeros(16, 3)
        directions[:8, axis], directions[8:, axis] = 1.0, -1.0
        # Rays that begin at different places inside of the box, besides those from outside.
        origins[:8, axis] = BOX[0, axis] + torch.linspace(-1, 0.45, 8) * size[axis]
        origins[8:, axis] = BOX[1, axis] - torch.linspace(-1, 0.45, 8) * size[axis]
        found += _check_march(occupancy, origins, directions, step)
    # Steps of at most 0.9 cells: those from outside find each cell.
    assert found >= 10 * resolution


@pytest.mark.parametrize("direction", [[1.0, 0, 0], [1.0, -0.0, -0.0]])
def test_a_ray_along_the_border_of_cells_belongs_to_the_upper_one(direction):
    bounds = torch.tensor([[0.0] * 3, [8.0] * 3])
    origins = torch.tensor([[-1.0, y, z] for y in range(9) for z in range(9)])
    directions = torch.tensor([direction]).expand(81, 3)
    cells = _random_cells(8, 0.4, seed=1)
    samples, _ = _occupancy(cells, bounds).march(origins, directions, 1.0)
    # Steps of a whole cell: one sample in the middle of each.
    found = torch.zeros(9, 9, 8, dtype=torch.bool)
    found.view(81, 8)[samples.ray, (samples.distance - 1).long()] = True
    expected = torch.zeros(9, 9, 8, dtype=torch.bool)
    expected[:8, :8] = cells.permute(1, 0, 2)
    assert torch.equal(found, expected)


def test_a_ray_that_starts_on_the_box_or_in_a_corner_is_followed():
    occupancy = _occupancy(torch.ones(8, 8, 8, dtype=torch.bool), torch.tensor([[0.0] * 3, [8.0] * 3]))
    origins = torch.tensor([[0.0, 4.5, 4.5], [0.0, 0.0, 0.0], [8.0, 4.5, 4.5], [8.0, 4.5, 4.5]])
    directions = torch.tensor([[1.0, 0, 0], [1.0, 1, 1], [-1.0, 0, 0], [1.0, 0, 0]])
    directions = torch.nn.functional.normalize(directions, dim=1)
    samples, _ = occupancy.march(origins, directions, 0.5)
    counts = torch.bincount(samples.ray, minlength=4).tolist()
    # Sides of 8 and a diagonal of 8 sqrt(3) = 13.86, in steps of 0.5; the last ray leaves at once.
    assert counts == [16, 28, 16, 0]


def test_rays_that_miss_the_box_or_look_away_have_no_samples():
    origins, directions = _random_rays(50, 4)
    occupancy = _occupancy(torch.ones(8, 8, 8, dtype=torch.bool))
    assert len(occupancy.march(origins, directions, 0.1)[0].ray) > 50
    aside = torch.nn.functional.normalize(torch.linalg.cross(directions, origins - BOX.mean(0)), dim=1)
    for away in (-directions, aside):
        samples, unit = occupancy.march(origins, away, 0.1)
        assert len(samples.ray) == len(samples.distance) == 0
        assert unit.shape == (0, 3)


def test_no_marked_cell_and_no_ray_have_no_samples():
    origins, directions = _random_rays(5, 4)
    empty = _occupancy(torch.zeros(8, 8, 8, dtype=torch.bool))
    assert len(empty.march(origins, directions, 0.1)[0].ray) == 0
    full = _occupancy(torch.ones(8, 8, 8, dtype=torch.bool))
    assert len(full.march(origins[:0], directions[:0], 0.1)[0].ray) == 0


@pytest.mark.parametrize("step", [0.03, 0.2])
def test_samples_keep_to_the_reach(step):
    origins, directions = _random_rays(100, 5)
    everything = _occupancy(torch.ones(16, 16, 16, dtype=torch.bool))
    samples, _ = everything.march(origins, directions, step)
    near, far = torch.quantile(samples.distance, torch.tensor([0.3, 0.6])).tolist()
    some = _occupancy(torch.ones(16, 16, 16, dtype=torch.bool), reach=(near, far))
    for generator in (None, torch.Generator().manual_seed(0)):
        found, _ = some.march(origins, directions, step, generator)
        assert len(found.ray) > 100
        # Distances of about 6 are rounded by 5e-7.
        assert float(found.distance.amin()) >= near - 1e-6
        assert float(found.distance.amax()) <= far + 1e-6
    _check_march(some, origins, directions, step)


def test_jitter_moves_a_ray_s_samples_together_by_less_than_a_step_and_evenly():
    origins, directions = _random_rays(2000, 6)
    occupancy = _occupancy(_random_cells(12, 0.3, seed=2))
    step = 0.07
    samples, unit = occupancy.march(origins, directions, step, torch.Generator().manual_seed(1))
    _check_marked(occupancy, origins, directions, samples, unit)
    _, _, near = _steps(occupancy, origins, directions, step)
    number = (samples.distance.double() - near[samples.ray, 0]) / step
    assert (samples.ray.diff() >= 0).all()
    same = samples.ray.diff() == 0
    assert (samples.distance.diff()[same] > 0).all()
    # Whole steps between the samples of a ray; distances of 6 in steps of 0.07 are rounded by 1e-5.
    between = number.diff()[same]
    torch.testing.assert_close(between, between.round(), rtol=0, atol=1e-4)
    first = torch.cat([torch.tensor([True]), ~same])
    shift = number[first] % 1
    assert len(shift) > 1500
    # The mean of 1500 numbers spread evenly over [0, 1) is within 4 * 0.29 / sqrt(1500) = 0.03 of 1/2.
    assert float(shift.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shift.amin()) < 0.02
    assert float(shift.amax()) > 0.98


def test_a_jittered_march_misses_no_place_either():
    origins, directions = _random_rays(200, 7)
    occupancy = _occupancy(_random_cells(13, 0.02, seed=3))
    step = 0.04
    samples, _ = occupancy.march(origins, directions, step, torch.Generator().manual_seed(2))
    # The same generator gives the same shifts, one for each ray.
    shift = torch.rand(200, 1, generator=torch.Generator().manual_seed(2)).double()
    distance, deep, _ = _steps(occupancy, origins, directions, step, shift)
    for ray, number in (deep > NEAR_BORDER).nonzero().tolist():
        own = samples.distance[samples.ray == ray].double()
        assert float((own - distance[ray, number]).abs().amin()) < 1e-5
    assert (deep > NEAR_BORDER).sum() > 100


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    origins, directions = _random_rays(50, 8)
    occupancy = _occupancy(_random_cells(12, 0.3, seed=2))

    def march(seed):
        return occupancy.march(origins, directions, 0.1, torch.Generator().manual_seed(seed))[0].distance

    assert torch.equal(march(1), march(1))
    assert march(1).tolist() != march(2).tolist()


@pytest.mark.parametrize("unit_of_length", [1e-3, 1e3, 1e5])
def test_a_march_does_not_depend_on_the_unit_of_length(unit_of_length):
    # A picture whose middle column and row look almost along an axis.
    camera = Camera.of_angle(look_at((0.1, -4.0, 0.1), (0.1, 0, 0.1)), 31, 31, angle_x=0.5)
    origins, directions = camera_rays(camera, torch.arange(961))
    cells = _random_cells(16, 0.1, seed=5)
    step = 0.06
    samples, unit = _occupancy(cells).march(origins, directions, step)
    scaled, scaled_unit = _occupancy(cells, BOX * unit_of_length).march(
        origins * unit_of_length, directions, step * unit_of_length
    )
    # Rounding may put a place on a border into another cell: 1 in 1000 at the most.
    assert len(scaled.ray) == pytest.approx(len(samples.ray), rel=1e-3)
    for ray in range(961):
        here, there = unit[samples.ray == ray], scaled_unit[scaled.ray == ray]
        if len(here) == len(there):
            torch.testing.assert_close(there, here, rtol=0, atol=1e-4)


# --- cells ---


@pytest.mark.parametrize("resolution", [8, 13])
def test_holds_says_of_points_whether_their_cell_is_marked(resolution):
    cells = _random_cells(resolution, 0.3, seed=1)
    occupancy = _occupancy(cells)
    centres = occupancy.centres()
    assert torch.equal(occupancy.holds(centres).view(cells.shape), cells)
    size = BOX[1] - BOX[0]
    for move in torch.cartesian_prod(*[torch.tensor([-0.49, 0.49])] * 3):
        assert torch.equal(occupancy.holds(centres + move * size / resolution).view(cells.shape), cells)
    full = _occupancy(torch.ones_like(cells))
    outside = torch.tensor([[0.0, 0, 1.001], [0, 0, -1.301], [0, 0.701, 0], [-1.001, 0, 0], [99, 0, 0]])
    assert not full.holds(outside).any()
    assert full.holds(torch.zeros(1, 3)).all()


def test_centres_by_hand():
    occupancy = _occupancy(
        torch.ones(2, 2, 2, dtype=torch.bool), torch.tensor([[0.0, 10, 20], [4.0, 14, 28]])
    )
    # x runs fastest; sides of 2, 2 and 4.
    expected = [[1, 11, 22], [3, 11, 22], [1, 13, 22], [3, 13, 22], [1, 11, 26], [3, 11, 26], [1, 13, 26]]
    assert occupancy.centres()[:7].tolist() == expected


def test_grid_points_span_the_box_from_corner_to_corner():
    points = grid_points(torch.tensor([[0.0, 10, 20], [4.0, 14, 28]]), (2, 1, 3))
    expected = [[0, 10, 20], [2, 10, 20], [4, 10, 20], [0, 10, 28], [2, 10, 28], [4, 10, 28]]
    assert points.tolist() == expected


def test_loading_restores_blocks_and_with_them_the_march_and_the_visible_pixels():
    occupancy = _occupancy(_random_cells(13, 0.01, seed=4))
    camera = Camera.of_angle(look_at((3.0, 2.0, 1.0), (0, 0, 0)), 20, 16, angle_x=0.8)
    restored = Occupancy(13)
    # What is kept of the old cells must not survive.
    assert restored.visible_pixels(camera).any()
    restored.load_state_dict(occupancy.state_dict())
    assert not occupancy.blocks.all()
    assert torch.equal(restored.blocks, occupancy.blocks)
    assert torch.equal(restored.cells, occupancy.cells)
    assert torch.equal(restored.visible_pixels(camera), occupancy.visible_pixels(camera))
    rays = _random_rays(100, 9)
    expected, found = occupancy.march(*rays, 0.05), restored.march(*rays, 0.05)
    assert len(expected[0].ray) > 10
    assert torch.equal(found[0].ray, expected[0].ray)
    assert torch.equal(found[0].distance, expected[0].distance)


def test_blocks_are_not_stored():
    assert set(Occupancy(8).state_dict()) == {"bounds", "reach", "cells"}


# --- visible pixels ---

SCENES = {
    "a picture of everything": (look_at((4.0, 3.0, 2.0), (0, 0, 0)), (90.0, 70.0)),
    "half of it beside the picture": (look_at((4.0, 3.0, 2.0), (1.0, -1.0, 0.6)), (90.0, 70.0)),
    "from close by": (look_at((1.5, 0.9, 0.2), (0, 0, 0)), (40.0, 40.0)),
    "from very close by": (look_at((1.25, 0.1, 0.0), (0, 0.2, 0.1)), (40.0, 40.0)),
    "a wide angle": (look_at((2.0, 1.0, 0.5), (0, 0, 0)), (16.0, 16.0)),
    "a very wide angle, looking past it": (look_at((1.8, 1.2, 0.3), (1.0, -2.0, 0.0)), (12.0, 12.0)),
    "from inside": (look_at((0.1, 0.1, -0.2), (1.0, 0.2, 0.4)), (20.0, 20.0)),
    "away from it": (look_at((2.0, 1.0, 0.5), (4.0, 2.0, 1.0)), (40.0, 40.0)),
}


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("resolution", [9, 32])
def test_no_pixel_whose_ray_has_samples_is_left_out(name, resolution):
    pose, focal = SCENES[name]
    camera = Camera(pose, 64, 48, focal, (30.0, 26.0))
    origins, directions = camera_rays(camera, torch.arange(64 * 48))
    for seed, share in enumerate([0.0, 0.003, 0.3]):
        cells = _random_cells(resolution, share, seed)
        cells[resolution // 2, resolution // 3, resolution // 2] = True
        occupancy = _occupancy(cells)
        samples, _ = occupancy.march(origins, directions, 0.05)
        hit = torch.zeros(64 * 48, dtype=torch.bool)
        hit[samples.ray] = True
        visible = occupancy.visible_pixels(camera)
        assert visible.shape == (64 * 48,)
        missed = int((hit & ~visible).sum())
        assert missed == 0, f"{missed} of {int(hit.sum())} pixels are left out with {share} of the cells"


@pytest.mark.parametrize("slope", [0.36, 1.0, 2.0])
def test_every_corner_of_a_cell_is_visible_in_a_fine_picture(slope):
    # Pictures that reach `slope` to each side at a distance of 1, which stretch what is at their edges.
    random, size, looked_at = np.random.default_rng(0), 200, 0
    side = ((BOX[1] - BOX[0]) / 16).numpy()
    for _ in range(60):
        x, y, z = random.integers(0, 16, 3).tolist()
        centre = BOX[0].numpy() + (np.array([x, y, z]) + 0.5) * side
        away = random.normal(size=3)
        distance = random.uniform(0.8, 3)
        position = centre + distance * away / np.linalg.norm(away)
        target = centre + random.normal(size=3) * distance * slope * 0.6
        camera = Camera(look_at(position, target), size, size, (size / 2 / slope,) * 2, (size / 2, size / 2))
        # A hundredth inside of the cell.
        corners = centre + np.array(list(itertools.product((-0.495, 0.495), repeat=3))) * side
        pixels, depth = camera.project(corners)
        inside = (depth > 0) & ((pixels >= 0) & (pixels < size)).all(1)
        column, row = pixels[inside].astype(int).T
        looked_at += len(row)
        visible = _occupancy(_one_cell(16, x, y, z)).visible_pixels(camera).view(size, size)
        assert visible[row, column].all()
    assert looked_at > 150


def test_every_corner_of_a_cell_is_visible_where_a_wide_picture_stretches_it_most():
    # 800x100 pixels that reach 2 to either side at a distance of 1; cells are seen at 1.3 to 1.8.
    random, looked_at = np.random.default_rng(1), 0
    cells, side = 40, ((BOX[1] - BOX[0]) / 40).numpy()
    for _ in range(60):
        x, y, z = random.integers(0, cells, 3).tolist()
        centre = BOX[0].numpy() + (np.array([x, y, z]) + 0.5) * side
        turn, slope = random.uniform(0, 2 * np.pi), random.uniform(1.3, 1.8) * random.choice([-1, 1])
        ahead = np.array([np.cos(turn), np.sin(turn), 0])
        right = np.array([np.sin(turn), -np.cos(turn), 0])
        position = centre - random.uniform(0.6, 1.0) * (ahead + slope * right)
        camera = Camera(look_at(position, position + ahead), 800, 100, (200.0, 200.0), (400.0, 50.0))
        corners = centre + np.array(list(itertools.product((-0.495, 0.495), repeat=3))) * side
        pixels, _ = camera.project(corners)
        column, row = pixels[((pixels >= 0) & (pixels < (800, 100))).all(1)].astype(int).T
        looked_at += len(row)
        visible = _occupancy(_one_cell(cells, x, y, z)).visible_pixels(camera).view(100, 800)
        assert visible[row, column].all()
    assert looked_at > 400


def test_few_pixels_around_a_small_thing_are_visible():
    occupancy = _occupancy(_one_cell(32, 16, 16, 16))
    camera = Camera.of_angle(look_at((4.0, 3.0, 2.0), (0, 0, 0)), 200, 200, angle_x=0.7)
    visible = occupancy.visible_pixels(camera).view(200, 200)
    # The cell is 0.07 wide, 5.4 away: 3.5 pixels. Pairs of cells, their diagonal and whole pixels widen it.
    assert 4 <= int(visible.sum()) <= 20**2
    rows, columns = visible.nonzero().float().mean(0).tolist()
    xy, _ = camera.project(occupancy.centres().view(32, 32, 32, 3)[16, 16, 16][None].numpy())
    assert (columns + 0.5, rows + 0.5) == pytest.approx(tuple(xy[0]), abs=3)


def test_an_empty_grid_and_one_behind_the_camera_are_not_visible():
    camera = Camera.of_angle(look_at((4.0, 3.0, 2.0), (8.0, 6.0, 4.0)), 20, 20, angle_x=0.7)
    assert not _occupancy(torch.ones(8, 8, 8, dtype=torch.bool)).visible_pixels(camera).any()
    towards = Camera.of_angle(look_at((4.0, 3.0, 2.0), (0, 0, 0)), 20, 20, angle_x=0.7)
    assert not _occupancy(torch.zeros(8, 8, 8, dtype=torch.bool)).visible_pixels(towards).any()


def test_new_cells_change_what_is_visible():
    occupancy = _occupancy(_one_cell(16, 2, 8, 8))
    camera = Camera.of_angle(look_at((0.1, -4.0, 0.0), (0.1, 0, 0)), 40, 40, angle_x=0.7)
    left = occupancy.visible_pixels(camera).clone()
    occupancy.set(_one_cell(16, 13, 8, 8))
    right = occupancy.visible_pixels(camera)
    assert left.any()
    assert right.any()
    assert not (left & right).any()


# --- the visual hull ---

CENTRE, RADIUS = torch.tensor([0.1, -0.05, 0.0]), 0.45


def _sphere_views(count, distance, angle, size=64):
    """Cameras spread over a sphere of `distance` around the ball, and its masks."""
    number = np.arange(count) + 0.5
    height = 1 - 2 * number / count
    turn = np.pi * (1 + 5**0.5) * number
    around = np.stack([np.cos(turn), np.sin(turn), height], 1)
    around[:, :2] *= np.sqrt(1 - height**2)[:, None]
    cameras, masks = [], []
    for direction in around:
        pose = look_at(CENTRE.numpy() + distance * direction, CENTRE.numpy() + (0.05, 0.1, -0.1))
        camera = Camera.of_angle(pose, size, size - 8, angle)
        camera = dataclasses.replace(camera, centre=(camera.centre[0] + 1.7, camera.centre[1]))
        origins, directions = camera_rays(camera, torch.arange(size * (size - 8)))
        along = ((CENTRE - origins) * directions).sum(1)
        off = (CENTRE - origins).square().sum(1) - along.square()
        masks.append(((off < RADIUS**2) & (along > 0)).view(size - 8, size))
        cameras.append(camera)
    return torch.stack(masks), cameras


def _meets_ball(resolution, bounds, radius):
    """Cells that come closer to the ball's centre than `radius`, bool [z, y, x]."""
    side = (bounds[1] - bounds[0]) / resolution
    centres = grid_points(bounds, (resolution,) * 3, centred=True)
    nearest = torch.maximum((centres - CENTRE).abs() - side / 2, torch.zeros(3))
    return (nearest.norm(dim=1) < radius).view((resolution,) * 3)


VIEWS = {"narrow": (5.0, 0.5), "middling": (2.5, 1.0), "wide and close": (0.9, 1.9)}


@pytest.mark.parametrize(
    ("name", "resolution"),
    [("narrow", 24), ("narrow", 31), ("middling", 24), ("middling", 64), ("wide and close", 31)],
)
def test_the_hull_of_a_ball_holds_it_and_is_not_much_larger(name, resolution):
    masks, cameras = _sphere_views(20, *VIEWS[name])
    hull = visual_hull(masks, cameras, BOX, resolution)
    assert hull.shape == (resolution,) * 3
    # A mask is as fine as its pixels: half of one at the ball's centre is not asked for.
    pixel = VIEWS[name][0] / cameras[0].focal[0]
    missing = _meets_ball(resolution, BOX, RADIUS - pixel) & ~hull
    assert not missing.any(), f"{int(missing.sum())} cells of the ball are missing"
    side = (BOX[1] - BOX[0]) / resolution
    volume = float(hull.sum() * side.prod())
    # 20 cones leave some room around a ball, cells add their diagonal and masks three pixels, on every side.
    widest = RADIUS * 1.15 + 1.5 * float(side.norm()) + 3 * pixel
    if name != "wide and close":
        assert volume < 4 / 3 * math.pi * widest**3


@pytest.mark.parametrize("beside", [-6.0, -1.0, 0.0, 1.0, 2.0, 6.0])
def test_a_ball_cut_by_the_edge_of_a_picture_or_just_beside_it_stays_whole(beside):
    # The ball is 32 pixels wide, and the picture begins so many pixels to the right of its right side.
    focal = 16 / math.tan(math.asin(RADIUS / 2.5))
    pose = look_at(CENTRE.numpy() + (0.0, -2.5, 0.0), CENTRE.numpy())
    camera = Camera(pose, 40, 40, (focal, focal), (-16.0 - beside, 20.0))
    origins, directions = camera_rays(camera, torch.arange(1600))
    away = torch.linalg.cross(CENTRE - origins, directions).norm(dim=1)
    mask = (away < RADIUS).view(1, 40, 40)
    assert mask.any() == (beside < 0)
    hull = visual_hull(mask, [camera], CUBE, 16)
    missing = _meets_ball(16, CUBE, RADIUS - 2.5 / focal) & ~hull
    assert not missing.any(), f"{int(missing.sum())} cells of the ball are missing"
    assert not hull.all()


def test_a_cell_outside_of_every_picture_stays_and_one_that_a_view_rules_out_goes():
    # One camera that sees the upper half of a cube only, and nothing there.
    camera = Camera.of_angle(look_at((0.0, -4.0, 0.0), (0, 0, 0)), 40, 40, angle_x=0.7)
    camera = dataclasses.replace(camera, centre=(20.0, 40.0))
    hull = visual_hull(torch.zeros(1, 40, 40, dtype=torch.bool), [camera], CUBE, 16)
    centres = grid_points(CUBE, (16,) * 3, centred=True)

    def corners_seen(reach):
        moves = torch.cartesian_prod(*[torch.tensor([-reach, reach])] * 3)
        pictures = [camera.project((centres + move).numpy())[0] for move in moves]
        return [((xy >= 0) & (xy < 40)).all(1) for xy in pictures]

    # In between are cells of 1/8 that the picture's edge cuts, or that lie within a margin of 6 pixels of it.
    wholly, partly = np.all(corners_seen(0.5), axis=0), np.any(corners_seen(0.11), axis=0)
    assert not hull.view(-1)[wholly].any()
    assert hull.view(-1)[~partly].all()
    assert wholly.sum() > 500
    assert (~partly).sum() > 500


def test_a_hull_without_views_is_everything_and_full_masks_rule_nothing_out():
    camera = Camera.of_angle(look_at((0.0, -4.0, 0.0), (0, 0, 0)), 10, 10, angle_x=0.7)
    assert visual_hull(torch.zeros(0, 10, 10, dtype=torch.bool), [], CUBE, 8).all()
    assert visual_hull(torch.ones(1, 10, 10, dtype=torch.bool), [camera], CUBE, 8).all()


def test_coarse_cells_first_rule_out_nothing_that_fine_ones_keep():
    # 64 cells come by way of 32; 63 are looked at directly.
    masks, cameras = _sphere_views(6, 2.5, 0.7, size=40)
    stepped = visual_hull(masks, cameras, BOX, 64)
    direct = visual_hull(masks, cameras, BOX, 63)
    assert float(stepped.sum()) / 64**3 == pytest.approx(float(direct.sum()) / 63**3, rel=0.05)


# --- the box ---


def test_the_box_around_cells_by_hand():
    bounds = torch.tensor([[0.0, 10, 20], [8.0, 18, 36]])
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    cells[2, 3, 4] = cells[5, 3, 6] = True
    # x: cells 4 to 6 of side 1, y: 3, z: 2 to 5 of side 2; then a half, or two, more on each side.
    assert box_of(cells, bounds).tolist() == [[3.5, 12.5, 23.0], [7.5, 14.5, 33.0]]
    assert box_of(cells, bounds, margin=2.0).tolist() == [[2.0, 11.0, 20.0], [9.0, 16.0, 36.0]]


def test_the_box_of_no_cell_is_the_whole():
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    assert torch.equal(box_of(cells, BOX), BOX)
