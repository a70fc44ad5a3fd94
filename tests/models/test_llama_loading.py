"""Models and tokenizers from every kind of source, and the errors of broken ones."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llama import BYTES, small
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from blacksmith import assets, network
from blacksmith.errors import DataError
from blacksmith.models.pytorch.llama import adapters, loading
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

TOKENS = torch.tensor([[5, 80, 7, 200, 3, 9]])
MERGED = BYTES + 1  # a GGUF tokenizer needs at least one merge


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def error_of(name) -> str:
    """The one-line message with which a model is refused."""
    with pytest.raises(DataError) as caught:
        loading.load_model(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.fixture
def gguf_file(tmp_path, monkeypatch) -> Path:
    """A GGUF file, and an empty cache in `tmp_path / "cache"`."""
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)
    return path


# --- from scratch ---


def test_the_seed_alone_decides_the_weights():
    state = torch.random.get_rng_state()
    first, second, other = small(), small(), small(seed=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(one, two), name
        assert "norm" in name or not torch.equal(one, three), name


def test_sizes_dtype_and_attention_are_as_requested():
    model = small(dtype="bfloat16", attention="eager")
    config, tokenizer = model.config, byte_tokenizer()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert config._attn_implementation == "eager"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.max_position_embeddings == 64
    assert model.lm_head.weight is model.model.embed_tokens.weight
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special


def test_bfloat16_leaves_the_rotary_frequencies_exact():
    assert torch.equal(small(dtype="bfloat16").model.rotary_emb.inv_freq, small().model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "text", ["", " a  b \n\n\tc .", "naïve – 😀 \u202e", "\x00\x01\x7f", "x" * 3000, "' s n't ,", "ÿþ"]
)
def test_the_byte_tokenizer_is_lossless(text, tmp_path):
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(text)["input_ids"] == tokens
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (0, 1, 2)


# --- directories ---


def test_a_directory_loads_as_transformers_loads_it(directory):
    model, tokenizer = loading.load_model(str(directory))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(directory)))
    assert torch.equal(logits(model), logits(small()))
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert model.name_or_path == str(directory)


def test_a_directory_loads_in_bfloat16_with_eager_attention(directory):
    model, _ = loading.load_model(str(directory), dtype="bfloat16", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    # bfloat16 has 8 bits of precision; the logits are below 1.
    assert (logits(model) - logits(small())).abs().amax() < 0.05


def change_config(**values):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_weights(change):
    def changed(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    return changed


def cut(name, part=0.5):
    def change(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * part)])

    return change


def without(name):
    return lambda directory: (directory / name).unlink()


def pickle_only(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def with_code(directory):
    change_config(model_type="own", auto_map={"AutoConfig": "own.Config"})(directory)
    (directory / "own.py").write_text(f"open({str(directory / 'executed')!r}, 'w')")


def with_adapter(directory):
    adapters.save_adapter(adapters.add_lora(small(), rank=2, alpha=2.0), directory)


def with_few_rows(directory):
    small(100).save_pretrained(directory)


NORM = "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
BROKEN = {
    "no config": (without("config.json"), ["cannot be read", "config.json"]),
    "truncated config": (cut("config.json"), ["cannot be read"]),
    "not a llama": (change_config(model_type="gpt2"), ["gpt2", "llama"]),
    "code of its own": (with_code, ["custom code"]),
    "no weights": (without("model.safetensors"), ["cannot be read", "model.safetensors"]),
    "truncated weights": (cut("model.safetensors"), ["cannot be read"]),
    "pickle only": (pickle_only, ["cannot be read", "model.safetensors"]),
    "missing weight": (change_weights(lambda w: w.pop(NORM)), [f"missing keys: {NORM}"]),
    "wrong shape": (change_weights(lambda w: w.update({NORM: torch.ones(7)})), ["mismatched", NORM, "7"]),
    "extra weight": (
        change_weights(lambda w: w.update({BIAS: torch.ones(32)})),
        [f"unexpected keys: {BIAS}"],
    ),
    "quantized": (change_config(quantization_config={"quant_method": "fp8"}), ["is quantized"]),
    "with an adapter": (with_adapter, ["contains an adapter"]),
    "no tokenizer": (without("tokenizer.json"), ["there is no tokenizer"]),
    "truncated tokenizer": (cut("tokenizer.json"), ["cannot be read"]),
    "large tokenizer": (with_few_rows, ["has the number 100, but the model"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_in_one_line(directory, case):
    change, words = BROKEN[case]
    change(directory)
    message = error_of(directory)
    assert all(word in message for word in [str(directory), *words]), message
    assert not (directory / "executed").exists()


# --- GGUF ---


def write_gguf(path: Path, more: dict[str, np.ndarray] | None = None) -> None:
    """Writes `small(MERGED)` as GGUF with float32 weights, and more tensors if given."""
    model, tokenizer = small(MERGED), byte_tokenizer()
    config, weights = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "Ġa"])
    writer.add_token_types([3, 3, 3] + [1] * (len(tokenizer) - 2))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    # llama.cpp rotates neighboring rows of a head together, transformers rows of its two halves.
    paired = lambda w, heads: w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)  # noqa: E731
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for name, short in names.items():
            value = weights[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            value = value if heads is None else paired(value, heads)
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(value))
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once_bit_for_bit(gguf_file, tmp_path, monkeypatch, capfd):
    first, tokenizer = loading.load_model(str(gguf_file))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1  # says where the copy is
    # Up to rounding: the file stores rms_norm_eps in single precision.
    torch.testing.assert_close(logits(first), logits(small(MERGED)), rtol=1e-5, atol=1e-5)
    direct = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_file.name, dtype=torch.float32)
    monkeypatch.setattr(gguf, "GGUFReader", None)  # what transformers parses it with
    moved = gguf_file.rename(tmp_path / "moved.gguf")
    capfd.readouterr()
    second, tokenizer_again = loading.load_model(str(moved))
    assert capfd.readouterr() == ("", "")
    wanted = direct.state_dict()
    for model in (first, second):
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    text = "Review: a fine film \U0001f600\n"
    assert tokenizer.eos_token_id == 1
    assert tokenizer_again(text).input_ids == tokenizer(text).input_ids
    assert loading.fingerprint(first, tokenizer) == loading.fingerprint(second, tokenizer_again)
    assert loading.load_model(str(moved), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_new_transformers_converts_a_gguf_file_again(gguf_file, tmp_path, monkeypatch):
    loading.load_model(str(gguf_file))
    monkeypatch.setattr(loading.transformers, "__version__", "9")
    loading.load_model(str(gguf_file))
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 2


def test_two_processes_convert_a_gguf_file_at_once(gguf_file, tmp_path, monkeypatch):
    save, faster = PreTrainedTokenizerFast.save_pretrained, []

    def slow(self, directory, *arguments, **options):
        save(self, directory, *arguments, **options)
        if not faster:
            faster.append(1)
            loading.load_model(str(gguf_file))  # finishes first

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", slow)
    model, _ = loading.load_model(str(gguf_file))
    torch.testing.assert_close(logits(model), logits(small(MERGED)), rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1


def test_a_full_disk_leaves_no_gguf_copy(gguf_file, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    message = error_of(gguf_file)
    assert "No space left" in message
    assert "BLACKSMITH_CACHE" in message
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_damaged_gguf_copy_is_named(gguf_file, tmp_path):
    loading.load_model(str(gguf_file))
    (copy,) = (tmp_path / "cache" / "gguf").iterdir()
    cut("model.safetensors")(copy)
    assert str(copy) in error_of(gguf_file)
    shutil.rmtree(copy)
    loading.load_model(str(gguf_file))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_gguf_file_is_refused(gguf_file, tmp_path, part):
    cut("small.gguf", part)(tmp_path)
    assert "small.gguf cannot be read" in error_of(gguf_file)


def test_a_gguf_file_with_scaled_positions_is_refused(gguf_file):
    write_gguf(gguf_file, {"rope_freqs.weight": np.full(4, 8, np.float32)})
    assert "rope_freqs.weight" in error_of(gguf_file)


def test_an_asset_is_loaded_from_the_cache(gguf_file):
    assert "blacksmith.assets smollm2-135m" in error_of("smollm2-135m")
    path = assets.path_of("smollm2-135m")
    path.parent.mkdir(parents=True)
    gguf_file.rename(path)
    model, _ = loading.load_model("smollm2-135m")
    assert model.name_or_path == "smollm2-135m"
    torch.testing.assert_close(logits(model), logits(small(MERGED)), rtol=1e-5, atol=1e-5)


# --- names and the hub ---


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "./here", "mnist", "/no/such/path", "a/missing.gguf", "~/no/such.gguf"]
)
def test_an_unknown_name_lists_what_is_allowed(name):
    assert "not an asset (smollm2-135m), an existing directory or .gguf file" in error_of(name)


def test_a_file_that_is_not_gguf_is_refused(directory):
    assert "not an asset" in error_of(directory / "model.safetensors")


@pytest.fixture
def hub(monkeypatch):
    """Sets the snapshots that the hub's library returns, as (from its cache, from the network)."""

    def answer(cached, online):
        def snapshot_download(*, local_files_only=False, **_):
            found = cached if local_files_only else online
            if isinstance(found, Exception):
                raise found
            return str(found)

        monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(network, "why_unreachable", lambda url: None)

    return answer


