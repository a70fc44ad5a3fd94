"""The configuration of the Llama experiment. Loads no framework."""

import dataclasses
from typing import Literal

from blacksmith.config.conditions import NOT_NONE
from blacksmith.config.sections import section, setting
from blacksmith.config.settings import (
    CheckpointConfig,
    LogConfig,
    RunConfig,
    ScheduleConfig,
    TorchOptimizerConfig,
    TrainConfig,
)
from blacksmith.errors import ConfigError

_FROM_SCRATCH = {"llama.Model.name_or_path": None}
_WITH_LORA = {"llama.Lora.rank": NOT_NONE}


@section("llama.Data")
class Data:
    """Sentences with a sentiment, and the prompt that they are put into."""

    source: str = setting(
        "sample",
        "sample: the bundled sentences; a directory or file of tsv, csv, json or parquet; or a Hugging Face "
        "dataset id",
        min_length=1,
        resume_may_change=True,
        location=True,
    )
    sentence_column: str = setting("sentence", "column of the text", resume_may_change=True, min_length=1)
    label_column: str = setting("label", "column of the 0 or 1", resume_may_change=True, min_length=1)
    validation: int | float | None = setting(
        None,
        "sentences held out of the training set to choose the best checkpoint: a number or a fraction; None: "
        "1,000, or 40 of the sample",
        gt=0,
    )
    min_words: int = setting(
        1,
        "leave out training and validation examples with fewer words: SST-2 trains on phrases and tests on "
        "sentences",
        ge=1,
    )
    template: str = setting(
        "Classify the sentiment of the movie review as negative or positive.\n\n"
        "Review: {sentence}\nSentiment: {label}",
        "the prompt: contains {sentence}, ends with {label}",
    )
    labels: tuple[str, ...] = setting(("negative", "positive"), "the prompt's words for the labels 0 and 1")
    max_length: int = setting(128, "maximum tokens per example, prompt and answer together", ge=4)
    too_long: Literal["drop", "truncate"] = setting(
        "truncate",
        "longer training examples are left out or truncated at the end of their sentence; validation and "
        "test examples are always truncated",
    )


@section("llama.Model")
class Model:
    """The model that is fine-tuned: pretrained, or from scratch with the sizes given here."""

    name_or_path: str | None = setting(
        None,
        "an asset (smollm2-135m), a directory, a .gguf file or a Hugging Face id; None: from scratch",
        min_length=1,
        resume_may_change=True,
        location=True,
    )
    hidden_size: int = setting(64, "width", gt=0, only_with=_FROM_SCRATCH)
    intermediate_size: int = setting(176, "width inside the MLP", gt=0, only_with=_FROM_SCRATCH)
    layers: int = setting(2, "decoder layers", gt=0, le=1000, only_with=_FROM_SCRATCH)
    heads: int = setting(4, "attention heads", gt=0, only_with=_FROM_SCRATCH)
    key_value_heads: int = setting(2, "heads of keys and values", gt=0, only_with=_FROM_SCRATCH)
    max_positions: int = setting(512, "longest context, in tokens", gt=0, only_with=_FROM_SCRATCH)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "data type of the model's own weights; an adapter's are always float32"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "implementation of attention", resume_may_change=True
    )
    gradient_checkpointing: bool = setting(
        False, "recompute layers in the backward pass instead of storing them", resume_may_change=True
    )
    compile: bool = setting(
        False, "torch.compile the layers' MLPs; the first steps take longer", resume_may_change=True
    )


@section("llama.Lora")
class Lora:
    """The adapter: low-rank updates of linear layers (Hu et al., LoRA, 2021), or full fine-tuning."""

    rank: int | None = setting(8, "rank of the updates; None: train all weights, without an adapter", gt=0)
    alpha: float = setting(16.0, "scale the updates by alpha / rank", gt=0, only_with=_WITH_LORA)
    dropout: float = setting(0.0, "dropout on the adapters' inputs", ge=0, lt=1, only_with=_WITH_LORA)
    bias: Literal["none", "all", "lora_only"] = setting("none", "biases to train", only_with=_WITH_LORA)
    target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        'names of the layers, such as "q_proj"; ("all-linear",): all linear layers except the head',
        only_with=_WITH_LORA,
    )


