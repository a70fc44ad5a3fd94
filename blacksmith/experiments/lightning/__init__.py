"""Experiments on Lightning."""
