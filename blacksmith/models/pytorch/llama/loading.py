"""Llama models and their tokenizers: an asset, a directory, a GGUF file, the hub's, or from scratch."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants, errors
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from blacksmith import assets, files
from blacksmith.errors import ConfigError, DataError
from blacksmith.models.pytorch.llama.prefix import causal_model

TINY = "gin/llama_sst2_tiny.gin needs no download"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_GGUF_HEADER_BYTES = 32 << 20
_FILES = ("*.json", "*.safetensors", "tokenizer.model")
_CONVERTER = f"transformers-{transformers.__version__}"  # what makes safetensors of a GGUF file
_STALE_SECONDS = 24 * 3600
_SAMPLES = 4096  # numbers of a tensor that go into a fingerprint
_ARCHITECTURE = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)
_PROBE = (
    "Review: It isn't a naïve film, of 1999 -- 'twas 2h 45min of well-meant , unfunny mess ...\n\n"
    "Sentiment: negative positive\tgreat terrible 0 1 yes no\r\n  (C’était émouvant) 😀 日本 <b>x</b> a_b {}"
)

Attention = Literal["sdpa", "eager", "flash_attention_2"]


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
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Attention = "sdpa",
) -> LlamaForCausalLM:
    """A model from scratch, with tied embeddings; the global random state stays as it was.

    Args:
      vocab_size: tokens.
      hidden_size: width.
      intermediate_size: width within the MLP.
      layers: decoder layers.
      heads: attention heads.
      key_value_heads: heads of keys and values.
      max_positions: longest context, in tokens.
      seed: of the weights.
      dtype: of the weights.
      attention: its implementation.
    """
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
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]), _clear(attention):
        torch.default_generator.manual_seed(seed % 2**63)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies stay float32
    return model


def load_model(
    name_or_path: str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Attention = "sdpa",
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A pretrained model and its tokenizer.

    Args:
      name_or_path: an asset, a directory, a ``.gguf`` file, or an id of the Hugging Face hub, which is looked
        up in its cache and then fetched.
      dtype: of the weights.
      attention: its implementation.

    Raises:
      DataError: it is missing, out of reach, gated, broken, or no Llama.
      ConfigError: the attention is not installed.
    """
    directory, config, options = _find(name_or_path)
    tokenizer = _tokenizer(name_or_path, directory, config=config, **options)
    with _clear(attention):
        model = _weights(
            name_or_path,
            directory,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            **options,
        )
    rows = model.get_input_embeddings().num_embeddings
    # Without tokens that were added by name: some are there only to be complete.
    if tokenizer.vocab_size > rows or tokenizer.eos_token_id >= rows:
        raise DataError(f"{name_or_path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}")
    model.config.use_cache = True
    model.name_or_path = name_or_path
    return model, tokenizer


def fingerprint(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What tells one base model from another, wherever its files lie: hashes of its weights, architecture and
    tokenizer.

    Of the weights, those that are not trained count, each with its name, its shape and up to 4,096 numbers
    spread over it; of the tokenizer, its vocabulary, the tokens of a text and those that begin and end one. A
    fraction of a second, for a model of any size.

    Args:
      model: with the adapter that is trained, if there is one.
      tokenizer: of the model.
    """
    weights = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad:
            numbers, stride = weight.detach().reshape(-1), -(-weight.numel() // _SAMPLES)
            while math.gcd(stride, weight.shape[-1]) > 1:
                stride += 1  # else some columns of a matrix would never be looked at
            some = numbers[::stride].float().cpu().numpy()
            weights.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    settings = causal_model(model).config.to_dict()
    architecture = json.dumps([settings.get(name) for name in _ARCHITECTURE], sort_keys=True)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    tokens = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE).input_ids, special])
    return {
        "weights": weights.hexdigest(),
        "architecture": hashlib.sha256(architecture.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(),
    }


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model; see `load_model`."""
    directory, config, options = _find(name_or_path)
    return _tokenizer(name_or_path, directory, config=config, **options)


def _weights(name: str, directory: Path, **options: Any) -> LlamaForCausalLM:
    """A directory's model, or with `gguf_file` that of a file in it, all of its weights there and no others.

    Raises:
      DataError: it cannot be read, or config and weights do not belong together.
    """
    quantised = "gguf_file" in options
    # Reading a GGUF file draws a bar that has no switch.
    hidden = contextlib.redirect_stderr(io.StringIO()) if quantised else contextlib.nullcontext()
    with _broken(name, directory), quiet(), hidden:
        model, info = LlamaForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **options,
            **({} if quantised else {"use_safetensors": True}),
        )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise DataError(
                f"{name}: the weights are not those of its config: {kind.replace('_', ' ')}, such as {first}"
            )
    if quantised:
        # The weights are plain numbers now, and are to be saved as such.
        for owner, attribute in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "is_quantized"),
        ):
            with contextlib.suppress(AttributeError):
                delattr(owner, attribute)
    return model


