"""Settings of the NeRF experiment: those that train, those that are published, those that are refused."""

import json
import shutil
from pathlib import Path

import pytest

from blacksmith import launch as launcher
from blacksmith.errors import ConfigError, DataError


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        ['nerf.Data.background = "random"'],
        ['nerf.Data.background = "black"', "nerf.Train.samples = None", "nerf.Train.rays = 600"],
        ["nerf.Data.hull = False", "nerf.Train.distortion = 0.01"],
        ["nerf.Train.total_variation = 1e-4", "nerf.Train.opacity_entropy = 1e-3"],
        [
            "nerf.Data.bounds = (-1.2, -1.2, -1.2, 1.2, 1.2, 1.2)",
            "nerf.Data.near = 2.5",
            "nerf.Data.far = 5.5",
        ],
        # Fewer rows than the finest level has: a coarser one is taken.
        ['nerf.Train.precision = "bfloat16"', "nerf.Grid.rows = 3000"],
    ],
    ids=lambda settings: settings[0].partition(" ")[0],
)
def test_each_setting_learns_the_ball(run_nerf, tmp_path, settings):
    # 80 steps; the plainest of these settings reaches 25 dB.
    run_nerf("nerf.Train.steps = 80", *settings)
    assert result(tmp_path / "run")["test"]["psnr"] > 20


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


def test_the_gpu_preset_runs_on_a_cpu(run_nerf, tmp_path):
    settings = [
        "nerf.Train.steps = 8",
        "nerf.Train.samples = 20000",
        "Schedule.warmup_steps = 2",
        "nerf.Grid.resolutions = (16, 20, 24, 32)",
        "nerf.Grid.occupancy_resolution = 32",
        "nerf.Grid.rows = 40000",
        "nerf.Results.video_frames = 0",
    ]
    assert run_nerf(*settings, file="nerf_blender_gpu") == 0
    assert result(tmp_path / "run")["step"] == 8


def test_a_changed_scene_is_not_resumed(run_nerf, ball, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(ball, own)
    settings = ["nerf.Train.steps = 10", f'nerf.Data.scene = "{own}"']
    run_nerf(*settings)
    with (own / "transforms_val.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match="the data has changed since step_00000010"):
        run_nerf(*settings)


def test_pictures_too_small_to_be_scored_are_refused(run_nerf, tmp_path):
    with pytest.raises(DataError, match="8x8 pixels are too small to be scored"):
        run_nerf("nerf.Data.downscale = 4")
    assert not (tmp_path / "run").exists()


def test_float16_needs_a_gpu(run_nerf):
    with pytest.raises(ConfigError, match="float16"):
        run_nerf('nerf.Train.precision = "float16"')


@pytest.mark.parametrize(
    ("file", "binding", "named"),
    [
        ("nerf_blender", "nerf.Grid.resolutions = (48, 40)", "must rise"),
        ("nerf_blender", "nerf.Grid.resolutions = (48, 80)", "one entry per level"),
        ("nerf_blender", "nerf.Grid.upsample_at = (0.5, 0.4)", "must rise"),
        ("nerf_blender", "nerf.Grid.refresh_at = (0.5, 1.0)", "between 0 and 1"),
        ("nerf_blender", "nerf.Grid.features = 2", "nerf.Grid.features"),
        ("nerf_blender", "nerf.Data.bounds = (1, 0, 0, 0, 1, 1)", "nerf.Data.bounds"),
        ("nerf_blender", "nerf.Data.bounds = (0, 0, 1)", "nerf.Data.bounds"),
        ("nerf_blender", "nerf.Data.bounds = (0, 0, 0, 1e30, 1, 1)", "nerf.Data.bounds"),
        ("nerf_blender", "nerf.Data.near = 7.0\nnerf.Data.far = 6.0", "nerf.Data.near"),
        ("nerf_blender", "nerf.Data.downscale = 0", "nerf.Data.downscale"),
        ("nerf_blender", "nerf.Mlp.width = 128", "no effect"),
        ("nerf_blender", 'nerf.Model.field = "hash"', "grid"),
        ("nerf_blender", 'Checkpoint.metric = "val_accuracy"', "val_psnr"),
        ("nerf_blender", "Checkpoint.every_epochs = 2", "every_steps"),
        ("nerf_blender", "nerf.Train.epochs = 2", "nerf.Train.steps"),
        ("nerf_blender", "Optimizer.clip_value = 1.0", "not clipped"),
        ("nerf_blender", "Schedule.warmup_steps = 100000", "warmup_steps"),
        ("nerf_blender", "nerf.Train.epsilon = 1e-7", "did you mean Optimizer.epsilon?"),
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