NOT_CACHED = loading.errors.LocalEntryNotFoundError("not there")


def test_without_a_network_a_hub_id_fails_fast(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(loading.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    message = error_of("meta-llama/Llama-3.2-1B")
    assert "cannot be downloaded: huggingface.co: no network in tests" in message
    assert "blacksmith.assets" in message


def test_offline_mode_makes_no_connection(hub, monkeypatch):
    hub(NOT_CACHED, AssertionError("connected"))
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(network, "why_unreachable", lambda url: pytest.fail("connected"))
    assert "HF_HUB_OFFLINE is set" in error_of("meta-llama/Llama-3.2-1B")


def test_a_cached_hub_model_needs_no_network(hub, directory):
    hub(directory, AssertionError("connected"))
    assert torch.equal(logits(loading.load_model("someone/model")[0]), logits(small()))


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_hub_snapshot_is_downloaded(hub, directory, tmp_path, lost):
    part = shutil.copytree(directory, tmp_path / "part")
    (part / lost).unlink()
    hub(part, directory)
    assert torch.equal(logits(loading.load_model("someone/model")[0]), logits(small()))


@pytest.mark.parametrize(
    "error",
    ["GatedRepoError", "RepositoryNotFoundError", "HfHubHTTPError"],
)
def test_what_the_hub_refuses_is_one_line(hub, error):
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    hub(NOT_CACHED, getattr(loading.errors, error)("403\nno", response=response))
    assert "cannot be downloaded: 403; if it is gated" in error_of("someone/model")


def test_a_broken_connection_is_one_line(hub):
    hub(NOT_CACHED, loading.errors.HTTPError(""))
    assert "cannot be downloaded: HTTPError;" in error_of("someone/model")


def test_loading_is_quiet_and_restores_the_progress_bars(directory, capfd):
    for enabled in (True, False):
        (loading.logging.enable_progress_bar if enabled else loading.logging.disable_progress_bar)()
        loading.load_model(str(directory))
        assert loading.logging.is_progress_bar_enabled() == enabled
    loading.logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")


# --- fingerprints ---


def differences(model, tokenizer) -> set[str]:
    """Parts of the fingerprint that differ from those of `small` with the byte tokenizer."""
    known = loading.fingerprint(small().requires_grad_(False), byte_tokenizer())
    found = loading.fingerprint(model.requires_grad_(False), tokenizer)
    return {name for name, value in found.items() if value != known[name]}


def test_the_fingerprint_does_not_depend_on_the_directory(directory, tmp_path):
    moved = directory.rename(tmp_path / "moved")
    model, tokenizer = loading.load_model(str(moved))
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # changes the tokenizer's state
    assert differences(model, tokenizer) == set()


@pytest.mark.parametrize("column", range(0, 96, 19))
def test_the_fingerprint_covers_every_column(column):
    model = loading.make_model(
        BYTES, 96, 96, 1, 4, 2, 64
    )  # matrices with 9,216 numbers, of which 4,096 count
    known = loading.fingerprint(model.requires_grad_(False), byte_tokenizer())
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:, column] += 1
    assert loading.fingerprint(model, byte_tokenizer())["weights"] != known["weights"]


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"head_dim": 16}, {"hidden_act": "gelu"}])
def test_the_fingerprint_covers_the_architecture(change):
    model = small()
    model.config.update(change)
    assert differences(model, byte_tokenizer()) == {"architecture"}


def test_the_fingerprint_ignores_trained_weights():
    model = adapters.add_lora(small(), rank=2, alpha=4.0)
    before = loading.fingerprint(model, byte_tokenizer())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 1
    assert loading.fingerprint(model, byte_tokenizer()) == before


def test_the_fingerprint_covers_more_than_the_vocabulary():
    other_end, other_rules = byte_tokenizer(), byte_tokenizer()
    other_end.eos_token = other_end.convert_ids_to_tokens(0)
    rules = json.loads(other_rules.backend_tokenizer.to_str()) | {"normalizer": {"type": "Lowercase"}}
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)), **other_rules.special_tokens_map
    )
    for tokenizer in (other_end, lower):
        assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
        assert differences(small(), tokenizer) == {"tokenizer"}
