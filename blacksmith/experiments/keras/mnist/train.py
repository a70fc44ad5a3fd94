"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch.

Data, model, loop, test: read `main` from top to bottom; what it calls is in `pipeline.py`, the loop itself in
`blacksmith/trainers/keras_trainer.py`.
"""

from blacksmith.experiments.keras.mnist import pipeline
from blacksmith.run.run import Run


def main(run: Run) -> int:
    """Runs the experiment in the given mode; returns the exit status."""
    if run.mode == "eval":
        return pipeline.evaluate_checkpoint(run)
    if run.mode == "export":
        return pipeline.export(run)
    prepared = pipeline.prepare(run)
    trainer = pipeline.make_trainer(run, prepared)
    status = trainer.fit()
    return pipeline.conclude(run, prepared, trainer, status)
