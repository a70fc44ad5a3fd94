"""Rays of known cameras, and batches of rays that resume."""

import json

import numpy as np
import pytest

# Skips the file if the extra `nerf` is not installed, so the imports below come late.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
from pinhole import camera_of, project

from blacksmith.datasets.blender import Views
from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.errors import RunError
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.models.pytorch.nerf.rendering import camera_rays
from blacksmith.run.order import generator

STRAIGHT = np.eye(3, 4, dtype=np.float32)
"""The pose of a camera at the origin that looks along -z, with +y up in its picture."""

# Wider than high, pixels that are not square, a principal point off the center.
CAMERAS = tuple(
    Camera(look_at(position, target), 7, 4, focal, center)
    for position, target, focal, center in [
        ((3.0, 1.0, 2.0), (0.1, -0.2, 0.3), (9.0, 5.0), (2.7, 2.9)),
        ((-2.0, 4.0, -1.0), (0.0, 0.0, 0.0), (4.0, 11.0), (4.1, 0.6)),
        ((0.0, 0.0, 5.0), (0.0, 0.0, 0.0), (6.5, 6.5), (3.5, 2.0)),
    ]
)


@pytest.fixture
def views():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 7, 4), np.uint8)
    return Views(pixels, CAMERAS, ("a", "b", "c"), np.ones(pixels.shape[:3], bool))


# --- origins and directions ---


def by_hand():
    """Directions of pixels 0 and 7 of 4x2, with focal lengths 2 and 4 and principal point (1, 1.5)."""
    # Pixel 0 has its center at (0.5, 0.5): x = (0.5 - 1) / 2 = -1/4, y down = (0.5 - 1.5) / 4 = -1/4.
    # Pixel 7, row 1, column 3: x = (3.5 - 1) / 2 = 5/4, y down = (1.5 - 1.5) / 4 = 0.
    straight = torch.tensor([[-0.25, 0.25, -1.0], [1.25, 0.0, -1.0]])
    return straight / straight.norm(dim=1, keepdim=True)


def test_rays_go_through_the_centers_of_pixels():
    camera = Camera(STRAIGHT, 4, 2, (2.0, 4.0), (1.0, 1.5))
    origins, directions = camera_rays(camera, torch.tensor([0, 7]))
    assert (origins.dtype, directions.dtype) == (torch.float32, torch.float32)
    assert origins.tolist() == [[0.0] * 3] * 2
    # Two roundings of numbers below 1.
    torch.testing.assert_close(directions, by_hand(), rtol=0, atol=2e-7)


def test_rays_turn_and_move_with_the_camera():
    # Right is world +y, up is world +z, back is world +x: it looks along -x from (5, 6, 7).
    pose = np.array([[0, 0, 1, 5], [1, 0, 0, 6], [0, 1, 0, 7]], np.float32)
    camera = Camera(pose, 4, 2, (2.0, 4.0), (1.0, 1.5))
    origins, directions = camera_rays(camera, torch.tensor([0, 7]))
    right, up, back = by_hand().T
    assert origins.tolist() == [[5.0, 6.0, 7.0]] * 2
    torch.testing.assert_close(directions, torch.stack([back, right, up], 1), rtol=0, atol=2e-7)


def test_outermost_rays_are_half_a_pixel_inside_the_angle():
    camera = camera_of(STRAIGHT, 100, 1, angle_x=1.2)
    _, directions = camera_rays(camera, torch.tensor([0, 99]))
    slope = np.tan(0.6) * 99 / 100
    found = (directions[:, 0] / -directions[:, 2]).tolist()
    assert found == pytest.approx([-slope, slope], rel=1e-6)


