"""Visual hulls miss nothing and rule out what they can; masks that contradict the others are found."""

import dataclasses
import math

import numpy as np
import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
from pinhole import camera_of, project

from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.models.pytorch.nerf.hull import contradicting_views, visual_hull
from blacksmith.models.pytorch.nerf.occupancy import grid_points
from blacksmith.models.pytorch.nerf.rendering import camera_rays

BOX = torch.tensor([[-1.0, -0.6, -1.3], [1.2, 0.7, 1.0]])
CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3])

CENTER, RADIUS = torch.tensor([0.1, -0.05, 0.0]), 0.45


def _sphere_views(count, distance, angle, size=64):
    """Cameras spread over a sphere of `distance` around the ball, and its masks."""
    number = np.arange(count) + 0.5
    height = 1 - 2 * number / count
    turn = np.pi * (1 + 5**0.5) * number
    around = np.stack([np.cos(turn), np.sin(turn), height], 1)
    around[:, :2] *= np.sqrt(1 - height**2)[:, None]
    cameras, masks = [], []
    for direction in around:
        pose = look_at(CENTER.numpy() + distance * direction, CENTER.numpy() + (0.05, 0.1, -0.1))
        camera = camera_of(pose, size, size - 8, angle)
        camera = dataclasses.replace(camera, center=(camera.center[0] + 1.7, camera.center[1]))
        masks.append(_mask(camera))
        cameras.append(camera)
    return torch.stack(masks), cameras


def _mask(camera):
    """The pixels whose centers show the ball."""
    origins, directions = camera_rays(camera, torch.arange(camera.width * camera.height))
    along = ((CENTER - origins) * directions).sum(1)
    off = (CENTER - origins).square().sum(1) - along.square()
    return ((off < RADIUS**2) & (along > 0)).view(camera.height, camera.width)


def _meets_ball(resolution, bounds, radius):
    """Cells that come closer to the ball's center than `radius`, bool [z, y, x]."""
    side = (bounds[1] - bounds[0]) / resolution
    centers = grid_points(bounds, (resolution,) * 3, centered=True)
    nearest = torch.maximum((centers - CENTER).abs() - side / 2, torch.zeros(3))
    return (nearest.norm(dim=1) < radius).view((resolution,) * 3)


@pytest.mark.parametrize(
    ("distance", "angle", "resolution"), [(5.0, 0.5, 31), (2.5, 1.0, 24), (2.5, 1.0, 64), (0.9, 1.9, 31)]
)
def test_the_hull_of_a_ball_contains_it_and_is_not_much_larger(distance, angle, resolution):
    masks, cameras = _sphere_views(20, distance, angle)
    hull = visual_hull(masks, cameras, BOX, resolution)
    # A mask is only as fine as its pixels: what is within one pixel of the rim may be lost.
    pixel = distance / cameras[0].focal[0]
    assert not (_meets_ball(resolution, BOX, RADIUS - pixel) & ~hull).any()
    side = (BOX[1] - BOX[0]) / resolution
    # 20 cones leave some room around a ball, cells add their diagonal and masks three pixels, on every side.
    widest = RADIUS * 1.15 + 1.5 * float(side.norm()) + 3 * pixel
    if distance > 1:
        assert float(hull.sum() * side.prod()) < 4 / 3 * math.pi * widest**3


@pytest.mark.parametrize("beside", [-6.0, 1.0], ids=["cut", "just outside"])
@pytest.mark.parametrize("side", [(-1, 0), (1, 0), (0, -1), (0, 1)], ids=["left", "right", "top", "bottom"])
def test_a_ball_at_the_edge_of_a_picture_stays_whole(side, beside):
    # The ball has a radius of 16 pixels, and the edge of the picture is this many pixels from its rim.
    focal = 16 / math.tan(math.asin(RADIUS / 2.5))
    pose = look_at(CENTER.numpy() + (0.0, -2.5, 0.0), CENTER.numpy())
    camera = Camera(pose, 160, 160, (focal, focal), tuple(80 + (96.0 + beside) * at for at in side))
    mask = _mask(camera)[None]
    assert mask.any() == (beside < 0)
    # Cells of 12 or 14 pixels: some that contain a part of the ball have their center in the picture.
    for resolution in (5, 6):
        hull = visual_hull(mask, [camera], CUBE, resolution)
        assert not (_meets_ball(resolution, CUBE, RADIUS - 2.5 / focal) & ~hull).any()


