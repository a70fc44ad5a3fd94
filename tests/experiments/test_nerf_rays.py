"""Rays of known cameras, and batches of rays that resume."""

import json

import numpy as np
import pytest

# Without the extra `nerf` none of this is collected, so its modules are imported after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from blacksmith.datasets.blender import Views
from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.experiments.lightning.nerf.rays import RayBank, RayLoader
from blacksmith.models.pytorch.nerf.rendering import camera_rays
from blacksmith.run.order import generator

STRAIGHT = np.eye(3, 4, dtype=np.float32)
"""A camera at the origin that looks along -z, with +y up in its picture."""

# Wider than high, pixels that are not square, a principal point off the center.
CAMERAS = tuple(
    Camera(look_at(position, target), 7, 4, focal, center)
    for position, target, focal, center in [
        ((3.0, 1.0, 2.0), (0.1, -0.2, 0.3), (9.0, 5.0), (2.7, 2.9)),
        ((-2.0, 4.0, -1.0), (0.0, 0.0, 0.0), (4.0, 11.0), (4.1, 0.6)),
        ((0.0, 0.0, 5.0), (0.0, 0.0, 0.0), (6.5, 6.5), (3.5, 2.0)),
    ]
)


def _views(cameras=CAMERAS, seed=0):
    shape = (len(cameras), cameras[0].height, cameras[0].width, 4)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Views(pixels, cameras, tuple(f"view_{i}" for i in range(len(cameras))))


# --- directions and origins ---


def _by_hand():
    """A camera of 4x2 pixels, its focal length 2 and 4 pixels, its principal point at (1, 1.5)."""
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
    torch.testing.assert_close(directions, _by_hand(), rtol=0, atol=2e-7)


def test_rays_turn_and_move_with_the_camera():
    # Right is world +y, up is world +z, back is world +x: it looks along -x from (5, 6, 7).
    pose = np.array([[0, 0, 1, 5], [1, 0, 0, 6], [0, 1, 0, 7]], np.float32)
    camera = Camera(pose, 4, 2, (2.0, 4.0), (1.0, 1.5))
    origins, directions = camera_rays(camera, torch.tensor([0, 7]))
    right, up, back = _by_hand().T
    assert origins.tolist() == [[5.0, 6.0, 7.0]] * 2
    torch.testing.assert_close(directions, torch.stack([back, right, up], 1), rtol=0, atol=2e-7)


def test_the_middle_pixel_looks_straight_ahead():
    camera = Camera.of_angle(STRAIGHT, 5, 3, angle_x=1.0)
    _, directions = camera_rays(camera, torch.tensor([7]))
    assert directions.tolist() == [[0.0, 0.0, -1.0]]


def test_the_outermost_rays_are_half_a_pixel_inside_the_angle():
    camera = Camera.of_angle(STRAIGHT, 100, 1, angle_x=1.2)
    _, directions = camera_rays(camera, torch.tensor([0, 99]))
    slope = np.tan(0.6) * 99 / 100
    found = (directions[:, 0] / -directions[:, 2]).tolist()
    assert found == pytest.approx([-slope, slope], rel=1e-6)


