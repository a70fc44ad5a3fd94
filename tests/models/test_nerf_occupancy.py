"""Samples in marked cells, compared with every step of every ray; hulls and visible pixels miss nothing.

Expectations are computed in float64. Where a place lies within `NEAR_BORDER` of a cell's border, float32 may
put it into either cell, and the tests accept both.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
from pinhole import camera_of, project

from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.models.pytorch.nerf.occupancy import Occupancy, box_of, grid_points
from blacksmith.models.pytorch.nerf.rendering import camera_rays

NEAR_BORDER = 1e-3
"""In cells: float32's rounding of positions of up to 50 cells, seen from a few boxes away."""

BOX = torch.tensor([[-1.0, -0.6, -1.3], [1.2, 0.7, 1.0]])
CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3])


def _occupancy(cells, bounds=BOX, near_far=(0.0, math.inf)):
    occupancy = Occupancy(len(cells))
    occupancy.bounds.copy_(bounds)
    occupancy.near_far.copy_(torch.tensor(near_far))
    occupancy.set(cells)
    return occupancy


def _visible(occupancy, camera):
    return next(occupancy.visible_pixels([camera]))


def _all_cells(resolution):
    return torch.ones((resolution,) * 3, dtype=torch.bool)


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


def _steps(occupancy, origins, directions, step, shift):
    """How deep inside of marked cells the places of rays are, at even steps from where they enter the box.

    Returns:
      Depths in cells [rays, steps], NaN in unmarked cells; the distances where rays enter [rays, 1].
    """
    low, high = occupancy.bounds.double()
    origins, directions = origins.double(), directions.double()
    first = (low - origins) / directions
    second = (high - origins) / directions
    outside = (directions == 0) & ((origins < low) | (origins >= high))
    enter = torch.minimum(first, second).nan_to_num(-math.inf).amax(1)
    leave = torch.maximum(first, second).nan_to_num(math.inf).amin(1)
    near = enter.clamp(min=float(occupancy.near_far[0]))
    far = leave.clamp(max=float(occupancy.near_far[1]))
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
    return torch.where(marked, deep, math.nan), near[:, None]