def test_a_view_rules_out_exactly_what_it_contains():
    # One camera that sees the upper half of a cube only, and nothing there.
    camera = camera_of(look_at((0.0, -4.0, 0.0), (0, 0, 0)), 40, 40, angle_x=0.7)
    camera = dataclasses.replace(camera, center=(20.0, 40.0))
    nothing = torch.zeros(1, 40, 40, dtype=torch.bool)
    hull = visual_hull(nothing, [camera], CUBE, 16)
    centers = grid_points(CUBE, (16,) * 3, centered=True)

    def corners_seen(reach):
        moves = torch.cartesian_prod(*[torch.tensor([-reach, reach])] * 3)
        pictures = [project(camera, (centers + move).numpy())[0] for move in moves]
        return [((xy >= 0) & (xy < 40)).all(1) for xy in pictures]

    # In between are cells of 1/8 that the picture's edge cuts, or that lie within a margin of 6 pixels of it.
    wholly, partly = np.all(corners_seen(0.5), axis=0), np.any(corners_seen(0.11), axis=0)
    assert not hull.view(-1)[wholly].any()
    assert hull.view(-1)[~partly].all()
    assert wholly.sum() > 500
    assert (~partly).sum() > 500
    # No view and full masks rule out nothing.
    assert visual_hull(nothing[:0], [], CUBE, 8).all()
    assert visual_hull(~nothing, [camera], CUBE, 8).all()


def test_going_from_coarse_to_fine_cells_rules_out_nothing_more():
    # 64 cells are reached by way of 32; 63 are tested directly.
    masks, cameras = _sphere_views(6, 2.5, 0.7, size=40)
    shares = [float(visual_hull(masks, cameras, BOX, n).float().mean()) for n in (64, 63)]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


def _contradicting(masks, cameras, maybe=None):
    wrong, unexplained = contradicting_views(masks, masks if maybe is None else maybe, cameras, BOX)
    return wrong.nonzero()[:, 0].tolist(), unexplained


def _without_lower_half(mask):
    rows = mask.any(1).nonzero()[:, 0]
    mask[int(rows.float().mean()) :] = False


@pytest.mark.parametrize(
    ("count", "distance", "angle", "size"), [(4, 2.5, 0.7, 40), (20, 5.0, 0.4, 64), (30, 2.5, 1.0, 200)]
)
def test_masks_that_fit_together_are_all_kept(count, distance, angle, size):
    wrong, unexplained = _contradicting(*_sphere_views(count, distance, angle, size))
    assert wrong == []
    assert unexplained.max() == 0


@pytest.mark.parametrize("size", [64, 200])
@pytest.mark.parametrize("bad", [(5,), (0, 7, 13), (2, 3, 4, 9, 15)], ids=str)
def test_views_that_lack_half_of_the_ball_are_found(size, bad):
    masks, cameras = _sphere_views(20, 2.5, 0.5, size)
    for view in bad:
        _without_lower_half(masks[view])
    assert _contradicting(masks, cameras)[0] == list(bad)


def test_pixels_that_say_nothing_contradict_nothing():
    masks, cameras = _sphere_views(20, 2.5, 0.5)
    maybe = masks.clone()
    _without_lower_half(masks[5])
    assert _contradicting(masks, cameras, maybe)[0] == []


def test_a_view_that_shows_more_than_the_others_is_told_by_its_share():
    masks, cameras = _sphere_views(20, 2.5, 0.7)
    masks[8, :10] = True  # 10 rows of background, above the ball
    wrong, unexplained = _contradicting(masks, cameras)
    assert wrong == []
    assert unexplained[8] > 0.2
    assert unexplained[:8].max() == unexplained[9:].max() == 0