def _tokenizer(name: str, directory: Path, **options: Any) -> PreTrainedTokenizerBase:
    if not _has_tokenizer(directory) and "gguf_file" not in options:
        raise DataError(f"{name}: there is no tokenizer.json in {directory}{_cure(name, directory)}")
    with _broken(name, directory), quiet():
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise DataError(
            f"{name}: the tokenizer has no end token, or does not know the characters of its tokens"
        )
    return tokenizer


def _find(name: str) -> tuple[Path, LlamaConfig, dict[str, str]]:
    """The directory that holds a model, its sizes, and what `from_pretrained` has to be told besides.

    Raises:
      DataError: it is nowhere, no Llama, or one that would not be loaded as it is.
    """
    if name in _models():
        path = assets.path_of(name)
        if not path.exists():
            raise DataError(f"{name} is not in the cache; run python -m blacksmith.assets {name}; {TINY}")
    else:
        path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise DataError(f"{name} is a file but no .gguf; name the directory that holds config.json")
        return _from_gguf(name, path)
    if path.suffix == ".gguf" or (path.is_absolute() and not path.exists()):
        raise DataError(f"{name}: no such file or directory")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{name}: there is no config.json in the directory")
    elif _HUB_ID.fullmatch(name) and not name.startswith("."):
        path = _fetch(name)
    else:
        raise DataError(
            f"llama.Model.name_or_path = {name!r} is no asset ({', '.join(_models())}), directory, .gguf "
            f"file or hub id such as meta-llama/Llama-3.2-1B; {TINY}"
        )
    _check_no_adapter(name, path)
    with _broken(name), quiet():
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    _check_llama(name, config)
    if getattr(config, "quantization_config", None):
        raise DataError(f"{name} is quantised by its config.json; take weights that are not, or a .gguf file")
    return path, config, {}


def _from_gguf(name: str, path: Path) -> tuple[Path, LlamaConfig, dict[str, str]]:
    """What `_find` gives for a GGUF file: a copy as safetensors in the cache, which is made on the first use.

    transformers parses a GGUF file three times over in Python, a quarter of a minute for 135M weights, and
    has plain float32 numbers then. From safetensors the same model is there in a second. The copy lies under
    the file's hash and the version of what converts it. Where it cannot be written, that is said and the
    file itself is loaded.

    Raises:
      DataError: the file is broken, no Llama, or one that would not be loaded as it is.
    """
    _check_no_adapter(name, path.parent)
    with _broken(name), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept = files.cache_dir() / "gguf" / f"{digest[:32]}-{_CONVERTER}"
    if not kept.is_dir():
        with _broken(name), quiet():
            _check_rope(path)
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        _check_llama(name, config)
        print(f"{name}: reading it takes a moment; the next time it comes from {kept}", file=sys.stderr)
        if not _keep(name, path, config, kept):
            return path.parent, config, {"gguf_file": path.name}
    with _broken(name, kept), quiet():
        return kept, AutoConfig.from_pretrained(kept, local_files_only=True), {}


