"""blacksmith: train the same models on any framework."""

__version__ = "0.1.0"
