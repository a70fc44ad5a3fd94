"""Scenes in Blender's format: pictures and cameras are as stored, and each mistake is one line."""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from pinhole import camera_of, project

from blacksmith.datasets import blender
from blacksmith.datasets.blender import pictures
from blacksmith.datasets.blender.bounds import estimate_bounds, near_far
from blacksmith.datasets.blender.cameras import Camera, look_at, orbit
from blacksmith.errors import DataError

WIDTH, HEIGHT = 12, 8
ANGLE = 0.6911112070083618
COUNTS = {"train": 4, "val": 2, "test": 3}
RADIUS = 4.0311
TRAIN = "transforms_train.json"


def _poses(split):
    """Random cameras on a sphere that look at the origin."""
    generator = np.random.default_rng(list(COUNTS).index(split))
    places = generator.normal(size=(COUNTS[split], 3))
    places *= RADIUS / np.linalg.norm(places, axis=1, keepdims=True)
    return [look_at(place, np.zeros(3)) for place in places]


def _pixels(split, index):
    generator = np.random.default_rng([list(COUNTS).index(split), index])
    return generator.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)


@pytest.fixture
def scene(tmp_path):
    """The directory of a correct scene with the file names of the original ones."""
    directory = tmp_path / "mug"
    for split in COUNTS:
        (directory / split).mkdir(parents=True)
        frames = []
        for index, pose in enumerate(_poses(split)):
            Image.fromarray(_pixels(split, index)).save(directory / split / f"r_{index}.png")
            matrix = [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]
            frames.append({"file_path": f"./{split}/r_{index}", "rotation": 0.1, "transform_matrix": matrix})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (directory / f"transforms_{split}.json").write_text(json.dumps(content))
    return directory


def _edit(directory, change, split="train"):
    """Applies a function to the content of a JSON file."""
    path = directory / f"transforms_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _save(directory, pixels, name="train/r_1.png"):
    Image.fromarray(pixels).save(directory / name)


