"""The optimizer step on PyTorch: Adam and AdamW in the fused kernel, all other optimizers traced.

Both classes have the same methods: `plan` prepares the next steps on the host, `apply` takes one step, `pull`
reads the state of the Keras optimizer, and `sync` writes it back.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
from keras import ops
from torch import Tensor

from blacksmith.errors import first_line
from blacksmith.trainers.task import Task
from blacksmith.trainers.torch_graph import Tensors, copies, trace


def make_optimizer_step(task: Task, notify: Callable[[str], None]) -> "FusedAdam | TracedOptimizer":
    """The fastest way to run the task's optimizer; `notify` takes a line that says which one was chosen."""
    reason = _why_not_fused(task.optimizer, task.model)
    name = type(task.optimizer).__name__
    if reason is None:
        notify(f"optimizer: {name} in PyTorch's fused kernel")
        return FusedAdam(task)
    notify(f"optimizer: {name} traced from Keras (fused kernel not used: {reason})")
    return TracedOptimizer(task, notify)


def _why_not_fused(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> str | None:
    """Why PyTorch's fused Adam kernel cannot replace this Keras optimizer, or None if it can."""
    if not isinstance(optimizer, keras.optimizers.Adam) or isinstance(optimizer, keras.optimizers.Nadam):
        return "not Adam or AdamW"
    variables, decay = model.trainable_variables, optimizer.weight_decay
    values = [v.value for v in variables]
    obstacles = {
        "AMSGrad": optimizer.amsgrad,
        "gradient clipping": optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue,
        "weight decay outside AdamW": decay and not isinstance(optimizer, keras.optimizers.AdamW),
        "weights excluded from weight decay": decay
        and not all(optimizer._use_weight_decay(v) for v in variables),
        "weight constraints": any(v.constraint is not None for v in variables),
        "weights that are not float32": any(value.dtype != torch.float32 for value in values),
        "weights that are transposed in memory": not all(value.is_contiguous() for value in values),
        "no such kernel on the device": any(v.device.type not in ("cpu", "cuda", "mps") for v in values),
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)


class FusedAdam:
    """Keras's Adam and AdamW in PyTorch's fused kernel, on Keras's own slots.

    Keras adds epsilon to sqrt(v) before the bias correction, PyTorch after it. With Keras's step size
    ``alpha = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)``, the kernel's update equals Keras's for
    ``lr' = alpha * (1 - beta_1^t) / sqrt(1 - beta_2^t)`` and ``eps' = epsilon / sqrt(1 - beta_2^t)``.
    """

    def __init__(self, task: Task) -> None:
        self._keras = task.optimizer
        self._decay = task.optimizer.weight_decay or 0.0
        self._kernel = torch._fused_adamw_ if self._decay else torch._fused_adam_
        self.pull()

    def pull(self) -> None:
        self._momentums = [v.value for v in self._keras._momentums]
        self._velocities = [v.value for v in self._keras._velocities]
        self._iteration = int(self._keras.iterations.value)
        self._steps = torch.tensor(float(self._iteration), device=self._momentums[0].device)

    def plan(self, count: int) -> list[tuple[float, float, float]]:
        """(lr', eps', weight decay') for each of the next `count` steps."""
        optimizer = self._keras
        iterations = np.arange(self._iteration, self._iteration + count)
        rate = optimizer._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            tensor = torch.from_numpy(iterations).to(self._steps.device)
            rates = ops.convert_to_numpy(rate(tensor)).astype(np.float32)
        else:
            rates = np.full(count, float(rate.value), np.float32)
        # alpha in float32, as in Keras, although it keeps only four or five digits of 1 - beta_2^t in the
        # first steps: with the more accurate float64 the loss is 1e-2 away from JAX's within 500 steps.
        one = np.float32(1)
        power_1 = _float32_power(optimizer.beta_1, iterations + 1)
        power_2 = _float32_power(optimizer.beta_2, iterations + 1)
        alpha = rates * np.sqrt(one - power_2) / (one - power_1)
        # The kernel computes its own bias correction in float64, so what cancels it must be float64 too.
        exact = (iterations + 1).astype(np.float64)
        root_2 = np.sqrt(1 - float(optimizer.beta_2) ** exact)
        kernel_rate = alpha.astype(np.float64) * (1 - float(optimizer.beta_1) ** exact) / root_2
        # The kernel shrinks weights by lr' * decay', Keras by lr * decay.
        with np.errstate(divide="ignore", invalid="ignore"):
            decay = np.where(kernel_rate > 0, self._decay * rates / kernel_rate, 0.0)
        return list(zip(kernel_rate.tolist(), (optimizer.epsilon / root_2).tolist(), decay.tolist()))

    def apply(self, trainable: Tensors, gradients: Tensors, planned: tuple[float, float, float]) -> None:
        """One step, in place."""
        rate, epsilon, decay = planned
        self._steps.add_(1)
        self._iteration += 1
        slots = (self._momentums, self._velocities, [], [self._steps] * len(trainable))
        settings = {"lr": rate, "eps": epsilon, "weight_decay": decay, "amsgrad": False, "maximize": False}
        beta_1, beta_2 = self._keras.beta_1, self._keras.beta_2
        self._kernel(trainable, gradients, *slots, beta1=beta_1, beta2=beta_2, **settings)

    def sync(self) -> None:
        """Writes the step count to the Keras optimizer; its slots were updated in place."""
        self._keras.iterations.assign(self._iteration)


def _float32_power(base: float, exponents: np.ndarray) -> np.ndarray:
    """Powers of a float32 base, rounded once; NumPy's own float32 power is off by several bits."""
    return (float(np.float32(base)) ** exponents.astype(np.float64)).astype(np.float32)


class TracedOptimizer:
    """Any Keras optimizer's own `stateless_apply`, traced once, or run eagerly if tracing fails."""

    def __init__(self, task: Task, notify: Callable[[str], None]) -> None:
        self._keras = task.optimizer
        self._notify = notify
        self._graph: Callable[..., Any] | None = None
        self.pull()

    def pull(self) -> None:
        self._slots = [v.value for v in self._keras.variables]

    def plan(self, count: int) -> list[None]:
        """Nothing: the graph computes everything from the iteration count in the slots."""
        return [None] * count

    def apply(self, trainable: Tensors, gradients: Tensors, planned: None) -> None:
        """One step; updates `trainable` in place or replaces its entries."""
        if self._graph is None:
            self._graph = self._trace((trainable, self._slots, gradients))
        new_trainable, new_slots = self._graph((trainable, self._slots, gradients))
        trainable[:] = new_trainable
        self._slots = list(new_slots)

    def sync(self) -> None:
        """Writes the slots to the Keras optimizer."""
        write_back(self._keras.variables, self._slots)

    def _trace(self, arguments: tuple[Tensors, ...]) -> Callable[..., Any]:
        """The graph of Keras's update for PyTorch, or else of Keras's backend-neutral update."""
        reason = ""
        for update in (self._update, self._neutral_update):
            try:
                graph = trace(update, arguments)
            except (RuntimeError, TypeError, AttributeError) as error:
                reason = reason or first_line(error)
                continue
            if _holds_later(graph, update, arguments):
                return graph
            reason = reason or "a value of the first step became a constant"
        self._notify(f"optimizer: {type(self._keras).__name__} cannot be traced ({reason}); runs eagerly")
        return lambda packed: self._update(*packed)

    def _update(self, trainable: Tensors, slots: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
        new_trainable, new_slots = self._keras.stateless_apply(slots, gradients, trainable)
        return list(new_trainable), list(new_slots)

    def _neutral_update(
        self, trainable: Tensors, slots: Tensors, gradients: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Keras's backend-neutral update.

        Some of its updates for PyTorch (SGD, Nadam) read tensor values on the host, which a graph cannot do.
        """
        optimizer = self._keras
        neutral = next(c for c in type(optimizer).__mro__ if c.__module__.startswith("keras.src.optimizers."))
        vars(optimizer)["_backend_update_step"] = partial(neutral._backend_update_step, optimizer)
        try:
            return self._update(trainable, slots, gradients)
        finally:
            del vars(optimizer)["_backend_update_step"]


def _holds_later(
    graph: Callable[..., Any], update: Callable[..., Any], arguments: tuple[Tensors, ...]
) -> bool:
    """Whether a traced update still equals the eager one a step later, with different gradients.

    It does not if Python computed with a tensor's value while tracing: the graph then holds the value of the
    first step, such as its learning rate, as a constant, without any error.
    """
    trainable, slots, gradients = copies(arguments)
    trainable, slots = update(trainable, slots, gradients)
    later = trainable, slots, [0.3 * g for g in arguments[2]]
    expected, found = update(*copies(later)), graph(copies(later))
    return all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for old, new in zip(expected, found)
        for a, b in zip(old, new)
    )


def write_back(variables: Sequence[keras.Variable], tensors: Sequence[Tensor]) -> None:
    """Copies tensors into Keras variables, except those that are the variable's own memory."""
    for variable, tensor in zip(variables, tensors):
        if variable.value.data_ptr() != tensor.data_ptr():
            variable.value.copy_(tensor)
