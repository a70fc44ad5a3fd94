"""LoRA adapters: initial state, saving, merging, and refusal of those that do not fit."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from blacksmith.errors import ConfigError, DataError
from blacksmith.models.pytorch.llama import adapters
from blacksmith.models.pytorch.llama.loading import make_model

TOKENS = torch.tensor([[5, 80, 7, 200, 3, 9]])


def base(width=32, seed=5):
    """A model with twice as many query heads as key heads."""
    return make_model(259, width, 48, 2, 4, 2, 64, seed=seed)


def adapted(rank=4, trained=True, seed=0, **options):
    """A model with an adapter whose update is not zero if `trained`."""
    model = adapters.add_lora(base(), rank=rank, alpha=8.0, seed=seed, **options)
    if trained:
        random = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.normal_(0, 0.1, generator=random)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def lora_names(model):
    return sorted(
        {n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_" in n}
    )


def test_a_new_adapter_is_zero_and_alone_is_trained():
    plain = logits(base())
    model = adapters.add_lora(base(), rank=3, alpha=6.0)
    assert torch.equal(logits(model), plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora_names(model) == linear
    # Each of 2 layers: (in + out) * rank, of the shapes 32x32 twice, 32x16 twice, 32x48 three times.
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * (2 * 64 + 2 * 48 + 3 * 80)


def test_the_update_is_alpha_over_rank_times_b_a():
    model = adapted(rank=4, target_modules=("q_proj",))
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        update = 8.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = inputs @ (layer.base_layer.weight + update).T
        torch.testing.assert_close(layer.eval()(inputs), expected, rtol=1e-5, atol=1e-6)
    assert lora_names(model) == ["q_proj"]


def test_the_seed_alone_decides_the_adapter():
    state = torch.random.get_rng_state()
    first, second, other = (adapted(trained=False, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    named = [dict(model.named_parameters()) for model in (first, second, other)]
    names = [name for name in named[0] if "lora_A" in name]
    assert len(names) == 14
    for name in names:
        assert torch.equal(named[0][name], named[1][name])
        assert not torch.equal(named[0][name], named[2][name])


def test_dropout_is_applied_in_training_only():
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model(input_ids=TOKENS).logits for _ in range(2))
    assert not torch.equal(first, second)
    without = adapted(dropout=0.0).train()
    with torch.no_grad():
        assert torch.equal(*(without(input_ids=TOKENS).logits for _ in range(2)))


@pytest.mark.parametrize("modules", [("q_proj", "nonsense"), ("nowhere.q_proj",), ("embed_tokens",), ()])
def test_an_unknown_module_lists_those_of_the_model(modules):
    with pytest.raises(ConfigError, match=r"the model has .*down_proj.*q_proj.*v_proj"):
        adapters.add_lora(base(), rank=2, alpha=2.0, target_modules=modules)


def test_biases_that_the_model_lacks_are_refused():
    with pytest.raises(ConfigError, match="has no biases"):
        adapters.add_lora(base(), rank=2, alpha=2.0, bias="all")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ("q_proj", "v_proj")}, {"target_modules": ("lm_head",)}]
)
def test_a_saved_adapter_loads_bit_for_bit(tmp_path, options):
    model = adapted(**options)
    adapters.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)  # equal runs write equal files
    loaded = adapters.load_adapter(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(base()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))
    fresh = adapters.add_lora(base(), rank=4, alpha=8.0, seed=9, **options)
    adapters.load_weights(fresh, tmp_path / adapters.WEIGHTS)
    assert torch.equal(logits(fresh), logits(model))


def test_merged_weights_give_the_same_logits():
    expected = logits(adapted())
    merged = adapters.merge(adapted())
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    # Sums of 32 to 48 products in a different order, through two layers, of logits up to about 1.
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (expected - logits(base())).abs().amax() > 0.05


HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def adapted_ends(layers, **options):
    """A model with tied weights and a trained adapter on its head, embedding or both."""
    settings = LoraConfig(r=4, lora_alpha=8.0, target_modules=layers, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base(), settings)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(
    "layers", [[HEAD], [EMBEDDING], [HEAD, EMBEDDING]], ids=["head", "embedding", "both"]
)
def test_merging_a_tied_layer_unties_it(layers, tmp_path):
    model = adapted_ends(layers)
    expected = logits(model)
    assert (expected - logits(base())).abs().amax() > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns if the config still ties the two
        merged = adapters.merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.filterwarnings("ignore:.*tie")
def test_merging_keeps_a_fully_trained_head(tmp_path):
    model = adapted_ends(["q_proj"], modules_to_save=["lm_head"])
    expected = logits(model)
    merged = adapters.merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_merging_other_layers_keeps_the_tie():
    merged = adapters.merge(adapted())
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_an_adapter_records_its_base_model(tmp_path):
    model = base()
    model.name_or_path = "someone/model"
    adapters.save_adapter(adapters.add_lora(model, rank=2, alpha=2.0), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "someone/model"


def edit_config(**values):
    def change(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_weights(change):
    def changed(directory):
        weights = load_file(directory / "adapter_model.safetensors")
        change(weights)
        save_file(weights, directory / "adapter_model.safetensors")

    return changed


def cut(directory: Path):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove(name):
    return lambda directory: (directory / name).unlink()


BROKEN = {
    "config not JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "config.json cannot be read"),
    "config a list": (
        lambda d: (d / "adapter_config.json").write_text("[]"),
        "config.json: it is not a LoRA",
    ),
    "other method": (edit_config(peft_type="IA3"), "not a LoRA adapter"),
    "other layer": (
        edit_config(target_modules=["nowhere"]),
        "config.json cannot be read or does not fit the model",
    ),
    "other rank": (edit_config(r=2), r"safetensors does not fit the model: .*, in the model \(2,"),
    "rank 0": (edit_config(r=0), "config.json cannot be read or does not fit the model"),
    "rank of text": (edit_config(r="4"), "config.json cannot be read or does not fit the model: TypeError"),
    "module of its own": (
        edit_config(megatron_config={"a": 1}, megatron_core="antigravity"),
        r"config.json: megatron_config = {'a': 1} is not supported",
    ),
    "other rank of a layer": (
        edit_config(rank_pattern={"q_proj": 10**12}),
        "a rank of 1000000000000 does not fit",
    ),
    "rank beyond its weights": (
        edit_config(r=10**12),
        "a rank of 1000000000000 does not fit its weights, of at",
    ),
    "many tokens": (edit_config(trainable_token_indices=[0] * 99), "99 trainable token indices do not fit"),
    "many layers": (
        edit_config(layer_replication=[[0, 10**9]]),
        r"layer_replication = \[\[0, 1000000000\]\] is not",
    ),
    "random start": (
        edit_config(init_lora_weights="pissa_niter_999999999"),
        "'pissa_niter_999999999' changes the",
    ),
    "backtracking": (edit_config(target_modules="((_|[^.])+.?)+x"), "matches no layer"),
    "slow pattern": (
        edit_config(target_modules="(.*?)" * 10 + r"\d{5}"),
        "regular expression .* takes too long",
    ),
    "slow rank": (
        edit_config(rank_pattern={"(.*?)" * 10 + r"\d{5}": 2}),
        "regular expression .* takes too long",
    ),
    "not a pattern": (edit_config(target_modules="(q_proj"), "config.json cannot be read or does not fit"),
    "pattern of no layer": (edit_config(target_modules="x.*"), "target_modules = 'x.*' matches no layer"),
    "pattern as a name": (
        edit_config(layers_pattern=["(a+)+"], layers_to_transform=[0]),
        "needed: a plain name",
    ),
    "no weights": (remove("adapter_model.safetensors"), "safetensors cannot be read"),
    "truncated weights": (cut, "safetensors cannot be read"),
    "missing weight": (edit_weights(lambda w: w.pop(min(w))), "base_model.* is missing, in the model"),
    "extra weight": (
        edit_weights(lambda w: w.update(more=torch.ones(2))),
        "more is .*, in the model missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_in_one_line(tmp_path, monkeypatch, case):
    monkeypatch.setattr(adapters, "_MATCH_SECONDS", 0.1)
    change, message = BROKEN[case]
    adapters.save_adapter(adapted(), tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        adapters.load_adapter(base(), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r".*_proj", "exclude_modules": r".*\.0\..*"},
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {r"layers\.[1-9]\..*": 2},
            "alpha_pattern": {"q_.*": 1},
        },
        {"target_modules": ["q_proj"], "rank_pattern": {r".*1\.self_attn\..+": 2, r".+": 3}},
    ],
    ids=["pattern", "exclude", "ranks", "first-rank"],
)
def test_patterns_mean_what_they_mean_in_peft(tmp_path, options):
    model = get_peft_model(base(), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.05)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(adapters.load_adapter(base(), tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_copies_of_base_weights_are_accepted_if_they_are_the_same(tmp_path):
    model = adapted_ends(["q_proj", HEAD])
    model.save_pretrained(tmp_path)
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(adapters.load_adapter(base(), tmp_path)), logits(model))
    with pytest.raises(DataError, match=r"lm_head\.base_layer\.weight is .*, in the model missing"):
        adapters.load_adapter(base(seed=6), tmp_path)


def test_a_setting_of_a_newer_peft_is_named(tmp_path, capsys):
    adapters.save_adapter(adapted(), tmp_path)
    edit_config(use_newest=True, newest_config=None)(tmp_path)
    assert torch.equal(logits(adapters.load_adapter(base(), tmp_path)), logits(adapted()))
    assert "unknown settings, without effect: use_newest\n" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("tie", [False, True], ids=["embedding", "both"])
def test_merging_trained_tokens_gives_the_same_logits(tmp_path, tie):
    settings = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices=[5, 80],
        ensure_weight_tying=tie,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base(), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(model)
    assert (expected - logits(base())).abs().amax() > 0.05
    merged = adapters.merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_an_adapter_for_a_wider_model_does_not_fit(tmp_path):
    adapters.save_adapter(adapted(), tmp_path)
    with pytest.raises(DataError, match=r"does not fit the model: .* is \(.*\), in the model"):
        adapters.load_adapter(base(width=64), tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path):
    adapters.save_adapter(adapted(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    with pytest.raises(DataError, match="safetensors cannot be read"):
        adapters.load_adapter(base(), tmp_path)
