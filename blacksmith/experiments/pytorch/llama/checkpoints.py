"""The model of a run, and its checkpoints: an adapter in PEFT's layout or all weights, and the optimizer."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blacksmith.errors import CheckpointError, ConfigError
from blacksmith.experiments.pytorch.llama.averages import Averages
from blacksmith.experiments.pytorch.llama.configs import Config
from blacksmith.models.pytorch.llama import adapters, loading, tokens
from blacksmith.models.pytorch.llama.prefix import causal_model, checkpoint_layers
from blacksmith.run.checkpoint import Saved
from blacksmith.run.order import seed_int
from blacksmith.run.run import Run
from blacksmith.trainers.torch_state import load_optimizer_state, optimizer_state, slot_fits

OPTIMIZER = "optimizer.safetensors"
UNAVERAGED = "unaveraged.safetensors"


def build_model(run: Run) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Returns the model, with a new adapter or that of `run.external_weights`, and its tokenizer.

    Raises:
      ConfigError: the model cannot do what the configuration demands.
      DataError: the model or the external adapter is missing or broken.
    """
    config: Config = run.config
    settings, lora = config.model, config.lora
    kind = {"dtype": settings.dtype, "attention": settings.attention}
    if settings.name_or_path is not None:
        model, tokenizer = loading.load_model(settings.name_or_path, **kind)
    else:
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
            **kind,
        )
    longest = model.config.max_position_embeddings
    if config.data.max_length > longest:
        raise ConfigError(
            f"llama.Data.max_length = {config.data.max_length} is more than the model's context, {longest}"
        )
    model.to(run.device)
    if run.external_weights is not None:
        model = adapters.load_adapter(model, run.external_weights)
    elif lora.rank is not None:
        seed = seed_int(config.run.seed, "adapter")
        model = adapters.add_lora(model, **dataclasses.asdict(lora), seed=seed)
    if settings.compile:
        # Not whole layers: each has keys and values of its own, so each would be compiled separately.
        for layer in causal_model(model).model.layers:
            layer.mlp.forward = torch.compile(layer.mlp.forward, dynamic=True)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    return model, tokenizer


def load_model(run: Run) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Returns the trained model, from the run's checkpoint or external weights, and its tokenizer."""
    model, tokenizer = build_model(run)
    if run.resumed is not None:
        load_weights(model, run.resumed, loading.fingerprint(model, tokenizer))
    return model, tokenizer


def load_weights(model: torch.nn.Module, saved: Saved, base: Mapping[str, str]) -> None:
    """Loads a checkpoint's weights (or averages) into a model.

    Raises:
      CheckpointError: the fingerprint of the base model that it was trained on is not `base`, or it lacks its
        weights.
      DataError: the weights do not fit.
    """
    trained_on = saved.value("base", dict[str, str])
    for what, value in base.items():
        if trained_on.get(what) != value:
            raise CheckpointError(
                f"{saved.path} was trained on a base model with different {what} than the one that "
                "llama.Model names; set llama.Model.name_or_path to the model it was trained on"
            )
    if hasattr(model, "get_base_model"):
        adapters.load_weights(model, saved.file(adapters.WEIGHTS))
        return
    tensors: dict[str, Tensor] = {}
    for name in saved.state["sha256"]:  # not what else may be in the directory
        if fnmatch.fnmatch(name, "model*.safetensors"):
            tensors |= adapters.read_safetensors(saved.path / name)
    wanted = model.state_dict()
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    adapters.check_fit(tensors, wanted, saved.path)
    model.load_state_dict(tensors, strict=False)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """What a checkpoint holds, except what the loop itself saves."""

    model: torch.nn.Module
    base: Mapping[str, str]  # the base model's fingerprint
    weights: Mapping[str, Tensor]  # the trained ones
    optimizer: torch.optim.Optimizer
    averages: Averages  # saved in place of the weights, if there are any

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes the files of a checkpoint; returns its JSON values."""
        with self.averages.applied(), loading.quiet():
            if hasattr(self.model, "get_base_model"):
                adapters.save_adapter(self.model, directory)
            else:
                self.model.save_pretrained(directory)
        tensors, numbers = optimizer_state(self.optimizer, self.weights)
        save_file(tensors, directory / OPTIMIZER)
        if self.averages.values:
            save_file(dict(self.weights), directory / UNAVERAGED)
        return {"base": dict(self.base), "optimizer_numbers": numbers}

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Restores all that `save` wrote; raises CheckpointError or DataError if it does not fit."""
        load_weights(self.model, saved, self.base)
        if self.averages.values:
            # The model has the averages now; training resumes from the weights themselves.
            path = saved.file(UNAVERAGED)
            unaveraged = adapters.read_safetensors(path)
            adapters.check_fit(unaveraged, self.weights, path)
            for name, weight in self.weights.items():
                self.averages.values[name].copy_(weight)
                weight.copy_(unaveraged[name])
        tensors = adapters.read_safetensors(saved.file(OPTIMIZER))
        numbers = saved.value("optimizer_numbers", dict[str, bool | int | float])
        load_optimizer_state(self.optimizer, self.weights, tensors, numbers)
        expected: dict[int, Any] = {}  # slots by number of dimensions, on which Adafactor's depend
        for name, weight in self.weights.items():
            slots = self.optimizer.state.get(weight, {})
            fits = all(slot_fits(slot, value, weight) for slot, value in slots.items())
            if slots.keys() != expected.setdefault(weight.dim(), slots.keys()) or not fits:
                raise CheckpointError(f"{saved.path}: the optimizer's state of {name} does not fit")
