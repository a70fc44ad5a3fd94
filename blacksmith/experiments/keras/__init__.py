"""Experiments on Keras 3."""
