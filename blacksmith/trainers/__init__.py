"""The trainer for Keras 3 models on JAX and PyTorch; what PyTorch and Lightning experiments share."""
