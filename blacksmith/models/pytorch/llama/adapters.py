"""LoRA adapters in PEFT's own layout. An adapter that does not fit the model is refused; peft accepts it."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from blacksmith.errors import ConfigError, DataError, first_line


def add_lora(
    model: LlamaForCausalLM,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    bias: Literal["none", "all", "lora_only"] = "none",
    target_modules: Sequence[str] = ("all-linear",),
    seed: int = 0,
) -> PeftModel:
    """Freezes a model and adds updates ``alpha / rank * B A`` to its linear layers (Hu et al., LoRA, 2021).

    B starts as zeros and A random, from `seed`; the global random state is left unchanged. The model is
    changed in place. `target_modules` are names of layers such as ``q_proj``, or all except the head.

    Raises:
      ConfigError: the model has no linear layer with such a name, or no biases to train.
    """
    names: str | list[str] = "all-linear"  # peft takes this one as a plain string
    if tuple(target_modules) != ("all-linear",):
        names = list(target_modules)
        linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        # peft ignores a name that fits no layer as long as another one fits.
        unknown = [n for n in names if not any(f".{layer}".endswith(f".{n}") for layer in linear)]
        if unknown or not names:
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear}))
            raise ConfigError(f"llama.Lora.target_modules: no linear layers {unknown}; the model has {known}")
    if bias != "none" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise ConfigError(f'llama.Lora.bias = {bias!r}: the model has no biases; set it to "none"')
    kind = {"bias": bias, "target_modules": names, "task_type": "CAUSAL_LM"}
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **kind)
    # peft draws A on the CPU wherever the model is, so this generator is the only one to restore.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `merge` takes care of it
        torch.default_generator.manual_seed(seed % 2**63)
        return peft.get_peft_model(model, settings)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory."""
    # peft keeps the names in a set and would write them in hash order, different in each process.
    settings = model.peft_config["default"]
    settings.target_modules = sorted(settings.target_modules)
    model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (Path(directory) / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in


def load_adapter(model: LlamaForCausalLM, directory: Path) -> PeftModel:
    """Adds a saved LoRA adapter to a model, in place, for evaluation; raises DataError if it does not fit."""
    path = Path(directory) / "adapter_config.json"
    try:
        with warnings.catch_warnings():
            # The base model may lie elsewhere now. A newer peft has settings that this one skips; they do not
            # matter if the weights fit.
            warnings.simplefilter("ignore")
            settings = PeftConfig.from_pretrained(str(directory))
            if not isinstance(settings, LoraConfig):
                raise TypeError(f"it is not a LoRA adapter but {type(settings).__name__}")
            settings.inference_mode = True
            base = settings.base_model_name_or_path
            peft_model = peft.get_peft_model(model, settings)
    except Exception as error:
        # Invalid settings fail anywhere in peft: TypeError, re.error, ImportError, ValueError.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path} cannot be read or does not fit the model: {reason}") from error
    print(
        f"adapter: rank {settings.r}, alpha {settings.lora_alpha}, trained on {base}, used with "
        f"{model.name_or_path or 'a model from scratch'}; llama.Lora has no effect on it",
        file=sys.stderr,
    )
    load_weights(peft_model, directory)
    return peft_model


def load_weights(model: PeftModel, directory: Path) -> None:
    """Loads the weights of a saved adapter into a similar one; raises DataError if they do not fit."""
    path = Path(directory) / "adapter_model.safetensors"
    found = read_safetensors(path)
    # peft itself ignores weights it has no place for, and keeps random numbers for those that are missing.
    check_fit(found, peft.get_peft_model_state_dict(model, save_embedding_layers=False), path)
    peft.set_peft_model_state_dict(model, found)


def merge(model: PeftModel) -> LlamaForCausalLM:
    """Adds the updates to the layers' own weights, in place, and removes the adapter."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    updated = isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer)
    # Merging writes into the weight itself. A weight that head and embedding share would change in both.
    if updated and head.weight is embedding.weight:
        getattr(head, "base_layer", head).weight = nn.Parameter(head.weight.detach().clone())
    if head.weight is not embedding.weight:
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name; raises DataError if it is missing or broken."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raises DataError if the tensors read from `path` have other names or shapes than the model's."""
    for name in sorted(found.keys() | wanted.keys()):
        shape, needed = (tuple(of[name].shape) if name in of else "missing" for of in (found, wanted))
        if shape != needed:
            raise DataError(f"{path} does not fit the model: {name} is {shape}, in the model {needed}")
