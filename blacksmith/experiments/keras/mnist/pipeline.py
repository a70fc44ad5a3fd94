"""What the MNIST experiments share: prepared data, model, optimiser, final test and export.

`keras/mnist` and `lightning/mnist` differ in who runs the loop; everything before and after it is here.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from blacksmith.config.settings import check_same_decay
from blacksmith.datasets import mnist
from blacksmith.errors import ConfigError
from blacksmith.experiments.keras.mnist.augmentation import ShiftAndRotate
from blacksmith.experiments.keras.mnist.configs import Config, Data
from blacksmith.files import write_json
from blacksmith.models.keras.mnist.mlp import mlp
from blacksmith.run.order import Order
from blacksmith.run.run import STOPPED, Run
from blacksmith.trainers import losses
from blacksmith.trainers.export import export_stablehlo, export_torch
from blacksmith.trainers.initial_weights import initialize
from blacksmith.trainers.keras_trainer import (
    KerasTrainer,
    Samples,
    evaluate,
    load_checkpoint,
    make_backend,
    make_plan,
)
from blacksmith.trainers.optimizers import make_optimizer
from blacksmith.trainers.task import Backend, Task

WORST = 48


@dataclass(frozen=True)
class Pipeline:
    """Everything that a run works with, ready to train.

    Attributes:
      data: the images as they were read.
      task: model, optimiser, loss.
      backend: holds the training data and the weights.
      order: the batches.
      total_steps: where training ends.
      validation: prepared validation samples.
    """

    data: mnist.Mnist
    task: Task
    backend: Backend
    order: Order
    total_steps: int
    validation: Samples


def prepare(run: Run) -> Pipeline:
    """Loads the data, builds the model with its initial weights, and puts both on the device.

    Raises:
      ConfigError: a batch is larger than the training set.
      DataError: the data is missing, broken, or not what a resumed run was trained on.
    """
    config: Config = run.config
    data = load_data(run)
    train = samples(data.train, config.data)
    if config.train.batch_size > len(train):
        raise ConfigError(
            f"mnist.Train.batch_size = {config.train.batch_size} is more than {len(train)} training samples"
        )
    order = Order(len(train), config.train.batch_size, config.run.seed)
    total_steps = config.train.steps or config.train.epochs * order.steps_per_epoch
    task = make_task(config, data.num_classes, total_steps)
    say = print if run.mode == "train" else lambda line: None
    backend = make_backend(task, train.inputs, train.labels, block_steps=config.train.block_steps, say=say)
    return Pipeline(data, task, backend, order, total_steps, samples(data.validation, config.data))


def load_data(run: Run) -> mnist.Mnist:
    """Loads what `mnist.Data` names and records it with the run."""
    settings: Data = run.config.data
    data = mnist.load(
        settings.source,
        settings.path,
        name=settings.name,
        validation=settings.validation,
        seed=run.config.run.seed,
    )
    run.use_data(data.info, mnist.describe(data.info))
    return data


def samples(split: mnist.Split, settings: Data) -> Samples:
    """Pixels as ``(pixel / scale - mean) / std``: inputs float32 [samples, 28, 28]."""
    inputs = split.images.astype(np.float32)
    inputs *= np.float32(1 / (settings.scale * settings.std))
    if settings.mean:
        inputs -= np.float32(settings.mean / settings.std)
    return Samples(inputs, split.labels.astype(np.int32))


def make_task(config: Config, num_classes: int, total_steps: int) -> Task:
    """The model with its initial weights, its optimiser and its loss."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(config.train.precision)
    model = mlp(
        config.model.hidden,
        activation=config.model.activation,
        dropout=config.model.dropout,
        bias=config.model.bias,
        num_classes=num_classes,
    )
    initialize(model, config.run.seed)
    augmentation = None
    if config.data.shift or config.data.rotate:
        background = -config.data.mean / config.data.std
        augmentation = ShiftAndRotate(config.data.shift, config.data.rotate, background)
    return Task(
        model=model,
        optimizer=make_optimizer(config.optimizer, config.schedule, total_steps),
        loss=losses.LOSSES[config.train.loss],
        metrics={"accuracy": losses.accuracy},
        augmentation=augmentation,
        accumulate=config.train.accumulate,
        seed=config.run.seed,
    )


def make_trainer(run: Run, pipeline: Pipeline, *, progress: str | None = None) -> KerasTrainer:
    """The loop over `pipeline`, at the checkpoint that the run goes on from.

    Args:
      run: the run.
      pipeline: from `prepare`.
      progress: style of the console progress instead of ``Log.progress``.
    """
    if run.resumed is not None:
        before = run.resumed.state["config"]
        check_same_decay(run.config.schedule, before, pipeline.order.steps_per_epoch, pipeline.total_steps)
    plan = make_plan(pipeline.total_steps, run.config)
    trainer = KerasTrainer(
        pipeline.task,
        pipeline.backend,
        pipeline.order,
        plan if progress is None else dataclasses.replace(plan, progress=progress),
        pipeline.validation,
        run,
    )
    if trainer.finished:
        print(f"already finished at step {trainer.state.step}: testing again")
    return trainer


