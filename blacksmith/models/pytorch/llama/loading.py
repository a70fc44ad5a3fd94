"""Llama models and tokenizers: an asset, a directory, a GGUF file, a Hugging Face id, or from scratch.

Only safetensors are loaded, never a pickle or code that comes with a model. A GGUF file is converted once.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants, errors
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from blacksmith import assets, files, network
from blacksmith.errors import DataError, first_line
from blacksmith.models.pytorch.llama import checks
from blacksmith.models.pytorch.llama.prefix import causal_model

_TINY = "gin/llama_sst2_tiny.gin needs no download"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_GGUF_HEADER_BYTES = 32 << 20
_SAMPLES = 4096  # numbers of each tensor that go into a fingerprint
# Settings that change what a model computes but neither the names nor the shapes of its weights.
_ARCHITECTURE = ("head_dim", "hidden_act", "rms_norm_eps", "rope_parameters")


def make_model(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    max_positions: int,
    *,
    seed: int = 0,
    dtype: str = "float32",
    attention: str = "sdpa",
) -> LlamaForCausalLM:
    """Returns a model with random weights and tied embeddings; the global random state is left unchanged.

    Raises:
      ConfigError: the implementation of attention is not installed.
    """
    checks.check_attention(attention)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    # `.to` has rounded the rotary frequencies too; transformers keeps them in float32 when it loads a model.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def load_model(
    name_or_path: str, *, dtype: str = "float32", attention: str = "sdpa"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Returns a pretrained model, from an asset, directory, .gguf file or Hugging Face id, and its tokenizer.

    Raises:
      DataError: the model is missing, unreachable, gated, broken, quantized or not a Llama.
      ConfigError: a package that it needs is not installed.
    """
    checks.check_attention(attention)
    path = _locate(name_or_path)
    if path.is_file():
        path = _convert_gguf(name_or_path, path)
    model, tokenizer = _read(name_or_path, path, dtype=getattr(torch, dtype), attn_implementation=attention)
    model.config.use_cache = True
    with checks.one_line_errors(name_or_path), quiet():
        checks.try_out(model, tokenizer)
    model.name_or_path = name_or_path  # recorded in adapters as their base model
    return model, tokenizer


