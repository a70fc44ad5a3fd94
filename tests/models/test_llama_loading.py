"""Models and tokenizers from every kind of place, and what is wrong with a broken one."""

import hashlib
import importlib
import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from blacksmith import assets
from blacksmith.errors import DataError
from blacksmith.models.pytorch.llama import adapters, loading
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

TOKENS = torch.tensor([[5, 80, 7, 200, 3, 9]])


BYTES = len(byte_tokenizer())
MERGED = BYTES + 1
"""Tokens of a model whose tokenizer has a merge, as GGUF wants."""


def small(tokens=BYTES, **options):
    """A model of 2 layers whose queries have twice the heads of its keys."""
    return loading.make_model(tokens, 32, 48, 2, 4, 2, 64, **{"seed": 5, **options})


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


@pytest.fixture
def directory(tmp_path) -> Path:
    """A model directory."""
    path = tmp_path / "model"
    small().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty hub cache, and no network."""

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(loading.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "*")


# --- from scratch ---


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone():
    state = torch.random.get_rng_state()
    first, second, other = small(), small(), small(seed=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(one, two), name
        assert "norm" in name or not torch.equal(one, three), name


def test_sizes_dtype_and_attention_are_those_asked_for():
    model = small(dtype="bfloat16", attention="eager")
    config = model.config
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert config._attn_implementation == "eager"
    assert small()._modules["model"].config._attn_implementation == "sdpa"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (
        4,
        2,
        64,
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- bytes ---


@pytest.mark.parametrize(
    "text", ["", " a  b \n\n\tc .", "naïve – 😀 \u202e", "\x00\x01\x7f", "x" * 3000, "' s n't ,", "ÿþ"]
)
def test_every_text_comes_back_as_it_was(text, tmp_path):
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokens
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 1, 2)


def test_the_model_from_scratch_agrees_with_the_tokenizer_on_special_tokens():
    config, tokenizer = small().config, byte_tokenizer()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


# --- directories ---


def test_a_directory_gives_the_model_that_was_saved(directory):
    model, tokenizer = loading.load_model(str(directory))
    assert torch.equal(logits(model), logits(small()))
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert model.name_or_path == str(directory)


def test_dtype_and_attention_are_those_asked_for(directory):
    model, _ = loading.load_model(str(directory), dtype="bfloat16", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
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


def pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def with_adapter(directory):
    adapters.save_adapter(adapters.add_lora(small(), rank=2, alpha=2.0), directory)


NORM = "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
BROKEN = {
    "no config": (without("config.json"), "no config.json"),
    "config cut": (cut("config.json"), "cannot be read"),
    "another kind": (change_config(model_type="gpt2"), "is a gpt2 model"),
    "no kind": (change_config(model_type="nonsense"), "cannot be read"),
    "no weights": (without("model.safetensors"), "cannot be read"),
    "weights cut": (cut("model.safetensors"), "cannot be read"),
    "header cut": (cut("model.safetensors", 0.001), "cannot be read"),
    "pickle only": (pickled, "cannot be read"),
    "a weight missing": (change_weights(lambda w: w.pop(NORM)), rf"missing keys, such as {NORM}"),
    "another shape": (
        change_weights(lambda w: w.update({NORM: torch.ones(7)})),
        rf"mismatched keys, such as .*{NORM}.*7.*32",
    ),
    "a bias besides": (change_weights(lambda w: w.update({BIAS: torch.ones(32)})), "unexpected keys"),
    "fewer layers in the config": (
        change_config(num_hidden_layers=1),
        r"unexpected keys, such as model\.layers\.1\.",
    ),
    "quantised": (change_config(quantization_config={"quant_method": "fp8"}), "is quantised"),
    "an adapter besides": (with_adapter, "move the adapter to a directory of its own"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json"),
    "tokenizer cut": (cut("tokenizer.json"), "cannot be read"),
}


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path):
    small(100).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="the tokenizer has 259 tokens, the model 100"):
        loading.load_model(str(tmp_path))


def test_bfloat16_leaves_the_rotary_frequencies_exact():
    assert torch.equal(small(dtype="bfloat16").model.rotary_emb.inv_freq, small().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_one_line(directory, case, capfd):
    change, message = BROKEN[case]
    change(directory)
    with pytest.raises(DataError, match=message) as caught:
        loading.load_model(str(directory))
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


# --- GGUF ---


def write_gguf(path: Path, more: dict[str, np.ndarray] | None = None) -> None:
    """A small model as GGUF, with weights in float32, and more tensors besides."""
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
    # llama.cpp pairs the halves of a head where transformers pairs neighbours.
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


def test_a_gguf_file_gives_the_model_in_it_and_can_be_saved_as_plain_weights(tmp_path):
    path = tmp_path / "small.gguf"
    write_gguf(path)
    model, tokenizer = loading.load_model(str(path))
    torch.testing.assert_close(logits(model), logits(small(MERGED)), rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.eos_token_id == 1
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = loading.load_model(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))


def test_a_gguf_file_is_read_once_and_then_comes_from_the_cache_to_the_bit(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)
    capfd.readouterr()
    first, tokenizer = loading.load_model(str(path))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "the next time it comes from" in captured.err
    direct = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    monkeypatch.setattr(gguf, "GGUFReader", None)  # what transformers parses one with
    moved = path.rename(tmp_path / "moved.gguf")
    capfd.readouterr()
    second, again = loading.load_model(str(moved))
    assert capfd.readouterr() == ("", "")
    wanted = direct.state_dict()
    for model in (first, second):
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "Review: a fine film \U0001f600\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert loading.fingerprint(first, tokenizer) == loading.fingerprint(second, again)
    assert loading.load_model(str(moved), dtype="bfloat16")[0].dtype == torch.bfloat16
    (kept,) = (tmp_path / "cache" / "gguf").iterdir()
    with open(moved, "rb") as file:
        assert kept.name.startswith(hashlib.file_digest(file, "sha256").hexdigest()[:32] + "-transformers-")


def test_the_copy_of_a_gguf_file_is_as_public_as_its_config(tmp_path, monkeypatch):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "small.gguf")
    loading.load_model(str(tmp_path / "small.gguf"))
    (kept,) = (tmp_path / "cache" / "gguf").iterdir()
    assert {file.stat().st_mode for file in kept.iterdir()} == {(kept / "config.json").stat().st_mode}


def test_another_version_of_transformers_makes_its_own_copy_of_a_gguf_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)
    loading.load_model(str(path))
    monkeypatch.setattr(loading, "_CONVERTER", "transformers-9")
    capfd.readouterr()
    loading.load_model(str(path))
    assert "the next time it comes from" in capfd.readouterr().err
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 2


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer", "all"])
def test_a_damaged_copy_of_a_gguf_file_is_to_be_deleted(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)
    loading.load_model(str(path))
    (kept,) = (tmp_path / "cache" / "gguf").iterdir()
    for file in kept.iterdir():
        if damage == "all" or file.name.startswith({"weights": "model"}.get(damage, damage)):
            file.unlink()
    with pytest.raises(DataError, match=r"; delete /.*, a copy, and run the same command again") as caught:
        loading.load_model(str(path))
    assert "\n" not in str(caught.value)
    shutil.rmtree(kept)
    loading.load_model(str(path))


def test_a_gguf_file_that_two_processes_read_at_once_is_kept_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)
    save, faster = PreTrainedTokenizerFast.save_pretrained, []

    def slow(self, directory, *arguments, **options):
        save(self, directory, *arguments, **options)
        if not faster:
            faster.append(1)
            loading.load_model(str(path))  # comes first

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", slow)
        model, _ = loading.load_model(str(path))
    assert "warning" not in capfd.readouterr().err
    torch.testing.assert_close(logits(model), logits(small(MERGED)), rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1


def test_what_a_killed_process_left_beside_copies_of_gguf_files_is_removed_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)
    old, new = (tmp_path / "cache" / "gguf" / name for name in (".tmp-old", ".tmp-new"))
    for left in (old, new):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    loading.load_model(str(path))
    assert not old.exists()
    assert new.exists()


def test_an_adapter_beside_a_gguf_file_is_refused(tmp_path):
    path = tmp_path / "small.gguf"
    write_gguf(path)
    adapters.save_adapter(adapters.add_lora(small(MERGED), rank=2, alpha=4), tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"the adapter_config\.json in .* would make its adapter part"):
            loading.load_model(str(path))
        (tmp_path / "adapter_config.json").rename(tmp_path / "away")
        loading.load_model(str(path))  # there is a copy from here on
        (tmp_path / "away").rename(tmp_path / "adapter_config.json")


def test_a_gguf_file_that_cannot_be_kept_is_loaded_as_it_is_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    write_gguf(path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        model, _ = loading.load_model(str(path))
    assert "small.gguf is not kept in the cache: [Errno 28] No space left" in capfd.readouterr().err
    torch.testing.assert_close(logits(model), logits(small(MERGED)), rtol=1e-5, atol=1e-5)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_gguf_file_is_one_line(tmp_path, part):
    write_gguf(tmp_path / "small.gguf")
    cut("small.gguf", part)(tmp_path)
    with pytest.raises(DataError, match="small.gguf cannot be read") as caught:  # noqa: RUF043
        loading.load_model(str(tmp_path / "small.gguf"))
    assert "\n" not in str(caught.value)


def test_a_gguf_file_whose_scaled_positions_would_be_lost_is_refused(tmp_path):
    path = tmp_path / "small.gguf"
    write_gguf(path, {"rope_freqs.weight": np.full(4, 8, np.float32)})
    with pytest.raises(DataError, match=r"has rope_freqs\.weight"):
        loading.load_model(str(path))


def test_a_damaged_asset_is_to_be_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path))
    path = assets.path_of("smollm2-135m")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    with pytest.raises(DataError, match=r"cannot be read: .*; run python -m blacksmith\.assets smollm2-135m"):
        loading.load_model("smollm2-135m")


# --- names ---


def test_an_asset_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLACKSMITH_CACHE", str(tmp_path))
    path = assets.path_of("smollm2-135m")
    with pytest.raises(DataError, match=r"run python -m blacksmith\.assets smollm2-135m; gin/llama_"):
        loading.load_model("smollm2-135m")
    path.parent.mkdir(parents=True)
    write_gguf(path)
    model, _ = loading.load_model("smollm2-135m")
    assert model.name_or_path == "smollm2-135m"
    torch.testing.assert_close(logits(model), logits(small(MERGED)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["/no/such/path", "missing.gguf", "~/no/such.gguf"])
def test_a_path_to_nothing_is_said_to_be_one(name):
    with pytest.raises(DataError, match=f"^{re.escape(name)}: no such file or directory$"):
        loading.load_model(name)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./here", "mnist"])
def test_a_name_that_can_be_nothing_says_what_may_be(name):
    with pytest.raises(DataError, match="is no asset .*smollm2-135m.*, directory, .gguf file or hub id"):  # noqa: RUF043
        loading.load_model(name)


def test_a_file_that_is_no_gguf_is_refused(directory):
    with pytest.raises(DataError, match="is a file but no .gguf"):  # noqa: RUF043
        loading.load_model(str(directory / "model.safetensors"))


def test_without_the_hub_a_hub_id_fails_fast_and_says_what_to_do(no_hub):
    with pytest.raises(DataError, match=r"out of reach .*\.assets smollm2-135m.*needs no download") as caught:
        loading.load_model("meta-llama/Llama-3.2-1B")
    assert "\n" not in str(caught.value)


def test_offline_mode_does_not_try(no_hub, monkeypatch):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(assets, "why_unreachable", lambda url: pytest.fail("tried"))
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        loading.load_model("meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_is_in_the_hub_s_cache_in_part_is_fetched(directory, tmp_path, monkeypatch, lost):
    part = tmp_path / "part"
    shutil.copytree(directory, part)
    (part / lost).unlink()

    def snapshot(*, local_files_only=False, **_):
        return str(part if local_files_only else directory)

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(assets, "why_unreachable", lambda url: None)
    model, _ = loading.load_model("someone/model")
    assert torch.equal(logits(model), logits(small()))
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="not whole in the Hugging Face cache"):
        loading.load_model("someone/model")


@pytest.mark.parametrize("lost", [None, 1])
def test_a_model_in_parts_is_whole_with_all_of_them(tmp_path, monkeypatch, lost):
    small().save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda **options: str(tmp_path))
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    if lost is None:
        assert torch.equal(logits(loading.load_model("someone/model")[0]), logits(small()))
        return
    parts[lost].unlink()
    with pytest.raises(DataError, match="not whole"):
        loading.load_model("someone/model")


@pytest.mark.parametrize("content", ['{"weight_map": {"a', "[]", '{"weight_map": 3}', "{}"])
def test_a_model_whose_index_is_broken_is_not_whole(directory, monkeypatch, content):
    (directory / "model.safetensors.index.json").write_text(content)
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda **options: str(directory))
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="not whole"):
        loading.load_model("someone/model")


def test_a_model_in_the_hub_s_cache_needs_no_hub(no_hub, directory, monkeypatch):
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda **options: str(directory))
    model, _ = loading.load_model("someone/model")
    assert torch.equal(logits(model), logits(small()))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (loading.errors.GatedRepoError, "is gated: accept its licence"),
        (loading.errors.RepositoryNotFoundError, "has no model"),
        (loading.errors.HfHubHTTPError, "cannot be fetched: 403 no"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, message, monkeypatch):
    response = SimpleNamespace(headers={}, request=None, status_code=403)

    def refuse(*, local_files_only=False, **_):
        if local_files_only:
            raise loading.errors.LocalEntryNotFoundError("not there")
        raise error("403\nno", response=response)

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(assets, "why_unreachable", lambda url: None)
    with pytest.raises(DataError, match=message) as caught:
        loading.load_model("someone/model")
    assert "\n" not in str(caught.value)


def test_a_connection_that_breaks_is_one_line(monkeypatch):
    def breaks(*, local_files_only=False, **_):
        if local_files_only:
            raise loading.errors.LocalEntryNotFoundError("not there")
        raise loading.errors.HTTPError("")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", breaks)
    monkeypatch.setattr(assets, "why_unreachable", lambda url: None)
    with pytest.raises(DataError, match="someone/model cannot be fetched: HTTPError"):
        loading.load_model("someone/model")


@pytest.mark.parametrize("variable", [None, True, False])
def test_progress_bars_are_afterwards_what_they_were(monkeypatch, variable):
    disabled = loading.huggingface_hub.utils.are_progress_bars_disabled
    for module in ("constants", "utils.tqdm"):
        monkeypatch.setattr(
            importlib.import_module(f"huggingface_hub.{module}"), "HF_HUB_DISABLE_PROGRESS_BARS", variable
        )
    # What transformers makes of the variable when it is imported.
    monkeypatch.setattr(loading.logging, "_tqdm_active", variable is not True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with loading.quiet():
            assert disabled() == (variable is not False)
            assert loading.logging.is_progress_bar_enabled() == (variable is False)
    assert disabled() == (variable is True)
    assert loading.logging.is_progress_bar_enabled() == (variable is not True)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_loading_is_quiet(directory, tmp_path, capfd, kind):
    path = directory
    if kind == "gguf":
        path = tmp_path / "small.gguf"
        write_gguf(path)
        loading.load_model(str(path))  # its first reading is told in one line
        capfd.readouterr()
    loading.load_model(str(path))
    assert capfd.readouterr() == ("", "")


def test_a_copy_elsewhere_is_the_same_model(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    assert torch.equal(logits(loading.load_model(str(tmp_path / "copy"))[0]), logits(small()))


# --- which model it is ---


def differences(model, tokenizer) -> set[str]:
    """What tells a model with its tokenizer from `small` with the byte tokenizer."""
    known = loading.fingerprint(small().requires_grad_(False), byte_tokenizer())
    found = loading.fingerprint(model.requires_grad_(False), tokenizer)
    return {name for name, value in found.items() if value != known[name]}


@pytest.mark.parametrize("column", range(0, 32, 5))
def test_a_changed_column_of_a_large_matrix_is_another_model(column, monkeypatch):
    monkeypatch.setattr(loading, "_SAMPLES", 64)  # of 32 columns, and at least 1,024 numbers
    model = small()
    assert not differences(model, byte_tokenizer())
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:, column] += 1
    assert differences(model, byte_tokenizer()) == {"weights"}


def test_what_is_trained_does_not_make_another_model():
    model = small()
    adapted = adapters.add_lora(
        model, rank=2, alpha=4.0, dropout=0.0, bias="none", target_modules="all-linear", seed=0
    )
    before = loading.fingerprint(adapted, byte_tokenizer())
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 1
    assert loading.fingerprint(adapted, byte_tokenizer()) == before


def test_another_tokenizer_of_the_same_vocabulary_is_another():
    other_end, other_split = byte_tokenizer(), byte_tokenizer()
    other_end.eos_token = other_end.convert_ids_to_tokens(0)
    split = json.loads(other_split.backend_tokenizer.to_str())
    split["normalizer"] = {"type": "Lowercase"}
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(split)), **other_split.special_tokens_map
    )
    for tokenizer in (other_end, lower):
        assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
        assert differences(small(), tokenizer) == {"tokenizer"}
