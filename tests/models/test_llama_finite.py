"""Where a model stops being finite."""

import pytest
import torch

from blacksmith.errors import DataError
from blacksmith.models.pytorch.llama import adapters, finite
from blacksmith.models.pytorch.llama.loading import make_model
from blacksmith.models.pytorch.llama.prefix import IGNORED, Batch

BATCH = Batch(
    torch.tensor([4, 5]), torch.tensor([[6, 7], [8, 9]]), torch.tensor([[IGNORED, 3], [3, IGNORED]])
)


def adapted():
    return adapters.add_lora(make_model(259, 32, 48, 2, 4, 2, 64, seed=5), rank=2, alpha=4.0)


def test_a_finite_model_has_no_such_place():
    assert finite.first_not_finite(adapted(), BATCH) == ""
    finite.check_weights(adapted(), "it")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("part", "kind"),
    [("layers.1.mlp.up_proj.base_layer.weight", "base weights"), ("layers.0.mlp.up_proj.lora_B", "adapter")],
)
def test_weights_are_named(value, part, kind):
    model = adapted()
    (name,) = [name for name, _ in model.named_parameters() if part in name]
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] = value
    place = f"{kind}, {name.removeprefix('base_model.model.')}"
    assert finite.first_not_finite(model, BATCH) == place
    with pytest.raises(
        DataError, match=f"it: the model has weights that are not finite: {kind}, model.layers"
    ):
        finite.check_weights(model, "it")


def test_activations_are_named_where_finite_weights_overflow():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.fill_(3e38)
    # The embedding of the first token is not 0, and 32 products of up to 1e38 are more than float32 can hold.
    assert finite.first_not_finite(model, BATCH) == "activations, model.layers.1.mlp.up_proj.base_layer"
    finite.check_weights(model, "it")
