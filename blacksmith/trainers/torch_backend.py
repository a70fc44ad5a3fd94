"""The Keras trainer on PyTorch: forward and backward are traced once into a flat graph.

A call of a small Keras model takes longer than its arithmetic. The model is therefore traced into bare tensor
operations, which run without Keras and autograd. Computing and applying gradients are separate steps, so that
gradients can be summed over processes in between. Lightning's loop calls both as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import torch
from keras import ops
from torch import Tensor

from blacksmith.run.order import Block
from blacksmith.trainers.backend_state import (
    added_loss,
    assign_state,
    check_parts,
    draw_augmentation,
    evaluate_in_batches,
    read_state,
    seed_states,
    step_seeds,
)
from blacksmith.trainers.task import Backend, Task
from blacksmith.trainers.torch_graph import Tensors, simplify, trace
from blacksmith.trainers.torch_optimizer import make_optimizer_step, write_back


class TorchBackend(Backend):
    """Runs a `Task` on PyTorch; `notify` takes lines for the user.

    Training inputs are [samples, ...] and labels [samples]. Weights and slots that the optimizer updates in
    place are the tensors of the Keras variables themselves; `sync` copies back those that it replaces.

    Raises:
      ValueError: the model has a random layer that cannot be traced.
    """

    def __init__(
        self, task: Task, inputs: np.ndarray, labels: np.ndarray, notify: Callable[[str], None] = print
    ) -> None:
        self.task = task
        self._device = task.model.trainable_variables[0].value.device
        self._inputs = torch.from_numpy(np.ascontiguousarray(inputs)).to(self._device)
        self._labels = torch.from_numpy(labels.astype(np.int64)).to(self._device)
        self._random = self._has_random_layers()
        self._graph: Callable[..., Any] | None = None
        self._pull()
        self._optimizer = make_optimizer_step(task, notify)

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        rows = self.rows(block, step)
        plan = self._optimizer.plan(step, len(block.indices))
        losses, outputs, labels = [], [], []
        with torch.no_grad():
            for i, row in enumerate(rows):
                loss, output, y, gradients = self.gradients(row)
                self.apply(gradients, plan[i])
                losses.append(loss)
                outputs.append(output)
                labels.append(y)
            return self.values(losses, outputs, labels, block.weights)

    def rows(self, block: Block, step: int) -> list[tuple[Any, ...]]:
        """What `gradients` needs for each step: indices, weights, augmentation or None, seed."""
        count, batch = block.indices.shape
        indices = torch.from_numpy(block.indices.astype(np.int64)).to(self._device).unbind(0)
        weights = torch.from_numpy(block.weights).to(self._device).unbind(0)
        drawn = draw_augmentation(self.task, step, count, batch)
        augmentation: Sequence[Any] = [None] * count
        if drawn is not None:
            augmentation = torch.from_numpy(drawn).to(self._device).unbind(0)
        # Some of PyTorch's generators take signed and some unsigned 64-bit seeds; 63 bits fit both.
        seeds = (step_seeds(self.task.seed, step, count) >> np.uint64(1)).tolist()
        return list(zip(indices, weights, augmentation, seeds))

    def gradients(self, row: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        """Forward and backward of one batch; changes no trainable weight.

        Returns:
          The loss [], the outputs [batch, ...], the labels [batch], and the gradients in the order of the
          model's trainable variables.
        """
        indices, weights, augmentation, seed = row
        x = self._inputs.index_select(0, indices)
        y = self._labels.index_select(0, indices)
        drawn = [] if augmentation is None else [augmentation]
        parts = self._parts([x, y, weights, *drawn])
        if self._graph is None:
            # One graph serves every step: a ragged last batch is padded to the shape of the others with
            # samples of weight 0.
            self._graph = simplify(trace(self._forward_backward, (self._trainable, self._fixed, parts[0])))
        if self._random:
            # After tracing, which draws random numbers too: a resumed run traces at a different step, but
            # must get the same masks.
            self._reseed(seed)
        if len(parts) == 1:
            return self._part(parts[0])
        done = [self._part(part) for part in parts]
        total = done[0][3]
        for _, _, _, more in done[1:]:
            torch._foreach_add_(total, more)
        loss = torch.stack([d[0] for d in done]).sum()
        return loss, torch.cat([d[1] for d in done]), y, total

    def plan(self, step: int, count: int) -> list[Any]:
        """What `apply` needs for each of `count` steps starting at `step`."""
        return self._optimizer.plan(step, count)

    def apply(self, gradients: Tensors, planned: Any) -> None:
        """One optimizer step with `gradients`."""
        self._optimizer.apply(self._trainable, gradients, planned)

    def values(
        self, losses: Tensors, outputs: Tensors, labels: Tensors, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Loss and metrics of several steps, float32 [steps]; one transfer per name."""
        steps, batch = weights.shape
        found = {"loss": torch.stack(losses).cpu().numpy()}
        if self.task.metrics:
            y, output = torch.cat(labels), torch.cat(outputs)
            for name, metric in self.task.metrics.items():
                per_sample = metric(y, output).cpu().numpy().reshape(steps, batch)
                found[name] = (per_sample * weights).sum(axis=1, dtype=np.float32)
        return found

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:

        def forward(inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
            x = torch.from_numpy(np.ascontiguousarray(inputs)).to(self._device)
            y = torch.from_numpy(labels.astype(np.int64)).to(self._device)
            outputs = ops.cast(self.task.model(x, training=False), "float32")
            values = self.task.per_sample(y, outputs)
            return {name: v.cpu().numpy() for name, v in values.items()}, outputs.cpu().numpy()

        self.sync()
        with torch.no_grad():
            return evaluate_in_batches(forward, inputs, labels)

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        first = Block(block.indices[:1], block.weights[:1], block.epoch, block.cursor)
        fixed = [t.clone() for t in self._fixed]
        with torch.no_grad():
            _, _, _, gradients = self.gradients(self.rows(first, step)[0])
        self._fixed = fixed
        found = {}
        for v, w, g in zip(self.task.model.trainable_variables, self._trainable, gradients):
            # A copy, because on the CPU the array would share the weights' memory and change with the next
            # step.
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

    def _pull(self) -> None:
        model = self.task.model
        self._trainable = [v.value.detach() for v in model.trainable_variables]
        self._fixed = [v.value.detach() for v in model.non_trainable_variables]

    def _parts(self, columns: Tensors) -> list[Tensors]:
        """The columns of a batch, split into its `accumulate` parts."""
        parts = self.task.accumulate
        if parts == 1:
            return [columns]
        check_parts(parts, len(columns[0]))
        return [list(part) for part in zip(*(column.chunk(parts) for column in columns))]

    def _part(self, part: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        loss, outputs, *rest = self._graph(*self._trainable, *self._fixed, *part)
        count = len(self._trainable)
        self._fixed = rest[count:]
        return loss, outputs, part[1], rest[:count]

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
        # Layers without their own seed draw from PyTorch's generator, so their Keras seed states must not
        # change.
        new_fixed = [
            old if id(v) in seeds else new.detach()
            for v, old, new in zip(task.model.non_trainable_variables, fixed, new_fixed)
        ]
        return loss, outputs.detach(), gradients, new_fixed

    def _has_random_layers(self) -> bool:
        """Whether the model draws random numbers in training; only PyTorch's own generator is allowed.

        The state of any other generator would be a constant in the graph: every step would draw the same
        numbers.
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
