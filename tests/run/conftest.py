"""Runs of the toy, see `numpy_toy`."""

import os

import pytest
from numpy_toy import make_run

from blacksmith.run import metrics, provenance


@pytest.fixture
def make(tmp_path):
    """Makes a run of the toy, with Gin bindings and arguments of `Run`."""
    return lambda *bindings, directory=tmp_path / "run", **options: make_run(directory, *bindings, **options)


class NoWriter:
    """In place of TensorBoard's."""

    def __init__(self, directory, first_step):
        self.scalars = self.histogram = self.close = lambda *_: None


@pytest.fixture
def quick(monkeypatch):
    """Makes hundreds of runs affordable: no waiting for the disk, no TensorBoard, no Git."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(metrics, "TensorBoardWriter", NoWriter)
    monkeypatch.setattr(provenance, "describe", lambda directory, **facts: facts)
