"""Models written on Keras 3, which run on every backend."""