def _check_samples(occupancy, origins, directions, step, seed=None):
    """Asserts that the samples are exactly the places that `_steps` finds; returns how many those are."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    samples, unit = occupancy.samples(origins, directions, step, generator)
    shift = 0.5
    if seed is not None:
        # The same generator gives the same shifts, one for each ray.
        shift = torch.rand(len(origins), 1, generator=torch.Generator().manual_seed(seed)).double()
    deep, near = _steps(occupancy, origins, directions, step, shift)
    shifts = shift if seed is None else shift[samples.ray, 0]
    number = (samples.distance.double() - near[samples.ray, 0]) / step - shifts
    index = number.round().long()
    # float32 rounds distances of up to 16 by 2e-6.
    assert len(index) == 0 or float((number - index).abs().amax()) * step < 2e-5
    assert ((samples.ray * (deep.shape[1] + 1) + index).diff() > 0).all()
    found = torch.zeros(deep.shape, dtype=torch.bool)
    found[samples.ray, index] = True
    assert not ((deep > NEAR_BORDER) & ~found).any(), "places are missing"
    # Every sample is in a marked cell, or on its border, and at the place that is returned.
    low, high = occupancy.bounds.double()
    points = origins[samples.ray].double() + directions[samples.ray].double() * samples.distance[:, None]
    place = (points - low) / (high - low)
    torch.testing.assert_close(unit.T.double(), place, rtol=0, atol=1e-5)
    assert ((unit >= 0) & (unit < 1)).all()
    within = torch.zeros(len(place), dtype=torch.bool)
    for move in torch.cartesian_prod(*[torch.tensor([-NEAR_BORDER, NEAR_BORDER])] * 3):
        beside = (place * occupancy.resolution + move).floor().long()
        x, y, z = beside.clamp(0, occupancy.resolution - 1).unbind(-1)
        within |= occupancy.cells[z, y, x]
    assert within.all()
    return int((deep > NEAR_BORDER).sum())


# --- samples ---


def test_a_ray_through_one_cell_has_its_samples_there_by_hand():
    # Cells of 1; the marked cell is x in [2, 3), y in [1, 2), z in [0, 1).
    occupancy = _occupancy(_one_cell(4, 2, 1, 0), torch.tensor([[0.0] * 3, [4.0] * 3]))
    origins = torch.tensor([[-2.0, 1.25, 0.5], [-2.0, 2.25, 0.5]])
    directions = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    samples, unit = occupancy.samples(origins, directions, 0.5)
    # The ray enters at 2 and has samples at 2.25, 2.75, ...: in the cell those at 4.25 and 4.75.
    assert samples.ray.tolist() == [0, 0]
    assert samples.ray.dtype == torch.int64
    assert samples.length == 0.5
    torch.testing.assert_close(samples.distance, torch.tensor([4.25, 4.75]), rtol=0, atol=1e-6)
    expected = torch.tensor([[2.25, 1.25, 0.5], [2.75, 1.25, 0.5]]) / 4
    torch.testing.assert_close(unit.T, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [None, 2], ids=["half steps", "random"])
@pytest.mark.parametrize(("bounds", "resolution"), [(BOX, 8), (BOX, 30), (CUBE, 13)], ids=["8", "30", "cube"])
@pytest.mark.parametrize("cells_per_step", [0.5, 2.7])
def test_samples_are_all_steps_in_marked_cells_and_no_others(bounds, resolution, cells_per_step, seed):
    step = cells_per_step * float((bounds[1] - bounds[0]).min()) / resolution
    total = 0
    for share in (0.002, 0.05, 1.0):
        occupancy = _occupancy(_random_cells(resolution, share, seed=resolution), bounds)
        total += _check_samples(occupancy, *_random_rays(100, 1, bounds), step, seed)
        total += _check_samples(occupancy, *_random_rays(50, 2, bounds, inside=True), step, seed)
    assert total > 100


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("resolution", [13, 26])
def test_no_cell_is_missed_by_a_ray_along_an_axis(axis, resolution):
    # The ray stays in one row of blocks: its segments are the longest in cells, and the blocks beside their
    # middles are the only ones to find the cell.
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
        # Rays that begin at different places inside of the box, or outside.
        origins[:8, axis] = BOX[0, axis] + torch.linspace(-1, 0.45, 8) * size[axis]
        origins[8:, axis] = BOX[1, axis] - torch.linspace(-1, 0.45, 8) * size[axis]
        found += _check_samples(occupancy, origins, directions, step)
    # With steps of at most 0.9 cells, those from outside find each cell.
    assert found >= 10 * resolution


@pytest.mark.parametrize("direction", [[1.0, 0, 0], [1.0, -0.0, -0.0]])
def test_a_ray_along_the_border_of_cells_belongs_to_the_upper_cell(direction):
    bounds = torch.tensor([[0.0] * 3, [8.0] * 3])
    origins = torch.tensor([[-1.0, y, z] for y in range(9) for z in range(9)])
    directions = torch.tensor([direction]).expand(81, 3)
    cells = _random_cells(8, 0.4, seed=1)
    samples, _ = _occupancy(cells, bounds).samples(origins, directions, 1.0)
    # Steps of a whole cell: one sample in the middle of each.
    found = torch.zeros(9, 9, 8, dtype=torch.bool)
    found.view(81, 8)[samples.ray, (samples.distance - 1).long()] = True
    expected = torch.zeros(9, 9, 8, dtype=torch.bool)
    expected[:8, :8] = cells.permute(1, 0, 2)
    assert torch.equal(found, expected)


def test_rays_without_marked_cells_have_no_samples():
    origins, directions = _random_rays(50, 4)
    aside = torch.nn.functional.normalize(torch.linalg.cross(directions, origins - BOX.mean(0)), dim=1)
    full, empty = _occupancy(_all_cells(8)), _occupancy(~_all_cells(8))
    assert len(full.samples(origins, directions, 0.1)[0].ray) > 50
    for occupancy, rays in (
        (full, (origins, -directions)),
        (full, (origins, aside)),
        (full, (origins[:0], directions[:0])),
        (empty, (origins, directions)),
    ):
        samples, unit = occupancy.samples(*rays, 0.1)
        assert len(samples.ray) == len(samples.distance) == 0
        assert unit.shape == (3, 0)


@pytest.mark.parametrize("seed", [None, 0], ids=["half steps", "random"])
def test_samples_keep_between_near_and_far(seed):
    origins, directions = _random_rays(100, 5)
    samples, _ = _occupancy(_all_cells(16)).samples(origins, directions, 0.03)
    near, far = torch.quantile(samples.distance, torch.tensor([0.3, 0.6])).tolist()
    some = _occupancy(_all_cells(16), near_far=(near, far))
    assert _check_samples(some, origins, directions, 0.03, seed) > 100
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found, _ = some.samples(origins, directions, 0.03, generator)
    # Distances of about 6 are rounded by 5e-7.
    assert near - 1e-6 <= float(found.distance.amin())
    assert float(found.distance.amax()) <= far + 1e-6


# --- cells ---


def test_grid_points_by_hand():
    box = torch.tensor([[0.0, 10, 20], [4.0, 14, 28]])
    expected = [[0, 10, 20], [2, 10, 20], [4, 10, 20], [0, 10, 28], [2, 10, 28], [4, 10, 28]]
    assert grid_points(box, (2, 1, 3)).tolist() == expected
    assert grid_points(box, (2, 1, 3), torch.tensor([4, 2])).tolist() == [expected[4], expected[2]]
    # Centers of cells: x runs fastest; sides of 2, 2 and 4.
    expected = [[1, 11, 22], [3, 11, 22], [1, 13, 22], [3, 13, 22], [1, 11, 26], [3, 11, 26], [1, 13, 26]]
    assert grid_points(box, (2, 2, 2), centered=True)[:7].tolist() == expected


def test_loading_restores_samples_and_visible_pixels():
    occupancy = _occupancy(_random_cells(13, 0.01, seed=4))
    assert set(occupancy.state_dict()) == {"bounds", "near_far", "cells"}
    camera = camera_of(look_at((3.0, 2.0, 1.0), (0, 0, 0)), 20, 16, angle_x=0.8)
    restored = Occupancy(13)
    assert _visible(restored, camera).any()
    restored.load_state_dict(occupancy.state_dict())
    assert torch.equal(_visible(restored, camera), _visible(occupancy, camera))
    rays = _random_rays(100, 9)
    (expected, places), (found, restored_places) = (
        occupancy.samples(*rays, 0.05),
        restored.samples(*rays, 0.05),
    )
    assert len(expected.ray) > 10
    assert torch.equal(found.ray, expected.ray)
    assert torch.equal(found.distance, expected.distance)
    assert torch.equal(restored_places, places)


def test_the_box_around_cells_by_hand():
    bounds = torch.tensor([[0.0, 10, 20], [8.0, 18, 36]])
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    assert torch.equal(box_of(cells, BOX), BOX)
    cells[2, 3, 4] = cells[5, 3, 6] = True
    # x: cells 4 to 6 of side 1, y: 3, z: 2 to 5 of side 2; then a half, or two, more on each side.
    assert box_of(cells, bounds).tolist() == [[3.5, 12.5, 23.0], [7.5, 14.5, 33.0]]
    assert box_of(cells, bounds, margin=2.0).tolist() == [[2.0, 11.0, 20.0], [9.0, 16.0, 36.0]]


# --- visible pixels ---

SCENES = {
    "a picture of everything": (look_at((4.0, 3.0, 2.0), (0, 0, 0)), (90.0, 70.0)),
    "half of it beside the picture": (look_at((4.0, 3.0, 2.0), (1.0, -1.0, 0.6)), (90.0, 70.0)),
    "from very close by": (look_at((1.25, 0.1, 0.0), (0, 0.2, 0.1)), (40.0, 40.0)),
    "a very wide angle, looking past it": (look_at((1.8, 1.2, 0.3), (1.0, -2.0, 0.0)), (12.0, 12.0)),
    "from inside": (look_at((0.1, 0.1, -0.2), (1.0, 0.2, 0.4)), (20.0, 20.0)),
    "away from it": (look_at((2.0, 1.0, 0.5), (4.0, 2.0, 1.0)), (40.0, 40.0)),
}


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("resolution", [9, 32])
def test_all_pixels_whose_rays_have_samples_are_visible(name, resolution):
    pose, focal = SCENES[name]
    camera = Camera(pose, 64, 48, focal, (30.0, 26.0))
    origins, directions = camera_rays(camera, torch.arange(64 * 48))
    for seed, share in enumerate([0.0, 0.003, 0.3]):
        cells = _random_cells(resolution, share, seed)
        cells[resolution // 2, resolution // 3, resolution // 2] = True
        occupancy = _occupancy(cells)
        visible = _visible(occupancy, camera)
        assert visible.shape == (48, 64)
        assert visible.flatten()[occupancy.samples(origins, directions, 0.05)[0].ray].all()


@pytest.mark.parametrize("slope", [0.36, 2.0])
def test_every_corner_of_a_cell_is_visible_in_a_fine_picture(slope):
    # Pictures that reach `slope` to each side at a distance of 1, which stretch what is at their edges.
    random, size, tested = np.random.default_rng(0), 200, 0
    side = ((BOX[1] - BOX[0]) / 16).numpy()
    for _ in range(60):
        x, y, z = random.integers(0, 16, 3).tolist()
        center = BOX[0].numpy() + (np.array([x, y, z]) + 0.5) * side
        away = random.normal(size=3)
        distance = random.uniform(0.8, 3)
        position = center + distance * away / np.linalg.norm(away)
        target = center + random.normal(size=3) * distance * slope * 0.6
        camera = Camera(look_at(position, target), size, size, (size / 2 / slope,) * 2, (size / 2, size / 2))
        # A hundredth inside of the cell.
        corners = center + np.array(list(itertools.product((-0.495, 0.495), repeat=3))) * side
        pixels, depth = project(camera, corners)
        inside = (depth > 0) & ((pixels >= 0) & (pixels < size)).all(1)
        column, row = pixels[inside].astype(int).T
        tested += len(row)
        visible = _visible(_occupancy(_one_cell(16, x, y, z)), camera)
        assert visible[row, column].all()
    assert tested > 150


def test_every_corner_of_a_stretched_cell_is_visible():
    # 800x100 pixels that reach 2 to either side at a distance of 1; cells are seen at 1.3 to 1.8.
    random, tested = np.random.default_rng(1), 0
    cells, side = 40, ((BOX[1] - BOX[0]) / 40).numpy()
    for _ in range(40):
        x, y, z = random.integers(0, cells, 3).tolist()
        center = BOX[0].numpy() + (np.array([x, y, z]) + 0.5) * side
        turn, slope = random.uniform(0, 2 * np.pi), random.uniform(1.3, 1.8) * random.choice([-1, 1])
        ahead = np.array([np.cos(turn), np.sin(turn), 0])
        right = np.array([np.sin(turn), -np.cos(turn), 0])
        position = center - random.uniform(0.6, 1.0) * (ahead + slope * right)
        camera = Camera(look_at(position, position + ahead), 800, 100, (200.0, 200.0), (400.0, 50.0))
        corners = center + np.array(list(itertools.product((-0.495, 0.495), repeat=3))) * side
        pixels, _ = project(camera, corners)
        column, row = pixels[((pixels >= 0) & (pixels < (800, 100))).all(1)].astype(int).T
        tested += len(row)
        visible = _visible(_occupancy(_one_cell(cells, x, y, z)), camera)
        assert visible[row, column].all()
    assert tested > 250


def test_only_pixels_around_a_small_thing_are_visible():
    occupancy = _occupancy(_one_cell(32, 16, 16, 16))
    camera = camera_of(look_at((4.0, 3.0, 2.0), (0, 0, 0)), 200, 200, angle_x=0.7)
    visible = _visible(occupancy, camera)
    # The cell is 0.07 wide, 5.4 away: 3.5 pixels. Pairs of cells, their diagonal and whole pixels widen it.
    assert 4 <= int(visible.sum()) <= 20**2
    rows, columns = visible.nonzero().float().mean(0).tolist()
    xy, _ = project(
        camera, grid_points(BOX, (32, 32, 32), centered=True).view(32, 32, 32, 3)[16, 16, 16][None].numpy()
    )
    assert (columns + 0.5, rows + 0.5) == pytest.approx(tuple(xy[0]), abs=3)
    # Nothing is visible in an empty grid, or behind the camera.
    occupancy.set(~_all_cells(32))
    assert not _visible(occupancy, camera).any()
    away = dataclasses.replace(camera, pose=look_at((4.0, 3.0, 2.0), (8.0, 6.0, 4.0)))
    assert not _visible(_occupancy(_all_cells(8)), away).any()
