"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch."""

from blacksmith.run.run import Run
from blacksmith.trainers.classification import run_classifier
from blacksmith.trainers.mnist import mnist_setup


def main(run: Run) -> int:
    """Trains, evaluates or exports the model, depending on the mode; returns the exit status."""
    data = run.config.data
    preparation = {
        "preparation": "(pixel / scale - mean) / std",
        "scale": data.scale,
        "mean": data.mean,
        "std": data.std,
    }
    return run_classifier(run, mnist_setup(run), preparation)
