"""The mesh of a field whose surface is known: its position, orientation and colors."""

import math

import numpy as np
import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("skimage")
pytest.importorskip("trimesh")

from blacksmith.errors import RunError
from blacksmith.models.pytorch.nerf import mesh as meshes
from blacksmith.models.pytorch.nerf.mesh import extract_mesh

CENTER = torch.tensor([0.1, -0.2, 0.3])


class Balls:
    """Balls whose density falls linearly from 20 in the middle to 10 at the radius, and on to 0.

    The color is that of the viewing direction, (direction + 1) / 2.
    """

    def __init__(self, *balls, bounds=((-1.0, -1.2, -0.7), (1.0, 1.0, 1.1))):
        self.balls = balls
        self.bounds = torch.tensor(bounds)

    def density(self, points):
        inside = ((points >= self.bounds[0]) & (points <= self.bounds[1])).all(-1)
        parts = [20 - 10 * (points - center).norm(dim=-1) / radius for center, radius in self.balls]
        return torch.stack(parts).amax(0).clamp(min=0) * inside

    def color(self, points, directions):
        torch.testing.assert_close(directions.norm(dim=-1), torch.ones(len(points)))
        return (directions + 1) / 2


@pytest.fixture(scope="module")
def ball():
    return extract_mesh(Balls((CENTER, 0.5)), resolution=64, threshold=10.0)


def test_a_ball_has_its_volume_its_center_and_its_radius(ball):
    # Cells of 2.2/64 = 0.034. A chord of that length lies up to 0.034^2 / (8 * 0.5) = 3e-4 inside the ball,
    # and an interpolated vertex as far off.
    radii = np.linalg.norm(ball.vertices - CENTER.numpy(), axis=1)
    np.testing.assert_allclose(radii, 0.5, atol=6e-4)
    np.testing.assert_allclose(ball.vertices.mean(0), CENTER.numpy(), atol=2e-3)
    # The volume is positive only if all triangles face outwards.
    assert ball.is_watertight
    assert ball.is_winding_consistent
    assert ball.volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=4e-3)


def test_the_threshold_is_in_extinction_per_world_unit():
    # 20 - 10 r / 0.5 is 15 at r = 0.25; the polyhedron lacks twice as much of the smaller ball.
    mesh = extract_mesh(Balls((CENTER, 0.5)), resolution=64, threshold=15.0)
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.25**3, rel=1.6e-2)


def test_colors_are_those_seen_along_the_inward_normal(ball):
    inward = (CENTER.numpy() - ball.vertices) / 0.5
    # Normals are gradients on the grid, accurate to about half a cell: 0.017 / 0.5 * 255 / 2 = 4.3 levels.
    np.testing.assert_allclose(ball.visual.vertex_colors[:, :3], (inward + 1) / 2 * 255, atol=6)


def test_small_parts_are_removed(monkeypatch):
    field = Balls((CENTER, 0.5), (torch.tensor([-0.8, -0.9, -0.5]), 0.1))
    both = extract_mesh(field, resolution=48, threshold=10.0)
    monkeypatch.setattr(meshes, "SMALLEST_PART", 0.1)
    large = extract_mesh(field, resolution=48, threshold=10.0)
    assert both.volume == pytest.approx(4 / 3 * math.pi * (0.5**3 + 0.1**3), rel=1e-2)
    assert large.volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=1e-2)
    assert large.is_watertight
    # What is left is unchanged: the vertices of the large ball with their colors, in the same order.
    kept = np.linalg.norm(both.vertices - CENTER.numpy(), axis=1) < 0.6
    np.testing.assert_array_equal(large.vertices, both.vertices[kept])
    np.testing.assert_array_equal(large.visual.vertex_colors, both.visual.vertex_colors[kept])


def test_what_reaches_the_side_of_the_box_is_closed_there():
    half = ((-1.0, -1.0, 0.0), (1.0, 1.0, 1.0))
    mesh = extract_mesh(Balls((torch.zeros(3), 0.5), bounds=half), resolution=64, threshold=10.0)
    assert mesh.vertices[:, 2].min() == 0
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(2 / 3 * math.pi * 0.5**3, rel=2e-2)


def test_a_field_without_anything_dense_is_an_error_of_one_line():
    with pytest.raises(RunError, match=r"threshold of 30 per world unit \(densest: 19\.\d\)"):
        extract_mesh(Balls((CENTER, 0.5)), resolution=32, threshold=30.0)
