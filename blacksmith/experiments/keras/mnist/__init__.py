"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch."""
