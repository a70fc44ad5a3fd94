"""The configuration of the Llama experiment. Loads no framework."""

import dataclasses
import math
from typing import Literal

from blacksmith.config.sections import fields, section, setting
from blacksmith.config.settings import CheckpointConfig, LogConfig, RunConfig, ScheduleConfig, check_log
from blacksmith.errors import ConfigError

TEMPLATE = (
    "Classify the sentiment of the movie review as negative or positive.\n\n"
    "Review: {sentence}\nSentiment: {label}"
)


@section("llama.Data")
class Data:
    """Sentences with a sentiment, and the prompt that they are put into."""

    source: str = setting(
        "sample",
        "sample: sentences that come with the package; a directory or file of tsv, csv, json or parquet; or "
        "a Hugging Face dataset id",
        evaluation_may_change=True,
        min_length=1,
    )
    sentence_column: str = setting(
        "sentence", "column of the sentence", evaluation_may_change=True, min_length=1
    )
    label_column: str = setting(
        "label", "column of the label, 0 or 1", evaluation_may_change=True, min_length=1
    )
    validation: int | float | None = setting(
        None,
        "whole sentences held out of the training to choose the best checkpoint: a number or a fraction; "
        "None: 1,000, or 40 of the sample",
        gt=0,
    )
    min_words: int = setting(
        1,
        "training and validation examples of fewer words are left out: SST-2 trains on phrases and tests on "
        "sentences",
        ge=1,
    )
    template: str = setting(TEMPLATE, "the prompt, with {sentence}, and {label} at its end", min_length=1)
    labels: tuple[str, ...] = setting(
        ("negative", "positive"), "what stands for the labels 0 and 1 in the prompt"
    )
    max_length: int = setting(128, "tokens that an example may have, prompt and answer together", ge=4)
    too_long: Literal["drop", "truncate"] = setting(
        "truncate",
        "what happens to a training example of more; truncate: its sentence loses tokens at its end. "
        "Validation and test examples are truncated always",
    )


@section("llama.Model")
class Model:
    """The model that is fine-tuned: pretrained, or from scratch by its sizes."""

    name_or_path: str | None = setting(
        None,
        "an asset (smollm2-135m), a directory, a .gguf file or a Hugging Face id; None: from scratch",
        min_length=1,
        resume_may_change=True,
    )
    hidden_size: int = setting(64, "from scratch: width", gt=0)
    intermediate_size: int = setting(176, "from scratch: width within the MLP", gt=0)
    layers: int = setting(2, "from scratch: decoder layers", gt=0)
    heads: int = setting(4, "from scratch: attention heads", gt=0)
    key_value_heads: int = setting(2, "from scratch: heads of keys and values", gt=0)
    max_positions: int = setting(512, "from scratch: longest context, in tokens", gt=0)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the model's own weights; an adapter's are float32 always"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "implementation of attention", resume_may_change=True
    )
    gradient_checkpointing: bool = setting(
        False, "compute layers again in the backward pass instead of keeping them", resume_may_change=True
    )
    compile: bool = setting(
        False, "torch.compile the layers' MLPs; the first steps take longer", resume_may_change=True
    )


@section("llama.Lora")
class Lora:
    """The adapter: low-rank updates of linear layers (Hu et al., LoRA, 2021), or full fine-tuning."""

    rank: int | None = setting(
        8, "rank of the updates; None: all weights are trained, without an adapter", gt=0
    )
    alpha: float = setting(16.0, "updates are scaled by alpha / rank", gt=0)
    dropout: float = setting(0.0, "of the adapters' inputs", ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = setting("none", "which biases are trained")
    target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        'names of the layers, such as "q_proj"; ("all-linear",): every linear one but the head',
    )


@section("llama.Train")
class Train:
    """The training loop."""

    epochs: int | None = setting(
        1, "passes over the training set; None: `steps` it is", gt=0, resume_may_change=True
    )
    steps: int | None = setting(None, "optimiser steps; None: `epochs` it is", gt=0, resume_may_change=True)
    batch_size: int = setting(32, "examples of an optimiser step", gt=0)
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other", gt=0)
    shared_prefix: bool = setting(
        True, "compute what all prompts begin with once a batch; exact, see README", resume_may_change=True
    )
    by_length: int = setting(
        50, "batches that are sorted by length together, so that little is padding; 1: none", gt=0
    )
    optimizer: str = setting("AdamW", "a class of torch.optim", min_length=1)
    learning_rate: float = setting(1e-3, "peak learning rate", gt=0)
    weight_decay: float | None = setting(
        0.0, "as the optimiser takes it; None: the optimiser's default", ge=0
    )
    momentum: float | None = setting(None, "of optimisers that have it, such as SGD", ge=0, lt=1)
    beta_1: float | None = setting(
        None, "decay of the first moment; None: the optimiser's default", ge=0, lt=1
    )
    beta_2: float | None = setting(
        None, "decay of the second moment; None: the optimiser's default", ge=0, lt=1
    )
    epsilon: float | None = setting(None, "added to the denominator; None: the optimiser's default", gt=0)
    clip_norm: float | None = setting(1.0, "the norm of all gradients together is cut to this", gt=0)
    average: float | None = setting(
        None,
        "decay of a moving average of the trained weights, at step t t/(t+9) at most, which is validated, "
        "saved and tested in their place; None: they themselves are",
        gt=0,
        lt=1,
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "bfloat16: matrix products under autocast", evaluation_may_change=True
    )
    evaluate_every_steps: int | None = setting(
        None, "look at the validation set every so many steps; None: ten times in all", gt=0
    )
    profile_steps: int = setting(
        0, "trace so many steps, after three, with torch.profiler", ge=0, resume_may_change=True
    )


