"""The training loop for any Keras 3 model, on JAX or PyTorch.

A backend runs blocks of steps as one compiled call; `run/loop.py` decides what happens between blocks.
Lightning, which owns its loop, calls the same `log` and `loop.between`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import keras
import numpy as np
import pydantic
from safetensors.numpy import load_file, save_file

from blacksmith.errors import CheckpointError, ConfigError, DataError
from blacksmith.run.checkpoint import Saved
from blacksmith.run.loop import Loop
from blacksmith.run.order import EMPTY_DIGEST, Block, Order, chain_digest
from blacksmith.run.run import Run
from blacksmith.trainers.finite import check_finite
from blacksmith.trainers.initial_weights import weights_sha256
from blacksmith.trainers.task import Backend, Task

ARRAYS = "arrays.safetensors"
Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Samples:
    """Prepared `inputs` [samples, ...], `labels` [samples, ...], and original `images`, if there are any.

    Raises:
      DataError: there are not as many labels as inputs.
    """

    inputs: np.ndarray
    labels: np.ndarray
    images: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(f"there are {len(self.inputs):,} inputs but {len(self.labels):,} labels")

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and for how long."""

    task: Task
    order: Order  # the batches of `train`
    end: int  # the last optimizer step
    train: Samples
    validation: Samples  # evaluated during training; may be empty
    test: Samples  # evaluated once, at the end


class KerasTrainer:
    """Trains one model in one run directory; resumes from `run.resumed` if set.

    Raises:
      CheckpointError: the checkpoint does not fit the model or optimizer.
      ValueError: a layer would see the padding of a batch, or a batch has no equal parts to accumulate.
    """

    def __init__(self, run: Run, setup: Setup) -> None:
        self.run, self.setup = run, setup
        _check_batches(setup.task, setup.order)
        self.backend = backend_of(run, setup)
        if run.resumed is None:
            model = {k: v for k, v in self.backend.state().items() if k.startswith("model/")}
            self._hashes = {"initial_weights_sha256": weights_sha256(model), "order_sha256": EMPTY_DIGEST}
        else:
            load_checkpoint(self.backend, run.resumed)
            names = ("initial_weights_sha256", "order_sha256")
            self._hashes = {name: run.resumed.value(name, Sha256) for name in names}
        self.loop = Loop(
            run,
            setup.order,
            end=setup.end,
            validate=self._validate if len(setup.validation) else None,
            save=self._save,
            learning_rate=self._learning_rate,
            histograms=self._histograms,
            examples_of=self._examples_of,
        )

    def fit(self) -> None:
        """Trains to the end, or until the run is stopped."""
        for step, steps in self.loop.blocks(self.run.config.train.block_steps):
            block = self.setup.order.block(step, steps)
            self.log(block, self.backend.train_block(block, step))

    def log(self, block: Block, values: Mapping[str, Any]) -> None:
        """Logs the loss and metrics of the steps of `block`, float32 [steps] each."""
        self._hashes["order_sha256"] = chain_digest(self._hashes["order_sha256"], block.indices)
        self.loop.log(values)

    def finish(self, test: Callable[[], Mapping[str, Any]]) -> int:
        """Tests the best checkpoint if training is done and writes the result; returns the exit status."""

        def test_checkpoint(saved: Saved) -> Mapping[str, Any]:
            load_checkpoint(self.backend, saved)
            return test()

        self.loop.between()  # so that the hash of the batches below covers the last step
        parameters = self.setup.task.model.count_params()
        return self.loop.finish(test_checkpoint, {"parameters": parameters, **self._hashes})

    def _validate(self) -> dict[str, float]:
        return evaluate(self.backend, self.setup.validation)[0]

    def _save(self, directory: Path) -> dict[str, str]:
        save_file(self.backend.state(), directory / ARRAYS)
        return self._hashes

    def _histograms(self) -> dict[str, np.ndarray]:
        step = self.loop.step
        return self.backend.distributions(self.setup.order.block(step, 1), step)

    def _learning_rate(self, step: int) -> float:
        rate = self.setup.task.optimizer._learning_rate
        return float(rate(step)) if callable(rate) else float(rate)

    def _examples_of(self, step: int) -> str:
        rows = self.setup.order.block(step, 1).indices[0]
        return f"training samples {', '.join(map(str, rows[:4]))}, ..."


def backend_of(run: Run, setup: Setup) -> Backend:
    """The backend of the framework that Keras runs on, with the training data on its device."""
    task, train = setup.task, setup.train
    if keras.config.backend() == "jax":
        from blacksmith.trainers.jax_backend import JaxBackend

        return JaxBackend(task, train.inputs, train.labels, run.config.train.block_steps)
    from blacksmith.trainers.torch_backend import TorchBackend

    notify = print if run.mode == "train" else lambda line: None
    return TorchBackend(task, train.inputs, train.labels, notify)


def evaluate(backend: Backend, samples: Samples) -> tuple[dict[str, float], np.ndarray]:
    """Mean loss and metrics over `samples`, and the outputs [samples, ...].

    Raises `NotFinite` if an output is not finite: an accuracy of it would look like one.
    """
    values, outputs = backend.evaluate(samples.inputs, samples.labels)
    check_finite(backend, samples.inputs, outputs, values)
    return {name: float(np.mean(v, dtype=np.float64)) for name, v in values.items()}, outputs


def load_checkpoint(backend: Backend, saved: Saved) -> None:
    """Loads a checkpoint's weights and optimizer slots; `CheckpointError` if they do not fit."""
    try:
        backend.load_state(load_file(saved.file(ARRAYS)))
    except ValueError as error:
        raise CheckpointError(f"{saved.path} does not fit this configuration: {error}") from error


def _check_batches(task: Task, order: Order) -> None:
    """Refuses batches that have no equal parts, and layers that would see the padding of a ragged batch."""
    if order.batch % task.accumulate:
        raise ValueError(f"accumulate = {task.accumulate} does not divide the batch of {order.batch} samples")
    if order.size % order.batch == 0:
        return
    for layer in task.model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) or layer.activity_regularizer is not None:
            raise ConfigError(
                f"the layer {layer.name!r} would see the padding of the last batch: {order.size} samples are "
                f"not a multiple of the batch size {order.batch}; choose one that divides them, or leave the "
                "last batch out with drop_last=True"
            )