@section("llama.Train", defaults={"epochs": 1, "batch_size": 32})
class Train(TrainConfig):
    """The training loop."""

    accumulate: int = setting(1, "compute a batch in this many parts; must divide `batch_size`", gt=0)
    shared_prefix: bool = setting(
        True,
        "compute the common beginning of all prompts once per batch; exact up to rounding",
        resume_may_change=True,
    )
    by_length: int = setting(
        50, "shuffle in pools of this many batches, sorted by length to save padding; 1: do not sort", gt=0
    )
    average: float | None = setting(
        None,
        "decay of a moving average of the trained weights (at most t/(t+9) at step t), which replaces them "
        "in validation, checkpoints and tests; None: no average",
        gt=0,
        lt=1,
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "bfloat16: matrix products under autocast", evaluation_may_change=True
    )
    evaluate_every_steps: int | None = setting(
        None, "validate every this many steps; None: ten times in all", gt=0
    )
    profile_steps: int = setting(
        0, "trace this many steps, after the first three, with torch.profiler", ge=0, resume_may_change=True
    )


@section("Optimizer", defaults={"name": "adamw", "weight_decay": 0.0, "global_clip_norm": 1.0})
class Optimizer(TorchOptimizerConfig):
    """AdamW by default, without weight decay."""


@section("Checkpoint")
class Checkpoint(CheckpointConfig):
    """When checkpoints are written and which are kept."""

    metric: Literal["val_accuracy", "val_loss"] = setting(
        "val_accuracy", "the validation metric that decides which is best"
    )


@section("llama.Evaluation")
class Evaluation:
    """How a model is tested."""

    batch_size: int = setting(64, "examples at a time", gt=0, resume_may_change=True)
    generate: int | None = setting(
        200,
        "test examples that are also answered by generation; 0: none, None: all",
        ge=0,
        resume_may_change=True,
    )
    max_new_tokens: int = setting(16, "maximum tokens of a generated answer", gt=0, resume_may_change=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of the Llama experiment."""

    run: RunConfig
    data: Data
    model: Model
    lora: Lora
    train: Train
    optimizer: Optimizer
    schedule: ScheduleConfig
    evaluation: Evaluation
    checkpoint: Checkpoint
    log: LogConfig

    def check(self) -> None:
        """Raises ConfigError for the first broken rule that spans fields."""
        data, model, lora, train = self.data, self.model, self.lora, self.train
        counts = [data.template.count(field) for field in ("{sentence}", "{label}")]
        if counts != [1, 1] or not data.template.endswith("{label}"):
            raise ConfigError(
                "llama.Data.template must contain {sentence} once, and {label} once, at its end"
            )
        folded = {text.strip().casefold() for text in data.labels}
        if len(data.labels) != 2 or len(folded) != 2 or "" in folded:
            raise ConfigError(f"llama.Data.labels = {data.labels}: must be two different words")
        if model.name_or_path is None:
            if model.hidden_size % model.heads or (model.hidden_size // model.heads) % 2:
                raise ConfigError(
                    f"llama.Model.hidden_size = {model.hidden_size} / llama.Model.heads = {model.heads} must "
                    "be an even number"
                )
            if model.heads % model.key_value_heads:
                raise ConfigError(
                    f"llama.Model.key_value_heads = {model.key_value_heads} does not divide "
                    f"llama.Model.heads = {model.heads}"
                )
        if model.attention == "flash_attention_2" and "bfloat16" not in (model.dtype, train.precision):
            raise ConfigError(
                'llama.Model.attention = "flash_attention_2" computes in bfloat16; set llama.Train.precision '
                "to it"
            )
        if model.name_or_path is None and self.data.max_length > model.max_positions:
            raise ConfigError(
                f"llama.Data.max_length = {self.data.max_length} is more than llama.Model.max_positions = "
                f"{model.max_positions}"
            )
        if model.dtype == "bfloat16" and (lora.rank is None or lora.bias != "none"):
            raise ConfigError(
                'llama.Model.dtype = "bfloat16" would round away small updates of weights and biases; '
                'set it to "float32", and llama.Train.precision = "bfloat16" for speed'
            )
        if train.batch_size % train.accumulate:
            raise ConfigError(
                f"llama.Train.accumulate = {train.accumulate} does not divide llama.Train.batch_size = "
                f"{train.batch_size}"
            )
