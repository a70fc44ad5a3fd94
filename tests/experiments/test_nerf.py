"""The NeRF experiment end to end, as a user runs it, on a ball of known pictures."""

import dataclasses
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blacksmith import launch as launcher
from blacksmith.datasets.blender import Scene, open_scene
from blacksmith.errors import ConfigError, DataError, RunError
from blacksmith.experiments.lightning.nerf import fields, train
from blacksmith.experiments.lightning.nerf.module import NerfModule, collapse
from blacksmith.experiments.lightning.nerf.rays import RayBank
from blacksmith.run import metrics
from blacksmith.run.checkpoint import find

specification = importlib.util.spec_from_file_location(
    "nerf_scene", Path(__file__).with_name("nerf_scene.py")
)
nerf_scene = importlib.util.module_from_spec(specification)
specification.loader.exec_module(nerf_scene)

SMALL = [
    "nerf.Grid.resolutions = (12, 18, 28)",
    "nerf.Grid.upsample_at = (0.2, 0.5)",
    "nerf.Grid.refresh_at = (0.4, 0.7)",
    "nerf.Grid.occupancy_resolution = 32",
    "nerf.Train.steps = 60",
    "nerf.Train.samples = 8192",
    "Schedule.warmup_steps = 5",
    "nerf.Train.evaluate_every_steps = 20",
    "nerf.Train.validation_views = 2",
    "nerf.Results.video_frames = 0",
    "Checkpoint.every_steps = None",
    "Log.every_steps = 7",
    "Log.tensorboard = False",
]
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
def scene(tmp_path_factory) -> Path:
    """The ball's directory."""
    return nerf_scene.write(tmp_path_factory.mktemp("scene") / "ball")


@pytest.fixture
def run(scene, tmp_path):
    """Runs a Gin file in this process; returns the exit status."""

    def call(*params: str, file: str = "nerf_blender", directory: Path = tmp_path / "run", flags=()) -> int:
        bindings = [f'nerf.Data.scene = "{scene}"', *params]
        resolved = launcher.resolve([f"gin/{file}.gin"], bindings)
        return launcher.run_experiment(resolved, directory, device="cpu", **dict(flags))

    return call


def lines(directory: Path) -> list[dict]:
    """The metrics without wall times and rates."""
    return [
        {k: v for k, v in line.items() if not metrics.is_timed(k)}
        for line in metrics.read(directory / "metrics.jsonl")
    ]


