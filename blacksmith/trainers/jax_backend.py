"""The Keras trainer on JAX: a block of steps is one compiled loop over device-resident data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from blacksmith.run.order import Block
from blacksmith.trainers.backend_state import (
    EVALUATION_BATCH,
    added_loss,
    assign_state,
    draw_augmentation,
    evaluate_in_batches,
    read_state,
    seed_states,
    step_seeds,
)
from blacksmith.trainers.task import Backend, Task

Arrays = dict[str, jax.Array]
Data = tuple[jax.Array, jax.Array]  # inputs and labels


class JaxBackend(Backend):
    """Runs a `Task` on JAX, in blocks of at most `block_steps` steps."""

    def __init__(self, task: Task, inputs: np.ndarray, labels: np.ndarray, block_steps: int = 128) -> None:
        self.task = task
        self._data = jnp.asarray(inputs), jnp.asarray(labels)
        self._capacity = block_steps
        seeds = {id(v) for v in seed_states(task.model)}
        self._seeds = [i for i, v in enumerate(task.model.non_trainable_variables) if id(v) in seeds]
        # Donating the state lets XLA update weights and slots in place instead of holding them twice.
        self._run = jax.jit(self._block, donate_argnums=0)
        self._forward = jax.jit(self._evaluation_batch)
        self._gradients = jax.jit(lambda *arguments: self._batch_gradients(*arguments)[0])
        self._pull()

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        count = len(block.indices)
        rows = self._rows(block, step, self._capacity)
        self._state, values = self._run(self._state, self._data, rows, count)
        # Sliced in NumPy, because JAX would compile a slice for every new length.
        return {name: np.asarray(values[name])[:count] for name in self.task.value_names}

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        trainable, fixed, _ = self._state

        def forward(x: np.ndarray, y: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
            count = len(x)
            if count < EVALUATION_BATCH:
                # Repeat samples to fill the only shape that is compiled.
                x, y = (np.resize(a, (EVALUATION_BATCH, *a.shape[1:])) for a in (x, y))
            values, outputs = self._forward(trainable, fixed, x, y)
            found = {name: np.asarray(values[name])[:count] for name in self.task.value_names}
            return found, np.asarray(outputs)[:count]

        return evaluate_in_batches(forward, inputs, labels)

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        rows = jax.tree.map(lambda a: a[0], self._rows(block, step, 1))
        gradients = self._gradients(self._state, self._data, rows)
        found = {}
        for v, w, g in zip(self.task.model.trainable_variables, self._state[0], gradients):
            found[f"weights/{v.path}"] = np.asarray(w)
            found[f"gradients/{v.path}"] = np.asarray(g)
        return found

    def state(self) -> dict[str, np.ndarray]:
        self.sync()
        return read_state(self.task)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        assign_state(self.task, state)
        self._pull()

    def sync(self) -> None:
        # Copies, because the next block donates, and so deletes, the arrays of the current state.
        for variables, values in zip(self._variables(), jax.tree.map(jnp.copy, self._state)):
            for variable, value in zip(variables, values):
                variable.assign(value)

    def _pull(self) -> None:
        # Copies here too, or donation would delete the arrays of the Keras variables.
        self._state = tuple([jnp.copy(v.value) for v in variables] for variables in self._variables())

    def _variables(self) -> tuple[list, list, list]:
        """The Keras variables of the state: trainable, non-trainable, optimizer."""
        model, optimizer = self.task.model, self.task.optimizer
        return model.trainable_variables, model.non_trainable_variables, optimizer.variables

    def _rows(self, block: Block, step: int, capacity: int) -> dict[str, np.ndarray]:
        """The block's indices, weights, seeds and augmentation, padded to `capacity` steps."""
        count, batch = block.indices.shape
        rows = {"indices": block.indices, "weights": block.weights}
        if self._seeds:
            rows["seeds"] = step_seeds(self.task.seed, step, count)[:, None].view(np.uint32)
        if self.task.augmentation is not None:
            rows["augmentation"] = draw_augmentation(self.task, step, count, batch)
        return {n: np.pad(a, [(0, capacity - count)] + [(0, 0)] * (a.ndim - 1)) for n, a in rows.items()}

    def _block(self, state: Any, data: Data, rows: Arrays, count: jax.Array) -> tuple[Any, Arrays]:
        """Runs the first `count` steps of `rows`.

        With `lax.scan`, `count` would be a shape. As a value, it lets one program run blocks of any length,
        so cutting an epoch into other blocks changes no bit.
        """
        capacity = rows["indices"].shape[0]
        values = {name: jnp.zeros(capacity, jnp.float32) for name in self.task.value_names}

        def body(i: jax.Array, carry: Any) -> Any:
            state, values = carry
            row = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), rows)
            gradients, fixed, one = self._batch_gradients(state, data, row)
            trainable, slots = self.task.optimizer.stateless_apply(state[2], gradients, state[0])
            update = jax.lax.dynamic_update_index_in_dim
            return (trainable, fixed, slots), {k: update(values[k], one[k], i, 0) for k in values}

        return jax.lax.fori_loop(0, count, body, (state, values))

    def _batch_gradients(self, state: Any, data: Data, row: Arrays) -> tuple[Any, Any, Arrays]:
        """Gradients, non-trainable variables and values of one batch, summed over its `accumulate` parts."""
        trainable, fixed, _ = state
        fixed = list(fixed)
        # Each random layer starts each step with its own seed, so that no generator has to be saved.
        for number, index in enumerate(self._seeds):
            fixed[index] = jax.random.fold_in(row["seeds"], number).astype(fixed[index].dtype)
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        per_sample = {k: v for k, v in row.items() if k != "seeds"}
        parts = self.task.accumulate
        size = len(row["indices"]) // parts
        total, values = None, None
        for start in range(0, size * parts, size):
            columns = {name: a[start : start + size] for name, a in per_sample.items()}
            (loss, (fixed, one)), g = gradient(trainable, fixed, data, columns)
            one = {"loss": loss, **one}
            # Plain sums, because the loss already contains the weights of the whole batch.
            total = g if total is None else jax.tree.map(jnp.add, total, g)
            values = one if values is None else jax.tree.map(jnp.add, values, one)
        return total, fixed, values

    def _loss(
        self, trainable: Any, fixed: Any, data: Data, columns: Arrays
    ) -> tuple[jax.Array, tuple[Any, Arrays]]:
        task = self.task
        # Indices of an `Order` are never out of bounds, and checking each of them takes time.
        x, y = (a.at[columns["indices"]].get(mode="promise_in_bounds") for a in data)
        if task.augmentation is not None:
            x = task.augmentation.apply(x, columns["augmentation"])
        outputs, fixed, added = task.model.stateless_call(
            trainable, fixed, x, training=True, return_losses=True
        )
        outputs = ops.cast(outputs, "float32")
        weights = columns["weights"]
        loss = jnp.sum(task.loss(y, outputs) * weights)
        if added:
            # In proportion to this part, so that the parts of a batch add it once in total.
            loss += added_loss(added) * jnp.sum(weights)
        values = {name: jnp.sum(f(y, outputs) * weights) for name, f in task.metrics.items()}
        return loss, (fixed, values)

    def _evaluation_batch(self, trainable: Any, fixed: Any, x: Any, y: Any) -> tuple[Arrays, jax.Array]:
        outputs, _ = self.task.model.stateless_call(trainable, fixed, x, training=False)
        outputs = ops.cast(outputs, "float32")
        return self.task.per_sample(y, outputs), outputs
