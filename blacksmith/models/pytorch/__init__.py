"""Models written in plain PyTorch."""
