"""Models and tokenizers from every kind of place, and what is wrong with a broken one."""

import json
import shutil
import socket
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from blacksmith import assets
from blacksmith.errors import DataError
from blacksmith.models.pytorch.llama import loading
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


NORM = "model.norm.weight"
BROKEN = {
    "no config": (without("config.json"), "no config.json"),
    "config cut": (cut("config.json"), "cannot be read"),
    "another kind": (change_config(model_type="gpt2"), "is a gpt2 model"),
    "no kind": (change_config(model_type="nonsense"), "cannot be read"),
    "no weights": (without("model.safetensors"), "cannot be read"),
    "weights cut": (cut("model.safetensors"), "cannot be read"),
    "header cut": (cut("model.safetensors", 0.001), "cannot be read"),
    "pickle only": (pickled, "cannot be read"),
    "a weight missing": (change_weights(lambda w: w.pop(NORM)), "not whole"),
    "another shape": (change_weights(lambda w: w.update({NORM: torch.ones(7)})), r"not whole|cannot be read"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json"),
    "tokenizer cut": (cut("tokenizer.json"), "cannot be read"),
}


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


def write_gguf(path: Path) -> None:
    """A small model as GGUF, with weights in float32."""
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


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_gguf_file_is_one_line(tmp_path, part):
    write_gguf(tmp_path / "small.gguf")
    cut("small.gguf", part)(tmp_path)
    with pytest.raises(DataError, match="small.gguf cannot be read") as caught:  # noqa: RUF043
        loading.load_model(str(tmp_path / "small.gguf"))
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("name", ["nowhere", "/no/such/path", "a/b/c", "./here", "mnist5k"])
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


def test_a_model_in_the_hub_s_cache_needs_no_hub(no_hub, directory, monkeypatch):
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda **options: str(directory))
    model, _ = loading.load_model("someone/model")
    assert torch.equal(logits(model), logits(small()))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (loading.errors.GatedRepoError, "is gated: accept its licence"),
        (loading.errors.RepositoryNotFoundError, "has no model"),
        (loading.errors.HfHubHTTPError, "cannot be fetched"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, message, monkeypatch):
    import httpx

    def refuse(*, local_files_only=False, **_):
        if local_files_only:
            raise loading.errors.LocalEntryNotFoundError("not there")
        raise error("403\nno", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(assets, "why_unreachable", lambda url: None)
    with pytest.raises(DataError, match=message) as caught:
        loading.load_model("someone/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_loading_is_quiet(directory, tmp_path, capfd, kind):
    path = directory
    if kind == "gguf":
        path = tmp_path / "small.gguf"
        write_gguf(path)
        capfd.readouterr()
    loading.load_model(str(path))
    assert capfd.readouterr() == ("", "")


def test_a_copy_elsewhere_is_the_same_model(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    assert torch.equal(logits(loading.load_model(str(tmp_path / "copy"))[0]), logits(small()))