def _png(width, height, depth, color, rows, *chunks):
    """A PNG with any header, and extra chunks before its data; `rows` are arrays or bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


def _refused(directory, message, **options):
    """Opens a scene that must be refused in one line, and returns the line."""
    with pytest.raises(DataError, match=message) as caught:
        blender.open_scene(directory, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 3
    return str(caught.value)


# --- a correct scene ---


@pytest.mark.parametrize("split", COUNTS)
def test_pixels_cameras_and_names_are_those_of_the_files(scene, split):
    views = blender.open_scene(scene).views(split)
    assert views.pixels.dtype == np.uint8
    np.testing.assert_array_equal(views.pixels, [_pixels(split, i) for i in range(COUNTS[split])])
    assert views.names == tuple(f"r_{i}" for i in range(COUNTS[split]))
    for camera, pose in zip(views.cameras, _poses(split), strict=True):
        assert camera.pose.dtype == np.float32
        np.testing.assert_array_equal(camera.pose, pose)
        assert (camera.width, camera.height) == (WIDTH, HEIGHT)
        focal = 0.5 * WIDTH / math.tan(0.5 * ANGLE)
        assert camera.focal == pytest.approx((focal, focal), rel=1e-12)
        assert camera.center == (6.0, 4.0)


def test_the_order_of_the_frames_is_kept(scene):
    _edit(scene, lambda content: content["frames"].reverse())
    views = blender.open_scene(scene).views("train")
    assert views.names == ("r_3", "r_2", "r_1", "r_0")
    np.testing.assert_array_equal(views.pixels[0], _pixels("train", 3))
    np.testing.assert_array_equal(views.cameras[0].pose, _poses("train")[3])


def test_info_is_complete_and_survives_json(scene):
    info = dataclasses.asdict(blender.open_scene(scene, downscale=2).info)
    assert json.loads(json.dumps(info)) == info
    assert len(bytes.fromhex(info["sha256"])) == 32
    assert list(info.items()) == [
        ("source", "blender"),
        ("name", "mug"),
        ("path", str(scene)),
        ("sha256", info["sha256"]),
        ("train", 4),
        ("validation", 2),
        ("test", 3),
        ("width", 6),
        ("height", 4),
        ("downscale", 2),
    ]


def test_a_scene_describes_itself_in_one_line(scene):
    line = blender.open_scene(scene).info.describe()
    assert line == f"scene mug: 4 train, 2 validation, 3 test views of 12x8 from {scene}"
    line = blender.open_scene(str(scene), downscale=4).info.describe()
    assert line == f"scene mug: 4 train, 2 validation, 3 test views of 3x2, scaled down by 4, from {scene}"


def test_opening_and_cameras_decode_no_picture(scene, monkeypatch):
    def load(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    cameras = blender.open_scene(scene, downscale=2).cameras("test")
    assert [(c.width, c.height, c.center) for c in cameras] == [(6, 4, (3.0, 2.0))] * 3
    assert cameras[0].focal[0] == pytest.approx(0.5 * 6 / math.tan(0.5 * ANGLE), rel=1e-12)


def test_views_can_be_chosen_by_index(scene):
    opened = blender.open_scene(scene)
    views = opened.views("train", np.array([3, 0]))
    assert views.names == ("r_3", "r_0")
    np.testing.assert_array_equal(views.pixels, [_pixels("train", 3), _pixels("train", 0)])
    assert views.cameras == tuple(opened.cameras("train")[i] for i in (3, 0))


def test_a_tilde_and_a_link_to_the_scene_are_followed(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(scene)
    for path in ("~/mug", tmp_path / "link"):
        opened = blender.open_scene(path)
        assert opened.info.sha256 == blender.open_scene(scene).info.sha256
        np.testing.assert_array_equal(opened.views("val").pixels[0], _pixels("val", 0))
    assert opened.info.name == "link"


# --- files of pictures ---


def test_a_truncated_jpeg_is_found_when_the_scene_is_opened(scene):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    (scene / "train/r_1.png").unlink()
    _save(scene, noise, "train/r_1.jpg")
    _set(file_path="train/r_1.jpg")(scene)
    content = (scene / "train/r_1.jpg").read_bytes()
    blender.open_scene(scene, needs_alpha=False)
    (scene / "train/r_1.jpg").write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"r_1\.jpg: cannot be read .*(?i:truncated)"):
        blender.open_scene(scene, needs_alpha=False)


def test_a_jpeg_named_with_its_extension_is_read(scene):
    (scene / "train/r_1.png").unlink()
    _save(scene, np.full((HEIGHT, WIDTH, 3), 40, np.uint8), "train/r_1.jpg")
    _set(file_path="train/r_1.jpg")(scene)
    views = blender.open_scene(scene, needs_alpha=False).views("train")
    assert views.names == ("r_0", "r_1", "r_2", "r_3")
    # A JPEG of one color keeps it to within the rounding of its transform.
    np.testing.assert_allclose(views.pixels[1, ..., :3].astype(int), 40, atol=1)
    assert (views.pixels[1, ..., 3] == 255).all()


def test_a_file_without_extension_takes_precedence(scene):
    Image.fromarray(_pixels("test", 0)).save(scene / "train/r_1", format="PNG")
    np.testing.assert_array_equal(blender.open_scene(scene).views("train").pixels[1], _pixels("test", 0))


def test_names_are_unique_even_if_those_of_the_files_are_not(scene):
    (scene / "left").mkdir()
    shutil.copy(scene / "train/r_0.png", scene / "left/R_1.png")
    _edit(scene, lambda content: content["frames"][2].update(file_path="left/R_1"))
    assert blender.open_scene(scene).views("train").names == ("0000_r_0", "0001_r_1", "0002_R_1", "0003_r_3")
    assert blender.open_scene(scene).views("val").names == ("r_0", "r_1")


def test_a_link_within_the_scene_is_followed(scene):
    (scene / "train/r_1.png").rename(scene / "other.png")
    (scene / "train/r_1.png").symlink_to(scene / "other.png")
    views = blender.open_scene(scene).views("train")
    assert views.names[1] == "r_1"
    np.testing.assert_array_equal(views.pixels[1], _pixels("train", 1))


# --- kinds of pictures ---


def _read(scene, content, **options):
    """The pixels of a picture with this content in place of the second one of the training split."""
    (scene / "train/r_1.png").write_bytes(content)
    return blender.open_scene(scene, **options).views("train").pixels[1]


def test_rgba_of_8_bits_is_exact_even_where_it_is_transparent(scene):
    pixels = _pixels("train", 1)
    pixels[..., 3] = 0
    _save(scene, pixels)
    np.testing.assert_array_equal(blender.open_scene(scene).views("train").pixels[1], pixels)


def test_gray_with_alpha_becomes_rgba(scene):
    pixels = _pixels("train", 1)[..., [0, 3]]
    _save(scene, pixels)
    found = blender.open_scene(scene).views("train").pixels[1]
    np.testing.assert_array_equal(found, pixels[..., [0, 0, 0, 1]])


def test_a_palette_with_transparency_becomes_rgba(scene):
    colors = np.array([[200, 10, 30, 255], [0, 250, 60, 128], [7, 8, 9, 0]], np.uint8)
    index = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    palette = (b"PLTE", colors[:, :3].tobytes()), (b"tRNS", colors[:, 3].tobytes())
    np.testing.assert_array_equal(_read(scene, _png(WIDTH, HEIGHT, 8, 3, index, *palette)), colors[index])


def test_rgb_with_a_transparent_color_becomes_rgba(scene):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, 1::2] = (1, 2, 3)
    key = (b"tRNS", struct.pack(">3H", 1, 2, 3))
    alpha = _read(scene, _png(WIDTH, HEIGHT, 8, 2, pixels, key))[..., 3]
    np.testing.assert_array_equal(alpha, np.tile([255, 0], (HEIGHT, WIDTH // 2)))


def test_16_bits_are_reduced_to_8(scene):
    deep = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 4), np.uint16)
    deep[0, 0] = (0, 65535, 257 * 100, 257 * 200)
    pixels = _read(scene, _png(WIDTH, HEIGHT, 16, 6, deep.astype(">u2")))
    assert pixels[0, 0].tolist() == [0, 255, 100, 200]
    # Pillow takes the high byte, which is up to one below the nearest value.
    np.testing.assert_allclose(pixels, deep / 257, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_without_alpha_a_picture_is_opaque_or_refused(scene, mode):
    Image.new("RGB", (WIDTH, HEIGHT), "white").convert(mode).save(scene / "train/r_1.png")
    pixels = blender.open_scene(scene, needs_alpha=False).views("train").pixels
    assert (pixels[1] == 255).all()
    np.testing.assert_array_equal(pixels[0], _pixels("train", 0))
    line = _refused(scene, "no alpha channel.*nerf.Data.hull = False and nerf.Data.background")
    assert str(scene / "train/r_1.png") in line


@pytest.mark.parametrize(
    ("mode", "form", "message"),
    [
        ("CMYK", "JPEG", "unsupported pixel mode CMYK"),
        ("1", "PNG", "unsupported pixel mode 1"),
        ("I;16", "PNG", "unsupported pixel mode I;16"),
        ("RGBA", "TIFF", "cannot be read as PNG or JPEG"),
        ("RGBA", "WEBP", "cannot be read as PNG or JPEG"),
        ("RGB", "PDF", "cannot be read as PNG or JPEG"),
    ],
)
def test_other_kinds_of_pictures_are_refused(scene, mode, form, message):
    Image.new(mode, (WIDTH, HEIGHT)).save(scene / "train/r_1.png", format=form)
    assert str(scene / "train/r_1.png") in _refused(scene, message, needs_alpha=False)


# --- scaling down and compositing ---


def test_scaling_down_keeps_the_color_of_what_is_visible():
    red, hidden = (200, 10, 30, 255), (0, 255, 99, 0)
    half = np.array([[red, hidden], [hidden, red]], np.uint8)
    assert pictures.reduce(half, 2).tolist() == [[[200, 10, 30, 128]]]  # 127.5 is rounded up
    assert pictures.reduce(np.full((2, 2, 4), hidden, np.uint8), 2).tolist() == [[[0, 0, 0, 0]]]
    weighted = np.array([[(100, 0, 255, 255), (200, 0, 255, 85)], [hidden, hidden]], np.uint8)
    # Red: (255 * 100 + 85 * 200) / 340 = 125; alpha: 340 / 4 = 85.
    assert pictures.reduce(weighted, 2).tolist() == [[[125, 0, 255, 85]]]
    block = np.zeros((4, 4, 4), np.uint8)
    block[0, 0] = (255, 255, 255, 7)  # an alpha of 7 / 16 is below a half
    assert pictures.reduce(block, 4).tolist() == [[[0, 0, 0, 0]]]


@pytest.mark.parametrize("factor", [2, 4])
def test_scaling_down_is_the_mean_over_blocks(scene, factor):
    small = blender.open_scene(scene, downscale=factor).views("train").pixels
    assert small.shape == (4, HEIGHT // factor, WIDTH // factor, 4)
    for index, pixels in enumerate(small):
        full = _pixels("train", index).astype(np.float64)
        full[..., :3] *= full[..., 3:] / 255
        blocks = full.reshape(HEIGHT // factor, factor, WIDTH // factor, factor, 4).mean((1, 3))
        blocks[..., :3] /= blocks[..., 3:] / 255
        np.testing.assert_array_equal(pixels, np.floor(blocks + 0.5))


def test_views_are_composited_over_a_background_in_float32():
    pixels = np.array([[[(255, 51, 0, 255), (255, 51, 0, 102), (255, 51, 0, 0)]]], np.uint8)
    camera = camera_of(np.eye(4), 3, 1, ANGLE)
    views = blender.Views(pixels, (camera,), ("a",), np.ones(pixels.shape[:3], bool))
    over = views.picture(0, (0.0, 0.5, 1.0))
    assert over.dtype == np.float32
    # 102 / 255 = 0.4 of (1, 0.2, 0) and 0.6 of the background; 1e-6 is a few roundings of float32.
    np.testing.assert_allclose(over, [[(1, 0.2, 0), (0.4, 0.38, 0.6), (0, 0.5, 1)]], atol=1e-6)
    everywhere = np.broadcast_to(np.float32([0, 0.5, 1]), (1, 3, 3))
    np.testing.assert_array_equal(views.picture(0, everywhere), over)


# --- intrinsics ---

FOCAL = 0.5 * WIDTH / math.tan(0.5 * ANGLE)

# Settings of the file and of its second frame; the focal lengths and the center that its camera gets.
INTRINSICS = {
    "fl_x alone": ({"fl_x": 20}, {}, (20, 20), (6, 4)),
    "all": ({"fl_x": 20, "fl_y": 21, "cx": 5.5, "cy": 4.25, "w": 12, "h": 8}, {}, (20, 21), (5.5, 4.25)),
    "cx of 0": ({"fl_x": 20, "cx": 0}, {}, (20, 20), (0, 4)),
    "two angles": ({"camera_angle_x": ANGLE, "camera_angle_y": 0.5}, {}, (FOCAL, 4 / math.tan(0.25)), (6, 4)),
    "fl_x before an angle": ({"fl_x": 20, "camera_angle_x": 1, "camera_angle_y": 2}, {}, (20, 20), (6, 4)),
    "larger w and h": ({"fl_x": 80, "fl_y": 84, "cx": 22, "w": 48.0, "h": 32}, {}, (20, 21), (5.5, 4)),
    "smaller w and h": ({"fl_x": 5, "cy": 1, "w": 3, "h": 2}, {}, (20, 20), (6, 4)),
    "an angle with larger w and h": ({"camera_angle_x": ANGLE, "w": 24, "h": 16}, {}, (FOCAL, FOCAL), (6, 4)),
    "of a frame": ({"fl_x": 20, "fl_y": 30}, {"fl_x": 25, "cx": 5}, (25, 25), (5, 4)),
    "an angle of a frame": ({"fl_x": 20, "fl_y": 30}, {"camera_angle_x": ANGLE}, (FOCAL, FOCAL), (6, 4)),
    "size of a frame": ({"fl_x": 20}, {"w": 24, "h": 16}, (10, 10), (6, 4)),
    "no distortion": ({"fl_x": 20, "k1": 0, "p2": -0.0, "camera_model": "OPENCV"}, {}, (20, 20), (6, 4)),
    "unknown keys": ({"fl_x": 20, "aabb": [0], "where": 1}, {"where": 2}, (20, 20), (6, 4)),
}


@pytest.mark.parametrize("case", INTRINSICS)
@pytest.mark.parametrize("downscale", [1, 2])
def test_intrinsics_are_read_in_every_form(scene, case, downscale):
    whole, frame, focal, center = INTRINSICS[case]

    def change(content):
        del content["camera_angle_x"]
        content.update(whole)
        content["frames"][1].update(frame)

    _edit(scene, change)
    camera = blender.open_scene(scene, downscale=downscale).cameras("train")[1]
    assert camera.focal == pytest.approx(np.divide(focal, downscale), rel=1e-12)
    assert camera.center == pytest.approx(np.divide(center, downscale), rel=1e-12)
    assert (camera.width, camera.height) == (WIDTH // downscale, HEIGHT // downscale)


# --- cameras and bounds ---


def test_a_moved_and_turned_camera_projects_as_computed_by_hand():
    # At (10, 0, 0), looking at the origin with z upwards: its right is +y.
    camera = Camera(look_at((10, 0, 0), np.zeros(3)), 40, 20, (100.0, 50.0), (18.0, 11.0))
    np.testing.assert_allclose(camera.pose, [(0, 0, 1, 10), (1, 0, 0, 0), (0, 1, 0, 0)], atol=1e-7)
    points = np.array([[0, 0, 0], [0, 1, 0], [5, 0, 0.1]], np.float32)
    places, depth = project(camera, points)
    np.testing.assert_allclose(depth, [10, 10, 5], rtol=1e-6)
    # (18 + 100 * 1 / 10, 11) and (18, 11 - 50 * 0.1 / 5); float32 poses are accurate to about 1e-5 pixels.
    np.testing.assert_allclose(places, [(18, 11), (28, 11), (18, 10)], atol=1e-4)
    np.testing.assert_allclose(project(camera.resized(10, 5), points)[0], places / 4, rtol=1e-9)


def _cameras(places, target=(0, 0, 0), *, width=200, height=200, angle=ANGLE):
    return [camera_of(look_at(place, np.array(target)), width, height, angle) for place in np.array(places)]


def _on_sphere(count, radius=RADIUS, seed=0):
    places = np.random.default_rng(seed).normal(size=(count, 3))
    places[:, 2] = np.abs(places[:, 2])
    return radius * places / np.linalg.norm(places, axis=1, keepdims=True)


def test_the_cube_of_the_classic_cameras_has_a_half_side_of_1_45():
    bounds = estimate_bounds(_cameras(_on_sphere(100)))
    assert bounds.dtype == np.float32
    # 4.0311 * tan(0.6911 / 2) = 1.4512
    np.testing.assert_allclose(bounds, [[-1.4512] * 3, [1.4512] * 3], atol=1e-3)
    # A camera that looks away changes little.
    cameras = _cameras(_on_sphere(50)) + _cameras([(0, 1, 1)], target=(0, 2, 2))
    np.testing.assert_allclose(estimate_bounds(cameras), [[-1.4512] * 3, [1.4512] * 3], atol=0.1)


def test_the_cube_is_no_larger_than_the_nearest_camera_sees():
    target = np.array([3.0, -2.0, 0.5])
    places = target + np.concatenate([_on_sphere(20, radius=2.5), _on_sphere(1, radius=2.0)])
    bounds = estimate_bounds(_cameras(places, target, width=100, height=200, angle=0.5))
    # The picture is twice as high as it is wide, so that the wider angle is the vertical one.
    half = 2.0 * 2 * math.tan(0.25)
    np.testing.assert_allclose(bounds, [target - half, target + half], atol=1e-4)


@pytest.mark.parametrize("radius", [0.3, 1.8, 2.9])
def test_a_few_close_ups_do_not_shrink_the_cube(radius):
    bounds = estimate_bounds(_cameras(np.concatenate([_on_sphere(20), _on_sphere(5, radius=radius)])))
    np.testing.assert_allclose(bounds, [[-1.4512] * 3, [1.4512] * 3], atol=2e-3)


def test_a_stray_camera_moves_neither_the_cube_nor_near_and_far():
    cameras = _cameras(_on_sphere(20))
    stray = [*cameras, camera_of(look_at((1e5, 0, 0), (1e5, 9, 3)), 20, 20, ANGLE)]
    np.testing.assert_array_equal(estimate_bounds(stray), estimate_bounds(cameras))
    box = estimate_bounds(cameras)
    assert near_far(stray, box) == near_far(cameras, box)


def test_the_cube_holds_what_the_masks_show():
    # Most are close-ups, which see 0.72; the other masks show a square that reaches 1 from the center.
    near, far = _cameras(_on_sphere(15, radius=2.0)), _cameras(_on_sphere(6))
    masks = np.ones((21, 200, 200), bool)  # of a close-up, which shows no end of it
    pixels = round(200 / 2 * 1.0 / 1.4512)
    masks[15:] = False
    masks[15:, 100 - pixels : 100 + pixels, 100 - pixels : 100 + pixels] = True
    np.testing.assert_allclose(estimate_bounds(near + far)[1], 0.72, atol=0.01)
    np.testing.assert_allclose(estimate_bounds(near + far, masks)[1], 1.0, atol=0.02)
    # Masks of less, or of nothing, change no bit.
    masks[15:, : 100 - pixels // 2] = masks[15:, 100 + pixels // 2 :] = False
    masks[15:, :, : 100 - pixels // 2] = masks[15:, :, 100 + pixels // 2 :] = False
    for shown in (masks, np.zeros_like(masks)):
        np.testing.assert_array_equal(estimate_bounds(near + far, shown), estimate_bounds(near + far))


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_parallel_cameras_get_a_cube_in_front_of_them(shift):
    places = [(x, y, 4.0 + shift) for x in (-0.5, 0.5) for y in (-0.5, 0.5)]
    cameras = [camera_of(look_at(p, np.array([p[0], p[1], 0])), 20, 20, ANGLE) for p in places]
    bounds = estimate_bounds(cameras)
    half = math.hypot(4 + shift, math.sqrt(0.5)) * math.tan(ANGLE / 2)
    np.testing.assert_allclose(bounds, [[-half] * 3, [half] * 3], rtol=1e-6)


def test_one_camera_is_enough():
    bounds = estimate_bounds(_cameras([(0, -RADIUS, 0)]))
    np.testing.assert_allclose(bounds, [[-1.4512] * 3, [1.4512] * 3], atol=1e-3)
    away = estimate_bounds(_cameras([(0, -3, 0)], target=(0, -5, 0)))
    assert (away[1] > away[0]).all()
    assert away.mean(0)[1] < -3


@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_cameras_that_look_outwards_get_a_cube_with_a_size(radius):
    turns = np.linspace(0, 2 * math.pi, 8, endpoint=False)
    out = np.stack([np.cos(turns), np.sin(turns), np.full(8, 0.2)], axis=1)
    cameras = [camera_of(look_at(radius * o, (radius + 1) * o), 20, 20, ANGLE) for o in out]
    bounds = estimate_bounds(cameras)
    assert np.isfinite(bounds).all()
    assert (bounds[1] - bounds[0] > 0.1).all()


def test_near_and_far_are_the_distances_to_the_box():
    box = np.array([[-1, -1, -1], [1, 1, 1]], np.float32)
    near, far = near_far(_cameras([(5, 0, 0), (0, 4, 0)]), box)
    assert near == pytest.approx(3)
    assert far == pytest.approx(math.sqrt(36 + 1 + 1))
    near, far = near_far(_cameras([(0.8, 0, 0)]), box)  # inside
    assert near == pytest.approx(0.05 * 0.8)
    assert far == pytest.approx(math.sqrt(1.8**2 + 2))


def test_an_orbit_circles_its_center_at_the_given_elevation():
    center = np.array([1.0, 2.0, 3.0])
    cameras = orbit(_cameras([(3, 0, 0)])[0], center, 2.0, 30.0, 4)
    assert len(cameras) == 4
    # Radius 2 at 30 degrees: 1 above the center, sqrt(3) beside it.
    np.testing.assert_allclose(cameras[1].pose[:, 3], center + (0, math.sqrt(3), 1), atol=1e-6)
    for camera in cameras:
        places, depth = project(camera, center[None])
        # A float32 rotation leaves 1e-4 of a pixel.
        np.testing.assert_allclose(places, [camera.center], atol=1e-3)
        np.testing.assert_allclose(depth, 2.0, rtol=1e-6)


# --- masks, keys that are not used, and turned pictures ---


def test_black_pixels_of_a_mask_are_not_used(scene):
    before = blender.open_scene(scene).info.sha256
    assert blender.open_scene(scene).views("train").used.all()
    used = np.random.default_rng(3).random((HEIGHT, WIDTH)) < 0.8
    used[:4, :4] = True
    _mask(used * 0.01)(scene)  # dark gray is not black
    (scene / "train/dynamic_mask_r_1.png").touch()  # the same for instant-ngp
    opened = blender.open_scene(scene)
    expected = np.ones((4, HEIGHT, WIDTH), bool)
    expected[1] = used
    np.testing.assert_array_equal(opened.views("train").used, expected)
    np.testing.assert_array_equal(opened.views("train", [1]).used, [used])
    assert opened.views("val").used.all()
    assert opened.info.sha256 != before
    # Of a mean over pixels, all must be used.
    halved = blender.open_scene(scene, downscale=2).views("train").used[1]
    np.testing.assert_array_equal(halved, used.reshape(4, 2, 6, 2).all((1, 3)))


def test_keys_that_are_not_used_are_named_once(scene):
    assert blender.open_scene(scene).notes == ()  # `rotation` means nothing to anyone
    for split in COUNTS:
        _edit(
            scene,
            lambda content: content.update(aabb_scale=16, depth_unit=2, distortion_params=[0, 0]),
            split,
        )
        _edit(scene, lambda content: content["frames"][0].update({"expo\nsure": 3, "time": 0}), split)
    (note,) = blender.open_scene(scene).notes
    assert note == r"scene mug: keys of the scene's files that are not used: 'depth_unit', 'expo\nsure'"


def test_test_pictures_that_are_trained_on_are_named(scene):
    shutil.copy(scene / "transforms_train.json", scene / "transforms_test.json")
    (note,) = blender.open_scene(scene).notes
    assert note == "scene mug: test pictures that are also trained on: r_0, r_1, r_2, r_3"


def _turn(scene, orientation, *, form="PNG", **intrinsics):
    """Stores the pictures as a camera does that is held in an orientation."""
    back = {3: 3, 6: 8, 8: 6}[orientation]
    for file in scene.glob("*/*.png"):
        with Image.open(file) as image:
            exif = image.getexif()
            exif[0x0112] = orientation
            image.transpose(pictures._TURNS[back]).save(file, form, exif=exif)
    for split in COUNTS:
        _edit(scene, lambda content: content.update(intrinsics), split)


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize(
    "intrinsics", [{}, {"w": WIDTH, "h": HEIGHT}, {"fl_x": 20.0, "cx": 6.1, "cy": 3.8}], ids=str
)
def test_pictures_are_turned_as_exif_says_which_is_one_line(scene, orientation, intrinsics):
    _turn(scene, orientation, **intrinsics)
    opened = blender.open_scene(scene)
    np.testing.assert_array_equal(opened.views("train").pixels[2], _pixels("train", 2))
    assert (opened.info.width, opened.info.height) == (WIDTH, HEIGHT)
    (note,) = opened.notes
    assert re.fullmatch(
        "scene mug: turned as their EXIF orientation says: train/r_0.png, .* and 1 more", note
    )


@pytest.mark.parametrize(
    "intrinsics", [{"w": HEIGHT, "h": WIDTH}, {"fl_x": 20.0, "cx": 4.1, "cy": 5.8}], ids=str
)
def test_an_orientation_that_contradicts_the_intrinsics_is_refused(scene, intrinsics):
    _turn(scene, 6, **intrinsics)
    line = _refused(scene, "EXIF orientation 6 turns it to 12x8 pixels, which contradicts the intrinsics")
    assert "train/r_0.png" in line


def test_exif_that_makes_no_sense_is_ignored(scene):
    for index, value in enumerate((0, 9, 1)):
        with Image.open(scene / f"train/r_{index}.png") as image:
            exif = image.getexif()
            exif[0x0112] = value
            image.save(scene / f"train/r_{index}.png", exif=exif)
    with Image.open(scene / "train/r_3.png") as image:
        image.save(scene / "train/r_3.png", exif=b"Exif\0\0junk")
    opened = blender.open_scene(scene)
    assert opened.notes == ()
    np.testing.assert_array_equal(opened.views("train").pixels, [_pixels("train", i) for i in range(4)])


def test_pictures_beyond_the_memory_are_refused_on_opening(scene, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 50)
    line = _refused(scene, "4 pictures of 96 pixels need .* GiB of memory.*nerf.Data.downscale")
    assert str(scene) in line


# --- hash ---


def test_the_hash_stays_when_the_scene_is_moved_or_scaled(scene, tmp_path):
    opened = blender.open_scene(scene)
    shutil.copytree(scene, tmp_path / "elsewhere" / "cup")
    moved = blender.open_scene(tmp_path / "elsewhere" / "cup", downscale=2, needs_alpha=False)
    assert moved.info.sha256 == opened.info.sha256
    assert moved.info.path != opened.info.path


def test_the_hash_changes_with_any_pixel_number_name_or_order(scene, tmp_path):
    def pixel(directory):
        pixels = _pixels("test", 2)
        pixels[-1, -1, 3] ^= 1
        _save(directory, pixels, "test/r_2.png")

    def swapped(directory):
        first, second = directory / "val/r_0.png", directory / "val/r_1.png"
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    changes = [
        lambda directory: None,
        pixel,
        swapped,
        lambda directory: (directory / "train/r_0.png").rename(directory / "train/r_0"),
        lambda directory: _edit(directory, lambda content: content.update(camera_angle_x=0.7), "val"),
        lambda directory: _edit(directory, lambda content: content["frames"].reverse()),
    ]
    seen = set()
    for number, change in enumerate(changes):
        directory = tmp_path / str(number)
        shutil.copytree(scene, directory)
        change(directory)
        seen.add(blender.open_scene(directory).info.sha256)
    assert len(seen) == len(changes)


# --- what is refused ---


def _whole(change):
    return lambda scene: _edit(scene, change)


def _frame(change):
    """Changes the second frame of the train split."""
    return _whole(lambda content: change(content["frames"][1]))


def _set(**settings):
    return _frame(lambda frame: frame.update(settings))


def _matrix(change):
    return _frame(
        lambda frame: frame.update(transform_matrix=change(np.array(frame["transform_matrix"])).tolist())
    )


def _entry(row, column, value):
    def apply(frame):
        frame["transform_matrix"][row][column] = value

    return _frame(apply)


def _content(content, name=TRAIN):
    return lambda scene: (scene / name).write_bytes(content)


def _picture(content):
    return _content(content, "train/r_1.png")


def _link_out(scene):
    (scene / "train/r_1.png").rename(scene.parent / "r_1.png")
    (scene / "train/r_1.png").symlink_to("../../r_1.png")


def _far_away(scene):
    """Adds what a projection of the earth adds."""

    def move(content):
        for frame in content["frames"]:
            frame["transform_matrix"][1][3] += 5e6

    for split in COUNTS:
        _edit(scene, move, split)


def _move_out(scene):
    (scene / "train/r_1.png").rename(scene.parent / "r_1.png")
    _set(file_path="../r_1")(scene)


def _loop(scene):
    (scene / "train/r_1.png").unlink()
    (scene / "train/r_1.png").symlink_to("r_1.png")


def _grown(scene):
    _save(scene, np.zeros((HEIGHT, WIDTH + 1, 4), np.uint8))


def _mask(values):
    """Gives a mask to the second frame."""

    def apply(scene):
        Image.fromarray((255 * values).astype(np.uint8)).save(scene / "m.png")
        _set(mask_path="m.png")(scene)

    return apply


HUGE = _png(100_000, 100_000, 8, 6, [])
LARGE = _png(10_000, 10_000, 8, 6, [])  # where Pillow only warns
FRAME = rf"{TRAIN}: frame 1: "
RIGID = FRAME + "transform_matrix = .*: must be a rotation without scale or reflection"
NO_PICTURE = "cannot be read as PNG or JPEG"

# What is done to a scene, what the line says, and the file that it names.
BROKEN = {
    "no such directory": (shutil.rmtree, f"no {TRAIN}, ", "mug"),
    "a file": (lambda scene: (shutil.rmtree(scene), scene.touch()), f"no {TRAIN}, ", "mug"),
    "no train split": (lambda scene: (scene / TRAIN).unlink(), f"no {TRAIN};", TRAIN),
    "no test split": (
        lambda scene: (scene / "transforms_test.json").unlink(),
        "no transforms_test.json;",
        "transforms_test.json",
    ),
    "an empty file": (_content(b""), "not JSON", TRAIN),
    "cut off": (_content(b'{"frames": [{"file_'), "not JSON", TRAIN),
    "no text": (_content(b'{"a": "\xff"}'), "not JSON .*utf-8", TRAIN),
    "too deep": (_content(b"[" * 100_000), "not JSON", TRAIN),
    "a number too long": (_content(b'{"frames": ' + b"1" * 5000 + b"}"), "not JSON", TRAIN),
    "a list": (_content(b"[]"), "must be a valid dictionary", TRAIN),
    "no frames": (_content(b"{}", "transforms_test.json"), "frames: is missing", "transforms_test.json"),
    "frames empty": (_whole(lambda c: c.update(frames=[])), "frames = .*at least 1", TRAIN),
    "frames an object": (_whole(lambda c: c.update(frames={})), "frames = {}: must be a valid list", TRAIN),
    "a frame a number": (
        _whole(lambda c: c["frames"].insert(1, 3)),
        r"frames\[1\] = 3: must be a valid dictionary",
        TRAIN,
    ),
    "no file_path": (_frame(lambda f: f.pop("file_path")), FRAME + "file_path: is missing", TRAIN),
    "file_path of the whole file": (
        _whole(lambda c: c["frames"][1].pop("file_path") and c.update(file_path="train/r_1")),
        FRAME + "file_path: is missing",
        TRAIN,
    ),
    "file_path a number": (_set(file_path=7), FRAME + "file_path = 7: must be a valid string", TRAIN),
    "file_path empty": (_set(file_path=""), FRAME + "file_path = ''", TRAIN),
    "no Unicode": (_set(file_path="\ud800"), FRAME + r"file_path = '\\ud800'", TRAIN),
    "no matrix": (_frame(lambda f: f.pop("transform_matrix")), FRAME + "transform_matrix: is miss", TRAIN),
    "a matrix 3x4": (_matrix(lambda m: m[:3]), FRAME + "transform_matrix = .*4 rows of 4", TRAIN),
    "a matrix 4x3": (_matrix(lambda m: m[:, :3]), FRAME + r"transform_matrix\[0\] = .*4 rows of 4", TRAIN),
    "a flat matrix": (_matrix(np.ravel), FRAME + "transform_matrix = .*4 rows of 4", TRAIN),
    "a matrix null": (_set(transform_matrix=None), FRAME + "transform_matrix = None", TRAIN),
    "NaN": (_entry(0, 3, math.nan), FRAME + r"transform_matrix\[0\]\[3\] = nan: must be a finite", TRAIN),
    "infinity": (_entry(1, 1, -math.inf), FRAME + r"transform_matrix\[1\]\[1\] = -inf", TRAIN),
    "a string": (_entry(2, 2, "1.0"), FRAME + r"transform_matrix\[2\]\[2\] = '1.0'", TRAIN),
    "true": (_entry(3, 3, True), FRAME + r"transform_matrix\[3\]\[3\] = True", TRAIN),
    "a huge number": (_entry(0, 3, 10**400), FRAME + r"transform_matrix\[0\]\[3\] = 1000", TRAIN),
    "sheared": (_entry(0, 0, 3.0), RIGID, TRAIN),
    "very sheared": (_entry(0, 0, 1e8), RIGID, TRAIN),
    "map coordinates": (_far_away, "are within 7.* of one another, but 5e\\+06 away from the origin", "mug"),
    "scaled": (_matrix(lambda m: m @ np.diag([2, 2, 2, 1])), RIGID, TRAIN),
    "scaled a little": (_matrix(lambda m: m @ np.diag([1.002] * 3 + [1])), RIGID, TRAIN),
    "mirrored": (_matrix(lambda m: m @ np.diag([1, -1, 1, 1])), RIGID, TRAIN),
    "a projective last row": (_entry(3, 2, 0.1), RIGID, TRAIN),
    "transposed": (_matrix(np.transpose), RIGID, TRAIN),
    "no intrinsics": (_whole(lambda c: c.pop("camera_angle_x")), "frame 0: needs `camera_angle_x`", TRAIN),
    "only fl_y": (_set(fl_y=3), FRAME + "needs `camera_angle_x`", TRAIN),
    "an angle of 0": (_set(camera_angle_x=0), FRAME + "camera_angle_x = 0: must be greater than", TRAIN),
    "an angle of pi": (
        _set(camera_angle_x=math.pi),
        FRAME + "camera_angle_x = 3.14.* less than .*3.14",
        TRAIN,
    ),
    "an angle as text": (_set(camera_angle_x="0.69"), FRAME + "camera_angle_x = '0.69'", TRAIN),
    "a negative angle": (_set(camera_angle_x=1, camera_angle_y=-1), FRAME + "camera_angle_y = -1", TRAIN),
    "negative fl_x": (_set(fl_x=-20), FRAME + "fl_x = -20: must be greater than", TRAIN),
    "fl_y of 0": (_set(fl_x=20, fl_y=0), FRAME + "fl_y = 0: must be greater than", TRAIN),
    "fl_x NaN": (_set(fl_x=math.nan), FRAME + "fl_x = nan", TRAIN),
    "cx null": (_set(cx=None), FRAME + "cx = None: must be a valid number", TRAIN),
    "half a pixel": (_set(w=12.5, h=8), FRAME + "w = 12.5: must be a multiple of 1", TRAIN),
    "wrong size": (_set(w=13, h=8), FRAME + "w and h say 13x8, but .* has 12x8", TRAIN),
    "wrong shape": (_set(w=24, h=8), FRAME + "w and h say 24x8", TRAIN),
    "half as large again": (_set(w=18, h=12), FRAME + "w and h say 18x12", TRAIN),
    "distortion": (_whole(lambda c: c.update(k1=-0.01)), "k1 = -0.01: must be 0 .*distortion", TRAIN),
    "distortion of a frame": (_set(p2=1e-4), FRAME + "p2 = 0.0001: must be 0 .*distortion", TRAIN),
    "distortion null": (_set(k2=None), FRAME + "k2 = None: must be 0 .*distortion", TRAIN),
    "a fisheye model": (_set(camera_model="OPENCV_FISHEYE"), FRAME + "camera_model = .*pinhole", TRAIN),
    "a lens in a list": (
        _whole(lambda c: c.update(distortion_params=[-0.11, 0, 0, 0, 0, 0])),
        r"distortion_params = \[-0.11, .*not supported: only pinhole .*undistort",
        TRAIN,
    ),
    "another lens": (_whole(lambda c: c.update(ftheta_p1=0.5)), "ftheta_p1 = 0.5 is not supp", TRAIN),
    "a sphere": (_whole(lambda c: c.update(equirectangular=True)), "equirectangular = True is not", TRAIN),
    "a cropped fisheye": (_set(fisheye_crop_radius=99), FRAME + "fisheye_crop_radius = 99 is not", TRAIN),
    "time": (_set(time=0.5), FRAME + "time = 0.5 is not supported: moving scenes", TRAIN),
    "a rolling shutter": (
        _whole(lambda c: c.update(rolling_shutter=[0, 0, 1, 0])),
        r"rolling_shutter = \[0, 0, 1, 0\] is not supported: moving",
        TRAIN,
    ),
    "a moving camera": (_set(transform_matrix_end=[[1]]), FRAME + "transform_matrix_end = .* is not", TRAIN),
    "a matrix of intrinsics": (_set(K=[[9, 0, 6]]), FRAME + "K = .* is not supported: give fl_x", TRAIN),
    "degrees": (_whole(lambda c: c.update(x_fov=40)), "x_fov = 40 is not supported: give fl_x", TRAIN),
    "other axes": (_whole(lambda c: c.update(from_na=True)), "from_na = True .*OpenGL axes", TRAIN),
    "transparent white": (_whole(lambda c: c.update(white_transparent=True)), "change the pictures", TRAIN),
    "frames to leave out": (_whole(lambda c: c.update(train_filenames=["a"])), "remove the frames", TRAIN),
    "fewer frames": (_whole(lambda c: c.update(n_frames=3)), "n_frames = 3, but there are 4 fra", TRAIN),
    "a key twice": (
        lambda scene: (scene / TRAIN).write_text((scene / TRAIN).read_text()[:-1] + ', "frames": []}'),
        "not JSON .*'frames' occurs twice",
        TRAIN,
    ),
    "no mask": (_set(mask_path="m.png"), FRAME + "no picture 'm.png' in [^,]*$", TRAIN),
    "a mask out of the scene": (_set(mask_path="../m.png"), FRAME + ".* leads out of the scene", TRAIN),
    "a mask a number": (_set(mask_path=1), FRAME + "mask_path = 1: must be a valid string", TRAIN),
    "a mask of another size": (_mask(np.ones((HEIGHT + 1, WIDTH))), "12x9 pixels, but .* has 12x8", "m.png"),
    "a black mask": (_mask(np.zeros((HEIGHT, WIDTH))), "the mask is black", "m.png"),
    "a mask with alpha": (_mask(np.ones((HEIGHT, WIDTH, 4))), "pixel mode RGBA; save the mask", "m.png"),
    "a mask that is none": (lambda scene: _set(mask_path=TRAIN)(scene), NO_PICTURE, TRAIN),
    "a fisheye": (_whole(lambda c: c.update(is_fisheye=True)), "is_fisheye = True: .*pinhole", TRAIN),
    "no picture": (lambda scene: (scene / "train/r_1.png").unlink(), FRAME + "no picture", "train/r_1"),
    "a directory for a picture": (_set(file_path="train"), FRAME + "no picture 'train'", TRAIN),
    "an impossible name": (_set(file_path="train/\0"), FRAME + r"'train/\\x00' cannot be read", TRAIN),
    "a name of two lines": (_set(file_path="a\nb"), FRAME + r"no picture 'a\\nb'", TRAIN),
    "a name too long": (_set(file_path="x" * 5000), FRAME + ".* cannot be read", TRAIN),
    "a link to itself": (_loop, FRAME + "no picture|cannot be read", "train/r_1"),
    "named twice": (_set(file_path="train/../train/r_0.png"), FRAME + ".* is named twice", "train/r_0.png"),
    "out of the scene": (_move_out, FRAME + r"'../r_1' leads out of the scene", TRAIN),
    "a link out": (_link_out, FRAME + ".* leads out of the scene", "train/r_1"),
    "a mask by name": (
        _content(b"", "train/dynamic_mask_r_1.png"),
        "instant-ngp would use this file with './train/r_1'.*: name it as mask_path, with .* in black, or",
        "train/dynamic_mask_r_1.png",
    ),
    "alpha by name": (
        _content(b"", "train/r_1.alpha.png"),
        "put it into the picture's alpha",
        "r_1.alpha.png",
    ),
    "rays by name": (_content(b"", "train/rays_r_1.dat"), "only pinhole cameras", "train/rays_r_1.dat"),
    "a picture of another size": (_grown, "13x8 pixels, but .*r_0.png has 12x8", "train/r_1.png"),
    "no bytes": (_picture(b""), NO_PICTURE, "train/r_1.png"),
    "no picture in it": (_picture(b"<html>not found</html>"), NO_PICTURE, "train/r_1.png"),
    "a header cut off": (_picture(HUGE[:20]), NO_PICTURE, "train/r_1.png"),
    "no pixels": (_picture(_png(0, 8, 8, 6, [])), NO_PICTURE, "train/r_1.png"),
    "a bomb": (_picture(HUGE), "exceeds limit of", "train/r_1.png"),
    "half a bomb": (_picture(LARGE), "exceeds limit of", "train/r_1.png"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_scene_is_refused_and_the_file_is_named(scene, case, recwarn):
    break_it, message, name = BROKEN[case]
    break_it(scene)
    line = _refused(scene, message)
    assert name in line
    assert str(scene) in line
    assert not recwarn.list


def _flipped(content):
    middle = content.index(b"IDAT") + (len(content) - content.index(b"IDAT")) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle:][:8]) + content[middle + 8 :]


TRUNCATED = {
    "cut in half": lambda content: content[: len(content) // 2],
    "with flipped bits": _flipped,
    "without data": lambda content: content[:33] + content[-12:],
}


@pytest.mark.parametrize("case", TRUNCATED)
def test_a_broken_png_is_named_when_the_scene_is_opened(scene, case):
    path = scene / "test/r_1.png"
    path.write_bytes(TRUNCATED[case](path.read_bytes()))

    def opened_and_decoded():
        opened = blender.open_scene(scene)
        assert case == "without data"  # all of its checksums are correct
        opened.views("test")

    with pytest.raises(DataError) as caught:
        opened_and_decoded()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_that_changed_or_vanished_since_opening_is_named(scene):
    opened = blender.open_scene(scene)
    _grown(scene)
    with pytest.raises(DataError, match=r"train/r_1\.png: changed since the scene was opened"):
        opened.views("train")
    (scene / "train/r_0.png").unlink()
    with pytest.raises(DataError, match=r"train/r_0\.png: cannot be read .*No such file or directory"):
        opened.views("train")


@pytest.mark.parametrize("downscale", [3, 8])
def test_a_factor_that_does_not_divide_the_size_is_refused(scene, downscale):
    line = _refused(scene, r"12x8 pixels, and downscale=.*; allowed: 1, 2, 4$", downscale=downscale)
    assert str(scene / "train/r_0.png") in line


# --- the bundled scene, and real ones ---


def test_the_bundled_scene_is_complete_small_and_licensed():
    info = blender.open_scene(None).info
    assert dataclasses.replace(info, sha256="") == blender.SceneInfo(
        source="anvil",
        name="anvil",
        path=None,
        sha256="",
        train=100,
        validation=20,
        test=20,
        width=200,
        height=200,
        downscale=1,
    )
    assert info.describe() == (
        "scene anvil: 100 train, 20 validation, 20 test views of 200x200 from the package"
    )
    files = [path for path in blender.BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert "Apache-2.0" in (blender.BUNDLED / "README.md").read_text(encoding="utf-8")
    # There is no picture that no frame names.
    assert sum(path.suffix == ".png" for path in files) == 140


def _overlap(path, mirror):
    """Carves the object out of the cube by 30 training views; returns how well it fits test views' masks.

    Args:
      path: of the scene.
      mirror: what to multiply the cameras' x, y and z axes with.

    Returns:
      Intersection over union of the carved points' pixels and the mask, for pictures 25 pixels wide, [views].
    """
    width = blender.open_scene(path).info.width
    scenes = {"train": blender.open_scene(path), "test": blender.open_scene(path, downscale=width // 25)}
    points = np.stack(np.meshgrid(*[np.linspace(-1.45, 1.45, 48)] * 3, indexing="ij"), -1).reshape(-1, 3)
    overlaps = []
    for split, indices in (("train", range(0, 60, 2)), ("test", range(0, 20, 4))):
        views = scenes[split].views(split, list(indices))
        for camera, pixels in zip(views.cameras, views.pixels):
            camera = dataclasses.replace(camera, pose=camera.pose * np.float32([*mirror, 1]))
            # A border of one pixel catches what is projected out of the picture.
            mask = np.pad(pixels[..., 3] > 0, 1)
            limits = (camera.width + 1, camera.height + 1)
            column, row = np.clip(np.floor(project(camera, points)[0]).astype(int) + 1, 0, limits).T
            if split == "train":
                points = points[mask[row, column]]
            else:
                seen = np.zeros_like(mask)
                seen[row, column] = True
                overlaps.append((seen & mask).sum() / (seen | mask).sum())
    return np.array(overlaps)


SCENES = [None, *filter(None, [os.environ.get("BLACKSMITH_NERF_SCENE")])]


@pytest.mark.parametrize("path", SCENES)
def test_masks_cameras_and_bounds_of_a_real_scene_agree(path):
    opened = blender.open_scene(path)
    bounds = estimate_bounds(opened.cameras("train"))
    np.testing.assert_allclose(bounds.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(bounds[1] - bounds[0], 2 * 1.45, atol=0.05)
    near, far = near_far(opened.cameras("train"), bounds)
    assert 1 < near < 3
    assert 5 < far < 7
    # Lego has 0.90 to 0.94 with its cameras, the rounder anvil 0.92 to 0.94; with a flipped axis they have
    # 0.35 to 0.63 and 0.70 to 0.84.
    right = _overlap(path, (1, 1, 1)).min()
    assert right > 0.88
    for mirror in ((-1, 1, 1), (1, -1, 1), (1, -1, -1)):
        assert _overlap(path, mirror).max() < right - 0.05
