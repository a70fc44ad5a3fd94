"""Model directories by others: what is refused before a run uses it, and what is put right."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llama import BYTES, small
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from blacksmith.errors import ConfigError, DataError
from blacksmith.models.pytorch.llama import checks, loading
from blacksmith.models.pytorch.llama.tokens import END, PAD

TOKENS = torch.tensor([[5, 80, 7, 200, 3, 9]])


def edit(file, **values):
    """Changes values of a JSON file in a directory."""

    def change(directory):
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tokenizer_of_its_own(directory):
    edit("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(
        directory
    )
    (directory / "own.py").write_text(f"open({str(directory / 'executed')!r}, 'w')")


def index_of(name):
    def change(directory):
        (directory / "model.safetensors").rename(directory / "other.safetensors")
        index = {
            "metadata": {},
            "weight_map": {"model.norm.weight": name, "lm_head.weight": "other.safetensors"},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def pattern(regex):
    rule = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return edit("tokenizer.json", pre_tokenizer=rule)


def exploding(directory):
    """Ten rules that each make a text ten times as long."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 10)] * 10)
    tokenizer.save(str(directory / "tokenizer.json"))


def integers(directory):
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def pipe(directory):
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")


REFUSED = {
    "integers": (integers, "model.norm.weight has the type I8; allowed: F64, F32, F16, BF16"),
    "pipe": (pipe, "config.json is not a file"),
    "dropout": (edit("config.json", attention_dropout=2.0), "dropout probability has to be between"),
    "code of the tokenizer": (tokenizer_of_its_own, "custom code"),
    "shard in another directory": (
        index_of("../other.safetensors"),
        r"'../other.safetensors', which is not a file",
    ),
    "absolute shard": (index_of("/etc/passwd"), "'/etc/passwd', which is not a file in its directory"),
    "weights elsewhere": (
        edit("config.json", transformers_weights="../a.safetensors"),
        "inside the model directory",
    ),
    "vocabulary": (
        edit("config.json", vocab_size=10**12),
        "describes 32,000,000,[0-9,]+ weights, the files hold",
    ),
    "layers": (edit("config.json", num_hidden_layers=10**11), "describes [0-9,]+ weights, the files hold"),
    "width": (edit("config.json", intermediate_size=10**13), "describes [0-9,]+ weights, the files hold"),
    "class names": (
        edit("config.json", num_labels=10**10),
        "num_labels = 10000000000; allowed: up to 10,000",
    ),
    "backtracking": (pattern("(([a-z ]+)+)+!"), "rules of the tokenizer fail on a short text: .*Regex"),
    "exploding text": (exploding, "rules of the tokenizer fail on a short text"),
    "end token": (
        edit("tokenizer_config.json", eos_token="[END]"),
        r"token '\[END\]' has the number 259, .* only 259",
    ),
    "begin token": (
        edit("tokenizer_config.json", bos_token="[BEGIN]"),
        r"token '\[BEGIN\]' has the number 259",
    ),
    "word as a token's number": (
        edit("generation_config.json", bos_token_id="x"),
        "bos_token_id = 'x'; needed",
    ),
    "longest text": (edit("tokenizer_config.json", model_max_length=[5]), "cannot be read: TypeError"),
    "activation": (edit("config.json", hidden_act="nope"), "cannot be read: KeyError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_fail_later_is_refused_in_one_line(directory, monkeypatch, case):
    change, message = REFUSED[case]
    change(directory)
    monkeypatch.setattr(checks, "_PROBE_BYTES", 1 << 30)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises(DataError, match=message) as caught:
        loading.load_model(str(directory))
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not (directory / "executed").exists()


def test_rules_that_do_not_end_are_refused(directory, monkeypatch):
    checks._probe.cache_clear()
    monkeypatch.setattr(checks, "_PROBE_SECONDS", 0)
    with pytest.raises(DataError, match="no result after 0 seconds"):
        loading.load_model(str(directory))
    checks._probe.cache_clear()


def test_a_panic_of_a_library_is_one_line():
    class Panic(BaseException):
        pass

    with pytest.raises(DataError, match="it cannot be read: Panic: no"), checks.one_line_errors("it"):
        raise Panic("no")
    with pytest.raises(KeyboardInterrupt), checks.one_line_errors("it"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_pad_token_without_embedding_is_replaced_by_the_end_token(directory, capsys, file):
    change = {"pad_token": "[PAD]"} if file == "tokenizer_config.json" else {"pad_token_id": BYTES}
    edit(file, **change)(directory)
    model, tokenizer = loading.load_model(str(directory))
    assert "the pad token has the number 259, " in capsys.readouterr().err
    assert tokenizer.pad_token == END
    assert model.config.pad_token_id == tokenizer.eos_token_id == 1
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, small()(input_ids=TOKENS).logits)


def test_a_pad_token_with_embedding_stays(directory, capsys):
    model, tokenizer = loading.load_model(str(directory))
    assert (tokenizer.pad_token, model.config.pad_token_id) == (PAD, 2)
    assert capsys.readouterr().err == ""


def test_an_added_token_without_embedding_may_stay_unused(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(directory)
    assert loading.load_model(str(directory))[1]("<image>")["input_ids"] == [BYTES]


@pytest.mark.parametrize("setting", ["return_dict", "output_attentions", "output_hidden_states"])
def test_settings_of_what_is_returned_change_nothing(directory, tmp_path, setting):
    edit("config.json", **{setting: setting != "return_dict"})(directory)
    model, _ = loading.load_model(str(directory))
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, small()(input_ids=TOKENS).logits)
    model.save_pretrained(tmp_path / "export")


def test_generation_settings_of_llama_2_are_accepted(directory):
    edit("generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)(directory)
    assert loading.load_model(str(directory))[0].generation_config.temperature == 0.9


def test_attention_that_is_not_installed_is_one_line(directory, monkeypatch):
    monkeypatch.setattr(loading.transformers.utils, "is_flash_attn_2_available", lambda: False)
    for make in (small, lambda **options: loading.load_model(str(directory), **options)):
        with pytest.raises(ConfigError, match='"flash_attention_2" needs the package flash-attn'):
            make(attention="flash_attention_2")
