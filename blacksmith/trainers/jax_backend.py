"""The Keras trainer on JAX: a block of steps is one compiled loop over device-resident data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from blacksmith.run.order import Block
from blacksmith.trainers.backend import (
    Task,
    added_loss,
    assign_state,
    check_parts,
    draw_augmentation,
    read_state,
    seed_states,
    step_seeds,
)

_EVALUATION_BATCH = 1000


class JaxBackend:
    """Runs a `Task` on JAX.

    One program serves every block: it runs the first `count` of `block_steps` rows, so that a shorter block
    compiles nothing new and gives the same bits.
    """

    def __init__(self, task: Task, inputs: np.ndarray, labels: np.ndarray, block_steps: int = 128) -> None:
        self.task = task
        self._inputs = jnp.asarray(inputs)
        self._labels = jnp.asarray(labels)
        self._capacity = block_steps
        self._seeds = [
            i
            for i, v in enumerate(task.model.non_trainable_variables)
            if any(v is s for s in seed_states(task.model))
        ]
        self._run = jax.jit(self._block, donate_argnums=0)
        self._forward = jax.jit(self._evaluation_batch)
        self._gradients = jax.jit(self._gradients_of)
        self._pull()

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """See `Backend.train_block`."""
        count = len(block.indices)
        if count > self._capacity:
            raise ValueError(f"a block of {count} steps is longer than block_steps = {self._capacity}")
        rows = self._rows(block, step, self._capacity)
        self._state, values = self._run(self._state, self._inputs, self._labels, rows, count)
        # JAX sorts the keys of dictionaries; the loss comes first.
        return {name: np.asarray(values[name])[:count] for name in ("loss", *self.task.metrics)}

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """See `Backend.evaluate`."""
        trainable, fixed, _ = self._state
        values: list[dict[str, Any]] = []
        outputs = []
        for start in range(0, len(inputs), _EVALUATION_BATCH):
            x, y = (
                inputs[start : start + _EVALUATION_BATCH],
                labels[start : start + _EVALUATION_BATCH],
            )
            missing = _EVALUATION_BATCH - len(x)
            if missing:
                x = np.concatenate([x, np.repeat(x[:1], missing, 0)])
                y = np.concatenate([y, np.repeat(y[:1], missing, 0)])
            one, output = self._forward(trainable, fixed, x, y)
            real = _EVALUATION_BATCH - missing
            values.append({k: np.asarray(v)[:real] for k, v in one.items()})
            outputs.append(np.asarray(output)[:real])
        return {
            k: np.concatenate([v[k] for v in values]) for k in ("loss", *self.task.metrics)
        }, np.concatenate(outputs)

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """See `Backend.distributions`."""
        rows = jax.tree.map(lambda a: a[0], self._rows(block, step, 1))
        gradients = self._gradients(self._state, self._inputs, self._labels, rows)
        found = {}
        for v, w, g in zip(self.task.model.trainable_variables, self._state[0], gradients):
            found[f"weights/{v.path}"] = np.asarray(w)
            found[f"gradients/{v.path}"] = np.asarray(g)
        return found

    def state(self) -> dict[str, np.ndarray]:
        """See `Backend.state`."""
        self.sync()
        return read_state(self.task)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Backend.load_state`."""
        assign_state(self.task, state)
        self._pull()

    def sync(self) -> None:
        """See `Backend.sync`."""
        # Copies: the next block gives its own buffers away.
        trainable, fixed, slots = jax.tree.map(jnp.copy, self._state)
        model, optimizer = self.task.model, self.task.optimizer
        for variables, values in (
            (model.trainable_variables, trainable),
            (model.non_trainable_variables, fixed),
            (optimizer.variables, slots),
        ):
            for variable, value in zip(variables, values):
                variable.assign(value)

    def _pull(self) -> None:
        model, optimizer = self.task.model, self.task.optimizer
        self._state = jax.tree.map(
            jnp.copy,
            (
                [v.value for v in model.trainable_variables],
                [v.value for v in model.non_trainable_variables],
                [v.value for v in optimizer.variables],
            ),
        )

    def _rows(self, block: Block, step: int, capacity: int) -> dict[str, np.ndarray]:
        """The block's indices, weights, seeds and augmentation, padded to `capacity` steps."""
        count, batch = block.indices.shape
        rows = {
            "indices": block.indices,
            "weights": block.weights,
        }
        if self._seeds:
            rows["seeds"] = step_seeds(self.task.seed, step, count)[:, None].view(np.uint32)
        augmentation = draw_augmentation(self.task, step, count, batch)
        if augmentation is not None:
            rows["augmentation"] = augmentation

        def fit(a: np.ndarray) -> np.ndarray:
            if len(a) >= capacity:
                return a[:capacity]
            return np.concatenate([a, np.zeros((capacity - len(a), *a.shape[1:]), a.dtype)])

        return {name: fit(a) for name, a in rows.items()}

    def _block(
        self, state: Any, inputs: jax.Array, labels: jax.Array, rows: dict, count: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        capacity = rows["indices"].shape[0]
        names = ["loss", *self.task.metrics]
        values = {name: jnp.zeros(capacity, jnp.float32) for name in names}

        def body(i: jax.Array, carry: Any) -> Any:
            state, values = carry
            row = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), rows)
            state, one = self._step(state, inputs, labels, row)
            update = jax.lax.dynamic_update_index_in_dim
            return state, {k: update(values[k], one[k], i, 0) for k in values}

        return jax.lax.fori_loop(0, count, body, (state, values))

    def _step(
        self, state: Any, inputs: jax.Array, labels: jax.Array, row: dict
    ) -> tuple[Any, dict[str, jax.Array]]:
        gradients, fixed, one = self._part_gradients(state, inputs, labels, row)
        trainable, slots = self.task.optimizer.stateless_apply(state[2], gradients, state[0])
        return (trainable, fixed, slots), one

    def _part_gradients(
        self, state: Any, inputs: jax.Array, labels: jax.Array, row: dict
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        """Gradients and values of one batch, summed over its `accumulate` parts."""
        trainable, fixed, _ = state
        fixed = list(fixed)
        for number, index in enumerate(self._seeds):
            fixed[index] = jax.random.fold_in(row["seeds"], number).astype(fixed[index].dtype)
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        per_sample = {k: v for k, v in row.items() if k != "seeds"}
        parts = self.task.accumulate
        check_parts(parts, len(row["indices"]))
        total, values = None, None
        for part in range(parts):
            size = per_sample["indices"].shape[0] // parts
            columns = jax.tree.map(lambda a: a[part * size : (part + 1) * size], per_sample)  # noqa: B023
            (loss, (fixed, one)), g = gradient(trainable, fixed, inputs, labels, columns)
            one = {"loss": loss, **one}
            total = g if total is None else jax.tree.map(jnp.add, total, g)
            values = one if values is None else jax.tree.map(jnp.add, values, one)
        return total, fixed, values

    def _gradients_of(self, state: Any, inputs: jax.Array, labels: jax.Array, row: dict) -> Any:
        return self._part_gradients(state, inputs, labels, row)[0]

    def _loss(
        self, trainable: Any, fixed: Any, inputs: jax.Array, labels: jax.Array, columns: dict
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        task = self.task
        # The order makes no index out of bounds; checking each costs time.
        x, y = (a.at[columns["indices"]].get(mode="promise_in_bounds") for a in (inputs, labels))
        if task.augmentation is not None:
            x = task.augmentation.apply(x, columns["augmentation"])
        outputs, fixed, added = task.model.stateless_call(
            trainable, fixed, x, training=True, return_losses=True
        )
        outputs = ops.cast(outputs, "float32")
        weights = columns["weights"]
        loss = jnp.sum(task.loss(y, outputs) * weights)
        if added:
            loss += added_loss(added) * jnp.sum(weights)
        values = {name: jnp.sum(f(y, outputs) * weights) for name, f in task.metrics.items()}
        return loss, (fixed, values)

    def _evaluation_batch(
        self, trainable: Any, fixed: Any, x: jax.Array, y: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        task = self.task
        outputs, _ = task.model.stateless_call(trainable, fixed, x, training=False)
        outputs = ops.cast(outputs, "float32")
        values = {"loss": task.loss(y, outputs)}
        values |= {name: f(y, outputs) for name, f in task.metrics.items()}
        return values, outputs
