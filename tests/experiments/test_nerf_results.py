"""Results of a radiance field: error and depth maps, scores, picture strips and the orbit video.

The fields here are analytic, so their appearance is known without a renderer.
"""

import hashlib
import json
import math
import sys
import types

import numpy as np
import pytest

# Skips the file if the extra `nerf` is not installed, so the imports below come late.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")
Image = pytest.importorskip("PIL.Image")
av = pytest.importorskip("av")
from pinhole import camera_of

from blacksmith.datasets.blender import Views
from blacksmith.datasets.blender.cameras import look_at, orbit
from blacksmith.errors import DataError, RunError
from blacksmith.experiments.lightning.nerf import results, scores
from blacksmith.experiments.lightning.nerf.pictures import (
    ERROR_SCALE,
    GAP_PIXELS,
    LABEL_PIXELS,
    depth_colors,
    error_colors,
    strip,
    to_bytes,
)
from blacksmith.experiments.lightning.nerf.results import write_gallery
from blacksmith.experiments.lightning.nerf.scores import Lpips, find_lpips_weights, psnr, ssim
from blacksmith.models.pytorch.nerf.rendering import Rendered, render_image
from blacksmith.run.manifest import Manifest

WHITE = (1.0, 1.0, 1.0)


class Wall:
    """Fills every picture with one level of gray."""

    def __init__(self, level):
        self.bounds = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
        self.level = level

    def render(self, origins, directions, background, *, quality=1.0):
        ones = torch.ones(len(origins))
        return Rendered(torch.full((len(origins), 3), self.level), ones, ones)


class Sphere:
    """An opaque unit sphere at the origin, colored by its normal: (normal + 1) / 2."""

    bounds = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])

    def render(self, origins, directions, background, *, quality=1.0):
        middle = -(origins * directions).sum(-1)
        inside = 1 - (origins.square().sum(-1) - middle.square())
        hit = inside > 0
        depth = (middle - inside.clamp(min=0).sqrt()) * hit
        normal = origins + depth[:, None] * directions
        rgb = torch.where(hit[:, None], (normal + 1) / 2, background)
        return Rendered(rgb, hit.float(), depth)


def _camera(width=48, height=40):
    return camera_of(look_at(np.array([3.0, 0, 1]), np.zeros(3)), width, height, math.radians(50))


def _gray_views(*levels):
    """Opaque views of one gray each, of 0 to 255."""
    pixels = np.full((len(levels), 40, 48, 4), 255, np.uint8)
    pixels[..., :3] = np.reshape(levels, (-1, 1, 1, 1))
    names = tuple(f"r_{index}" for index in range(len(levels)))
    return Views(pixels, (_camera(),) * len(levels), names, np.ones(pixels.shape[:3], bool))


def _sphere_views(count=2, size=64):
    cameras = orbit(_camera(size, size), np.zeros(3), 3.0, 20.0, count)
    pixels = []
    for camera in cameras:
        seen = render_image(Sphere(), camera, torch.zeros(3))
        pixels.append(to_bytes(torch.cat([seen.rgb, seen.opacity[..., None]], -1).numpy()))
    pixels, names = np.stack(pixels), tuple(f"r_{index}" for index in range(count))
    return Views(pixels, tuple(cameras), names, np.ones(pixels.shape[:3], bool))


class StopAfter:
    """A stop flag that is false the first `checks` times."""

    def __init__(self, checks):
        self.checks = checks

    def __bool__(self):
        self.checks -= 1
        return self.checks < 0


def _run(directory=None, background=WHITE, stop=False, **video):
    """The part of a run that results are made from."""
    log, video = types.SimpleNamespace(progress="off"), types.SimpleNamespace(**video)
    config = types.SimpleNamespace(background=background, log=log, results=video)
    run = types.SimpleNamespace(config=config, directory=directory, stop=stop)
    if directory is not None:
        manifest = Manifest(directory)
        run.claim, run.clear = manifest.claim, manifest.clear
    return run


def evaluate(field, views, directory, lpips=None, **options):
    scene = types.SimpleNamespace(views=lambda split: views)
    run = _run(directory and directory.parent, **options)
    return results.score_views(run, field, scene, "test", lpips, directory)


# Pictures