def fingerprint(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns sha256 hashes that identify a base model: `weights`, `architecture` and `tokenizer`.

    Only frozen weights count: a checkpoint contains the trained ones itself. Of each, the hash covers name,
    shape and a few thousand numbers, for speed.
    """
    weights = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            continue
        # A stride that shares a factor with the row length would skip some columns of a matrix entirely.
        stride = -(-weight.numel() // _SAMPLES)
        while math.gcd(stride, weight.shape[-1]) > 1:
            stride += 1
        sample = weight.detach().reshape(-1)[::stride].float().cpu().numpy()
        weights.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    config = causal_model(model).config.to_dict()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["padding"], rules["truncation"]  # state of the latest call

    def digest(values: list) -> str:
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    return {
        "weights": weights.hexdigest(),
        "architecture": digest([config.get(name) for name in _ARCHITECTURE]),
        "tokenizer": digest([rules, tokenizer.bos_token_id, tokenizer.eos_token_id]),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turns off the warnings and progress bars of transformers and huggingface_hub."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _locate(name: str) -> Path:
    """Returns the directory or ``.gguf`` file of a model."""
    models = [asset for asset in assets.ASSETS if assets.path_of(asset).suffix == ".gguf"]
    path = assets.path_of(name) if name in models else Path(os.path.expanduser(name))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if name in models:
        raise DataError(f"{name} is not in the cache; run python -m blacksmith.assets {name}; {_TINY}")
    if _HUB_ID.fullmatch(name) and not path.exists() and path.suffix != ".gguf":
        return _from_hub(name)
    raise DataError(
        f"llama.Model.name_or_path = {name!r} is not an asset ({', '.join(models)}), an existing directory "
        f"or .gguf file, or a Hugging Face id such as meta-llama/Llama-3.2-1B; {_TINY}"
    )


def _from_hub(name: str) -> Path:
    """Returns a hub model's snapshot in the hub's own cache; downloads what is missing."""
    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    options: dict[str, Any] = {"repo_id": name, "allow_patterns": patterns}
    # Cache first: a check for a newer revision would need the network for a model that is already there.
    with contextlib.suppress(OSError, ValueError):
        snapshot = Path(huggingface_hub.snapshot_download(**options, local_files_only=True))
        # The library calls a snapshot complete even if another program fetched only the tokenizer.
        if all(any(snapshot.glob(pattern)) for pattern in ("config.json", "*.safetensors", "tokenizer.*")):
            return snapshot
    reason: str | None = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        reason = network.why_unreachable(constants.ENDPOINT)
    if reason is None:
        try:
            with quiet():
                return Path(huggingface_hub.snapshot_download(**options))
        except (errors.HTTPError, OSError, ValueError) as error:
            reason = first_line(error)
    raise DataError(
        f"{name} is not a path, not complete in the Hugging Face cache, and cannot be downloaded: {reason}; "
        f"if it is gated, accept its license at {constants.ENDPOINT}/{name} and run hf auth login; or use a "
        f"directory, a .gguf file or an asset (python -m blacksmith.assets); {_TINY}"
    )


def _convert_gguf(name: str, path: Path) -> Path:
    """Returns the directory in the cache with a GGUF file's model as safetensors; creates it on first use.

    Reading GGUF takes transformers 20 seconds for 135M weights, safetensors one. Each version may convert
    differently.
    """
    with checks.one_line_errors(name):
        digest = files.file_sha256(path)
    copy = files.cache_dir() / "gguf" / f"{digest[:32]}-transformers-{transformers.__version__}"
    if copy.is_dir():
        return copy
    with open(path, "rb") as file:
        # The scaled rotary positions of Llama 3.1 and later; transformers ignores them without a warning.
        if b"rope_freqs.weight" in file.read(_GGUF_HEADER_BYTES):
            raise DataError(f"{name} has rope_freqs.weight, which is not supported; use safetensors instead")
    print(f"{name}: converting to safetensors, once, in {copy}", file=sys.stderr)
    plain = transformers.GgufConfig(dequantize=True)
    try:
        # transformers draws a progress bar that cannot be turned off.
        with files.atomic_directory(copy) as directory, quiet(), contextlib.redirect_stderr(io.StringIO()):
            model, tokenizer = _read(name, path, dtype=torch.float32, quantization_config=plain)
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        if not copy.is_dir():  # otherwise another process has converted the same file
            raise DataError(
                f"{name}: cannot write {copy}: {first_line(error)}; set BLACKSMITH_CACHE to another directory"
            ) from error
    return copy


def _read(name: str, path: Path, **options: Any) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Reads a model and its tokenizer from a directory or GGUF file, or raises UserError."""
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    directory = path
    if path.is_file():
        directory, where["gguf_file"] = path.parent, path.name
    if (directory / "adapter_config.json").is_file():
        raise DataError(f"{name}: {directory} contains an adapter; move it to a directory of its own")
    if path.is_dir() and not any(path.glob("tokenizer.*")):  # transformers would make an empty tokenizer
        raise DataError(f"{name}: there is no tokenizer in {path}")
    place = name if name == str(path) else f"{name} ({path})"
    with checks.one_line_errors(place), quiet():
        if path.is_dir():
            checks.check_files(path)
            checks.check_counts(path)
        config = transformers.AutoConfig.from_pretrained(directory, **where)
        if config.model_type != "llama":
            raise DataError(f"{name} is a {config.model_type} model; only llama models are supported")
        if getattr(config, "quantization_config", None):
            raise DataError(f"{name} is quantized; use weights that are not, or a .gguf file")
        # Settings of what a model returns, not of what it computes.
        config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
        checks.check_size(config, path)
        tokenizer = AutoTokenizer.from_pretrained(directory, config=config, **where)
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise DataError(f"{name}: the tokenizer has no end token, or no character offsets of its tokens")
        checks.check_rules(tokenizer, place)
        checks.check_tokens(config, tokenizer, name)
        model, info = LlamaForCausalLM.from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            **where,
            **options,
        )
        # transformers only warns about these, and fills what is missing with random numbers.
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                keys = f"{kind.replace('_', ' ')}: {min(map(str, info[kind]))}"
                raise DataError(f"{name}: the weights do not match config.json: {keys}")
        checks.check_generation(model, name)
    return model, tokenizer