def result(directory: Path) -> dict:
    """What the run has to say."""
    return json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors."""
    path = find(directory).path / fields.WEIGHTS
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("hull", [True, False])
def test_pictures_need_not_be_square(run, tmp_path, hull):
    wide = nerf_scene.write(tmp_path / "wide", width=40, height=30)
    params = [*SMALL, f'nerf.Data.scene = "{wide}"', f"nerf.Data.hull = {hull}", "nerf.Train.steps = 150"]
    assert run(*params, "nerf.Results.video_frames = 2", "nerf.Results.video_width = 40") == 0
    directory = tmp_path / "run"
    # Rows and columns taken for one another give less than 15 dB.
    assert result(directory)["test"]["psnr"] > 25
    assert Image.open(directory / "test" / "r_0.png").size == (40, 30)
    assert Image.open(directory / "images" / "orbit.gif").size == (40, 30)


def test_a_run_learns_the_scene_and_shows_it(run, tmp_path, capsys):
    directory = tmp_path / "run"
    assert (
        run(*SMALL, "nerf.Train.steps = 150", "nerf.Results.video_frames = 3", "Log.tensorboard = True") == 0
    )
    content = result(directory)
    assert content["status"] == "done"
    # A ball of one colour is at 17 dB here, white at 8.
    assert content["test"]["psnr"] > 27
    assert content["test"]["ssim"] > 0.9
    assert [image["name"] for image in content["test"]["images"]] == ["r_0", "r_1", "r_2"]
    assert np.mean([image["psnr"] for image in content["test"]["images"]]) == pytest.approx(
        content["test"]["psnr"]
    )
    assert content["data"]["alpha_hull"] is True
    splits = [line["split"] for line in lines(directory)]
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
    assert "PSNR" in capsys.readouterr().out


@pytest.mark.parametrize("hull", [True, False])
def test_a_run_resumed_anywhere_equals_the_uninterrupted_one(run, tmp_path, hull):
    """Before, at and after a change of level (12, 30) or occupancy (24, 42), and between log lines."""
    settings = [*SMALL, f"nerf.Data.hull = {hull}"]
    whole = tmp_path / "whole"
    run(*settings, "Checkpoint.every_steps = 6", "Checkpoint.keep_last = 20", directory=whole)
    for step in (6, 12, 24, 30, 42):
        resumed = tmp_path / f"from_{step}"
        flags = {"resume": str(whole / "checkpoints" / f"step_{step:08d}")}
        run(*settings, "Checkpoint.every_steps = None", directory=resumed, flags=flags)
        expected = [line for line in lines(whole) if line["step"] > step]
        assert lines(resumed) == expected, step
        old, new = weights(whole), weights(resumed)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old), step
        assert result(resumed)["test"]["images"] == result(whole)["test"]["images"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_with_a_checkpoint_and_it_goes_on(scene, tmp_path, number):
    directory = tmp_path / "run"
    settings = [*SMALL, "nerf.Train.steps = 200", 'Log.progress = "off"', f'nerf.Data.scene = "{scene}"']
    command = [sys.executable, "-m", "blacksmith.launch", "--gin_file=gin/nerf_blender.gin", "--device=cpu"]
    command += [f"--workdir={directory}", *(f"--gin_param={binding}" for binding in settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    written = directory / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert signal.Signals(number).name in error
    assert "Traceback" not in error
    stopped = result(directory)
    assert stopped["status"] == "stopped"
    assert 0 < stopped["step"] < 200
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert result(directory)["step"] == 200
    steps = [line["step"] for line in lines(directory) if line["split"] == "train"]
    assert steps == [*range(7, 200, 7), 200]


def test_the_test_views_are_not_decoded_before_training_is_done(run, monkeypatch, tmp_path):
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
    run(*SMALL, "nerf.Train.steps = 10")
    assert decoded == [("train", False), ("val", False), ("test", True)]


def test_a_collapsed_field_is_noticed_and_begun_again_once(run, monkeypatch, tmp_path, capsys):
    directory, start = tmp_path / "run", NerfModule.on_train_start

    def ruined(module):
        start(module)
        with torch.no_grad():
            module.field.density_table.fill_(-40)

    monkeypatch.setattr(NerfModule, "on_train_start", ruined)
    assert run(*SMALL, "nerf.Train.steps = 100") == 0
    restarts = result(directory)["restarts"]
    assert [restart["step"] for restart in restarts] == [5]
    assert "empty" in restarts[0]["reason"]
    assert "collapsed" in capsys.readouterr().err
    assert result(directory)["test"]["psnr"] > 24


def test_a_field_that_collapses_twice_ends_the_run(run, tmp_path, monkeypatch):
    def ruined(module, *_):
        with torch.no_grad():
            module.field.density_table.fill_(-40)

    monkeypatch.setattr(NerfModule, "on_train_batch_start", ruined)
    with pytest.raises(RunError, match="collapsed again"):
        run(*SMALL, "nerf.Train.steps = 100")
    assert result(tmp_path / "run")["status"] == "failed"


def test_collapse_is_told_from_health():
    truth = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    matter = torch.ones(100, dtype=torch.bool)
    opaque = torch.ones(100)
    assert collapse(opaque, truth, truth, matter) is None
    assert collapse(torch.zeros(100), truth, truth, ~matter) is None
    assert "empty" in collapse(opaque * 0.01, truth, truth, matter)
    assert "one colour" in collapse(opaque, torch.full_like(truth, 0.5), truth, matter)
    assert "finite" in collapse(opaque * torch.nan, truth, truth, matter)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    run, monkeypatch, tmp_path
):
    step = NerfModule.training_step

    def broken(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        if module.global_step == 30:
            module._sums["loss"] = float("nan")
        return loss

    monkeypatch.setattr(NerfModule, "training_step", broken)
    with pytest.raises(RunError, match=r"not finite .* step 35.*step_00000020"):
        run(*SMALL, "Checkpoint.every_steps = 20")
    assert find(tmp_path / "run").step == 20


def test_a_checkpoint_is_evaluated_at_another_resolution(run, tmp_path):
    run(*SMALL)
    flags = {"mode": "eval"}
    assert run(*SMALL, flags=flags) == 0
    full = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert full["test"]["images"] == result(tmp_path / "run")["test"]["images"]
    assert run(*SMALL, "nerf.Data.downscale = 2", flags=flags) == 0
    half = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert half["data"]["width"] == 16
    assert half["test"]["psnr"] > 15
    assert Image.open(tmp_path / "run" / "eval" / "r_0.png").size == (16, 16)
    assert Image.open(tmp_path / "run" / "test" / "r_0.png").size == (32, 32)
    assert len(half["val"]["images"]) == 3


def test_a_mesh_of_the_ball_has_its_size_and_colours(run, tmp_path, capsys):
    run(*SMALL, "nerf.Train.steps = 150")
    assert (
        run(*SMALL, "nerf.Train.steps = 150", "nerf.Results.mesh_resolution = 48", flags={"mode": "export"})
        == 0
    )
    content = (tmp_path / "run" / "export" / "mesh.ply").read_bytes()
    head, _, body = content.partition(b"end_header\n")
    count = int(head.split(b"element vertex ")[1].split()[0])
    layout = np.dtype([("position", "<f4", 3), ("colour", "u1", 3)])
    vertices = np.frombuffer(body, layout, count)
    distance = np.linalg.norm(vertices["position"], axis=1)
    # What lies inside is never seen and may be anything. A voxel is 0.08.
    assert np.quantile(distance, 0.98) == pytest.approx(nerf_scene.RADIUS, abs=0.1)
    up = vertices["colour"][vertices["position"][:, 2] > 0.9].mean(0)
    assert up[2] > 200  # the normal (0, 0, 1) is blue
    assert abs(up[0] - 128) < 30
    assert "mesh.ply" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        ['nerf.Data.background = "random"'],
        ['nerf.Data.background = "black"'],
        ["nerf.Data.hull = False", "nerf.Train.distortion = 0.01"],
        ["nerf.Train.total_variation = 1e-4", "nerf.Train.opacity_entropy = 1e-3"],
        [
            "nerf.Data.bounds = (-1.2, -1.2, -1.2, 1.2, 1.2, 1.2)",
            "nerf.Data.near = 2.5",
            "nerf.Data.far = 5.5",
        ],
        ['nerf.Train.precision = "bfloat16"'],
        ["nerf.Train.samples = None", "nerf.Train.rays = 600"],
        ["nerf.Grid.rows = 3000"],  # fewer than the finest level has: a coarser one is taken
    ],
    ids=lambda settings: settings[0].partition(" ")[0],
)
def test_each_setting_learns_the_ball(run, tmp_path, settings):
    # 80 steps; the plainest of these settings reaches 25 dB.
    run(*SMALL, "nerf.Train.steps = 80", *settings)
    assert result(tmp_path / "run")["test"]["psnr"] > 20


def test_the_paper_s_field_trains_and_renders(run, tmp_path):
    assert run(*MLP, file="nerf_vanilla") == 0
    content = result(tmp_path / "run")
    assert content["step"] == 6
    first, *_, last = (line["loss"] for line in lines(tmp_path / "run") if line["split"] == "train")
    assert last < first
    assert run(*MLP, file="nerf_vanilla", flags={"mode": "eval"}) == 0


def test_the_paper_s_field_resumes_to_the_bit(run, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(*MLP, "Checkpoint.every_steps = 3", "Checkpoint.keep_last = 9", file="nerf_vanilla", directory=whole)
    flags = {"resume": str(whole / "checkpoints" / "step_00000003")}
    run(*MLP, file="nerf_vanilla", directory=resumed, flags=flags)
    assert lines(resumed) == [line for line in lines(whole) if line["step"] > 3]
    old, new = weights(whole), weights(resumed)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_published_settings_are_ours():
    config = launcher.resolve(["gin/nerf_vanilla.gin"], []).config
    assert (config.mlp.depth, config.mlp.width) == (8, 256)
    assert (config.mlp.position_frequencies, config.mlp.direction_frequencies) == (10, 4)
    assert (config.mlp.coarse_samples, config.mlp.fine_samples) == (64, 128)
    optimizer, schedule = config.optimizer, config.schedule
    assert (config.train.rays, optimizer.name, optimizer.learning_rate) == (4096, "adam", 5e-4)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (None, 0.999, 1e-7)  # None is 0.9
    assert (schedule.name, schedule.warmup_steps, schedule.final_fraction) == ("exponential", 0, 0.1)
    assert (config.data.near, config.data.far, config.data.background) == (2.0, 6.0, "white")


def test_the_fine_preset_is_the_default_with_finer_levels_and_more_steps():
    default = launcher.resolve(["gin/nerf_blender.gin"], []).config
    fine = launcher.resolve(["gin/nerf_blender_fine.gin"], []).config
    assert fine.grid.resolutions > default.grid.resolutions
    assert fine.train.steps == 2700
    same = dataclasses.replace(
        fine,
        grid=dataclasses.replace(fine.grid, resolutions=default.grid.resolutions),
        train=dataclasses.replace(fine.train, steps=default.train.steps),
    )
    assert same == default


def test_the_gpu_preset_takes_its_steps_on_a_cpu(run, tmp_path):
    settings = [
        "nerf.Train.steps = 8",
        "nerf.Train.samples = 20000",
        "Schedule.warmup_steps = 2",
        "nerf.Grid.resolutions = (16, 20, 24, 32)",
        "nerf.Grid.occupancy_resolution = 32",
        "nerf.Grid.rows = 40000",
        "nerf.Results.video_frames = 0",
    ]
    assert run(*settings, file="nerf_blender_gpu") == 0
    assert result(tmp_path / "run")["step"] == 8


def test_a_scene_that_has_changed_is_not_resumed(run, scene, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(scene, own)
    settings = [*SMALL, "nerf.Train.steps = 10", f'nerf.Data.scene = "{own}"']
    run(*settings)
    with (own / "transforms_val.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match="the data has changed since step_00000010"):
        run(*settings)


def test_a_finished_run_started_again_tests_again(run, tmp_path, capsys):
    run(*SMALL, "nerf.Train.steps = 10")
    before = result(tmp_path / "run")["test"]["images"]
    assert run(*SMALL, "nerf.Train.steps = 10") == 0
    assert result(tmp_path / "run")["test"]["images"] == before
    assert "already finished at step 10" in capsys.readouterr().err


def test_scores_are_kept_when_the_video_is_stopped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train.results, "write_orbit", lambda *_, **__: [])
    assert run(*SMALL, "nerf.Train.steps = 10", "nerf.Results.video_frames = 4") == 75
    assert result(tmp_path / "run")["status"] == "stopped"
    assert len(result(tmp_path / "run")["test"]["images"]) == 3


def test_a_run_resumed_after_a_restart_equals_the_uninterrupted_one(run, tmp_path, monkeypatch):
    start, whole = NerfModule.on_train_start, tmp_path / "whole"

    def ruined(module):
        start(module)
        if module.global_step == 0:
            with torch.no_grad():
                module.field.density_table.fill_(-40)

    monkeypatch.setattr(NerfModule, "on_train_start", ruined)
    settings = [*SMALL, "nerf.Train.steps = 100", "Log.every_steps = 1"]
    run(*settings, "Checkpoint.every_steps = 4", "Checkpoint.keep_last = 30", directory=whole)
    assert [restart["step"] for restart in result(whole)["restarts"]] == [5]
    rates = {line["step"]: line["learning_rate"] for line in lines(whole) if line["split"] == "train"}
    # A new warm-up of 5 steps; logged is the rate of the step that comes next. Nothing is logged at step 5.
    assert 5 not in rates
    assert [rates[step] for step in (6, 7, 8)] == pytest.approx(
        [0.5 * share * 0.1 ** (step / 100) for step, share in ((6, 0.4), (7, 0.6), (8, 0.8))]
    )
    for step in (4, 8):
        resumed = tmp_path / f"from_{step}"
        run(*settings, directory=resumed, flags={"resume": str(whole / f"checkpoints/step_{step:08d}")})
        assert lines(resumed) == [line for line in lines(whole) if line["step"] > step]


def test_rays_are_exact_under_autocast(scene):
    bank = RayBank(open_scene(scene).views("train"), "cpu")
    exact = bank(torch.arange(2000))
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank(torch.arange(2000))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, exact))


def test_a_missing_scene_is_one_line_and_leaves_nothing(launch, tmp_path):
    done = launch(
        "--gin_file=gin/nerf_blender.gin",
        f"--workdir={tmp_path / 'run'}",
        '--gin_param=nerf.Data.scene="/no/lego"',
    )
    assert done.returncode == 3
    assert "/no/lego" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_pictures_too_small_to_be_scored_are_refused_before_training(run, tmp_path):
    with pytest.raises(DataError, match="8x8 pixels are too small for SSIM"):
        run(*SMALL, "nerf.Data.downscale = 4")
    assert not (tmp_path / "run").exists()


def test_float16_needs_a_gpu(run):
    with pytest.raises(ConfigError, match="float16"):
        run(*SMALL, 'nerf.Train.precision = "float16"')


@pytest.mark.parametrize(
    ("file", "binding", "named"),
    [
        ("nerf_blender", "nerf.Grid.resolutions = (48, 40)", "must rise"),
        ("nerf_blender", "nerf.Grid.resolutions = (48, 80)", "levels"),
        ("nerf_blender", "nerf.Grid.upsample_at = (0.5, 0.4)", "must rise"),
        ("nerf_blender", "nerf.Grid.refresh_at = (0.5, 1.0)", "between 0 and 1"),
        ("nerf_blender", "nerf.Grid.features = 2", "nerf.Grid.features"),
        ("nerf_blender", "nerf.Data.bounds = (1, 0, 0, 0, 1, 1)", "nerf.Data.bounds"),
        ("nerf_blender", "nerf.Data.bounds = (0, 0, 1)", "nerf.Data.bounds"),
        ("nerf_blender", "nerf.Data.near = 7.0\nnerf.Data.far = 6.0", "nerf.Data.near"),
        ("nerf_blender", "nerf.Data.downscale = 0", "nerf.Data.downscale"),
        ("nerf_blender", "nerf.Mlp.width = 128", "no effect"),
        ("nerf_blender", 'nerf.Model.field = "hash"', "grid"),
        ("nerf_blender", 'Checkpoint.metric = "val_accuracy"', "val_psnr"),
        ("nerf_blender", "Checkpoint.every_epochs = 2", "every_steps"),
        ("nerf_blender", "nerf.Train.epochs = 2", "nerf.Train.steps"),
        ("nerf_blender", "nerf.Train.epsilon = 1e-7", "is now Optimizer.epsilon"),
        ("nerf_blender", "Optimizer.clip_value = 1.0", "not clipped"),
        ("nerf_blender", "Schedule.warmup_steps = 100000", "warmup_steps"),
        ("nerf_blender", "nerf.View.port = 70000", "nerf.View.port"),
        ("nerf_blender", 'Run.backend = "jax"', "torch"),
        ("nerf_vanilla", "nerf.Grid.features = 16", "no effect"),
        ("nerf_vanilla", "nerf.Train.samples = 1000", "no effect"),
        ("nerf_vanilla", "nerf.Train.density_learning_rate = 0.1", "no effect"),
        ("nerf_vanilla", "nerf.Data.hull = False", "no effect"),
    ],
)
def test_a_wrong_setting_is_one_line(file, binding, named):
    with pytest.raises(ConfigError) as error:
        launcher.resolve([f"gin/{file}.gin"], binding.splitlines())
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_only_experiments_with_something_to_look_at_have_a_viewer(launch, tmp_path):
    done = launch("--gin_file=gin/mnist_torch.gin", "--mode=view", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "train, eval, export" in done.stderr
