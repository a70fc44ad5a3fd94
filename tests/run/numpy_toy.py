"""A toy experiment in NumPy for tests of run directories and the loop: momentum SGD on ten noisy rows."""

import dataclasses
import functools
import json

import numpy as np

from blacksmith import config as configuration
from blacksmith.config import settings
from blacksmith.config.sections import section, setting
from blacksmith.run import metrics
from blacksmith.run.checkpoint import Checkpoints
from blacksmith.run.loop import Loop
from blacksmith.run.order import Order, generator
from blacksmith.run.run import Run

DEFAULTS = (
    "Run.experiment = 'toy'",
    "Checkpoint.metric = 'val_loss'",
    "Log.tensorboard = False",
    "Log.progress = 'off'",
)


STEPS = "toy.Train.steps = 14"
BY_STEPS = (
    "toy.Train.evaluate_every_steps = 4",
    "Checkpoint.every_steps = 3",
    "Checkpoint.every_epochs = None",
    "Log.every_steps = 3",
)
# An epoch has 3 steps, of 4, 4 and 2 rows, so that nearly everything falls on steps of its own.
VARIANTS = {
    "epochs": (STEPS, "Log.every_steps = 4", "Checkpoint.every_epochs = 2"),
    "early stopping": (*BY_STEPS, "toy.Train.steps = 30", "toy.Train.early_stopping = 2"),
    "target": (*BY_STEPS, STEPS, "toy.Train.stop_at = 0.63", "Checkpoint.keep_best = 0"),
}


@section("toy.Train", defaults={"batch_size": 4})
class Train(settings.TrainConfig):
    """How it trains."""

    epochs: int = setting(4, "passes over the rows", resume_may_change=True)
    learning_rate: float = setting(0.1, "learning rate of the first step")


@dataclasses.dataclass(frozen=True)
class Config:
    """The toy's configuration."""

    run: settings.RunConfig
    train: Train
    schedule: settings.ScheduleConfig
    checkpoint: settings.CheckpointConfig
    log: settings.LogConfig


@dataclasses.dataclass(frozen=True)
class Info:
    """Which data is used."""

    source: str = "rows"
    sha256: str = "0123456789abcdef" * 4

    def describe(self):
        """One line."""
        return f"data: {self.source}"


@functools.cache
def configure(*bindings):
    """The toy's configuration with some Gin bindings."""
    parsed = configuration.parse([], [*DEFAULTS, *bindings])
    return configuration.build(Config, parsed, experiment="toy"), parsed


def make_run(directory, *bindings, **arguments):
    """A run of the toy with Gin bindings and further arguments of `Run`."""
    config, parsed = configure(*bindings)
    usual = {"experiment": "toy", "checkpoint_format": "toy-1", "backend": "jax", "device": "cpu"}
    return Run(directory, config, **usual | {"bindings": parsed} | arguments)


class Toy:
    """One training.

    Args:
      run: the run.
      block: steps of one block.
      at: called wherever a signal or a crash may come.
      **options: of the loop.

    Attributes:
      events: what the loop asked for, ``(what, step)`` each.
      blocks: first step and length of each block.
    """

    def __init__(self, run, *, block=1, at=lambda: None, **options):
        self.run, self.block, self.at = run, block, at
        run.use_data(Info())
        seed = run.config.run.seed
        self.order = Order(10, run.config.train.batch_size, seed)
        random = generator(seed, "rows")
        self.inputs, self.truth = random.standard_normal((20, 3)), random.standard_normal(20)
        self.state = np.zeros((2, 3))  # weights, momentum
        if run.resumed is not None:
            self.state = np.load(run.resumed.path / "arrays.npy")
        self.events = []
        self.blocks = []
        end = run.config.train.total_steps(self.order.steps_per_epoch)
        usual = {"validate": self.validate, "learning_rate": self.rate, "histograms": self.histograms}
        usual["examples_of"] = lambda step: f"rows {self.order.rows(step).tolist()}"
        self.loop = Loop(run, self.order, end=end, save=self.save, **usual | options)

    def train(self):
        """Trains and tests; returns the exit status."""
        for step, steps in self.loop.blocks(self.block):
            self.blocks.append((step, steps))
            losses = [self.step(step + i) for i in range(steps)]
            self.at()
            self.loop.log({"loss": np.array(losses) if self.block > 1 else losses[0]})
        return self.loop.finish(self.test, {"weights": 3})

    def step(self, step):
        """One optimizer step; returns its loss."""
        rows = self.order.rows(step)
        noise = generator(self.run.config.run.seed, "step", step).standard_normal((len(rows), 3))
        inputs = self.inputs[rows] + 0.3 * noise
        error = inputs @ self.state[0] - self.truth[rows]
        momentum = 0.7 * self.state[1] + inputs.T @ error / len(rows)
        self.state = np.stack([self.state[0] - self.rate(step) * momentum, momentum])
        return np.float32(np.mean(error**2))

    def rate(self, step):
        """The learning rate of a step."""
        return self.run.config.train.learning_rate / (1 + step)

    def loss(self):
        """The loss on the rows that are not trained on."""
        return float(np.mean((self.inputs[10:] @ self.state[0] - self.truth[10:]) ** 2))

    def validate(self):
        """As the loop wants it."""
        self.events.append(("validate", self.loop.step))
        self.at()
        return None if self.run.stop else {"loss": self.loss()}

    def histograms(self):
        """As the loop wants it."""
        self.events.append(("histograms", self.loop.step))
        return {"weights": self.state[0]}

    def save(self, directory):
        """As the loop wants it."""
        self.events.append(("save", self.loop.step))
        np.save(directory / "arrays.npy", self.state)
        self.at()
        return {"norm": float(np.linalg.norm(self.state[0]))}

    def test(self, saved):
        """As the loop wants it."""
        self.events.append(("test", saved.step))
        self.state = np.load(saved.path / "arrays.npy")
        self.at()
        return None if self.run.stop else {"loss": self.loss(), "rows": 10, "seconds_per_row": 0.1}


def train(directory, *bindings, toy=Toy, resumed=None, **options):
    """Trains a toy in a directory, from the newest checkpoint there if it has one."""
    resumed = resumed or Checkpoints(directory / "checkpoints").newest()
    with make_run(directory, *bindings, resumed=resumed).opened() as run:
        trained = toy(run, **options)
        trained.status = trained.train()
    return trained


def take_steps(run, steps, *, first=0):
    """Takes steps without a loop: data, metrics, a checkpoint after each."""
    run.use_data(Info())
    run.begin()
    for step in range(first + 1, first + steps + 1):
        run.metrics.write(step, step / 10, "train", {"loss": 1 / step})
        save(run, step)


def save(run, step):
    """Saves a checkpoint of some letters."""

    def write(directory):
        (directory / "a").write_bytes(b"a" * step)
        return {"letters": step}

    run.save_checkpoint(step, {"step": step}, write, {"val_loss": 1 / step})


def result_of(directory):
    """The content of `result.json`."""
    return json.loads((directory / "result.json").read_text())


def lines(directory, split):
    """The lines of one split in `metrics.jsonl`."""
    return [line for line in metrics.read(directory / "metrics.jsonl") if line["split"] == split]
