"""Classifiers on the Keras trainer: setup, test, evaluation and export."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image, PngImagePlugin

from blacksmith.errors import ConfigError, DataError
from blacksmith.files import write_json
from blacksmith.run.order import Order
from blacksmith.run.run import Run
from blacksmith.trainers import losses
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.confusion import class_tables
from blacksmith.trainers.export import export_model
from blacksmith.trainers.initial_weights import initialize
from blacksmith.trainers.keras_trainer import (
    KerasTrainer,
    Samples,
    Setup,
    backend_of,
    evaluate,
    load_checkpoint,
)
from blacksmith.trainers.optimizers import make_optimizer
from blacksmith.trainers.task import Backend, Task

WORST = 48
COMPARED = 8  # samples on which exported files are compared with the evaluated model


def make_setup(
    config: Any,
    build: Callable[[], keras.Model],
    splits: Sequence[Samples],
    augmentation: ShiftAndRotate | None = None,
    *,
    drop_last: bool = False,
) -> Setup:
    """Batches, model, optimizer and loss of a classifier.

    Args:
      config: has the sections `run`, `train`, `optimizer` and `schedule`.
      build: makes the model, from inputs [batch, ...] to logits [batch, classes].
      splits: training, validation (may be empty) and test samples.
      augmentation: of the training inputs.
      drop_last: whether an epoch leaves out its last batch if that is smaller than the others.

    Raises:
      ConfigError: a batch is larger than the training set.
      DataError: labels are not integers [samples] below the model's number of classes.
    """
    samples, batch = len(splits[0]), config.train.batch_size
    if batch > samples:
        raise ConfigError(
            f"{config.train.gin_name}.batch_size = {batch} is more than {samples} training samples"
        )
    order = Order(samples, batch, config.run.seed, drop_last=drop_last)
    end = config.train.total_steps(order.steps_per_epoch)
    keras.config.set_dtype_policy(config.train.precision)
    model = build()
    for samples in splits:
        _check_labels(samples.labels, model.outputs[0].shape[-1])
    initialize(model, config.run.seed)
    task = Task(
        model=model,
        optimizer=make_optimizer(config.optimizer, config.schedule, end),
        loss=losses.LOSSES[config.train.loss],
        metrics={"accuracy": losses.accuracy},
        augmentation=augmentation,
        accumulate=config.train.accumulate,
        seed=config.run.seed,
    )
    return Setup(task, order, end, *splits)


def _check_labels(labels: np.ndarray, classes: int) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"labels must be integers [samples], not {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, but the model has {classes} classes"
        )


def run_classifier(run: Run, setup: Setup, preparation: Mapping[str, Any] | None = None) -> int:
    """Trains, evaluates or exports a classifier, depending on the run's mode; returns the exit status.

    `preparation` says how inputs are prepared, for `export.json`.
    """
    if run.mode == "eval":
        return evaluate_checkpoint(run, setup)
    if run.mode == "export":
        return export_checkpoint(run, setup, preparation or {})
    trainer = KerasTrainer(run, setup)
    trainer.fit()
    return trainer.finish(lambda: score_classifier(trainer.backend, setup.test))


def score_classifier(
    backend: Backend, samples: Samples, worst_to: Callable[[str], Path] | None = None
) -> dict[str, Any]:
    """Loss, accuracy, per-class accuracy and confusion matrix (rows: true, columns: predicted).

    The worst-classified images are saved for the report, where `worst_to` puts them: `Run.claim`.
    """
    means, logits = evaluate(backend, samples)
    if worst_to is not None:
        _save_worst(worst_to, samples, logits)
    return {**means, **class_tables(samples.labels, logits.argmax(axis=1), logits.shape[1])}


def _save_worst(claim: Callable[[str], Path], samples: Samples, logits: np.ndarray) -> None:
    """Saves the misclassified images whose true class got the lowest probability, worst first."""
    labels, predictions = samples.labels, logits.argmax(axis=1)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    of_truth = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predictions != labels)
    for rank, index in enumerate(wrong[np.argsort(of_truth[wrong], kind="stable")][:WORST], 1):
        true, chance = labels[index], of_truth[index]
        caption = f"{true} → {predictions[index]}\np({true}) = {chance:{'.0e' if chance < 1e-3 else '.3f'}}"
        texts = PngImagePlugin.PngInfo()  # the report shows them next to the image
        texts.add_itxt("Title", "Worst-classified test images: true → predicted class")
        texts.add_itxt("Description", caption)
        Image.fromarray(samples.images[index]).save(claim(f"images/test_worst_{rank:02d}.png"), pnginfo=texts)


def evaluate_checkpoint(run: Run, setup: Setup) -> int:
    """Evaluates the validation and test sets, writes `eval.json` and returns the exit status.

    On data other than the training data, only the test set, since no validation set was held out of it.
    """
    backend = backend_of(run, setup)
    load_checkpoint(backend, run.resumed)
    result: dict[str, Any] = {"checkpoint": str(run.resumed.path), "data": run.data}
    if run.trained_on_this_data() and len(setup.validation):
        result["val"] = evaluate(backend, setup.validation)[0]
    result["test"] = score_classifier(backend, setup.test)
    write_json(run.claim("eval.json"), result)
    for split in ("val", "test"):
        if split in result:
            print(f"{split}: " + "  ".join(f"{k} {result[split][k]:.6f}" for k in ("loss", "accuracy")))
    print(run.directory / "eval.json")
    return 0


def export_checkpoint(run: Run, setup: Setup, preparation: Mapping[str, Any]) -> int:
    """Writes the model and `export.json`, which describes it, into ``export/``; returns the exit status."""
    backend = backend_of(run, setup)
    load_checkpoint(backend, run.resumed)
    model = setup.task.model
    _, outputs = evaluate(backend, setup.test)
    directory = run.directory / "export"
    with run.new_directory("export") as temporary:
        files = export_model(model, temporary, setup.test.inputs[:COMPARED], outputs[:COMPARED])
        content = {
            "checkpoint": str(run.resumed.path),
            "files": files,
            "input": f"float32 {_with_batch(model.inputs[0].shape)}",
            "output": f"logits {_with_batch(model.outputs[0].shape)}",
            **preparation,
        }
        write_json(temporary / "export.json", content)
    for name in [*files, "export.json"]:
        print(directory / name)
    return 0


def _with_batch(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join(['batch', *map(str, shape[1:])])}]"
