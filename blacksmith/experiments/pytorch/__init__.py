"""Experiments in plain PyTorch."""
