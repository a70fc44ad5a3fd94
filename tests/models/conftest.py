"""Fixtures of the model tests."""

from pathlib import Path

import pytest


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with `small_llama.small` and its tokenizer."""
    from small_llama import byte_tokenizer, small

    path = tmp_path / "model"
    small().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
