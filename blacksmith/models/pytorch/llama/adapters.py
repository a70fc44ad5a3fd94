"""LoRA adapters in PEFT's own layout. An adapter that does not fit the model is refused; peft accepts it."""

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

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def add_lora(
    model: LlamaForCausalLM,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    bias: Literal["none", "all", "lora_only"] = "none",
    target_modules: Literal["all-linear"] | Sequence[str] = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """Adds low-rank updates to a model's linear layers, in place; they start at zero.

    The update of a layer is ``alpha / rank * B A`` (Hu et al., LoRA, 2021), where A is random and B starts as
    zeros. The global random state is left unchanged.

    Args:
      model: the base model; its own weights are frozen.
      rank: rows of A and columns of B.
      alpha: scales the updates.
      dropout: probability of dropping an input of an update.
      bias: which biases are trained.
      target_modules: names of the layers, such as ``("q_proj", "v_proj")``; ``all-linear``: all but the head.
      seed: decides A.

    Raises:
      ConfigError: the model has no linear layer with such a name, or no biases to train.
    """
    if target_modules != "all-linear":
        target_modules = list(target_modules)
        linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        # peft ignores a name that fits no layer as long as another one fits.
        unknown = [t for t in target_modules if not any(f".{name}".endswith(f".{t}") for name in linear)]
        if unknown or not target_modules:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"llama.Lora.target_modules: no linear layers {unknown}; the model has {', '.join(known)}"
            )
    if bias != "none" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise ConfigError(f'llama.Lora.bias = {bias!r}: the model has no biases; set it to "none"')
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    # peft draws A on the CPU wherever the model is, so this generator is the only one to restore.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `merge` takes care of it
        torch.default_generator.manual_seed(seed % 2**63)
        return peft.get_peft_model(model, settings)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory."""
    model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (Path(directory) / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in


def load_adapter(model: LlamaForCausalLM, directory: Path) -> PeftModel:
    """Adds a saved LoRA adapter to a model, in place, for evaluation.

    Args:
      model: the base model, with the layer sizes that the adapter was made for.
      directory: the adapter in PEFT's layout.

    Raises:
      DataError: the adapter is missing, broken, not LoRA, or does not fit the model.
    """
    settings = read_config(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the base model may lie elsewhere now
            peft_model = peft.get_peft_model(model, settings)
    except Exception as error:
        # Invalid settings fail anywhere in peft: TypeError, re.error, ImportError, ValueError.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{Path(directory) / CONFIG} does not fit the model: {reason}") from error
    load_weights(peft_model, directory)
    return peft_model


def load_weights(model: PeftModel, directory: Path) -> None:
    """Loads the weights of a saved adapter into an adapter with the same settings.

    Raises:
      DataError: they are missing or broken, or belong to other layers or another rank.
    """
    path = Path(directory) / WEIGHTS
    found = read_safetensors(path)
    # peft itself ignores weights it has no place for, and keeps random numbers for those that are missing.
    check_fit(found, peft.get_peft_model_state_dict(model, save_embedding_layers=False), path)
    peft.set_peft_model_state_dict(model, found)


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Checks that the tensors read from `path` have the names and shapes of those in the model.

    Raises:
      DataError: they differ; names the first difference.
    """
    for name in [*sorted(wanted.keys() - found.keys()), *sorted(found.keys() - wanted.keys())]:
        verb = "lacks" if name in wanted else "has"
        raise DataError(f"{path} does not fit the model: it {verb} {name}")
    for name, value in wanted.items():
        shape, needed = tuple(found[name].shape), tuple(value.shape)
        if shape != needed:
            raise DataError(f"{path} does not fit the model: {name} is {shape} instead of {needed}")


def merge(model: PeftModel) -> LlamaForCausalLM:
    """Adds the updates to the layers' own weights, in place, and removes the adapter.

    If the head or the embedding has an update of its own, the two stop sharing their weights, which makes the
    model larger.
    """
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    updated = isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer)
    # Merging writes into the weight itself: while it is shared, the other layer would get the update too.
    if updated and head.weight is embedding.weight:
        getattr(head, "base_layer", head).weight = nn.Parameter(head.weight.detach().clone())
    if head.weight is not embedding.weight:
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name.

    Raises:
      DataError: the file is missing or broken.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def read_config(directory: Path) -> LoraConfig:
    """Returns the settings of a saved LoRA adapter, including the base model that it was trained on.

    Raises:
      DataError: they are missing, broken or not those of a LoRA adapter.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():  # peft would look for it on the hub
        raise DataError(f"{path} is missing: {directory} does not contain an adapter")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # a newer peft has settings that this one skips; weights are checked
            settings = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # peft lets through whatever an unexpected value makes it do
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(settings, LoraConfig):
        raise DataError(f"{path} is not a LoRA adapter but {type(settings).__name__}")
    settings.inference_mode = True
    return settings