@section("llama.Evaluation")
class Evaluation:
    """How a model is tested."""

    batch_size: int = setting(64, "examples at a time", gt=0, resume_may_change=True)
    generate: int | None = setting(
        200,
        "test examples that are answered by generation besides; 0: none, None: all",
        ge=0,
        resume_may_change=True,
    )
    max_new_tokens: int = setting(16, "the most tokens of a generated answer", gt=0, resume_may_change=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the Llama experiment is given."""

    run: RunConfig
    data: Data
    model: Model
    lora: Lora
    train: Train
    schedule: ScheduleConfig
    evaluation: Evaluation
    checkpoint: CheckpointConfig
    log: LogConfig

    def check(self) -> None:
        """The rules that span fields.

        Raises:
          ConfigError: the first that is broken.
        """
        check_log(self.log)
        self._check_data()
        self._check_model()
        train, schedule = self.train, self.schedule
        if (train.epochs is None) == (train.steps is None):
            raise ConfigError(
                f"llama.Train.steps = {train.steps} and llama.Train.epochs = {train.epochs}: set one, and "
                "the other to None"
            )
        if train.batch_size % train.accumulate:
            raise ConfigError(
                f"llama.Train.accumulate = {train.accumulate} does not divide llama.Train.batch_size = "
                f"{train.batch_size}"
            )
        if schedule.name == "constant" and (schedule.decay_steps is not None or schedule.final_fraction):
            raise ConfigError(
                "Schedule.decay_steps and Schedule.final_fraction have no effect on a constant schedule"
            )
        if self.checkpoint.metric not in ("val_accuracy", "val_loss"):
            raise ConfigError(
                f"Checkpoint.metric = {self.checkpoint.metric!r}: this experiment has val_accuracy and "
                "val_loss"
            )

    def _check_data(self) -> None:
        data = self.data
        for field in ("{sentence}", "{label}"):
            count = data.template.count(field)
            if count != 1:
                raise ConfigError(f"llama.Data.template has {field} {count} times; it must have it once")
        if not data.template.endswith("{label}"):
            raise ConfigError("llama.Data.template must end with {label}: the answer is what is learnt")
        folded = {text.strip().casefold() for text in data.labels}
        if len(data.labels) != 2 or len(folded) != 2 or "" in folded:
            raise ConfigError(f"llama.Data.labels = {data.labels}: must be two different words")
        if isinstance(data.validation, float) and data.validation >= 1:
            raise ConfigError(f"llama.Data.validation = {data.validation}: a fraction is below 1")

    def _check_model(self) -> None:
        model, lora = self.model, self.lora
        if model.name_or_path is None:
            if model.hidden_size % model.heads or (model.hidden_size // model.heads) % 2:
                raise ConfigError(
                    f"llama.Model.hidden_size = {model.hidden_size} over llama.Model.heads = {model.heads} "
                    "gives no even whole width of a head"
                )
            if model.heads % model.key_value_heads:
                raise ConfigError(
                    f"llama.Model.key_value_heads = {model.key_value_heads} does not divide "
                    f"llama.Model.heads = {model.heads}"
                )
            if self.data.max_length > model.max_positions:
                raise ConfigError(
                    f"llama.Data.max_length = {self.data.max_length} is more than "
                    f"llama.Model.max_positions = {model.max_positions}"
                )
        else:
            sizes = (
                "hidden_size",
                "intermediate_size",
                "layers",
                "heads",
                "key_value_heads",
                "max_positions",
            )
            for name in sizes:
                self._refuse("llama.Model", model, name, "a pretrained model, which has its own")
        if model.attention == "flash_attention_2" and "bfloat16" not in (model.dtype, self.train.precision):
            raise ConfigError(
                'llama.Model.attention = "flash_attention_2" computes in bfloat16; set llama.Train.precision '
                "to it"
            )
        if lora.rank is None:
            for name in ("alpha", "dropout", "bias", "target_modules"):
                self._refuse("llama.Lora", lora, name, "full fine-tuning (llama.Lora.rank = None)")
            if model.dtype == "bfloat16":
                raise ConfigError(
                    'llama.Model.dtype = "bfloat16" would round away small updates of trained weights; full '
                    'fine-tuning takes float32, with llama.Train.precision = "bfloat16" for speed'
                )
        elif lora.bias != "none" and model.dtype == "bfloat16":
            raise ConfigError(
                f'llama.Lora.bias = {lora.bias!r} with llama.Model.dtype = "bfloat16" would round away small '
                "updates of the biases; one of them has to change"
            )

    @staticmethod
    def _refuse(title: str, values: object, name: str, what: str) -> None:
        value = getattr(values, name)
        if value != fields(type(values))[name].default:
            raise ConfigError(f"{title}.{name} = {value!r} has no effect on {what}")


def total_steps(train: Train, steps_per_epoch: int) -> int:
    """Where training ends, in optimiser steps."""
    return train.steps or train.epochs * steps_per_epoch


def evaluate_every(train: Train, total: int) -> int:
    """Optimiser steps between two looks at the validation set."""
    return train.evaluate_every_steps or max(1, math.ceil(total / 10))
