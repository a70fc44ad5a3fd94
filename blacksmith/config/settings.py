"""The sections that experiments share, as they are or as base classes; docs/settings.md lists them."""

import dataclasses
from typing import Any, Literal

from blacksmith.config.conditions import POSITIVE, Is, hold
from blacksmith.config.sections import fields, section, setting
from blacksmith.errors import ConfigError

_HAS_BETAS = {"Optimizer.name": ("adam", "adamw", "adamax", "nadam", "lion", "lamb")}
_HAS_EPSILON = {
    "Optimizer.name": ("adam", "adamw", "adamax", "nadam", "rmsprop", "adagrad", "adadelta", "lamb", "muon")
}
_DECAYS = {"Schedule.name": Is("not 'constant'", lambda name: name != "constant")}


@section("Run")
class RunConfig:
    """Which experiment runs, on which framework, from which seed."""

    experiment: str = setting(..., "the experiment's name, see --list", resume_may_change=True, min_length=1)
    backend: Literal["jax", "torch"] | None = setting(
        None, "the framework; optional if the experiment has only one", resume_may_change=True
    )
    seed: int = setting(0, "everything random is derived from this number", ge=0, le=2**63 - 1)


@section("Train")
class TrainConfig:
    """How long to train, and when to validate; each experiment has a `Train` section under its own name."""

    epochs: int | None = setting(10, "passes over the training set", gt=0, resume_may_change=True)
    steps: int | None = setting(None, "optimizer steps, instead of `epochs`", gt=0, resume_may_change=True)
    batch_size: int = setting(128, "examples per optimizer step", gt=0)
    evaluate_every_steps: int | None = setting(
        None, "validate every this many steps; None: after each epoch", gt=0
    )
    early_stopping: int | None = setting(
        None, "stop after this many validations in a row without a better `Checkpoint.metric`", gt=0
    )
    stop_at: float | None = setting(
        None, "stop as soon as `Checkpoint.metric` is this good", resume_may_change=True
    )

    def check(self) -> None:
        """Raises ConfigError if nothing says when training ends."""
        if self.steps is None and self.epochs is None:
            raise ConfigError(
                f"{self.gin_name}.steps and {self.gin_name}.epochs are both None; set one of them"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """The last optimizer step."""
        return self.steps or self.epochs * steps_per_epoch


@section("Train")
class KerasTrainConfig(TrainConfig):
    """Training a Keras model on the Keras trainer."""

    accumulate: int = setting(1, "compute a batch in this many parts; must divide `batch_size`", gt=0)
    loss: Literal["cross_entropy", "mse"] = setting(
        "cross_entropy", "the loss; mse: of the outputs against one-hot labels"
    )
    precision: Literal["float32", "mixed_bfloat16"] = setting(
        "float32", "precision of the layers; weights and optimizer state stay float32"
    )
    block_steps: int = setting(
        128,
        "steps per compiled call; a stop signal waits for the end of the call",
        gt=0,
        le=4096,
        resume_may_change=True,
    )

    def check(self) -> None:
        """Raises ConfigError if no end is set, or a batch cannot be divided into its parts."""
        TrainConfig.check(self)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"{self.gin_name}.accumulate = {self.accumulate} does not divide "
                f"{self.gin_name}.batch_size = {self.batch_size}"
            )


@section("Optimizer")
class OptimizerConfig:
    """The optimizer and its settings, under Keras's names."""

    name: Literal[
        "sgd",
        "adam",
        "adamw",
        "adamax",
        "nadam",
        "rmsprop",
        "adagrad",
        "adadelta",
        "lion",
        "adafactor",
        "lamb",
        "muon",
    ] = setting("adam", "the optimizer")
    learning_rate: float = setting(1e-3, "peak learning rate", gt=0)
    weight_decay: float | None = setting(
        None, "decoupled weight decay, multiplied by the learning rate; None: the framework's default", ge=0
    )
    momentum: float = setting(0.0, "momentum", ge=0, lt=1, only_with={"Optimizer.name": ("sgd", "rmsprop")})
    nesterov: bool = setting(
        False, "Nesterov momentum", only_with={"Optimizer.name": "sgd", "Optimizer.momentum": POSITIVE}
    )
    beta_1: float | None = setting(
        None, "decay of the first moment; None: the framework's default", ge=0, lt=1, only_with=_HAS_BETAS
    )
    beta_2: float | None = setting(
        None, "decay of the second moment; None: the framework's default", ge=0, lt=1, only_with=_HAS_BETAS
    )
    rho: float | None = setting(
        None,
        "decay of the average of squared gradients; None: the framework's default",
        ge=0,
        lt=1,
        only_with={"Optimizer.name": ("rmsprop", "adadelta")},
    )
    epsilon: float | None = setting(
        None, "added to the denominator; None: the framework's default", gt=0, only_with=_HAS_EPSILON
    )
    amsgrad: bool = setting(False, "the AMSGrad variant", only_with={"Optimizer.name": ("adam", "adamw")})
    clip_norm: float | None = setting(None, "clip the norm of each gradient to this", gt=0)
    global_clip_norm: float | None = setting(None, "clip the norm of all gradients together to this", gt=0)
    clip_value: float | None = setting(None, "clip each element of the gradients to +-this", gt=0)

    def check(self) -> None:
        """Raises ConfigError for more than one way to clip."""
        clips = [n for n in ("clip_norm", "global_clip_norm", "clip_value") if getattr(self, n) is not None]
        if len(clips) > 1:
            raise ConfigError(f"Optimizer.{' and Optimizer.'.join(clips)} are both set; set only one of them")

    def own_settings(self) -> dict[str, Any]:
        """The changed settings of the optimizer's formula, to be passed to its class."""
        values = {f"Optimizer.{name}": getattr(self, name) for name in fields(OptimizerConfig)}
        return {
            name: values[f"Optimizer.{name}"]
            for name, field in fields(OptimizerConfig).items()
            if name not in ("name", "learning_rate", "clip_norm", "global_clip_norm", "clip_value")
            and values[f"Optimizer.{name}"] != field.get_default()
            and hold(field.json_schema_extra["only_with"] or {}, values)
        }


