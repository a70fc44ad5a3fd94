"""Fixtures of the Llama tests: the tiny Gin file with settings that make it smaller, and a base model."""

from pathlib import Path

import pytest

from blacksmith import launch as launcher

SMALL = [
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
def resolve_llama():
    """Resolves the tiny Gin file with small settings and the given ones."""
    return lambda *params: launcher.resolve(["gin/llama_sst2_tiny.gin"], [*SMALL, *params])


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
