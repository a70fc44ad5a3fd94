"""LoRA adapters by peft, in and out of PEFT's own layout, with what peft lets pass checked."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from blacksmith.errors import ConfigError, DataError

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
    """Puts low-rank updates into a model's linear layers, in place; at first they add nothing.

    The update of a layer is ``alpha / rank * B A`` (Hu et al., LoRA, 2021), where A is drawn from `seed` and
    B begins as zeros. The global random state stays as it was.

    Args:
      model: its own weights are no longer trained.
      rank: rows of A and columns of B.
      alpha: scales the updates.
      dropout: of the updates' inputs.
      bias: which biases are trained.
      target_modules: names of the layers, such as ``("q_proj", "v_proj")``; ``all-linear``: all but the head.
      seed: of A.

    Raises:
      ConfigError: the model has no linear layer of such a name.
    """
    if target_modules != "all-linear":
        target_modules = list(target_modules)
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        unknown = [
            target for target in target_modules if not any(f".{n}".endswith(f".{target}") for n in linear)
        ]
        if unknown or not target_modules:
            raise ConfigError(
                f"the model has no linear layers {', '.join(unknown) or 'of no name'}; it has "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
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
    # A is drawn on the CPU wherever the model is, so no other generator is touched.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # see `merge`
        torch.default_generator.manual_seed(seed % 2**63)
        return get_peft_model(model, settings)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory."""
    model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (Path(directory) / "README.md").unlink(missing_ok=True)  # a model card to be filled in


def load_adapter(model: LlamaForCausalLM, directory: Path) -> PeftModel:
    """Puts a saved LoRA adapter into a model, in place, for evaluation.

    Args:
      model: of the sizes that the adapter was made for.
      directory: in PEFT's layout.

    Raises:
      DataError: the adapter is missing, broken, of another kind, or does not fit the model.
    """
    settings = read_config(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the base model is in another place now, too
            peft_model = get_peft_model(model, settings)
    except Exception as error:
        # Nonsense in a configuration fails anywhere in peft: TypeError, re.error, ImportError, ValueError.
        raise DataError(
            f"{Path(directory) / CONFIG} does not fit the model: {type(error).__name__}: {_one_line(error)}"
        ) from error
    load_weights(peft_model, directory)
    return peft_model


def load_weights(model: PeftModel, directory: Path) -> None:
    """Puts the weights of a saved adapter into an adapter of the same kind.

    Raises:
      DataError: they are missing, broken, or not those of this adapter: other layers or another rank.
    """
    path = Path(directory) / WEIGHTS
    found = read_safetensors(path)
    # peft itself leaves out what it does not know and starts anew what is missing.
    check_fit(found, get_peft_model_state_dict(model, save_embedding_layers=False), path)
    set_peft_model_state_dict(model, found)


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Checks that the tensors read from a path have the names and shapes of those that are wanted.

    Raises:
      DataError: they have not; names the first that differs.
    """
    for name in [*sorted(wanted.keys() - found.keys()), *sorted(found.keys() - wanted.keys())]:
        lacks = "lacks" if name in wanted else "has"
        raise DataError(f"{path} does not fit the model: it {lacks} {name}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise DataError(
                f"{path} does not fit the model: {name} is {tuple(found[name].shape)} instead of "
                f"{tuple(value.shape)}"
            )


def merge(model: PeftModel) -> LlamaForCausalLM:
    """Adds the updates to the layers' own weights, in place, and takes the adapter away.

    A head or embedding with an update of its own stops sharing its weights with the other one, which would
    get that update too; the model is larger then.
    """
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    updated = isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer)
    if updated and head.weight is embedding.weight:
        getattr(head, "base_layer", head).weight = nn.Parameter(head.weight.detach().clone())
    if head.weight is not embedding.weight:
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
      DataError: it is missing or broken.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is broken: {_one_line(error)}") from error


def read_config(directory: Path) -> LoraConfig:
    """What a saved LoRA adapter says about itself, the base model that it was made on among it.

    Raises:
      DataError: it is missing, broken or of another kind.
    """
    path = Path(directory) / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {directory} is no adapter") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is broken: {_one_line(error)}") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise DataError(f"{path}: peft_type is {kind!r}; only LORA adapters are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that a newer peft has; what matters is checked
            settings = LoraConfig.from_pretrained(directory)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is broken: {_one_line(error)}") from error
    settings.inference_mode = True
    return settings


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
