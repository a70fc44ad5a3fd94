"""What is checked of a model before it is used: sizes, names of files, tokens, rules that never end.

`loading` calls these for every model from a file, so that it cannot fail, hang or fill the memory later.
"""

import contextlib
import functools
import json
import os
import reprlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from blacksmith.errors import ConfigError, DataError, UserError, first_line
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch, target_logits

_FLOATS = ("F64", "F32", "F16", "BF16")
_PROBE_SECONDS, _PROBE_BYTES = 60, 4 << 30
# Ordinary text, and the runs of equal characters that make a pattern backtrack.
_PROBE_TEXT = (
    "The film's 2nd half isn't bad: a warm, well-acted story -- naïve, but charming (and 98 minutes).\n\n"
    "Label: positive\n" + "a" * 64 + " " * 64 + "1" * 64 + "." * 64 + "\U0001f600" * 8
)
_PROBE = """
import resource, sys
from tokenizers import Tokenizer
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
Tokenizer.from_str(sys.stdin.read()).encode(sys.argv[2])
"""


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turns any exception of a library into one line: a truncated file can raise every kind."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except ImportError as error:  # sentencepiece for a tokenizer.model
        raise ConfigError(f"{name} needs a package that is not installed: {first_line(error)}") from error
    except BaseException as error:  # a panic in a library written in Rust is no `Exception`
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {reason}") from error


def check_attention(attention: str) -> None:
    """Raises ConfigError if an implementation is not installed; transformers may download code for it."""
    if attention == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available():
        raise ConfigError(
            f'llama.Model.attention = "{attention}" needs the package flash-attn and a GPU; '
            'install it, or set "sdpa"'
        )


def check_files(directory: Path) -> None:
    """Raises DataError for what is not safe to read in the directory of a model or adapter.

    That is a pipe, which would never end; weights that are not floating-point numbers, which the libraries
    would convert as they stand; and an index of weights that names files in other directories.
    """
    for path in sorted(directory.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{path} is not a file")
        if path.suffix == ".safetensors":
            with one_line_errors(str(path)), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if (kind := file.get_slice(name).get_dtype()) not in _FLOATS:
                        raise DataError(f"{path}: {name} has the type {kind}; allowed: {', '.join(_FLOATS)}")
    for index in sorted(directory.glob("*.safetensors.index.json")):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if name != os.path.basename(name) or name in (".", ".."):
                raise DataError(f"{index} names {name[:200]!r}, which is not a file in its directory")


def check_counts(directory: Path) -> None:
    """Raises DataError if making a `config.json` into a configuration would fill the memory."""
    labels = json.loads((directory / "config.json").read_text()).get("num_labels")
    if labels is not None and not (isinstance(labels, int) and 0 <= labels <= 10_000):
        raise DataError(
            f"{directory / 'config.json'}: num_labels = {reprlib.repr(labels)}; allowed: up to 10,000"
        )


def check_size(config: LlamaConfig, path: Path) -> None:
    """Raises DataError if a configuration describes far more weights than its files can hold.

    transformers makes a model as large as `config.json` says before it finds out which weights are missing.
    """
    query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    per_layer = (2 * query + 2 * key + 3 * config.intermediate_size + 2) * config.hidden_size
    described = abs(config.num_hidden_layers * per_layer) + abs(config.vocab_size * config.hidden_size)
    if path.is_file():
        held = 8 * path.stat().st_size  # one bit each
    else:
        held = sum(file.stat().st_size for file in path.glob("*.safetensors"))  # one byte each
    if described > held > 0:
        raise DataError(
            f"{path}: the configuration describes {described:,} weights, the files hold {held:,} at most"
        )


def check_rules(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises DataError if a tokenizer's regular expressions do not end, or its rules let a text explode."""
    failure = _probe(tokenizer.backend_tokenizer.to_str())
    if failure:
        raise DataError(f"{name}: the rules of the tokenizer fail on a short text: {failure}")


@functools.lru_cache(maxsize=8)
def _probe(rules: str) -> str:
    """Why a tokenizer cannot encode a short text, or an empty string.

    In a process of its own: the library cannot be interrupted, and is killed when memory runs out.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, str(_PROBE_BYTES), _PROBE_TEXT],
            input=rules.encode(),
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no result after {_PROBE_SECONDS} seconds"
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        return lines[-1][:300]
    return ""


def check_tokens(config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises DataError if the model has no embedding for the vocabulary, the begin or the end token.

    Tokens that were added to the vocabulary may lack one: they are refused where a text contains them. The
    pad token, which is never looked at, is replaced by the end token.
    """
    rows, added = config.vocab_size, tokenizer.get_added_vocab()
    needed = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        if token is not None:
            needed[token] = tokenizer.convert_tokens_to_ids(token)
    check_embedded(needed, rows, name)
    pads = (tokenizer.pad_token_id, config.pad_token_id)
    beyond = [pad for pad in pads if pad is not None and pad >= rows]
    if beyond:
        print(
            f"{name}: the pad token has the number {beyond[0]}, but the model has embeddings of only {rows} "
            "tokens, from 0; padding with the end token, which changes no result",
            file=sys.stderr,
        )
        tokenizer.pad_token, config.pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id


def check_embedded(tokens: dict[str, int], rows: int, name: str) -> None:
    """Raises DataError for the first of some tokens, by number, that is beyond an embedding of `rows`."""
    beyond = [(number, token) for token, number in tokens.items() if number >= rows]
    if beyond:
        number, token = min(beyond)
        raise DataError(
            f"{name}: the token {reprlib.repr(token)} has the number {number}, but the model has embeddings "
            f"of only {rows} tokens, from 0; use the tokenizer that belongs to the model"
        )


def check_generation(model: LlamaForCausalLM, name: str) -> None:
    """Raises DataError if a token in `generation_config.json` is not a number; an export contains it."""
    own, rows = model.generation_config, model.config.vocab_size
    for what in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(own, what)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and type(number) is not int:
                found = f"generation_config.json: {what} = {reprlib.repr(value)}"
                raise DataError(f"{name}: {found}; needed: a token's number")
    if own.pad_token_id is not None and own.pad_token_id >= rows:
        own.pad_token_id = model.config.pad_token_id


@torch.no_grad()
def try_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Does once what a run does later: encodes, decodes, computes, and writes the files of an export."""
    ids = tokenizer(["A film.", ""], return_offsets_mapping=True)["input_ids"][0]
    tokenizer.decode(ids, skip_special_tokens=True)
    end = torch.tensor([[tokenizer.eos_token_id]])
    if model.config._attn_implementation != "flash_attention_2":  # not on a CPU
        with torch.random.fork_rng(devices=[]):  # attention may have dropout
            target_logits(model.train(), Batch(end[0], end, torch.full_like(end, IGNORED)))
        model.eval()  # as it was
    with tempfile.TemporaryDirectory() as directory:
        for part in (tokenizer, model.config, model.generation_config):
            part.save_pretrained(directory)
