"""The model of a run, and its checkpoints: an adapter in PEFT's layout or all weights, and the optimiser."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from blacksmith.config.settings import CheckpointConfig
from blacksmith.errors import CheckpointError, ConfigError
from blacksmith.experiments.pytorch.llama.batches import LengthOrder
from blacksmith.experiments.pytorch.llama.configs import Config
from blacksmith.experiments.pytorch.llama.journal import Loop
from blacksmith.experiments.pytorch.llama.optimizer import Averages, load_state, state_tensors
from blacksmith.models.pytorch.llama import adapters, loading, tokens
from blacksmith.models.pytorch.llama.prefix import causal_model, checkpoint_layers
from blacksmith.run.order import seed_words
from blacksmith.run.run import Run

OPTIMIZER = "optimizer.safetensors"
UNAVERAGED = "unaveraged.safetensors"


def build_model(run: Run) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model with its adapter, on the run's device, and its tokenizer.

    The weights are those of the checkpoint or adapter directory that the run starts from, if it does.

    Raises:
      ConfigError: the configuration asks for what the model cannot do.
      DataError: the model is missing or broken.
      CheckpointError: the checkpoint does not fit it.
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
            seed=seed_words(config.run.seed, "weights"),
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
    if run.foreign is not None:
        lora = adapters.read_config(run.foreign)
        made_on, here = lora.base_model_name_or_path, settings.name_or_path or "a model from scratch"
        print(
            f"adapter: rank {lora.r}, alpha {lora.lora_alpha}, made on {made_on}"
            + ("" if made_on == settings.name_or_path else f", here on {here}")
            + "; llama.Lora has no effect on it",
            file=sys.stderr,
        )
        model = adapters.load_adapter(model, run.foreign)
    elif config.lora.rank is not None:
        lora = config.lora
        model = adapters.add_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            bias=lora.bias,
            target_modules="all-linear" if lora.target_modules == ("all-linear",) else lora.target_modules,
            seed=seed_words(config.run.seed, "adapter"),
        )
    if run.resumed is not None:
        check_base(run, loading.fingerprint(model, tokenizer))
        load_weights(model, run.resumed.path)
    if settings.compile:
        # Not whole layers: each has keys and values of its own, and would be compiled anew.
        for layer in causal_model(model).model.layers:
            layer.mlp.forward = torch.compile(layer.mlp.forward, dynamic=True)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    return model, tokenizer


def check_base(run: Run, found: dict[str, str]) -> None:
    """Checks that a checkpoint's base model is the one that was loaded now.

    Raises:
      CheckpointError: it is another, or its files have changed.
    """
    for what, value in run.resumed.state["loop"]["base"].items():
        if found[what] != value:
            other = "other" if what == "weights" else "another"
            raise CheckpointError(
                f"{run.resumed.path} was trained on a base model of {other} {what} than "
                f"llama.Model.name_or_path = {run.config.model.name_or_path!r} has now; name that one"
            )


def due(settings: CheckpointConfig, step: int, order: LengthOrder) -> bool:
    """Whether a checkpoint is to be written after so many steps."""
    epoch, cursor = order.position(step)
    by_steps = settings.every_steps is not None and step % settings.every_steps == 0
    by_epochs = settings.every_epochs is not None and cursor == 0 and epoch % settings.every_epochs == 0
    return step > 0 and (by_steps or by_epochs)


def save(
    run: Run,
    model: torch.nn.Module,
    base: dict[str, str],
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    averages: Averages,
    loop: Loop,
    epoch: float,
) -> None:
    """Writes a checkpoint of the present state; `base` is the base model's fingerprint."""
    tensors, numbers = state_tensors(optimizer, {weight: name for name, weight in weights.items()})

    def write(directory: Path) -> None:
        with averages.applied():
            if run.config.lora.rank is None:
                with loading.quiet():
                    causal_model(model).save_pretrained(directory)
            else:
                adapters.save_adapter(model, directory)
        save_file(tensors, directory / OPTIMIZER)
        if averages.values:
            save_file(dict(weights), directory / UNAVERAGED)

    state = {**dataclasses.asdict(loop), "optimizer_numbers": numbers, "epoch": epoch, "base": base}
    # Metrics of older weights would make this checkpoint look as good as they were.
    current = loop.validation if loop.validated_at == loop.step > 0 else {}
    run.save_checkpoint(loop.step, state, write, current)


def resume(
    run: Run, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], averages: Averages
) -> Loop:
    """Where the run stands; if it goes on from a checkpoint, puts the optimiser's state back.

    The checkpoint's weights are in the model already. If they are averages, those that were averaged take
    their place.

    Raises:
      CheckpointError: the optimiser's state does not fit.
      DataError: a file cannot be read, or the weights in it do not fit.
    """
    if run.resumed is None:
        return Loop()
    state = dict(run.resumed.state["loop"])
    numbers = state.pop("optimizer_numbers")
    state.pop("epoch")
    state.pop("base")
    tensors = adapters.read_safetensors(run.resumed.path / OPTIMIZER)
    if averages.values:
        path = run.resumed.path / UNAVERAGED
        unaveraged = adapters.read_safetensors(path)
        adapters.check_fit(unaveraged, weights, path)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(unaveraged[name])
    load_state(optimizer, {weight: name for name, weight in weights.items()}, tensors, numbers)
    loop = Loop(**state)
    if not run.goes_on:
        # The best checkpoint so far stays where it is: here the search for one starts anew.
        loop.best, loop.best_step = None, -1
    return loop


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
