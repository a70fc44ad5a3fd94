"""The model of a run, and its checkpoints: an adapter in PEFT's layout or all weights, and the optimiser."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from blacksmith.errors import CheckpointError, ConfigError
from blacksmith.experiments.pytorch.llama.averages import Averages
from blacksmith.experiments.pytorch.llama.configs import Config
from blacksmith.models.pytorch.llama import adapters, loading, tokens
from blacksmith.models.pytorch.llama.prefix import causal_model, checkpoint_layers
from blacksmith.run.checkpoint import Saved
from blacksmith.run.order import seed_int
from blacksmith.run.run import Run
from blacksmith.trainers.torch_state import load_optimizer_state, optimizer_state

OPTIMIZER = "optimizer.safetensors"
UNAVERAGED = "unaveraged.safetensors"


def build_model(run: Run) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model with a new adapter or that of `run.external_weights`, on the run's device, and its tokenizer.

    Raises:
      ConfigError: the configuration asks for what the model cannot do.
      DataError: the model is missing or broken.
    """
    config: Config = run.config
    settings = config.model
    if settings.name_or_path is None:
        tokenizer = tokens.byte_tokenizer()
        model = loading.make_model(
            len(tokenizer),
            settings.hidden_size,
            settings.intermediate_size,
            settings.layers,
            settings.heads,
            settings.key_value_heads,
            settings.max_positions,
            seed=seed_int(config.run.seed, "weights"),
            dtype=settings.dtype,
            attention=settings.attention,
        )
    else:
        model, tokenizer = loading.load_model(
            settings.name_or_path, dtype=settings.dtype, attention=settings.attention
        )
    longest = model.config.max_position_embeddings
    if config.data.max_length > longest:
        raise ConfigError(
            f"llama.Data.max_length = {config.data.max_length} is more than the {longest} tokens of the "
            "model's context"
        )
    model.to(run.device)
    if settings.attention == "flash_attention_2" and torch.device(run.device).type != "cuda":
        raise ConfigError(f'llama.Model.attention = "flash_attention_2" needs a GPU, not {run.device}')
    if run.external_weights is not None:
        lora = adapters.read_config(run.external_weights)
        made_on, here = lora.base_model_name_or_path, settings.name_or_path or "a model from scratch"
        print(
            f"adapter: rank {lora.r}, alpha {lora.lora_alpha}, made on {made_on}"
            + ("" if made_on == settings.name_or_path else f", here on {here}")
            + "; llama.Lora has no effect on it",
            file=sys.stderr,
        )
        model = adapters.load_adapter(model, run.external_weights)
    elif config.lora.rank is not None:
        lora = config.lora
        model = adapters.add_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            bias=lora.bias,
            target_modules="all-linear" if lora.target_modules == ("all-linear",) else lora.target_modules,
            seed=seed_int(config.run.seed, "adapter"),
        )
    if settings.compile:
        # Not whole layers: each has keys and values of its own, and would be compiled anew.
        for layer in causal_model(model).model.layers:
            layer.mlp.forward = torch.compile(layer.mlp.forward, dynamic=True)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    return model, tokenizer


def load_model(run: Run) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The trained model, from the run's checkpoint or external weights, and its tokenizer.

    Raises:
      ConfigError: the configuration asks for what the model cannot do.
      DataError: the model is missing or broken.
      CheckpointError: the checkpoint does not fit it.
    """
    model, tokenizer = build_model(run)
    if run.resumed is not None:
        check_base(run.resumed, loading.fingerprint(model, tokenizer))
        load_weights(model, run.resumed.path)
    return model, tokenizer


def check_base(saved: Saved, found: Mapping[str, str]) -> None:
    """Checks that the base model that was loaded is the one that a checkpoint was trained on.

    Raises:
      CheckpointError: it is a different one, or its files have changed.
    """
    for what, value in saved.own["base"].items():
        if found[what] != value:
            raise CheckpointError(
                f"{saved.path} was trained on a base model with different {what} than the one that "
                "llama.Model names; set llama.Model.name_or_path to the model it was trained on"
            )


@dataclass(frozen=True, eq=False)
class TrainState:
    """What a checkpoint holds: weights (or their averages) and optimizer.

    Attributes:
      model: with its adapter, if it has one.
      base: the base model's fingerprint.
      weights: the trained ones by name.
      optimizer: over the weights.
      averages: of the weights.
    """

    model: torch.nn.Module
    base: Mapping[str, str]
    weights: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    averages: Averages

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes the files of a checkpoint; returns its JSON values."""
        with self.averages.applied():
            if hasattr(self.model, "get_base_model"):
                adapters.save_adapter(self.model, directory)
            else:
                with loading.quiet():
                    causal_model(self.model).save_pretrained(directory)
        tensors, numbers = optimizer_state(self.optimizer, self.weights)
        save_file(tensors, directory / OPTIMIZER)
        if self.averages.values:
            save_file(dict(self.weights), directory / UNAVERAGED)
        return {"base": dict(self.base), "optimizer_numbers": numbers}

    def load_weights(self, saved: Saved) -> None:
        """Puts a checkpoint's weights (or averages) into the model.

        Raises:
          CheckpointError: they cannot be read or do not fit.
        """
        load_weights(self.model, saved.path)

    def restore(self, saved: Saved) -> None:
        """Restores all that `save` wrote.

        Raises:
          CheckpointError: the base model or the optimizer's state does not fit.
          DataError: a file cannot be read, or the weights in it do not fit.
        """
        check_base(saved, self.base)
        self.load_weights(saved)
        tensors = adapters.read_safetensors(saved.path / OPTIMIZER)
        if self.averages.values:
            # The model has the averages now; training resumes from the weights themselves.
            path = saved.path / UNAVERAGED
            unaveraged = adapters.read_safetensors(path)
            adapters.check_fit(unaveraged, self.weights, path)
            with torch.no_grad():
                for name, weight in self.weights.items():
                    self.averages.values[name].copy_(weight)
                    weight.copy_(unaveraged[name])
        load_optimizer_state(self.optimizer, self.weights, tensors, saved.own["optimizer_numbers"])


def load_weights(model: torch.nn.Module, directory: Path) -> None:
    """Puts a checkpoint's weights into a model of the same kind.

    Raises:
      CheckpointError: they cannot be read or do not fit.
    """
    if hasattr(model, "get_base_model"):
        adapters.load_weights(model, directory)
    else:
        _load_whole(causal_model(model), directory)


def _load_whole(model: LlamaForCausalLM, directory: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        tensors |= adapters.read_safetensors(file)
    wanted = model.state_dict()
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    adapters.check_fit(tensors, wanted, directory)
    model.load_state_dict(tensors, strict=False)