def conclude(run: Run, pipeline: Pipeline, trainer: KerasTrainer, status: str) -> int:
    """Tests the best checkpoint once training is done, and writes the result; returns the exit status."""
    state = trainer.state
    result: dict[str, Any] = {
        "step": state.step,
        "epoch": round(state.step / pipeline.order.steps_per_epoch, 4),
        "parameters": pipeline.task.model.count_params(),
        "initial_weights_sha256": state.initial_weights_sha256,
        "order_sha256": state.order_sha256,
        "best": {"metric": trainer.plan.metric, "value": state.best, "step": state.best_step},
        "final": dict(state.validation),
    }
    if status == "stopped":
        run.finish("stopped", result)
        print(f"stopped at step {state.step}; the same command with --workdir={run.directory} goes on")
        return STOPPED
    _ = run.metrics  # from here on the directory is this run's, also where no step was left to take
    saved = run.checkpoints.chosen()
    load_checkpoint(pipeline.backend, saved)
    result["tested_checkpoint"] = saved.path.name
    result["test"] = evaluate_test_set(pipeline, run.config.data, worst_to=run.directory / "worst.npz")
    values = {k: result["test"][k] for k in ("loss", "accuracy")}
    run.metrics.write(state.step, state.step / pipeline.order.steps_per_epoch, "test", values)
    run.finish("done", result)
    print(
        f"test accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f} "
        f"({saved.path.name}, {run.metrics.seconds:.1f} s)\n{run.directory / 'report.html'}"
    )
    return 0


def evaluate_test_set(pipeline: Pipeline, settings: Data, worst_to: Path | None = None) -> dict[str, Any]:
    """Evaluates on the test set.

    Args:
      pipeline: data, and the weights to test.
      settings: how the images are prepared.
      worst_to: a file for the worst-classified images, which the report shows.

    Returns:
      loss, accuracy, per-class accuracy and the confusion matrix (rows: true, columns: predicted).
    """
    data = pipeline.data
    means, logits = evaluate(pipeline.backend, samples(data.test, settings))
    labels = data.test.labels
    predictions = logits.argmax(axis=1)
    confusion = np.zeros((data.num_classes, data.num_classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    if worst_to is not None:
        _save_worst(worst_to, data.test, predictions, logits)
    counts = confusion.sum(axis=1)
    per_class = np.divide(confusion.diagonal(), counts, out=np.zeros(len(counts)), where=counts > 0)
    return {
        **means,
        "per_class_accuracy": per_class.tolist(),
        "confusion_matrix": confusion.tolist(),
    }


def _save_worst(path: Path, split: mnist.Split, predictions: np.ndarray, logits: np.ndarray) -> None:
    """Saves the misclassified images whose true class got the least probability, worst first."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    of_truth = probabilities[np.arange(len(split)), split.labels]
    wrong = np.flatnonzero(predictions != split.labels)
    worst = wrong[np.argsort(of_truth[wrong], kind="stable")][:WORST]
    np.savez(
        path,
        images=split.images[worst],
        labels=split.labels[worst],
        predictions=predictions[worst],
        probabilities=of_truth[worst],
    )


def evaluate_checkpoint(run: Run) -> int:
    """``--mode=eval``: the checkpoint on the validation and test sets, into `eval.json`.

    On other data than it was trained on only the test set counts: the validation set was held out of nothing.
    """
    pipeline = prepare(run)
    load_checkpoint(pipeline.backend, run.resumed)
    result: dict[str, Any] = {"checkpoint": str(run.resumed.path), "data": run.data}
    trained_on = run.resumed.state["data"]
    other = trained_on.get("sha256") != run.data["sha256"]
    if other:
        print(
            f"note: the model was trained on other data ({trained_on.get('source')} "
            f"{str(trained_on.get('sha256'))[:12]}); its training samples may be among these test samples",
            file=sys.stderr,
        )
    if len(pipeline.validation) and not other:
        result["val"] = evaluate(pipeline.backend, pipeline.validation)[0]
    result["test"] = evaluate_test_set(pipeline, run.config.data)
    write_json(run.directory / "eval.json", result)
    for split in ("val", "test"):
        if split in result:
            print(f"{split}: " + "  ".join(f"{k} {result[split][k]:.6f}" for k in ("loss", "accuracy")))
    print(run.directory / "eval.json")
    return 0


def export(run: Run) -> int:
    """``--mode=export``: the checkpoint's model as ``.keras`` and in the backend's own format.

    Writes into ``export/``: ``model.keras``; on JAX ``model.stablehlo`` (`jax.export`, any batch size);
    on PyTorch ``model.pt2`` (`torch.export`, any batch size); and ``export.json``, which says how inputs
    are prepared.
    """
    pipeline = prepare(run)
    load_checkpoint(pipeline.backend, run.resumed)
    pipeline.backend.sync()
    model = pipeline.task.model
    directory = run.directory / "export"
    directory.mkdir(exist_ok=True)
    model.save(directory / "model.keras")
    written = ["model.keras"]
    if run.backend == "jax":
        written.append(export_stablehlo(model, directory / "model.stablehlo").name)
    else:
        written.append(export_torch(model, directory / "model.pt2").name)
    settings = run.config.data
    write_json(
        directory / "export.json",
        {
            "checkpoint": str(run.resumed.path),
            "files": written,
            "input": "float32 [batch, 28, 28]",
            "output": f"logits [batch, {pipeline.data.num_classes}]",
            "preparation": "(pixel / scale - mean) / std",
            "scale": settings.scale,
            "mean": settings.mean,
            "std": settings.std,
        },
    )
    for name in [*written, "export.json"]:
        print(directory / name)
    return 0