def _keep(name: str, path: Path, config: LlamaConfig, kept: Path) -> bool:
    """Writes a GGUF file's model as safetensors into a directory of the cache; says why where it cannot be.

    Raises:
      DataError: the file is broken.
    """
    tokenizer = _tokenizer(name, path.parent, config=config, gguf_file=path.name)
    model = _weights(name, path.parent, config=config, gguf_file=path.name, dtype=torch.float32)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        for left in kept.parent.glob(".tmp-*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=kept.parent, ignore_cleanup_errors=True) as made:
            whole = Path(made) / kept.name
            with quiet():
                model.save_pretrained(whole)
                tokenizer.save_pretrained(whole)
            for file in whole.iterdir():
                shutil.copymode(whole / "config.json", file)  # safetensors makes its files private
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            whole.rename(kept)
    except (OSError, SafetensorError) as error:
        if not kept.is_dir():  # else another process was faster
            print(f"warning: {name} is not kept in the cache: {_first_line(error)}", file=sys.stderr)
            return False
    return True


def _check_no_adapter(name: str, directory: Path) -> None:
    """Refuses a directory whose model would come with an adapter.

    Raises:
      DataError: there is one.
    """
    if (directory / "adapter_config.json").is_file():
        raise DataError(
            f"{name}: the adapter_config.json in {directory} would make its adapter part of the model; move "
            "the adapter to a directory of its own"
        )


def _check_llama(name: str, config: PretrainedConfig) -> None:
    """Refuses models of another kind.

    Raises:
      DataError: it is one.
    """
    if config.model_type != "llama":
        raise DataError(f"{name} is a {config.model_type} model; this experiment fine-tunes llama models")


def _check_rope(path: Path) -> None:
    """Refuses a GGUF file of Llama 3.1 and later, whose scaled positions transformers does not read.

    Raises:
      DataError: it has `rope_freqs.weight`.
    """
    with open(path, "rb") as file:
        # The table of tensors follows the tokenizer's few megabytes; gguf's own reader takes seconds.
        if b"rope_freqs.weight" in file.read(_GGUF_HEADER_BYTES):
            raise DataError(
                f"{path} has rope_freqs.weight, which transformers leaves out of what it loads; take the "
                "model's directory or hub id with safetensors instead"
            )


def _models() -> list[str]:
    return [
        name for name, asset in assets.ASSETS.items() if any(f.name.endswith(".gguf") for f in asset.files)
    ]


def _fetch(name: str) -> Path:
    """The snapshot of a hub's model in the hub's own cache, fetched if need be."""
    options = {"repo_id": name, "allow_patterns": list(_FILES)}
    with contextlib.suppress(OSError):
        path = Path(huggingface_hub.snapshot_download(**options, local_files_only=True))
        if _is_whole(path):
            return path
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{name} is not whole in the Hugging Face cache and HF_HUB_OFFLINE is set; {TINY}")
    if why := assets.why_unreachable(constants.ENDPOINT):
        raise DataError(
            f"{name} is neither a path nor whole in the Hugging Face cache, and the hub is out of reach "
            f"({why}); name a directory, or run python -m blacksmith.assets {_models()[0]} and name that; "
            f"{TINY}"
        )
    try:
        with quiet():
            return Path(huggingface_hub.snapshot_download(**options))
    except errors.GatedRepoError as error:
        raise DataError(
            f"{name} is gated: accept its licence at {constants.ENDPOINT}/{name}, then run hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"the Hugging Face hub has no model {name}, or it is private: hf auth login"
        ) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = _first_line(error) or type(error).__name__
        raise DataError(f"{name} cannot be fetched: {reason}") from error


def _is_whole(path: Path) -> bool:
    """Whether a snapshot has config, weights and tokenizer; other programs fetch single files of a model."""
    index = path / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.is_file():
        try:
            weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
    return _has_tokenizer(path) and all((path / name).is_file() for name in {"config.json", *weights})


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


@contextlib.contextmanager
def _broken(name: str, directory: Path | None = None) -> Iterator[None]:
    """Turns what goes wrong when files are read, of a directory if one is given, into one line."""
    try:
        yield
    except (ConfigError, DataError, ImportError, MemoryError):
        raise
    except Exception as error:
        # Libraries raise all sorts for a truncated file: SafetensorError, ValueError, IndexError, OSError.
        raise DataError(
            f"{name} cannot be read: {type(error).__name__}: {_first_line(error)}{_cure(name, directory)}"
        ) from error


def _cure(name: str, directory: Path | None) -> str:
    """What helps where files of ours are broken; nothing for the user's."""
    if directory is not None and directory.parent == files.cache_dir() / "gguf":
        return f"; delete {directory}, a copy, and run the same command again"
    return f"; run python -m blacksmith.assets {name} again" if name in assets.ASSETS else ""


@contextlib.contextmanager
def _clear(attention: str) -> Iterator[None]:
    """Says which package an attention implementation needs."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"llama.Model.attention = {attention!r}: {_first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, the hub's neither; errors alone are told."""
    level = logging.get_verbosity()
    # Where the user's variable has decided, the hub's library warns of an attempt to overrule it.
    bars = logging.is_progress_bar_enabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."
