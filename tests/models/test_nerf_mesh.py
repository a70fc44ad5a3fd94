"""The mesh of a field whose surface is known: where it lies, which way it faces, its colours, its file."""

import math

import numpy as np
import pytest

# Without the extra `nerf` none of this is collected, so its modules come after the question.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("skimage")

from blacksmith.errors import RunError
from blacksmith.models.pytorch.nerf import mesh as meshes
from blacksmith.models.pytorch.nerf.mesh import Mesh, extract_mesh, write_ply

CENTRE = torch.tensor([0.1, -0.2, 0.3])


class Balls:
    """Balls whose density falls from 20 in the middle to 10 at the radius, linearly, and on to 0.

    The colour is that of the direction looked along, (direction + 1) / 2.
    """

    def __init__(self, *balls, bounds=((-1.0, -1.2, -0.7), (1.0, 1.0, 1.1))):
        self.balls = balls
        self.bounds = torch.tensor(bounds)

    def density(self, points):
        inside = ((points >= self.bounds[0]) & (points <= self.bounds[1])).all(-1)
        parts = [20 - 10 * (points - centre).norm(dim=-1) / radius for centre, radius in self.balls]
        return torch.stack(parts).amax(0).clamp(min=0) * inside

    def colour(self, points, directions):
        torch.testing.assert_close(directions.norm(dim=-1), torch.ones(len(points)))
        return (directions + 1) / 2


def _volume(mesh):
    """The volume inside, by the divergence theorem: positive when corners run counter-clockwise outside."""
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].transpose(1, 0, 2)
    return np.einsum("ij,ij->", a, np.cross(b, c)) / 6


def _edge_counts(mesh):
    edges = np.sort(
        np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1
    )
    return np.unique(edges, axis=0, return_counts=True)[1]


@pytest.fixture(scope="module")
def ball():
    return extract_mesh(Balls((CENTRE, 0.5)), resolution=64, threshold=10.0)


def test_a_ball_has_its_volume_its_centre_and_its_radius(ball):
    assert (ball.vertices.dtype, ball.faces.dtype, ball.colours.dtype) == (np.float32, np.int32, np.uint8)
    # Cells of 2.2/64 = 0.034. A chord of that length lies up to 0.034^2 / (8 * 0.5) = 3e-4 inside the ball,
    # and an interpolated vertex as far beside it.
    radii = np.linalg.norm(ball.vertices - CENTRE.numpy(), axis=1)
    np.testing.assert_allclose(radii, 0.5, atol=6e-4)
    assert _volume(ball) == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=4e-3)
    np.testing.assert_allclose(ball.vertices.mean(0), CENTRE.numpy(), atol=2e-3)


def test_the_threshold_is_in_extinction_per_world_unit():
    # 20 - 10 r / 0.5 is 15 at r = 0.25; the polyhedron lacks twice as much of the smaller ball.
    mesh = extract_mesh(Balls((CENTRE, 0.5)), resolution=64, threshold=15.0)
    assert _volume(mesh) == pytest.approx(4 / 3 * math.pi * 0.25**3, rel=1.6e-2)


def test_every_triangle_of_a_ball_faces_outwards(ball):
    a, b, c = ball.vertices.astype(np.float64)[ball.faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    assert (np.einsum("ij,ij->i", normals, (a + b + c) / 3 - CENTRE.numpy()) > 0).all()
    assert set(_edge_counts(ball)) == {2}


def test_colours_are_those_seen_along_the_inward_normal(ball):
    inward = (CENTRE.numpy() - ball.vertices) / 0.5
    # Normals are gradients on the grid, good to about half a cell: 0.017 / 0.5 * 255 / 2 = 4.3 levels.
    np.testing.assert_allclose(ball.colours, (inward + 1) / 2 * 255, atol=6)


def test_the_density_is_asked_for_in_chunks_and_the_mesh_is_the_same(ball, monkeypatch):
    asked = []

    class Watched(Balls):
        def density(self, points):
            asked.append(len(points))
            return super().density(points)

    monkeypatch.setattr(meshes, "CHUNK_POINTS", 10_000)
    mesh = extract_mesh(Watched((CENTRE, 0.5)), resolution=64, threshold=10.0)
    assert max(asked) <= 10_000
    # 2.0, 2.2 and 1.8 wide in cells of 2.2/64: rounded up.
    assert sum(asked) == 60 * 65 * 54
    for part, whole in zip(mesh, ball):
        np.testing.assert_array_equal(part, whole)


def test_small_parts_are_left_out_unless_asked_for():
    field = Balls((CENTRE, 0.5), (torch.tensor([-0.8, -0.9, -0.5]), 0.1))
    large, both = (
        extract_mesh(field, resolution=48, threshold=10.0, smallest_part=share) for share in (0.1, 0)
    )
    assert _volume(both) == pytest.approx(4 / 3 * math.pi * (0.5**3 + 0.1**3), rel=1e-2)
    assert _volume(large) == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=1e-2)
    assert large.vertices[:, 0].min() > -0.45
    assert set(np.unique(large.faces)) == set(range(len(large.vertices)))
    assert len(large.colours) == len(large.vertices) < len(both.vertices)


def test_what_reaches_the_side_of_the_box_is_closed_there():
    half = ((-1.0, -1.0, 0.0), (1.0, 1.0, 1.0))
    mesh = extract_mesh(Balls((torch.zeros(3), 0.5), bounds=half), resolution=64, threshold=10.0)
    assert mesh.vertices[:, 2].min() == 0
    assert set(_edge_counts(mesh)) == {2}
    assert _volume(mesh) == pytest.approx(2 / 3 * math.pi * 0.5**3, rel=2e-2)


def test_a_field_without_anything_dense_is_an_error_of_one_line():
    with pytest.raises(RunError, match=r"denser than the threshold of 30 per world unit \(densest: 19\.\d\)"):
        extract_mesh(Balls((CENTRE, 0.5)), resolution=32, threshold=30.0)


def test_a_ply_file_read_byte_by_byte_is_the_mesh(tmp_path):
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1.5, 0], [0, 0, -2]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3]], np.int32)
    colours = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    write_ply(tmp_path / "a.ply", Mesh(vertices, faces, colours))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]
    header, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert header.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 4",
        "property float x",
        "property float y",
        "property float z",
        "property uchar red",
        "property uchar green",
        "property uchar blue",
        "element face 2",
        "property list uchar int vertex_indices",
    ]
    assert len(body) == 4 * 15 + 2 * 13
    for index in range(4):
        row = body[15 * index : 15 * (index + 1)]
        np.testing.assert_array_equal(np.frombuffer(row[:12], "<f4"), vertices[index])
        np.testing.assert_array_equal(np.frombuffer(row[12:], np.uint8), colours[index])
    for index in range(2):
        row = body[60 + 13 * index : 60 + 13 * (index + 1)]
        assert row[0] == 3
        np.testing.assert_array_equal(np.frombuffer(row[1:], "<i4"), faces[index])


def test_another_library_reads_the_ply_file(tmp_path, ball):
    trimesh = pytest.importorskip("trimesh")
    write_ply(tmp_path / "ball.ply", ball)
    read = trimesh.load(tmp_path / "ball.ply", process=False)
    np.testing.assert_array_equal(read.vertices.astype(np.float32), ball.vertices)
    np.testing.assert_array_equal(read.faces, ball.faces)
    np.testing.assert_array_equal(read.visual.vertex_colors[:, :3], ball.colours)
    assert read.is_watertight
    assert read.volume > 0
