"""A Llama of 2 layers for tests."""

from blacksmith.models.pytorch.llama import loading
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

BYTES = len(byte_tokenizer())


def small(tokens=BYTES, **options):
    """A model with 2 layers and twice as many query heads as key heads."""
    return loading.make_model(tokens, 32, 48, 2, 4, 2, 64, **{"seed": 5, **options})