def test_bytes_are_clipped_and_rounded_half_up():
    given = np.array([[[-1.0, 0.0, 0.49 / 255], [0.5, 1.0, 7.0]]])
    np.testing.assert_array_equal(to_bytes(given), [[[0, 0, 0], [128, 255, 255]]])
    assert to_bytes(given).dtype == np.uint8


def test_error_colors_have_a_fixed_scale():
    truth = np.full((1, 5, 3), 0.5)
    render = truth.copy()
    render[0, 1] += 0.3  # over the scale
    render[0, 2, 0] += 3 * ERROR_SCALE / 2  # one channel alone: its third counts
    render[0, 3] -= ERROR_SCALE / 2
    render[0, 4] += ERROR_SCALE / 4
    colors = error_colors(render, truth)[0].astype(int)
    np.testing.assert_array_equal(colors[0], [0x00, 0x00, 0x04])
    np.testing.assert_array_equal(colors[1], [0xFC, 0xFF, 0xA4])
    np.testing.assert_array_equal(colors[2], colors[3])
    luma = colors @ [0.2126, 0.7152, 0.0722]
    assert luma[0] < luma[4] < luma[3] < luma[1]


def test_depths_are_bright_near_dark_far_and_white_outside():
    near, far, nothing = [0xFD, 0xE7, 0x25], [0x44, 0x01, 0x54], [255, 255, 255]
    depth = np.concatenate([np.linspace(2, 4, 1000), [3, 0]])[None]
    opacity = np.concatenate([np.ones(1000), [0.0, 0.0]])[None]
    colors = depth_colors(depth, opacity)
    assert (colors.dtype, colors.shape) == (np.uint8, (1, 1002, 3))
    np.testing.assert_array_equal(colors[0, [0, 999]], [near, far])
    np.testing.assert_array_equal(colors[0, 1000:], [nothing, nothing])
    # Green has 0x21918C in the middle: within two of the 255 entries of the color map.
    np.testing.assert_allclose(colors[0, 500], [0x21, 0x91, 0x8C], atol=3)


def test_depth_is_blended_with_white_by_opacity():
    colors = depth_colors(np.array([[1.0, 2.0, 1.0]]), np.array([[1.0, 1.0, 0.6]]))
    expected = 0.6 * colors[0, 0].astype(float) + 0.4 * 255
    np.testing.assert_allclose(colors[0, 2], expected, atol=1)  # both were rounded


def test_stray_depths_do_not_change_the_range():
    depth, opacity = np.tile(np.linspace(2, 4, 1000), (2, 1)), np.ones((2, 1000))
    depth[1, 500] = 1000.0
    clean, stray = depth_colors(depth[:1], opacity[:1]), depth_colors(depth[1:], opacity[1:])
    # Neighbors in the color map are at most 9 levels apart.
    np.testing.assert_allclose(np.delete(stray, 500, axis=1), np.delete(clean, 500, axis=1), atol=9)


@pytest.mark.filterwarnings("error")
def test_depth_of_nothing_is_white_of_a_plane_near():
    np.testing.assert_array_equal(depth_colors(np.zeros((2, 3)), np.zeros((2, 3))), np.full((2, 3, 3), 255))
    plane = depth_colors(np.full((2, 3), 5.0), np.ones((2, 3)))
    np.testing.assert_array_equal(plane, np.broadcast_to([0xFD, 0xE7, 0x25], (2, 3, 3)))