@section("Optimizer")
class TorchOptimizerConfig(OptimizerConfig):
    """An optimizer of `torch.optim`."""

    name: Literal[
        "sgd", "adam", "adamw", "adamax", "nadam", "rmsprop", "adagrad", "adadelta", "adafactor"
    ] = setting("adam", "the optimizer of `torch.optim`")
    weight_decay: float | None = setting(
        None,
        "weight decay, decoupled for adamw and adafactor, else added to the gradient; None: the framework's "
        "default",
        ge=0,
    )


@section("Schedule")
class ScheduleConfig:
    """The learning rate over the optimizer steps."""

    name: Literal["constant", "linear", "cosine", "exponential"] = setting(
        "constant", "the shape of the decay after the warm-up; exponential: from the first step on"
    )
    warmup_steps: int = setting(0, "steps in which the rate rises linearly from 0", ge=0)
    decay_steps: int | None = setting(
        None,
        "length of the decay; None: to the end of the run",
        gt=0,
        resume_may_change=True,  # `check_same_decay` refuses a change of the actual length
        only_with=_DECAYS,
    )
    final_fraction: float = setting(
        0.0, "the rate after the decay, as a fraction of the peak", ge=0, le=1, only_with=_DECAYS
    )

    def check(self) -> None:
        """Raises ConfigError for an exponential decay to 0."""
        if self.name == "exponential" and not self.final_fraction:
            raise ConfigError("Schedule.name = 'exponential' needs Schedule.final_fraction above 0")


@section("Checkpoint")
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int | None = setting(None, "save every this many steps", gt=0, resume_may_change=True)
    every_epochs: int | None = setting(1, "save every this many epochs", gt=0, resume_may_change=True)
    keep_last: int = setting(2, "how many of the newest to keep", ge=1, resume_may_change=True)
    keep_best: int = setting(1, "how many of the best by `metric` to keep", ge=0, resume_may_change=True)
    metric: str = setting(
        "val_accuracy", "the validation metric that decides which is best, such as val_loss", min_length=1
    )
    mode: Literal["auto", "min", "max"] = setting(
        "auto",
        "whether a lower or higher metric is better; auto: known for loss, accuracy, PSNR and the like",
    )


@section("Log")
class LogConfig:
    """What is logged during the run."""

    every_steps: int = setting(
        50, "log training metrics, averaged, every this many steps", gt=0, resume_may_change=True
    )
    tensorboard: bool = setting(True, "write TensorBoard events", resume_may_change=True)
    wandb: Literal["off", "offline", "online"] = setting(
        "off", "log to Weights & Biases", resume_may_change=True
    )
    wandb_project: str = setting("blacksmith", "the Weights & Biases project", resume_may_change=True)
    histograms_every: int | None = setting(
        None,
        "write histograms of weights and gradients every this many steps",
        gt=0,
        resume_may_change=True,
        only_with=({"Log.tensorboard": True}, {"Log.wandb": ("offline", "online")}),
    )
    progress: Literal["auto", "bar", "lines", "off"] = setting(
        "auto", "progress on the console; auto: a bar on a terminal, else lines", resume_may_change=True
    )


SHARED = (
    RunConfig,
    TrainConfig,
    KerasTrainConfig,
    OptimizerConfig,
    ScheduleConfig,
    CheckpointConfig,
    LogConfig,
)


def check_warmup(schedule: ScheduleConfig, end: int | None) -> None:
    """Raises ConfigError if the warm-up takes all of the run's `end` optimizer steps; None: not known yet."""
    if end is not None and schedule.warmup_steps >= end:
        raise ConfigError(
            f"Schedule.warmup_steps = {schedule.warmup_steps} leaves no step after it in a run of {end}"
        )


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The sections that the loop and the run directory need; an experiment's `Config` adds its own."""

    run: RunConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    log: LogConfig


@dataclasses.dataclass(frozen=True)
class KerasConfig(BaseConfig):
    """The sections that an experiment on the Keras trainer needs in addition to its `Train`."""

    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TorchConfig(BaseConfig):
    """The sections that a plain PyTorch experiment needs in addition to its `Train`."""

    optimizer: TorchOptimizerConfig