@pytest.mark.parametrize("number", range(len(CAMERAS)))
def test_points_on_a_ray_project_to_its_pixel(number):
    camera = CAMERAS[number]
    pixels = torch.arange(28)
    origins, directions = camera_rays(camera, pixels)
    for distance in (0.5, 3.0, 40.0):
        points = (origins + distance * directions).double().numpy()
        xy, depth = camera.project(points)
        expected = np.stack([pixels.numpy() % 7 + 0.5, pixels.numpy() // 7 + 0.5], 1)
        # Points at 40 are rounded by 2e-6, pixels of up to 11 by focal length and depth: 1e-5.
        np.testing.assert_allclose(xy, expected, rtol=0, atol=1e-4)
        assert (depth > 0).all()
        assert (depth <= distance + 1e-5).all()


def test_a_bank_has_the_rays_and_pixels_of_each_view():
    views = _views()
    bank = RayBank(views, "cpu")
    assert len(bank) == 3 * 28
    for view, camera in enumerate(CAMERAS):
        pixels = torch.arange(28)
        origins, directions, rgba = bank(pixels + 28 * view)
        expected = camera_rays(camera, pixels)
        assert {v.dtype for v in (origins, directions, rgba)} == {torch.float32}
        assert torch.equal(origins, expected[0])
        # The same numbers, but for the order of three additions.
        torch.testing.assert_close(directions, expected[1], rtol=0, atol=5e-7)
        np.testing.assert_array_equal(rgba.numpy(), (views.pixels[view] / np.float32(255)).reshape(28, 4))


def test_a_bank_gives_rays_in_any_order():
    bank = RayBank(_views(), "cpu")
    everything = bank(torch.arange(84))
    asked = torch.tensor([83, 0, 30, 30, 56])
    for found, whole in zip(bank(asked), everything):
        torch.testing.assert_close(found, whole[asked], rtol=0, atol=5e-7)


def test_directions_have_length_1():
    _, directions, _ = RayBank(_views(), "cpu")(torch.arange(84))
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(84), rtol=0, atol=3e-7)


def test_large_ray_numbers_keep_their_pixels():
    # float32 holds ray numbers only up to 2^24: rows and columns have to be found in whole numbers.
    camera = Camera(STRAIGHT, 3, 2, (3.0, 3.0), (1.5, 1.0))
    count = 2_900_000
    bank = RayBank(Views(np.zeros((1, 2, 3, 4), np.uint8), (camera,), ("a",)), "cpu")
    bank.pixels = bank.pixels[:1].expand(6 * count, 4)
    bank._poses, bank._intrinsics = bank._poses.expand(count, 3, 4), bank._intrinsics.expand(count, 4)
    _, last, _ = bank(torch.arange(6 * count - 6, 6 * count))
    torch.testing.assert_close(last, camera_rays(camera, torch.arange(6))[1], rtol=0, atol=5e-7)


def test_a_bank_takes_4_bytes_per_pixel_and_64_per_view():
    bank = RayBank(_views(), "cpu")
    kept = {
        name: value.numel() * value.element_size()
        for name, value in vars(bank).items()
        if isinstance(value, torch.Tensor)
    }
    assert kept["pixels"] == 4 * 3 * 7 * 4
    # A pose of 12 float32 numbers, and 4 of intrinsics.
    assert sum(kept.values()) == 4 * 3 * 7 * 4 + 64 * 3


# --- batches ---


def _loader(pool=100, steps=1000, seed=5, size=8):
    loader = RayLoader(steps, seed, size, rays=100)
    loader.use_pool(torch.arange(pool, dtype=torch.int32) * 3 + 7)
    return loader


def _take(loader, count):
    batches = iter(loader)
    return [next(batches).tolist() for _ in range(count)]


def test_a_pass_visits_every_ray_once_but_the_remainder():
    pool = set(range(7, 7 + 300, 3))
    batches = _take(_loader(), 36)
    for number in range(3):
        # 100 rays are 12 batches of 8, and 4 rays that are dropped.
        one_pass = [ray for batch in batches[12 * number : 12 * number + 12] for ray in batch]
        assert len(one_pass) == len(set(one_pass)) == 96
        assert set(one_pass) <= pool
    assert sorted(batches[0]) != sorted(batches[12])


def test_a_pool_that_batches_fill_is_visited_whole():
    batches = _take(_loader(pool=96), 24)
    for number in range(2):
        one_pass = sorted(ray for batch in batches[12 * number : 12 * number + 12] for ray in batch)
        assert one_pass == list(range(7, 7 + 288, 3))


def test_there_is_one_batch_per_step_and_an_epoch_is_all_rays():
    loader = _loader(steps=5)
    assert len(loader) == 5
    batches = list(loader)
    assert len(batches) == 5
    assert {batch.dtype for batch in batches} == {torch.int64}
    assert {len(batch) for batch in batches} == {8}
    assert loader.step == 5
    assert loader.epoch(5) == 40 / 100
    assert list(loader) == []


def test_the_order_follows_from_seed_attempt_and_pass():
    loader = _loader()
    loader.attempt = 1
    found = [ray for batch in _take(loader, 24) for ray in batch]
    expected = []
    for number in range(2):
        rows = generator(5, "order", 1, number).permutation(np.arange(100, dtype=np.int32))
        expected += (rows[:96] * 3 + 7).tolist()
    assert found == expected


def test_a_new_pool_starts_a_new_pass():
    loader = _loader()
    _take(loader, 3)
    loader.use_pool(torch.arange(1000, 1020, dtype=torch.int32))
    batches = _take(loader, 2)
    assert loader.passes == 1
    rows = generator(5, "order", 0, 1).permutation(np.arange(20, dtype=np.int32))
    assert [ray for batch in batches for ray in batch] == (rows[:16] + 1000).tolist()


def test_a_pool_smaller_than_a_batch_is_drawn_whole():
    loader = _loader(pool=5)
    batches = _take(loader, 3)
    assert [sorted(batch) for batch in batches] == [[7, 10, 13, 16, 19]] * 3
    assert loader.drawn == 15


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="no ray is left"):
        RayLoader(10, 0, 4, rays=1).use_pool(torch.zeros(0, dtype=torch.int32))


