"""Evaluating and exporting a checkpoint of the MNIST experiments."""

from blacksmith.experiments.keras.mnist.train import prepare
from blacksmith.run.run import Run
from blacksmith.trainers.classification import evaluate_checkpoint, export_checkpoint


def evaluate(run: Run) -> int:
    """``--mode=eval``; returns the exit status."""
    return evaluate_checkpoint(run, prepare(run))


def export(run: Run) -> int:
    """``--mode=export``; returns the exit status."""
    settings = run.config.data
    preparation = {
        "preparation": "(pixel / scale - mean) / std",
        "scale": settings.scale,
        "mean": settings.mean,
        "std": settings.std,
    }
    return export_checkpoint(run, prepare(run), preparation)
