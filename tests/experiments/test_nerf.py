"""The NeRF experiment end to end, as a user runs it, on a ball of known pictures."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from blacksmith.datasets.blender import Scene, open_scene
from blacksmith.errors import RunError
from blacksmith.experiments.lightning.nerf import fields, train
from blacksmith.experiments.lightning.nerf.module import NerfModule, collapse
from blacksmith.experiments.lightning.nerf.rays import RayBank
from blacksmith.run.checkpoint import find

VIDEO = ["nerf.Results.video_frames = 2", "nerf.Results.video_width = 16"]
MLP = [
    "nerf.Mlp.width = 16",
    "nerf.Mlp.coarse_samples = 8",
    "nerf.Mlp.fine_samples = 8",
    "nerf.Train.rays = 64",
    "nerf.Train.steps = 6",
    "nerf.Train.evaluate_every_steps = 3",
    "nerf.Train.validation_views = 1",
    "nerf.Results.video_frames = 0",
    "Checkpoint.every_steps = None",
    "Log.every_steps = 2",
    "Log.tensorboard = False",
]


@pytest.fixture(scope="module")
def whole(launch_nerf, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run with `VIDEO`."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert launch_nerf(directory, *VIDEO) == 0
    return directory


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors."""
    path = find(directory).path / fields.WEIGHTS
    return torch.load(path, weights_only=True)["state_dict"]


def saved_metrics(directory: Path) -> dict[int, dict[str, float]]:
    """The metrics that each checkpoint carries, by step."""
    states = [json.loads(path.read_text()) for path in directory.glob("checkpoints/*/state.json")]
    return {state["step"]: state["metrics"] for state in states}