@pytest.mark.parametrize("taken", [0, 1, 12, 30])
def test_a_resumed_loader_draws_the_same_batches(taken):
    whole = _take(_loader(), 50)
    loader = _loader()
    _take(loader, taken)
    # Through JSON: plain numbers are all there is.
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = RayLoader(1000, 5, 999, rays=100)
    resumed.load_state_dict(state)
    resumed.use_pool(torch.arange(100, dtype=torch.int32) * 3 + 7, reshuffle=False)
    assert _take(resumed, 50 - taken) == whole[taken:]
    assert resumed.step == 50


def _grow_and_shrink(loader, steps):
    """Batches whose size follows from the step that they are drawn in, as in training."""
    found, batches = [], iter(loader)
    for _ in range(steps):
        found.append(next(batches).tolist())
        loader.size = 3 + loader.step * 5 % 17
    return found


@pytest.mark.parametrize("taken", [1, 9, 23])
def test_a_resumed_loader_draws_the_same_sizes(taken):
    whole = _grow_and_shrink(_loader(), 40)
    assert len({len(batch) for batch in whole}) > 5
    loader = _loader()
    _grow_and_shrink(loader, taken)
    resumed = _loader(size=1)
    resumed.load_state_dict(loader.state_dict())
    assert _grow_and_shrink(resumed, 40 - taken) == whole[taken:]


def test_no_ray_repeats_in_a_pass_when_sizes_change():
    loader, seen = _loader(), []
    batches = iter(loader)
    for step in range(60):
        number, batch = loader.passes, next(batches).tolist()
        if loader.passes != number:
            seen = []
        assert not set(batch) & set(seen)
        seen += batch
        loader.size = 3 + step * 5 % 17
    assert loader.passes > 3


def test_a_changed_pool_is_resumed():
    second = torch.arange(500, 560, dtype=torch.int32)
    loader = _loader()
    _take(loader, 4)
    loader.use_pool(second)
    _take(loader, 2)
    state = loader.state_dict()
    expected = _take(loader, 10)
    resumed = RayLoader(1000, 5, 8, rays=100)
    resumed.load_state_dict(state)
    resumed.use_pool(second, reshuffle=False)
    assert _take(resumed, 10) == expected


def test_an_unused_pool_is_replaced_within_its_pass():
    loader = _loader()
    loader.use_pool(torch.arange(100, dtype=torch.int32) * 3 + 7)
    assert loader.passes == 0
    assert _take(loader, 5) == _take(_loader(), 5)