@pytest.mark.parametrize("camera", CAMERAS, ids=range(3))
def test_points_on_a_ray_project_to_its_pixel(camera):
    pixels = torch.arange(28)
    origins, directions = camera_rays(camera, pixels)
    for distance in (0.5, 3.0, 40.0):
        points = (origins + distance * directions).double().numpy()
        xy, depth = project(camera, points)
        expected = np.stack([pixels.numpy() % 7 + 0.5, pixels.numpy() // 7 + 0.5], 1)
        # Points at 40 are rounded by 2e-6, pixels of up to 11 by focal length and depth: 1e-5.
        np.testing.assert_allclose(xy, expected, rtol=0, atol=1e-4)
        assert (depth > 0).all()
        assert (depth <= distance + 1e-5).all()


def test_a_bank_has_the_rays_and_pixels_of_each_view(views):
    bank = RayBank(views, "cpu")
    assert len(bank) == 3 * 28
    pixels = torch.arange(28).flip(0)
    for view, camera in enumerate(CAMERAS):
        origins, directions, rgba = bank(pixels + 28 * view)
        expected = camera_rays(camera, pixels)
        assert {v.dtype for v in (origins, directions, rgba)} == {torch.float32}
        assert torch.equal(origins, expected[0])
        # The same numbers, but for the order of three additions.
        torch.testing.assert_close(directions, expected[1], rtol=0, atol=5e-7)
        np.testing.assert_array_equal(rgba, (views.pixels[view] / np.float32(255)).reshape(28, 4)[::-1])


def test_large_ray_numbers_keep_their_pixels():
    # float32 holds ray numbers only up to 2^24: rows and columns have to be found in whole numbers.
    camera = Camera(STRAIGHT, 4100, 4100, (3000.0, 3000.0), (2050.0, 2050.0))
    bank = RayBank(
        Views(np.zeros((1, 4100, 4100, 4), np.uint8), (camera,), ("a",), np.ones((1, 4100, 4100), bool)),
        "cpu",
    )
    last = torch.arange(len(bank) - 6, len(bank))
    assert last[0] > 2**24
    torch.testing.assert_close(bank(last)[1], camera_rays(camera, last)[1], rtol=0, atol=5e-7)


# --- batches ---


POOL = torch.arange(100, dtype=torch.int32) * 3 + 7


def loader_of(pool=POOL, steps=1000, size=8):
    loader = RayLoader(steps, 5, size, rays=100)
    loader.use_pool(pool)
    return loader


def take(loader, count):
    batches = iter(loader)
    return [next(batches).tolist() for _ in range(count)]


def take_changing(loader, count):
    """Batches whose size changes with the step, as in training."""
    found, batches = [], iter(loader)
    for _ in range(count):
        found.append(next(batches).tolist())
        loader.size = 3 + loader.step * 5 % 17
    return found


@pytest.mark.parametrize("rays", [100, 96])
def test_a_pass_visits_every_ray_once_but_the_remainder(rays):
    pool = POOL[:rays]
    batches = take(loader_of(pool), 36)
    for first in (0, 12, 24):
        # 100 rays are 12 batches of 8, and 4 rays that are dropped.
        one_pass = {ray for batch in batches[first : first + 12] for ray in batch}
        assert len(one_pass) == 96
        assert one_pass <= set(pool.tolist())
    assert sorted(batches[0]) != sorted(batches[12])


def test_there_is_one_batch_per_step():
    loader = loader_of(steps=5)
    assert len(loader) == 5
    batches = list(loader)
    assert [(batch.dtype, len(batch)) for batch in batches] == [(torch.int64, 8)] * 5
    assert loader.step == 5
    assert loader.epoch(5) == 40 / 100, "an epoch is all rays"
    assert list(loader) == []


def test_the_order_follows_from_seed_attempt_and_pass():
    loader = loader_of()
    loader.attempt = 1
    found = [ray for batch in take(loader, 24) for ray in batch]
    expected = []
    for number in range(2):
        rows = generator(5, "order", 1, number).permutation(np.arange(100, dtype=np.int32))
        expected += (rows[:96] * 3 + 7).tolist()
    assert found == expected


def test_a_new_pool_starts_a_new_pass():
    loader = loader_of()
    take(loader, 3)
    loader.use_pool(torch.arange(1000, 1020, dtype=torch.int32))
    batches = take(loader, 2)
    assert loader.passes == 1
    rows = generator(5, "order", 0, 1).permutation(np.arange(20, dtype=np.int32))
    assert [ray for batch in batches for ray in batch] == (rows[:16] + 1000).tolist()


def test_an_unused_pool_is_replaced_within_its_pass():
    loader = loader_of()
    loader.use_pool(POOL)
    assert loader.passes == 0
    assert take(loader, 5) == take(loader_of(), 5)


def test_a_pool_smaller_than_a_batch_is_drawn_whole():
    loader = loader_of(POOL[:5])
    batches = take(loader, 3)
    assert [sorted(batch) for batch in batches] == [[7, 10, 13, 16, 19]] * 3
    assert loader.drawn == 15


def test_an_empty_pool_is_refused():
    with pytest.raises(RunError, match=r"no training ray can meet anything.*nerf\.Data\.bounds"):
        loader_of(POOL[:0])


def test_no_ray_repeats_in_a_pass_when_sizes_change():
    loader, seen, number = loader_of(), set(), 0
    for _ in range(60):
        batch = set(take_changing(loader, 1)[0])
        if loader.passes != number:
            seen, number = set(), loader.passes
        assert not batch & seen
        seen |= batch
    assert number > 3


@pytest.mark.parametrize("taken", [0, 1, 12, 30])
def test_a_resumed_loader_draws_the_same_batches(taken):
    whole = take_changing(loader_of(), 50)
    assert len({len(batch) for batch in whole}) > 5
    loader = loader_of()
    take_changing(loader, taken)
    state = json.loads(json.dumps(loader.state_dict()))  # plain numbers are all that is saved
    resumed = RayLoader(1000, 5, 999, rays=100)
    resumed.load_state_dict(state)
    resumed.use_pool(POOL, reshuffle=False)
    assert take_changing(resumed, 50 - taken) == whole[taken:]
    assert resumed.step == 50


def test_a_changed_pool_is_resumed():
    second = torch.arange(500, 560, dtype=torch.int32)
    loader = loader_of()
    take(loader, 4)
    loader.use_pool(second)
    take(loader, 2)
    state = loader.state_dict()
    expected = take(loader, 10)
    resumed = RayLoader(1000, 5, 8, rays=100)
    resumed.load_state_dict(state)
    resumed.use_pool(second, reshuffle=False)
    assert take(resumed, 10) == expected
