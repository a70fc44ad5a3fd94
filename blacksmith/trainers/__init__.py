"""The trainer for any Keras 3 model: one epoch loop, one file per backend."""