def test_a_strip_has_white_gaps_and_labels():
    red, blue = np.zeros((30, 50, 3), np.uint8), np.zeros((30, 20, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 100
    labelled = strip([red, blue], ["a", "b"])
    both = labelled[LABEL_PIXELS:]
    assert both.shape == (30, 70 + GAP_PIXELS, 3)
    np.testing.assert_array_equal(both[:, :50], red)
    np.testing.assert_array_equal(both[:, 50 : 50 + GAP_PIXELS], np.full((30, GAP_PIXELS, 3), 255))
    np.testing.assert_array_equal(both[:, 50 + GAP_PIXELS :], blue)
    assert all(part.min() < 128 for part in (labelled[:LABEL_PIXELS, :50], labelled[:LABEL_PIXELS, 54:]))


# Scores


@pytest.mark.parametrize(("error", "decibels"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (0.0, 100.0)])
def test_psnr_of_a_known_error(error, decibels):
    truth = np.zeros((8, 9, 3), np.float32)
    # float32: the mean is off by some 1e-7 of itself, a millionth of a decibel.
    assert psnr(truth + np.float32(error), truth) == pytest.approx(decibels, abs=1e-5)


def test_psnr_averages_over_pixels_and_channels():
    render = np.zeros((2, 2, 3))
    render[0, 0, 0] = 0.6  # 0.36 / 12 = 0.03
    assert psnr(render, np.zeros((2, 2, 3))) == pytest.approx(-10 * math.log10(0.03))


def _noisy_pair(height, width, seed=0):
    generator = np.random.default_rng(seed)
    smooth = np.linspace(0, 1, width)[None, :, None] * np.linspace(1, 0.2, height)[:, None, None]
    truth = np.clip(smooth + generator.normal(0, 0.1, (height, width, 3)), 0, 1).astype(np.float32)
    return np.clip(truth + generator.normal(0, 0.1, truth.shape), 0, 1).astype(np.float32), truth


@pytest.mark.parametrize("size", [(11, 11), (17, 40), (64, 48)])
def test_ssim_equals_scikit_image(size):
    metrics = pytest.importorskip("skimage.metrics")
    render, truth = _noisy_pair(*size)
    expected = metrics.structural_similarity(
        render.astype(np.float64),
        truth.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
    )
    # Ours is float32, where variances are differences of squares up to 1.
    assert ssim(render, truth) == pytest.approx(expected, abs=1e-5)


def test_ssim_of_flat_pictures():
    # No variance: (2ab + C1) / (a^2 + b^2 + C1), C1 = 0.01^2; float32 variances near 0 against C2 = 9e-4.
    dark, light = np.full((16, 16, 3), 0.2, np.float32), np.full((16, 16, 3), 0.4, np.float32)
    assert ssim(dark, light) == pytest.approx(0.1601 / 0.2001, abs=1e-4)
    assert ssim(dark, dark) == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file of random AlexNet weights in torchvision's layout, the classifier's included."""
    generator, weights = torch.Generator().manual_seed(0), {}
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    for layer, shape in shapes.items():
        scale = math.sqrt(2 / math.prod(shape[1:]))
        weights[f"features.{layer}.weight"] = torch.randn(shape, generator=generator) * scale
        weights[f"features.{layer}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    weights["classifier.6.bias"] = torch.zeros(1000)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(weights, path)
    return path


def _as_torchvision(alexnet):
    """The part of torchvision that torchmetrics builds its LPIPS of."""
    from torch import nn

    def build(weights=None):
        convolutions = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1)]
        convolutions += [(384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        layers = []
        for index, (channels, out, kernel, stride, padding) in enumerate(convolutions):
            layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(3, 2)] if index in (0, 1, 4) else []
        network = nn.Module()
        network.features = nn.Sequential(*layers)
        network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
        return network

    models = types.SimpleNamespace(alexnet=build, AlexNet_Weights=types.SimpleNamespace(DEFAULT=alexnet))
    module = types.ModuleType("torchvision")
    module.models = models
    return module


@pytest.mark.parametrize("size", [(31, 31), (64, 80)])
def test_lpips_equals_torchmetrics_on_the_same_weights(monkeypatch, alexnet, size):
    reference = sys.modules["torchmetrics.functional.image.lpips"]
    monkeypatch.setattr(reference, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setitem(sys.modules, "torchvision", _as_torchvision(alexnet))
    render, truth = _noisy_pair(*size, seed=1)
    as_batch = [torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (render, truth)]
    expected = reference.learned_perceptual_image_patch_similarity(*as_batch, net_type="alex", normalize=True)
    assert expected > 0.01
    # The same float32 operations but for the order of a sum.
    assert Lpips(alexnet)(render, truth) == pytest.approx(float(expected), abs=1e-5)


def test_lpips_grows_with_the_difference(alexnet):
    lpips = Lpips(alexnet)
    render, truth = _noisy_pair(40, 40)
    assert lpips(truth, truth) == 0
    assert 0 < lpips((render + 3 * truth) / 4, truth) < lpips(render, truth)


def test_lpips_weights_come_from_the_cache_or_torch_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert find_lpips_weights() is None
    monkeypatch.setattr(scores, "ALEXNET_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    cache, hub = tmp_path / "cache/lpips", tmp_path / "torch/hub/checkpoints"
    for directory in (hub, cache):
        directory.mkdir(parents=True)
        (directory / "alexnet-owt-7be5be79.pth").write_bytes(b"weights")
        assert find_lpips_weights() == directory / "alexnet-owt-7be5be79.pth"
    (cache / "alexnet-owt-7be5be79.pth").write_bytes(b"broken")
    assert find_lpips_weights() == hub / "alexnet-owt-7be5be79.pth"
    given = tmp_path / "another name"
    given.write_bytes(b"weights")
    assert find_lpips_weights(str(given)) == given


def test_wrong_lpips_weights_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*missing\.pth: No such file or directory$"):
        find_lpips_weights(str(tmp_path / "missing.pth"))
    (tmp_path / "other.pth").write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()[:8]
    with pytest.raises(DataError, match=rf"other\.pth has sha256 {digest}\.\.\., but .* has 7be5be79"):
        find_lpips_weights(str(tmp_path / "other.pth"))


# Evaluation


def test_scores_are_means_over_views_and_valid_json():
    # Errors of 51/255 = 0.2 and 102/255 = 0.4.
    views = _gray_views(153, 0)
    found = evaluate(
        Wall(102 / 255), views, None, lpips=lambda render, truth: float((render - truth).abs().mean())
    )
    assert list(found) == ["psnr", "ssim", "lpips", "images", "seconds_per_frame"]
    first, second = -20 * math.log10(0.2), -20 * math.log10(0.4)
    # float32: millionths of a decibel.
    assert [image["psnr"] for image in found["images"]] == pytest.approx([first, second], abs=1e-4)
    assert found["psnr"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert found["lpips"] == pytest.approx(0.3, abs=1e-6)
    assert [image["name"] for image in found["images"]] == ["r_0", "r_1"]
    assert found["seconds_per_frame"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "lpips" not in evaluate(Wall(0.4), views, None)


@pytest.mark.parametrize("background", [WHITE, (0.2, 0.4, 0.6)])
def test_a_field_scores_best_against_its_own_pictures(background):
    found = evaluate(Sphere(), _sphere_views(), None, background=background)
    # The truth is rounded to 8 bits: off by at most 0.5/255, 54.2 dB.
    assert found["psnr"] >= 54.15
    assert found["ssim"] > 0.999


def test_colors_are_clipped_before_scoring():
    assert evaluate(Wall(1.5), _gray_views(255), None)["psnr"] == pytest.approx(100)


def test_evaluation_writes_four_pictures_of_every_view(tmp_path):
    directory = tmp_path / "test"
    views = _sphere_views()
    evaluate(Sphere(), views, directory)
    kinds = ("", "_truth", "_error", "_depth")
    assert {path.name for path in directory.iterdir()} == {
        f"r_{i}{kind}.png" for i in (0, 1) for kind in kinds
    }
    pictures = {kind: np.asarray(Image.open(directory / f"r_1{kind}.png")).astype(int) for kind in kinds}
    assert {picture.shape for picture in pictures.values()} == {(64, 64, 3)}
    np.testing.assert_allclose(pictures[""], pictures["_truth"], atol=1)
    hit = views.pixels[1, ..., 3] > 0
    np.testing.assert_array_equal(pictures[""][~hit], 255)
    np.testing.assert_array_equal(pictures["_depth"][~hit], 255)
    assert pictures["_depth"][32, 32].sum() > pictures["_depth"][hit].sum(-1).min() + 200
    assert pictures["_error"].max() < 20


def test_a_stopped_evaluation_returns_none(tmp_path):
    assert evaluate(Wall(0.4), _gray_views(0, 0, 0), tmp_path / "test", stop=StopAfter(2)) is None
    assert (tmp_path / "test" / "r_1.png").exists()
    assert not (tmp_path / "test" / "r_2.png").exists()


# The gallery


def test_the_gallery_has_the_worst_median_and_best_view(tmp_path):
    views = _gray_views(102, 153, 0, 120, 110)  # errors of 0, 51, 102, 18 and 8 levels
    directory, images = tmp_path / "test", tmp_path / "images"
    found = evaluate(Wall(102 / 255), views, directory)
    write_gallery(_run(tmp_path), found)
    names = ["test_1_worst_r_2.png", "test_2_median_r_3.png", "test_3_best_r_0.png"]
    assert sorted(path.name for path in images.iterdir()) == names
    picture = np.asarray(Image.open(images / names[0]))
    width, height = results.STRIP_PICTURE_PIXELS, round(results.STRIP_PICTURE_PIXELS * 40 / 48)
    assert picture.shape == (height + LABEL_PIXELS, 4 * width + 3 * GAP_PIXELS, 3)
    middles = [picture[150, width // 2 + place * (width + GAP_PIXELS)] for place in range(4)]
    # Truth, render, an error over the scale, a plane.
    expected = [[0, 0, 0], [102, 102, 102], [0xFC, 0xFF, 0xA4], [0xFD, 0xE7, 0x25]]
    np.testing.assert_array_equal(middles, expected)


@pytest.mark.parametrize(
    ("levels", "names"),
    [
        ((0,), ["test_1_worst_r_0.png"]),
        ((102, 0), ["test_1_worst_r_1.png", "test_3_best_r_0.png"]),
    ],
)
def test_a_small_gallery_shows_no_view_twice(tmp_path, levels, names):
    found = evaluate(Wall(0.4), _gray_views(*levels), tmp_path / "test")
    write_gallery(_run(tmp_path), found)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names


# The orbit


def film(directory, width, height, frames, fps, stop=False):
    """Films the sphere into `images/` of a directory."""
    scene = types.SimpleNamespace(cameras=lambda split: [_camera(width, height)])
    video = {"video_frames": frames, "video_fps": fps, "video_elevation": 25.0, "video_width": None}
    return results.film(_run(directory, stop=stop, **video), Sphere(), scene)


def test_an_orbit_is_a_browser_video_and_a_small_gif(monkeypatch, tmp_path):
    video, animation = tmp_path / "images/orbit.mp4", tmp_path / "images/orbit.gif"
    monkeypatch.setattr(results, "GIF_PIXELS", 48)
    monkeypatch.setattr(results, "GIF_FRAMES", 6)
    assert film(tmp_path, 97, 65, 12, fps=24)
    assert sorted(video.parent.iterdir()) == [animation, video]
    content = video.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index comes first"
    with av.open(video) as file:
        codec = file.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 96, 64)
        # BT.709, limited range.
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        assert file.streams.video[0].average_rate == 24
        assert file.duration / av.time_base == pytest.approx(0.5, abs=0.01)
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
    views = orbit(_camera(97, 65).resized(96, 64), np.zeros(3), math.sqrt(10), 25.0, 12)
    for shown, view in zip(frames, views, strict=True):
        expected = to_bytes(render_image(Sphere(), view, torch.ones(3)).rgb.numpy())
        # Half the resolution for color smears the rim; in the mean little is left of it.
        assert np.abs(shown - expected).mean() < 4
        np.testing.assert_allclose(shown[32, 48], expected[32, 48], atol=8)
    with Image.open(animation) as gif:
        # Every second frame: 12 per second.
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (6, (48, 32), 0, 80)
        gif.seek(3)
        small = np.asarray(gif.convert("RGB")).astype(int)
    expected = to_bytes(render_image(Sphere(), views[6], torch.ones(3)).rgb.numpy())
    # A palette of 256 colors, and the middle of a resized picture.
    np.testing.assert_allclose(small[16, 24], expected[32, 48], atol=16)
    np.testing.assert_array_equal(small[0, 0], 255)


@pytest.mark.parametrize("checks", [0, 2])
def test_a_stopped_orbit_leaves_nothing(tmp_path, checks):
    assert not film(tmp_path, 32, 32, 4, fps=4, stop=StopAfter(checks))
    assert list((tmp_path / "images").iterdir()) == []


@pytest.mark.parametrize("missing", [1, 600, None])
def test_a_video_that_cannot_be_written_leaves_the_old_one(tmp_path, missing):
    resource = pytest.importorskip("resource")
    film(tmp_path, 320, 320, 3, fps=4)
    video = tmp_path / "images/orbit.mp4"
    size = video.stat().st_size
    video.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The disk is "full" at the first byte, in the index, which is written last, and at the last byte.
    limit = 0 if missing is None else size - missing
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match="cannot write the video: File too large"):
            film(tmp_path, 320, 320, 3, fps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in video.parent.iterdir()) == ["orbit.gif", "orbit.mp4"]
    assert video.read_bytes() == b"old"
