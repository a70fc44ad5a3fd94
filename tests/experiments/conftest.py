"""Fixtures of the NeRF and Llama tests: Gin files with small settings, a scene and a base model."""

import importlib.util
import signal
from pathlib import Path

import pytest

from blacksmith import launch as launcher

NERF = [
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
LLAMA = [
    "llama.Data.validation = 20",
    "llama.Model.hidden_size = 32",
    "llama.Model.intermediate_size = 48",
    "llama.Train.epochs = None",
    "llama.Train.steps = 12",
    "llama.Train.batch_size = 8",
    "llama.Train.evaluate_every_steps = 5",
    "llama.Evaluation.generate = 3",
    "Schedule.warmup_steps = 2",
    "Log.every_steps = 3",
    "Log.tensorboard = False",
    'Log.progress = "off"',
]


@pytest.fixture(scope="session")
def nerf_scene():
    """The module `nerf_scene.py`, which draws a ball."""
    path = Path(__file__).with_name("nerf_scene.py")
    specification = importlib.util.spec_from_file_location("nerf_scene", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ball(nerf_scene, tmp_path_factory) -> Path:
    """The directory of a scene that shows a ball."""
    return nerf_scene.write(tmp_path_factory.mktemp("scene") / "ball")


@pytest.fixture(scope="session")
def launch_nerf(ball):
    """Runs a Gin file on the ball, the default one with small settings; returns the exit status."""

    def run(directory: Path, *params: str, file: str = "nerf_blender", **options: str) -> int:
        small = NERF if file == "nerf_blender" else []
        resolved = launcher.resolve([f"gin/{file}.gin"], [f'nerf.Data.scene = "{ball}"', *small, *params])
        return launcher.run_experiment(resolved, directory, device="cpu", **options)

    return run


@pytest.fixture
def run_nerf(launch_nerf, tmp_path):
    """As `launch_nerf`, in ``run`` unless a directory is given."""

    def call(*params: str, directory: Path = tmp_path / "run", **options: str) -> int:
        return launch_nerf(directory, *params, **options)

    return call


@pytest.fixture(scope="session")
def resolve_llama():
    """Resolves the tiny Gin file with small settings and the given ones."""
    return lambda *params: launcher.resolve(["gin/llama_sst2_tiny.gin"], [*LLAMA, *params])


@pytest.fixture
def run_llama(resolve_llama, tmp_path):
    """Runs `resolve_llama`'s settings, in ``run`` unless a directory is given; returns the exit status."""

    def call(*params: str, directory: Path = tmp_path / "run", **options: str) -> int:
        return launcher.run_experiment(resolve_llama(*params), directory, device="cpu", **options)

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model directory of random weights."""
    from blacksmith.models.pytorch.llama import loading
    from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

    directory = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 32, 48, 2, 4, 2, 512, seed=5).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pretrained():
    """The settings that name a model directory in place of sizes."""
    sizes = ["llama.Model.hidden_size = 64", "llama.Model.intermediate_size = 176"]
    return lambda directory: [*sizes, f'llama.Model.name_or_path = "{directory}"']


@pytest.fixture
def stop_during(monkeypatch):
    """Sends SIGTERM when the function `name` of `owner` is called for the given time; returns its calls."""

    def arrange(owner, name, call=1):
        function, calls = getattr(owner, name), []

        def stopping(*arguments, **options):
            calls.append(name)
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, stopping)
        return calls

    return arrange