def equal_weights(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs have the same tensors."""
    old, new = weights(one), weights(other)
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.fixture
def scores(monkeypatch):
    """Replaces the validation by one that returns the given PSNRs in turn."""

    def give(*values):
        remaining = iter(values)
        monkeypatch.setattr(NerfModule, "validate", lambda module: {"loss": 0.1, "psnr": next(remaining)})

    return give


@pytest.mark.parametrize("hull", [True, False])
def test_pictures_need_not_be_square(run_nerf, nerf_scene, tmp_path, hull):
    wide = nerf_scene.write(tmp_path / "wide", width=40, height=30)
    params = [f'nerf.Data.scene = "{wide}"', f"nerf.Data.hull = {hull}", "nerf.Train.steps = 150"]
    assert run_nerf(*params, "nerf.Results.video_frames = 2", "nerf.Results.video_width = 40") == 0
    directory = tmp_path / "run"
    # Rows and columns taken for one another give less than 15 dB.
    assert result(directory)["test"]["psnr"] > 25
    assert Image.open(directory / "test" / "r_0.png").size == (40, 30)
    assert Image.open(directory / "images" / "orbit.gif").size == (40, 30)


def test_a_run_learns_the_scene_and_shows_it(run_nerf, stream, tmp_path, capsys):
    directory = tmp_path / "run"
    assert run_nerf("nerf.Train.steps = 150", "nerf.Results.video_frames = 3", "Log.tensorboard = True") == 0
    content = result(directory)
    assert content["status"] == "done"
    # A ball of one color is at 17 dB here, white at 8.
    assert content["test"]["psnr"] > 27
    assert content["test"]["ssim"] > 0.9
    assert [image["name"] for image in content["test"]["images"]] == ["r_0", "r_1", "r_2"]
    assert np.mean([image["psnr"] for image in content["test"]["images"]]) == pytest.approx(
        content["test"]["psnr"]
    )
    assert content["data"]["alpha_hull"] is True
    splits = [line["split"] for line in stream(directory)]
    assert splits.count("val") == 8
    assert splits[-1] == "test"
    for name in ("r_0.png", "r_0_truth.png", "r_0_error.png", "r_0_depth.png"):
        assert (directory / "test" / name).exists(), name
    truth = np.asarray(Image.open(directory / "test" / "r_1_truth.png")).astype(float) / 255
    render = np.asarray(Image.open(directory / "test" / "r_1.png")).astype(float) / 255
    again = -10 * np.log10(np.square(truth - render).mean())
    assert again == pytest.approx(content["test"]["images"][1]["psnr"], abs=0.1)  # bytes, not floats
    for name in ("orbit.mp4", "orbit.gif", "val_00000150.png"):
        assert (directory / "images" / name).exists(), name
    assert len(list((directory / "images").glob("test_*.png"))) == 3
    page = (directory / "report.html").read_text()
    assert "orbit.gif" in page
    assert "psnr" in page
    assert "test psnr" in capsys.readouterr().out


@pytest.mark.parametrize("hull", [True, False])
def test_resume_is_bit_equal(run_nerf, stream, tmp_path, hull):
    """At and after a change of level (12, 30) or occupancy (24, 42), and between training lines."""
    settings = [f"nerf.Data.hull = {hull}", "Checkpoint.keep_best = 0"]
    whole = tmp_path / "whole"
    run_nerf(*settings, "Checkpoint.every_steps = 6", "Checkpoint.keep_last = 20", directory=whole)
    for step in (12, 30, 42):
        resumed = tmp_path / f"from_{step}"
        resume = str(whole / "checkpoints" / f"step_{step:08d}")
        run_nerf(*settings, directory=resumed, resume=resume)
        assert stream(resumed) == [line for line in stream(whole) if line["step"] > step], step
        assert equal_weights(resumed, whole), step
        assert result(resumed)["test"]["images"] == result(whole)["test"]["images"]


def test_resume_after_a_restart_is_bit_equal(run_nerf, stream, tmp_path, monkeypatch):
    start, whole = NerfModule.on_train_start, tmp_path / "whole"

    def ruined(module):
        start(module)
        if module.global_step == 0:
            with torch.no_grad():
                module.field.density_table.fill_(-40)

    monkeypatch.setattr(NerfModule, "on_train_start", ruined)
    settings = ["nerf.Train.steps = 100", "Log.every_steps = 1", "Checkpoint.keep_best = 0"]
    run_nerf(*settings, "Checkpoint.every_steps = 4", "Checkpoint.keep_last = 30", directory=whole)
    assert [restart["step"] for restart in result(whole)["restarts"]] == [5]
    rates = {line["step"]: line["learning_rate"] for line in stream(whole) if line["split"] == "train"}
    # A new warm-up of 5 steps; the rate that is logged is the next step's. Nothing is logged at step 5.
    assert 5 not in rates
    assert [rates[step] for step in (6, 7, 8)] == pytest.approx(
        [0.5 * share * 0.1 ** (step / 100) for step, share in ((6, 0.4), (7, 0.6), (8, 0.8))]
    )
    for step in (4, 8):
        resumed = tmp_path / f"from_{step}"
        run_nerf(*settings, directory=resumed, resume=str(whole / f"checkpoints/step_{step:08d}"))
        assert stream(resumed) == [line for line in stream(whole) if line["step"] > step]
        assert equal_weights(resumed, whole)


def test_the_mlp_field_trains_resumes_and_is_evaluated(run_nerf, stream, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = [*MLP, "Checkpoint.keep_best = 0"]
    more = ["Checkpoint.every_steps = 3", "Checkpoint.keep_last = 9"]
    run_nerf(*settings, *more, file="nerf_vanilla", directory=whole)
    first, *_, last = (line["loss"] for line in stream(whole) if line["split"] == "train")
    assert last < first
    resume = str(whole / "checkpoints" / "step_00000003")
    run_nerf(*settings, file="nerf_vanilla", directory=resumed, resume=resume)
    assert stream(resumed) == [line for line in stream(whole) if line["step"] > 3]
    assert equal_weights(resumed, whole)
    assert run_nerf(*settings, file="nerf_vanilla", directory=whole, mode="eval") == 0


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        (train, "check_device", 0),  # while the run starts
        (NerfModule, "validate", 20),
        (train, "score_views", 60),
        (train, "film", 60),
    ],
    ids=["start", "validation", "test", "video"],
)
def test_a_stop_loses_nothing(run_nerf, whole, stream, tmp_path, monkeypatch, stop_during, owner, name, step):
    stop_during(owner, name)
    assert run_nerf(*VIDEO) == 75
    stopped = result(tmp_path / "run")
    assert (stopped["status"], stopped["step"]) == ("stopped", step)
    monkeypatch.undo()
    assert run_nerf(*VIDEO) == 0
    assert stream(tmp_path / "run") == stream(whole)
    assert equal_weights(tmp_path / "run", whole)
    assert saved_metrics(tmp_path / "run") == saved_metrics(whole)
    assert result(tmp_path / "run")["status"] == "done"


def test_the_best_weights_are_saved_and_tested(run_nerf, scores, tmp_path):
    """Though no checkpoint is due at the step at which they were found."""
    scores(30.0, 10.0, 20.0)
    run_nerf("Checkpoint.keep_last = 1")
    content = result(tmp_path / "run")
    assert content["best"] == {"metric": "val_psnr", "value": 30.0, "step": 20}
    assert content["tested_checkpoint"] == "step_00000020"
    assert content["final"] == {"val_loss": 0.1, "val_psnr": 20.0}
    psnrs = {step: found["val_psnr"] for step, found in saved_metrics(tmp_path / "run").items()}
    assert psnrs == {20: 30.0, 60: 20.0}


@pytest.mark.parametrize(
    ("setting", "psnrs", "tested"),
    [
        ("nerf.Train.early_stopping = 1", (30.0, 20.0), "step_00000020"),
        ("nerf.Train.stop_at = 25.0", (20.0, 30.0), "step_00000040"),
    ],
    ids=["early_stopping", "stop_at"],
)
def test_early_stopping_and_a_target_end_the_run(run_nerf, scores, tmp_path, setting, psnrs, tested):
    scores(*psnrs)
    assert run_nerf(setting) == 0
    content = result(tmp_path / "run")
    assert (content["status"], content["step"], content["tested_checkpoint"]) == ("done", 40, tested)


def test_loop_state_is_stored_once(whole):
    saved = find(whole)
    assert saved.state["position"]["step"] == saved.step == 60
    assert saved.own.keys() == {"rows", "restarts", "per_ray", "drawn"}
    content = torch.load(saved.path / fields.WEIGHTS, weights_only=True)
    assert content["global_step"] == 60
    assert not content.keys() & {"loop", "position", *saved.own}


def test_histograms_start_before_the_first_step(run_nerf, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_nerf("Log.tensorboard = True", "Log.histograms_every = 30") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0}).Reload()
    steps = {tag: [event.step for event in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    assert steps["weights/density_table"] == [0, 30, 60]
    assert steps["gradients/density_table"] == [30, 60]


def test_a_finished_run_started_again_tests_again(run_nerf, tmp_path, capsys):
    run_nerf("nerf.Train.steps = 10")
    before = result(tmp_path / "run")["test"]["images"]
    assert run_nerf("nerf.Train.steps = 10") == 0
    assert result(tmp_path / "run")["test"]["images"] == before
    assert "already finished at step 10" in capsys.readouterr().err
    # In a new directory as well, which gets a checkpoint.
    resume = str(tmp_path / "run")
    assert run_nerf("nerf.Train.steps = 10", directory=tmp_path / "new", resume=resume) == 0
    assert result(tmp_path / "new")["test"]["images"] == before
    assert equal_weights(tmp_path / "new", tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(run_nerf, monkeypatch, tmp_path):
    loss, calls = torch.nn.functional.mse_loss, []

    def broken(*arguments):
        calls.append(1)
        return loss(*arguments) * (torch.nan if len(calls) == 31 else 1)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", broken)
    with pytest.raises(RunError, match=r"loss nan .*at step 31;.*step_00000020"):
        run_nerf("Checkpoint.every_steps = 20")
    assert find(tmp_path / "run").step == 20
    assert result(tmp_path / "run")["status"] == "failed"


def test_test_views_are_decoded_after_training(run_nerf, monkeypatch, tmp_path):
    decoded, trained = [], []
    views, fit = Scene.views, train.fit

    def watched(scene, split, *rest):
        decoded.append((split, bool(trained)))
        return views(scene, split, *rest)

    def fitted(*arguments):
        fit(*arguments)
        trained.append(True)

    monkeypatch.setattr(Scene, "views", watched)
    monkeypatch.setattr(train, "fit", fitted)
    run_nerf("nerf.Train.steps = 10")
    assert decoded == [("train", False), ("val", False), ("test", True)]


def test_a_collapsed_field_is_restarted_once(run_nerf, monkeypatch, tmp_path, capsys):
    directory, start = tmp_path / "run", NerfModule.on_train_start

    def ruined(module):
        start(module)
        with torch.no_grad():
            module.field.density_table.fill_(-40)

    monkeypatch.setattr(NerfModule, "on_train_start", ruined)
    assert run_nerf("nerf.Train.steps = 100") == 0
    restarts = result(directory)["restarts"]
    assert [restart["step"] for restart in restarts] == [5]
    assert "empty" in restarts[0]["reason"]
    assert "collapsed" in capsys.readouterr().err
    assert result(directory)["test"]["psnr"] > 24


def test_a_field_that_collapses_twice_ends_the_run(run_nerf, tmp_path, monkeypatch):
    def ruined(module, *_):
        with torch.no_grad():
            module.field.density_table.fill_(-40)

    monkeypatch.setattr(NerfModule, "on_train_batch_start", ruined)
    with pytest.raises(RunError, match="collapsed again"):
        run_nerf("nerf.Train.steps = 100")
    assert result(tmp_path / "run")["status"] == "failed"


def test_collapse_is_recognized():
    truth = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    matter = torch.ones(100, dtype=torch.bool)
    opaque = torch.ones(100)
    assert collapse(opaque, truth, truth, matter) is None
    assert collapse(torch.zeros(100), truth, truth, ~matter) is None
    assert "empty" in collapse(opaque * 0.01, truth, truth, matter)
    assert "one color everywhere" in collapse(opaque, torch.full_like(truth, 0.5), truth, matter)
    assert "finite" in collapse(opaque * torch.nan, truth, truth, matter)


def test_a_checkpoint_is_evaluated_at_another_resolution(run_nerf, tmp_path):
    run_nerf()
    assert run_nerf(mode="eval") == 0
    full = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert full["test"]["images"] == result(tmp_path / "run")["test"]["images"]
    assert run_nerf("nerf.Data.downscale = 2", mode="eval") == 0
    half = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert half["data"]["width"] == 16
    assert half["test"]["psnr"] > 15
    assert Image.open(tmp_path / "run" / "eval" / "r_0.png").size == (16, 16)
    assert Image.open(tmp_path / "run" / "test" / "r_0.png").size == (32, 32)
    assert len(half["val"]["images"]) == 3


def test_a_mesh_of_the_ball_has_its_size_and_colors(run_nerf, nerf_scene, tmp_path, capsys):
    run_nerf("nerf.Train.steps = 150")
    assert run_nerf("nerf.Train.steps = 150", "nerf.Results.mesh_resolution = 48", mode="export") == 0
    mesh = trimesh.load(tmp_path / "run" / "export" / "mesh.ply", process=False)
    distance = np.linalg.norm(mesh.vertices, axis=1)
    # What lies inside is never seen and may be anything. A voxel is 0.08.
    assert np.quantile(distance, 0.98) == pytest.approx(nerf_scene.RADIUS, abs=0.1)
    up = mesh.visual.vertex_colors[mesh.vertices[:, 2] > 0.9].mean(0)
    assert up[2] > 200  # the normal (0, 0, 1) is blue
    assert abs(up[0] - 128) < 30
    assert "mesh.ply" in capsys.readouterr().out


def test_view_serves_the_field_until_a_signal(run_nerf, tmp_path, monkeypatch):
    from blacksmith.experiments.lightning.nerf import viewer

    served = []

    def serve(field, camera, *, stop, **options):
        signal.raise_signal(signal.SIGINT)
        served.append((field.density_table.abs().sum() > 0, camera.width, stop(), options["port"]))

    monkeypatch.setattr(viewer, "serve", serve)
    run_nerf("nerf.Train.steps = 10")
    before = result(tmp_path / "run")
    assert run_nerf("nerf.Train.steps = 10", "nerf.View.port = 0", mode="view") == 0
    assert served == [(True, 32, True, 0)]
    assert result(tmp_path / "run") == before


def test_rays_are_exact_under_autocast(ball):
    bank = RayBank(open_scene(ball).views("train"), "cpu")
    exact = bank(torch.arange(2000))
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank(torch.arange(2000))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, exact))
