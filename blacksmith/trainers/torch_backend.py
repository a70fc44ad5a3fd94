"""The Keras trainer on PyTorch: forward and backward are traced once into a flat graph.

A call of a small Keras model takes longer than its arithmetic; the traced tensor operations run without Keras
and autograd.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import torch
from keras import ops
from torch import Tensor

from blacksmith.run.order import Block
from blacksmith.trainers.backend_state import (
    added_loss,
    assign_state,
    draw_augmentation,
    evaluate_in_batches,
    read_state,
    seed_states,
    step_seeds,
)
from blacksmith.trainers.task import Backend, Task
from blacksmith.trainers.torch_graph import Tensors, simplify, trace
from blacksmith.trainers.torch_optimizer import make_optimizer_step, write_back


class Row(NamedTuple):
    """The inputs of a step, apart from the data and the weights."""

    columns: tuple[Tensor, ...]  # indices int64 [batch], weights [batch], and augmentation, if there is any
    seed: int  # of PyTorch's generator
    planned: Any  # by the optimizer, see `torch_optimizer`


class Taken(NamedTuple):
    """The results of a step, from which `TorchBackend.values` makes the logged values."""

    loss: Tensor  # []
    outputs: Tensor  # [batch, ...]
    labels: Tensor  # [batch, ...]


class TorchBackend(Backend):
    """Runs a `Task` on PyTorch; `notify` takes lines for the user.

    Weights and slots that the optimizer updates in place are the tensors of the Keras variables themselves;
    `sync` copies back those that it replaces. Raises ValueError for a random layer that cannot be traced.
    """

    def __init__(
        self, task: Task, inputs: np.ndarray, labels: np.ndarray, notify: Callable[[str], None] = print
    ) -> None:
        self.task = task
        self._device = task.model.trainable_variables[0].value.device
        self._data = self._on_device(inputs), self._on_device(_wide(labels))
        self._random = self._has_random_layers()
        self._graph: Callable[..., Any] | None = None
        self._pull()
        self._optimizer = make_optimizer_step(task, notify)

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        return self.values([self.step(row) for row in self.rows(block, step)], block.weights)

    def rows(self, block: Block, step: int) -> list[Row]:
        """What `step` needs for each step of a block."""
        count, batch = block.indices.shape
        columns = [block.indices.astype(np.int64), block.weights]
        if self.task.augmentation is not None:
            columns.append(draw_augmentation(self.task, step, count, batch))
        tensors = [self._on_device(column).unbind(0) for column in columns]
        # Some of PyTorch's generators take signed and some unsigned 64-bit seeds; 63 bits fit both.
        seeds = (step_seeds(self.task.seed, step, count) >> np.uint64(1)).tolist()
        return list(map(Row, zip(*tensors), seeds, self._optimizer.plan(count)))

    def step(self, row: Row) -> Taken:
        """Trains on one batch."""
        with torch.no_grad():
            taken, gradients = self.gradients(row)
            self._optimizer.apply(self._trainable, gradients, row.planned)
        return taken

    def gradients(self, row: Row) -> tuple[Taken, Tensors]:
        """What `step` returns, and the gradients of the trainable variables; changes no trainable weight."""
        indices, *drawn = row.columns
        x, y = (data.index_select(0, indices) for data in self._data)
        columns, count = [x, y, *drawn], self.task.accumulate
        parts = [columns] if count == 1 else [list(p) for p in zip(*(c.chunk(count) for c in columns))]
        if self._graph is None:
            # One graph serves every step: a ragged last batch is padded with samples of weight 0.
            self._graph = simplify(trace(self._forward_backward, (self._trainable, self._fixed, parts[0])))
        if self._random:
            # After tracing, which draws random numbers too, and a resumed run traces at a different step.
            self._reseed(row.seed)
        if len(parts) == 1:
            return self._part(parts[0])
        done = [self._part(part) for part in parts]
        total = done[0][1]
        for _, more in done[1:]:
            torch._foreach_add_(total, more)
        loss = torch.stack([taken.loss for taken, _ in done]).sum()
        return Taken(loss, torch.cat([taken.outputs for taken, _ in done]), y), total

    def values(self, done: Sequence[Taken], weights: np.ndarray) -> dict[str, np.ndarray]:
        """Loss and metrics, float32 [steps], from what `step` returned; one transfer per name."""
        losses, outputs, labels = zip(*done)
        found = {"loss": torch.stack(losses).cpu().numpy()}
        if self.task.metrics:
            y, output = torch.cat(labels), torch.cat(outputs)
            for name, metric in self.task.metrics.items():
                per_sample = metric(y, output).cpu().numpy().reshape(weights.shape)
                found[name] = (per_sample * weights).sum(axis=1, dtype=np.float32)
        return found

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        def forward(inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
            x, y = self._on_device(inputs), self._on_device(_wide(labels))
            outputs = ops.cast(self.task.model(x, training=False), "float32")
            values = self.task.per_sample(y, outputs)
            return {name: v.cpu().numpy() for name, v in values.items()}, outputs.cpu().numpy()

        self.sync()
        with torch.no_grad():
            return evaluate_in_batches(forward, inputs, labels)

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        fixed = [t.clone() for t in self._fixed]
        with torch.no_grad():
            _, gradients = self.gradients(self.rows(block, step)[0])
        self._fixed = fixed
        found = {}
        for v, w, g in zip(self.task.model.trainable_variables, self._trainable, gradients):
            # A copy, because on the CPU the array would share the weights' memory.
            found[f"weights/{v.path}"] = np.array(w.detach().cpu())
            found[f"gradients/{v.path}"] = g.cpu().numpy()
        return found

    def state(self) -> dict[str, np.ndarray]:
        self.sync()
        return read_state(self.task)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        with torch.no_grad():
            assign_state(self.task, state)
        self._pull()
        self._optimizer.pull()

    def sync(self) -> None:
        with torch.no_grad():
            write_back(self.task.model.trainable_variables, self._trainable)
            write_back(self.task.model.non_trainable_variables, self._fixed)
            self._optimizer.sync()

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _pull(self) -> None:
        model = self.task.model
        self._trainable = [v.value.detach() for v in model.trainable_variables]
        self._fixed = [v.value.detach() for v in model.non_trainable_variables]

    def _part(self, part: Tensors) -> tuple[Taken, Tensors]:
        loss, outputs, *rest = self._graph(*self._trainable, *self._fixed, *part)
        count = len(self._trainable)
        self._fixed = rest[count:]
        return Taken(loss, outputs, part[1]), rest[:count]

    def _forward_backward(
        self, trainable: Tensors, fixed: Tensors, part: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        """The function that is traced; returns loss, outputs, gradients and new non-trainable values."""
        task = self.task
        x, y, weights, *augmentation = part
        with torch.enable_grad():
            # New leaves, so that autograd stops at the weights.
            trainable = [t.detach().requires_grad_(True) for t in trainable]
            if augmentation:
                x = task.augmentation.apply(x, augmentation[0])
            outputs, new_fixed, added = task.model.stateless_call(
                trainable, fixed, x, training=True, return_losses=True
            )
            outputs = ops.cast(outputs, "float32")
            # The loss is a weighted sum, so its backward pass starts with the weights themselves.
            terms, factors = [task.loss(y, outputs)], [weights]
            loss = (terms[0].detach() * weights).sum()
            if added:
                # In proportion to this part, so that the parts of a batch add it once in total.
                terms.append(added_loss(added))
                factors.append(weights.sum())
                loss = loss + terms[1].detach() * factors[1]
            gradients = torch.autograd.grad(terms, trainable, factors)
        # The fused kernel ignores strides, so a transposed gradient would be scrambled.
        gradients = [g.contiguous() for g in gradients]
        seeds = {id(v) for v in seed_states(task.model)}
        # Layers without their own seed draw from PyTorch's generator: their Keras seed states stay.
        new_fixed = [
            old if id(v) in seeds else new.detach()
            for v, old, new in zip(task.model.non_trainable_variables, fixed, new_fixed)
        ]
        return loss, outputs.detach(), gradients, new_fixed

    def _has_random_layers(self) -> bool:
        """Whether the model draws random numbers in training.

        Only PyTorch's own generator is allowed: the state of any other would be a constant in the graph.
        """
        found = False
        for layer in self.task.model._flatten_layers():
            # Keras gives every recurrent cell a generator that only its dropout uses.
            idle = getattr(layer, "recurrent_dropout", None) == 0 and layer.dropout == 0
            if not layer._seed_generators or idle:
                continue
            found = True
            plain = isinstance(layer, keras.layers.Dropout) and layer.noise_shape is None
            if not plain or layer.seed is not None:
                raise ValueError(
                    f"the layer {layer.name!r} draws from a Keras seed generator, which cannot be traced "
                    "on PyTorch; use keras.layers.Dropout without seed and noise_shape"
                )
        return found

    def _reseed(self, seed: int) -> None:
        # Only the generator in use: `torch.manual_seed` seeds all of them and takes 90 times as long.
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)
        elif self._device.type != "cpu":
            torch.manual_seed(seed)


def _wide(labels: np.ndarray) -> np.ndarray:
    """Integer labels as the int64 that PyTorch's indexing takes; other labels as they are."""
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
