"""Scenes and checkpoints of a NeRF run that are wrong: named in one line, and no score that looks right."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from blacksmith import launch as launcher
from blacksmith.datasets.blender import open_scene
from blacksmith.errors import CheckpointError, ConfigError, DataError
from blacksmith.experiments.lightning.nerf import fields, results
from blacksmith.experiments.lightning.nerf.masks import without_bad_masks
from blacksmith.experiments.lightning.nerf.module import NerfModule
from blacksmith.files import file_sha256
from blacksmith.models.pytorch.nerf.hull import visual_hull
from blacksmith.run import checkpoint

HALF = ("nerf.Train.steps = 20", "nerf.Train.evaluate_every_steps = 10")


@pytest.fixture(scope="module")
def views(ball):
    return open_scene(ball).views("train")


def begin(views, *params):
    """The empty field of some views and the lines that were printed about it."""
    small = ["nerf.Grid.resolutions = (12, 18, 28)", "nerf.Grid.occupancy_resolution = 32"]
    config = launcher.resolve(["gin/nerf_blender.gin"], [*small, *params]).config
    lines, masks = [], None
    if config.hull:
        views, masks = without_bad_masks(views, "cpu", lines.append)
    return fields.for_scene(config, views.cameras, masks, "cpu", lines.append), lines


def with_alpha(views, change):
    """The views with the alpha changed in place, [views, height, width]."""
    pixels = views.pixels.copy()
    change(pixels[..., 3])
    return dataclasses.replace(views, pixels=pixels)


# --- masks ---


def test_the_box_is_printed_and_good_masks_are_not_mentioned(views):
    field, lines = begin(views)
    low, high = field.bounds.tolist()
    text = " to ".join("(" + ", ".join(f"{at:.3f}" for at in corner) + ")" for corner in (low, high))
    assert lines == [f"box from the alpha masks: {text} in world units; nerf.Data.bounds sets it"]
    assert begin(views, "nerf.Data.hull = False")[1][0].startswith("box from the cameras: (-1.4")
    given = begin(views, "nerf.Data.bounds = (-1, -1, -1, 1, 1, 1)")[1]
    assert given[0].startswith("box from the configuration: (-1.000, -1.000, -1.000) to (1.000")


def lower_half(alpha):
    alpha[5, 16:] = 0


def empty(alpha):
    alpha[5] = 0


def opaque(alpha):
    alpha[5] = 255


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lower_half, "lacking a part of what the other training views show: r_5"),
        (empty, "empty, as if nothing were there: r_5"),
        (opaque, "opaque everywhere, as if there were no background: r_5"),
    ],
)
@pytest.mark.parametrize("bounds", ["None", "(-1.2, -1.2, -1.2, 1.2, 1.2, 1.2)"])
def test_a_bad_mask_is_named_and_left_out(views, change, named, bounds):
    changed = with_alpha(views, change)
    field, lines = begin(changed, f"nerf.Data.bounds = {bounds}")
    others = [index for index in range(len(views.names)) if index != 5]
    masks = torch.from_numpy(views.pixels[others][..., 3] > 5)
    cameras = [views.cameras[index] for index in others]
    assert torch.equal(field.hull, visual_hull(masks, cameras, field.bounds, 32))
    assert lines[0] == f"alpha {named}; left out of the visual hull and of training"
    assert len(lines) == 2
    kept, _ = without_bad_masks(changed, "cpu", lines.append)
    assert kept.names == tuple(views.names[index] for index in others)
    assert [*map(id, kept.cameras)] == [*map(id, cameras)]
    assert np.array_equal(kept.pixels, views.pixels[others])


def test_a_view_that_shows_too_much_is_named(nerf_scene, tmp_path):
    def add(alpha):
        alpha[5, :, :12] = 255

    larger = nerf_scene.write(tmp_path / "ball", width=96, height=96, views=(12, 1, 1))
    _, lines = begin(with_alpha(open_scene(larger).views("train"), add))
    assert lines[0].startswith("alpha showing matter where the other training views show none, or outside of")
    assert "r_5 (" in lines[0]


@pytest.mark.parametrize("value", [0, 255])
def test_without_any_mask_there_is_no_hull(views, value):
    with pytest.raises(
        DataError, match=r"all 24 training views are opaque or empty.*nerf\.Data\.hull = False"
    ):
        begin(with_alpha(views, lambda alpha: alpha.fill(value)))


def test_pixels_that_a_mask_leaves_out_rule_out_nothing(views):
    used = np.ones(views.pixels.shape[:3], bool)
    used[5, 16:] = False
    field, lines = begin(dataclasses.replace(with_alpha(views, lower_half), used=used))
    assert len(lines) == 1
    masks = torch.from_numpy(views.pixels[..., 3] > 5)
    whole = visual_hull(masks, views.cameras, field.bounds, 32)
    assert (field.hull | ~whole).all()


def test_masked_pixels_and_bad_masks_count_neither_in_training_nor_in_scores(
    run_nerf, ball, tmp_path, monkeypatch
):
    scene = tmp_path / "masked"
    shutil.copytree(ball, scene)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(scene / "mask.png")
    for split in ("train", "val", "test"):
        path = scene / f"transforms_{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_path": "mask.png"}))
        for file in (scene / split).glob("*.png"):  # where the mask is black, nothing is right
            pixels = np.array(Image.open(file))
            pixels[:, 20:] = (255, 0, 255, 255)
            if (split, file.stem) == ("train", "r_5"):
                pixels[..., 3] = 0
            Image.fromarray(pixels).save(file)
    drawn, step = [], NerfModule.training_step

    def watched(module, batch, index):
        drawn.append(batch)
        return step(module, batch, index)

    monkeypatch.setattr(NerfModule, "training_step", watched)
    assert run_nerf(f'nerf.Data.scene = "{scene}"') == 0
    drawn = torch.cat(drawn)
    assert (drawn % 32).max() == 19
    assert (drawn // 1024).max() == 22  # of 24 views, one has an empty alpha
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["test"]["psnr"] > 15
    assert found["final"]["val_psnr"] > 15


# --- the box ---


def test_a_box_that_no_view_shows_is_refused_before_the_run(run_nerf, views, tmp_path):
    # A far place in a direction in which no camera looks: they see up to 0.5 rad from where they look.
    axes = np.stack([-camera.pose[:, 2] for camera in views.cameras])
    places = np.random.default_rng(0).normal(size=(1000, 3))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    x, y, z = (50 * places[(places @ axes.T).max(1).argmin()]).tolist()
    for hull in ("True", "False"):
        with pytest.raises(ConfigError, match=r"no training view shows any of this box") as caught:
            run_nerf(f"nerf.Data.bounds = {(x, y, z, x + 1, y + 1, z + 1)}", f"nerf.Data.hull = {hull}")
        assert "\n" not in str(caught.value)
    for setting in ("nerf.Data.near = 50.0", "nerf.Data.far = 0.5"):
        with pytest.raises(ConfigError, match=r"no ray would meet the box, which is .* from the cameras"):
            run_nerf(setting)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("half", "warned"), [(1.3, False), (0.8, True)])
def test_matter_at_the_faces_of_the_box_is_warned_of_once(run_nerf, capsys, half, warned):
    assert run_nerf(f"nerf.Data.bounds = {(-half,) * 3 + (half,) * 3}") == 0
    assert capsys.readouterr().err.count("of the matter lies at the faces of the box") == warned


# --- checkpoints with wrong values, under a valid hash ---


@pytest.fixture(scope="module")
def short(launch_nerf, tmp_path_factory):
    """The directory of a run of 20 steps that has ended after 10."""
    directory = tmp_path_factory.mktemp("short") / "run"
    assert launch_nerf(directory, *HALF, "nerf.Train.stop_at = 1.0") == 0
    return directory


def rewritten(run, directory, change=None, weights=None):
    """A copy of a run with its checkpoint's state, or Lightning's file, changed in place."""
    shutil.copytree(run, directory)
    saved = directory / "checkpoints" / "step_00000010"
    state = json.loads((saved / "state.json").read_text())
    if weights:
        content = torch.load(saved / fields.WEIGHTS, weights_only=True)
        weights(content)
        torch.save(content, saved / fields.WEIGHTS)
        state["sha256"][fields.WEIGHTS] = file_sha256(saved / fields.WEIGHTS)
    if change:
        change(state)
    del state["state_sha256"]
    state["state_sha256"] = checkpoint._content_sha256(state)
    (saved / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", "x"), ("rows", 1 << 50), ("restarts", [{"step": "x"}]), ("per_ray", -1.0), ("drawn", None)],
)
def test_a_checkpoint_with_a_wrong_value_of_its_own_is_one_line(short, run_nerf, tmp_path, name, value):
    rewritten(short, tmp_path / "run", lambda state: state["own"].update({name: value}))
    with pytest.raises(CheckpointError, match=f"own.{name}|lightning.ckpt cannot be read"):
        run_nerf(*HALF)


def no_loops(content):
    del content["loops"]


def other_shapes(content):
    for state in content["optimizer_states"][0]["state"].values():
        state["exp_avg"] = torch.zeros(3)


def no_vertices(content):
    content["state_dict"]["field.shape"].zero_()


def a_negative_place(content):
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["cursor"] = -5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_loops, "does not fit this run: it was written at step 0, its state.json at 10"),
        (other_shapes, "does not fit this run: the optimizer's moments have other shapes"),
        (no_vertices, "cannot be read: ValueError: a grid of"),
        (a_negative_place, "does not fit this run: cursor = -5"),
    ],
)
def test_a_file_of_lightning_that_does_not_fit_is_one_line(short, run_nerf, tmp_path, change, message):
    rewritten(short, tmp_path / "old", weights=change)
    with pytest.raises(CheckpointError, match=message):
        run_nerf(*HALF, resume=str(tmp_path / "old"))


def test_a_finished_run_whose_last_step_was_not_validated_validates(short, run_nerf, tmp_path):
    rewritten(short, tmp_path / "run", lambda state: state["position"].update(validated_at=3))
    assert run_nerf(*HALF, "nerf.Train.stop_at = 1.0") == 0
    found = [json.loads((path / "result.json").read_text()) for path in (short, tmp_path / "run")]
    assert found[0]["final"] == found[1]["final"]


def not_finite(content):
    content["state_dict"]["field.density_table"][7:9] = torch.nan  # a render would show them as empty space


@pytest.mark.parametrize("mode", ["train", "eval", "export", "view"])
def test_weights_that_are_not_finite_are_refused(short, run_nerf, tmp_path, mode):
    rewritten(short, tmp_path / "run", weights=not_finite)
    with pytest.raises(
        CheckpointError, match=r"2 of the 21,952 values of density_table are not finite"
    ) as caught:
        run_nerf(*HALF, mode=mode)
    assert "step_00000010" in str(caught.value)
    assert "learning rate" not in str(caught.value)
    assert not (tmp_path / "run" / "eval.json").exists()
    assert not (tmp_path / "run" / "export" / "mesh.ply").exists()


@pytest.mark.parametrize("part", ["rgb", "depth"])
def test_a_render_that_is_not_finite_names_its_view(short, run_nerf, monkeypatch, tmp_path, part):
    shutil.copytree(short, tmp_path / "run")
    render, calls = results.render_image, []

    def overflowing(*arguments):
        rendered = render(*arguments)
        calls.append(1)
        if len(calls) == 5:  # the second test view, after three validation views
            getattr(rendered, part)[3, 4] = torch.inf
        return rendered

    monkeypatch.setattr(results, "render_image", overflowing)
    with pytest.raises(CheckpointError, match=f"test view r_1: {part} is not finite in 1 of 1,024 pixels"):
        run_nerf(*HALF, mode="eval")
    assert not (tmp_path / "run" / "eval.json").exists()
