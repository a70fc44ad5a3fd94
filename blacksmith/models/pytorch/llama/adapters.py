"""LoRA adapters in PEFT's own layout. An adapter that does not fit the model is refused; peft accepts it."""

import json
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import peft
import regex
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from blacksmith.errors import ConfigError, DataError, UserError, first_line
from blacksmith.models.pytorch.llama.checks import check_files, one_line_errors

WEIGHTS = "adapter_model.safetensors"

# What an adapter may ask for in `adapter_config.json`. Of the rest, some import a module by name, some change
# the weights of the base model, and some compute something else than an adapter.
_HONORED = (
    *("r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "ensure_weight_tying"),
    "base_model_name_or_path",
)
# What they describe is over once an adapter is trained.
_PAST = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "runtime_config", "megatron_core"),
    "qalora_group_size",
)
# Initial values that are subtracted from the base model: exactly, or differently each time.
_SUBTRACTED, _INEXACT = ("pissa", "olora"), re.compile(r"pissa_|corda|loftq|lora_ga")
_PLAIN = re.compile(r"[\w.-]+")
_MATCH_SECONDS = 1


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
    """Writes ``adapter_config.json`` and `WEIGHTS` into a directory."""
    # peft keeps the names in a set and would write them in hash order, different in each process.
    settings = model.peft_config["default"]
    settings.target_modules = sorted(settings.target_modules)
    model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (Path(directory) / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in


def load_adapter(model: LlamaForCausalLM, directory: Path) -> PeftModel:
    """Adds a saved LoRA adapter to a model, in place, for evaluation; raises DataError if it does not fit."""
    path, weights = (Path(directory) / name for name in ("adapter_config.json", WEIGHTS))
    with one_line_errors(str(directory)):
        check_files(Path(directory))
    found = read_safetensors(weights)
    try:
        settings = _read_settings(path)
        base = "".join(c for c in str(settings.base_model_name_or_path)[:200] if c.isprintable())
        _resolve_patterns(settings, [name for name, _ in model.named_modules()])
        _check_counts(settings, found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the base model may lie elsewhere now
            peft_model = peft.get_peft_model(model, settings)
    except UserError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:
        # Invalid settings fail anywhere in peft: TypeError, ImportError, ValueError.
        reason = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise DataError(f"{path} cannot be read or does not fit the model: {reason}") from error
    print(
        f"adapter: rank {settings.r}, alpha {settings.lora_alpha}, trained on {base}, used with "
        f"{model.name_or_path or 'a model from scratch'}; llama.Lora has no effect on it",
        file=sys.stderr,
    )
    load_weights(peft_model, weights)
    return peft_model


def _read_settings(path: Path) -> LoraConfig:
    """Returns what an `adapter_config.json` says; raises DataError for a setting that is not supported."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise DataError(f"it is not a LoRA adapter but {reprlib.repr(content)}")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and _INEXACT.match(start):
        raise DataError(
            f"init_lora_weights = {reprlib.repr(start)} changes the base model; convert the adapter with "
            "peft's path_initial_model_for_weight_conversion"
        )
    plain = vars(LoraConfig())
    own = {name: value for name, value in content.items() if name in _HONORED}
    rest = {name: value for name, value in content.items() if name not in (*_HONORED, *_PAST)}
    for name, value in rest.items():
        if name in plain and value != plain[name] and value:
            raise DataError(f"{name} = {reprlib.repr(value)} is not supported")
    # Settings of a newer peft, whose defaults are not known here.
    if unknown := sorted(
        ascii(name[:50])[1:-1] for name, value in rest.items() if name not in plain and value
    ):
        print(f"{path}: unknown settings, without effect: {', '.join(unknown[:10])}", file=sys.stderr)
    if start in _SUBTRACTED:
        own["init_lora_weights"] = start
    return LoraConfig(**own, task_type="CAUSAL_LM", inference_mode=True)


def _resolve_patterns(settings: LoraConfig, modules: Sequence[str]) -> None:
    """Replaces regular expressions, which may take forever, by the names of the modules that they match."""
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(settings, field)
        if isinstance(pattern, str) and pattern != "all-linear":
            names = {name for name in modules if _matches(pattern, name)}
            if not names and field == "target_modules":
                raise DataError(f"{field} = {pattern[:200]!r} matches no layer of the model")
            setattr(settings, field, names)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(settings, field)
        if not all(map(_PLAIN.fullmatch, patterns)):
            # The first one counts, as in peft.
            reversed_ = [(rf"(.*\.)?({key})", value) for key, value in patterns.items()][::-1]
            resolved = {n: value for key, value in reversed_ for n in modules if _matches(key, n)}
            setattr(settings, field, resolved)
    for field in ("layers_pattern", "modules_to_save"):
        names = getattr(settings, field) or []
        for name in [names] if isinstance(names, str) else names:
            if not _PLAIN.fullmatch(name):
                raise DataError(f"{field} = {name[:200]!r}; needed: a plain name")


def _matches(pattern: str, name: str) -> bool:
    try:
        return regex.fullmatch(pattern, name, timeout=_MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise DataError(f"the regular expression {pattern[:200]!r} takes too long") from error


def _check_counts(settings: LoraConfig, found: Mapping[str, Tensor]) -> None:
    """Raises DataError if the adapter's sizes are beyond those of its own weights."""
    most = max((size for tensor in found.values() for size in tensor.shape), default=0)
    for rank in (settings.r, *settings.rank_pattern.values()):
        if rank > most:
            raise DataError(f"a rank of {rank} does not fit its weights, of at most {most}")
    indices: Iterable = settings.trainable_token_indices or ()
    for one in indices.values() if isinstance(indices, dict) else [indices]:
        if len(one) > most:
            raise DataError(f"{len(one):,} trainable token indices do not fit its weights, of at most {most}")


def load_weights(model: PeftModel, path: Path) -> None:
    """Loads the `WEIGHTS` of a saved adapter into a similar one; raises DataError if they do not fit."""
    found, own = read_safetensors(path), model.state_dict()
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # peft saves a copy of the base model's embeddings beside an adapter of them.
    for name in found.keys() & own.keys() - wanted.keys():
        if torch.equal(found[name], own[name].to("cpu", found[name].dtype)):
            del found[name]
    # peft itself ignores weights it has no place for, and keeps random numbers for those that are missing.
    check_fit(found, wanted, path)
    peft.set_peft_model_state_dict(model, found)


def merge(model: PeftModel) -> LlamaForCausalLM:
    """Adds the updates to the layers' own weights, in place, and removes the adapter."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    updated = isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer)
    # Merging writes into the weight itself. A weight that head and embedding share would change in both.
    if updated and head.weight is embedding.weight:
        getattr(head, "base_layer", head).weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False  # else peft warns
    merged = model.merge_and_unload()
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    # Only now: a layer that wraps another one may make its weight again each time it is asked for.
    merged.config.tie_word_embeddings = head.weight.data_ptr() == embedding.weight.data_ptr()
    return merged


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
