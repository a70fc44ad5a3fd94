"""The Keras trainer on PyTorch: forward and backward traced once into a flat graph, then Keras's optimiser.

Keras's own call costs more than the arithmetic of a small model. Its model is therefore traced once with
`make_fx` into the bare tensor operations, which run without Keras or autograd. Gradients and their
application are separate steps, so that gradients can be reduced between processes in between; Lightning uses
the same two. Adam and AdamW go through PyTorch's fused kernel, fed with Keras's slots and Keras's formula;
every other optimiser's own `stateless_apply` is traced likewise.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
from keras import ops
from torch.fx.experimental.proxy_tensor import make_fx

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
_ATEN = torch.ops.aten


class TorchBackend:
    """Runs a `Task` on PyTorch.

    The tensors of the Keras variables themselves are updated in place, where the optimiser's code does so;
    `sync` brings back those that it replaces.
    """

    def __init__(
        self,
        task: Task,
        inputs: np.ndarray,
        labels: np.ndarray,
        say: Callable[[str], None] = print,
    ) -> None:
        self.task = task
        self._say = say
        self._device = task.model.trainable_variables[0].value.device
        self._inputs = torch.from_numpy(np.ascontiguousarray(inputs)).to(self._device)
        self._labels = torch.from_numpy(labels.astype(np.int64)).to(self._device)
        self._check_random_layers()
        self._graph: Callable[..., Any] | None = None
        self._pull()
        self._optimizer = _make_optimizer_step(task, say)

    def train_block(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """See `Backend.train_block`."""
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
        """What `gradients` needs for each step: indices, weights, augmentation (or None), seed."""
        count, batch = block.indices.shape
        indices = torch.from_numpy(block.indices.astype(np.int64)).to(self._device).unbind(0)
        weights = torch.from_numpy(block.weights).to(self._device).unbind(0)
        drawn = draw_augmentation(self.task, step, count, batch)
        augmentation: Sequence[Any] = [None] * count
        if drawn is not None:
            augmentation = torch.from_numpy(drawn).to(self._device).unbind(0)
        # 63 bits: torch's CPU generator takes a signed or unsigned 64-bit number, this fits both.
        seeds = (step_seeds(self.task.seed, step, count) >> np.uint64(1)).tolist()
        return list(zip(indices, weights, augmentation, seeds))

    def gradients(
        self, row: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Forward and backward of one batch, without changing any weight.

        Returns:
          The loss [], the outputs [batch, ...], the labels [batch] and the gradients, in the order of the
          model's trainable variables.
        """
        indices, weights, augmentation, seed = row
        x = self._inputs.index_select(0, indices)
        y = self._labels.index_select(0, indices)
        drawn = [] if augmentation is None else [augmentation]
        parts = self._parts([x, y, weights, *drawn])
        if self._graph is None:
            self._graph = self._trace(self._arguments(parts[0]))
        if self._random:
            # After tracing, which draws as well: a resumed run has to see the masks it would have seen.
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
        """What `apply` needs for each of `count` steps from `step` on."""
        return self._optimizer.plan(step, count)

    def apply(self, gradients: list[torch.Tensor], planned: Any) -> None:
        """One optimiser step with `gradients`."""
        self._optimizer.apply(self._trainable, gradients, planned)

    def values(
        self,
        losses: list[torch.Tensor],
        outputs: list[torch.Tensor],
        labels: list[torch.Tensor],
        weights: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Loss and metrics of some steps as NumPy: float32 [steps]; one transfer for all of them."""
        steps, batch = weights.shape
        found = {"loss": torch.stack(losses).cpu().numpy()}
        if self.task.metrics:
            y, output = torch.cat(labels), torch.cat(outputs)
            for name, metric in self.task.metrics.items():
                per_sample = metric(y, output).cpu().numpy().reshape(steps, batch)
                found[name] = (per_sample * weights).sum(axis=1, dtype=np.float32)
        return found

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """See `Backend.evaluate`."""
        self.sync()
        task = self.task
        values: list[dict[str, np.ndarray]] = []
        outputs = []
        with torch.no_grad():
            for start in range(0, len(inputs), _EVALUATION_BATCH):
                end = start + _EVALUATION_BATCH
                x = torch.from_numpy(np.ascontiguousarray(inputs[start:end])).to(self._device)
                y = torch.from_numpy(labels[start:end].astype(np.int64)).to(self._device)
                output = ops.cast(task.model(x, training=False), "float32")
                one = {"loss": task.loss(y, output)}
                one |= {name: f(y, output) for name, f in task.metrics.items()}
                values.append({k: v.cpu().numpy() for k, v in one.items()})
                outputs.append(output.cpu().numpy())
        return {k: np.concatenate([v[k] for v in values]) for k in values[0]}, np.concatenate(outputs)

    def distributions(self, block: Block, step: int) -> dict[str, np.ndarray]:
        """See `Backend.distributions`."""
        first = Block(block.indices[:1], block.weights[:1], block.epoch, block.cursor)
        fixed = [t.clone() for t in self._fixed]
        with torch.no_grad():
            _, _, _, gradients = self.gradients(self.rows(first, step)[0])
        self._fixed = fixed
        found = {}
        for v, w, g in zip(self.task.model.trainable_variables, self._trainable, gradients):
            # A copy: on the CPU the array would be the weights themselves, and change with the next step.
            found[f"weights/{v.path}"] = np.array(w.detach().cpu())
            found[f"gradients/{v.path}"] = g.cpu().numpy()
        return found

    def state(self) -> dict[str, np.ndarray]:
        """See `Backend.state`."""
        self.sync()
        return read_state(self.task)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Backend.load_state`."""
        with torch.no_grad():
            assign_state(self.task, state)
        self._pull()
        self._optimizer.pull()

    def sync(self) -> None:
        """See `Backend.sync`."""
        with torch.no_grad():
            _write_back(self.task.model.trainable_variables, self._trainable)
            _write_back(self.task.model.non_trainable_variables, self._fixed)
            self._optimizer.sync()

    def _pull(self) -> None:
        model = self.task.model
        self._trainable = [v.value.detach() for v in model.trainable_variables]
        self._fixed = [v.value.detach() for v in model.non_trainable_variables]

    def _parts(self, columns: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The columns of a batch, cut into the parts that it is computed in."""
        parts = self.task.accumulate
        if parts == 1:
            return [columns]
        check_parts(parts, len(columns[0]))
        return [list(part) for part in zip(*(column.chunk(parts) for column in columns))]

    def _arguments(self, part: list[torch.Tensor]) -> tuple[Any, ...]:
        x, y, weights, *drawn = part
        return self._trainable, self._fixed, x, y, weights, drawn

    def _part(
        self, part: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        trainable, fixed, x, y, weights, drawn = self._arguments(part)
        loss, outputs, *rest = self._graph(*trainable, *fixed, x, y, weights, *drawn)
        if fixed:
            self._fixed = rest[len(trainable) :]
        return loss, outputs, y, rest[: len(trainable)]

    def _trace(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """The graph of `_forward_backward` for these shapes; takes and returns tensors without nesting."""
        return _simplify(_trace(self._forward_backward, _copies(arguments)))

    def _forward_backward(
        self,
        trainable: list[torch.Tensor],
        fixed: list[torch.Tensor],
        x: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
        augmentation: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        task = self.task
        with torch.enable_grad():
            trainable = [t.detach().requires_grad_(True) for t in trainable]
            if augmentation:
                x = task.augmentation.apply(x, augmentation[0])
            outputs, new_fixed, added = task.model.stateless_call(
                trainable, fixed, x, training=True, return_losses=True
            )
            outputs = ops.cast(outputs, "float32")
            # The loss is a weighted sum: its backward pass starts with the weights themselves.
            terms, factors = [task.loss(y, outputs)], [weights]
            loss = (terms[0].detach() * weights).sum()
            if added:
                terms.append(added_loss(added))
                factors.append(weights.sum())
                loss = loss + terms[1].detach() * factors[1]
            gradients = torch.autograd.grad(terms, trainable, factors)
        # The fused kernel goes through memory in one order: a transposed gradient would be scrambled.
        gradients = [g.contiguous() for g in gradients]
        seeds = {id(v) for v in seed_states(task.model)}
        # Seed states are not used by layers without a seed of their own; they stay as they are.
        new_fixed = [
            old if id(v) in seeds else new.detach()
            for v, old, new in zip(task.model.non_trainable_variables, fixed, new_fixed)
        ]
        return loss, outputs.detach(), gradients, new_fixed

    def _check_random_layers(self) -> None:
        """Random layers must draw from torch's generator: another's state would be frozen in the trace."""
        self._random = False
        for layer in self.task.model._flatten_layers():
            # Keras gives every recurrent cell a generator, which only its dropout uses.
            idle = getattr(layer, "recurrent_dropout", None) == 0 and layer.dropout == 0
            if not layer._seed_generators or idle:
                continue
            self._random = True
            plain = isinstance(layer, keras.layers.Dropout) and layer.noise_shape is None
            if not plain or layer.seed is not None:
                raise ValueError(
                    f"the layer {layer.name!r} draws from a Keras seed generator, which cannot be traced "
                    "on PyTorch; use keras.layers.Dropout without seed and noise_shape"
                )

    def _reseed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)
        elif self._device.type != "cpu":
            torch.manual_seed(seed)


def _write_back(variables: Sequence[keras.Variable], tensors: Sequence[torch.Tensor]) -> None:
    for variable, tensor in zip(variables, tensors):
        if variable.value.data_ptr() != tensor.data_ptr():
            variable.value.copy_(tensor)


def _copies(tensors: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.detach().clone(), tensors)


def _trace(function: Callable[..., Any], arguments: tuple[Any, ...]) -> torch.fx.GraphModule:
    """`make_fx` of a method: it miscounts the arguments of bound ones, so it is given them as one."""

    def call(packed: tuple[Any, ...]) -> Any:
        return function(*packed)

    return make_fx(call)(arguments)


def _simplify(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """Removes detaches, joins matrix product and bias, and takes the arguments flat; same values."""
    for node in list(graph.graph.nodes):
        if node.target is _ATEN.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.target is not _ATEN.add.Tensor or node.kwargs:
            continue
        product, bias = node.args
        joinable = (
            isinstance(product, torch.fx.Node)
            and isinstance(bias, torch.fx.Node)
            and product.target is _ATEN.mm.default
            and len(product.users) == 1
        )
        if joinable and bias.meta["val"].ndim == 1:
            with graph.graph.inserting_before(node):
                joined = graph.graph.call_function(_ATEN.addmm.default, (bias, *product.args))
            joined.meta = node.meta
            node.replace_all_uses_with(joined)
            graph.graph.erase_node(node)
            graph.graph.erase_node(product)
    graph.graph.eliminate_dead_code()
    # Without the default, which packs and unpacks nested arguments at every call.
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    return graph.forward


# The optimiser's part of a step


def _make_optimizer_step(task: Task, say: Callable[[str], None]) -> "_FusedAdam | _TracedOptimizer":
    why_not = fused_kernel_refusal(task.optimizer, task.model)
    name = type(task.optimizer).__name__
    if why_not is None:
        say(f"PyTorch: {name} runs in the fused kernel")
        return _FusedAdam(task)
    say(f"PyTorch: {name} runs as Keras's own update, traced ({why_not})")
    return _TracedOptimizer(task, say)


def fused_kernel_refusal(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> str | None:
    """Why PyTorch's fused Adam kernel cannot stand for this Keras optimiser, or None where it can."""
    variables = model.trainable_variables
    devices = {v.value.device.type for v in variables}
    if not isinstance(optimizer, (keras.optimizers.Adam, keras.optimizers.AdamW)) or isinstance(
        optimizer, keras.optimizers.Nadam
    ):
        return "not Adam or AdamW"
    if optimizer.amsgrad:
        return "AMSGrad"
    if optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue:
        return "gradient clipping"
    if optimizer.weight_decay and not isinstance(optimizer, keras.optimizers.AdamW):
        return "weight decay outside AdamW"
    if optimizer.weight_decay and any(not optimizer._use_weight_decay(v) for v in variables):
        return "weights left out of the weight decay"
    if any(v.constraint is not None for v in variables):
        return "weight constraints"
    if any(v.value.dtype != torch.float32 for v in variables):
        return "weights that are not float32"
    if not all(v.value.is_contiguous() for v in variables):
        return "weights that are transposed in memory"
    if not devices <= {"cpu", "cuda", "mps"}:
        return f"no such kernel on {', '.join(devices)}"
    return None


class _FusedAdam:
    """Keras's Adam and AdamW through PyTorch's fused kernel, on Keras's own slots.

    Keras adds epsilon to sqrt(v) before the bias correction, PyTorch after it. With Keras's step size
    ``alpha = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)`` the kernel's update is Keras's for
    ``lr' = alpha * (1 - beta_1^t) / sqrt(1 - beta_2^t)`` and ``eps' = epsilon / sqrt(1 - beta_2^t)``.
    alpha is computed in float32, as Keras does.
    """

    def __init__(self, task: Task) -> None:
        self._keras = task.optimizer
        self._decay = task.optimizer.weight_decay or 0.0
        self._kernel = torch._fused_adamw_ if self._decay else torch._fused_adam_
        self._count = len(task.model.trainable_variables)
        self.pull()

    def pull(self) -> None:
        """Takes the slots and the step count from the Keras optimiser."""
        self._momentums = [v.value for v in self._keras._momentums]
        self._velocities = [v.value for v in self._keras._velocities]
        self._iteration = int(self._keras.iterations.value)
        self._steps = torch.tensor(float(self._iteration), device=self._momentums[0].device)

    def plan(self, step: int, count: int) -> list[tuple[float, float, float]]:
        """(lr', eps', decay') of each step."""
        optimizer = self._keras
        iterations = np.arange(self._iteration, self._iteration + count)
        rate = optimizer._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            tensor = torch.from_numpy(iterations).to(self._steps.device)
            rates = ops.convert_to_numpy(rate(tensor)).astype(np.float32)
        else:
            rates = np.full(count, float(rate.value), np.float32)
        one = np.float32(1)
        # Powers of the float32 betas, rounded once: NumPy's own float32 power is off by some bits.
        power_1 = _float32_power(optimizer.beta_1, iterations + 1)
        power_2 = _float32_power(optimizer.beta_2, iterations + 1)
        alpha = rates * np.sqrt(one - power_2) / (one - power_1)
        exact = (iterations + 1).astype(np.float64)
        root_2 = np.sqrt(1 - float(optimizer.beta_2) ** exact)
        kernel_rate = alpha.astype(np.float64) * (1 - float(optimizer.beta_1) ** exact) / root_2
        with np.errstate(divide="ignore", invalid="ignore"):
            decay = np.where(kernel_rate > 0, self._decay * rates / kernel_rate, 0.0)
        return list(zip(kernel_rate.tolist(), (optimizer.epsilon / root_2).tolist(), decay.tolist()))

    def apply(
        self,
        trainable: list[torch.Tensor],
        gradients: list[torch.Tensor],
        planned: tuple[float, float, float],
    ) -> None:
        """One step, in place."""
        rate, epsilon, decay = planned
        self._steps.add_(1)
        self._iteration += 1
        self._kernel(
            trainable,
            gradients,
            self._momentums,
            self._velocities,
            [],
            [self._steps] * self._count,
            amsgrad=False,
            lr=rate,
            beta1=self._keras.beta_1,
            beta2=self._keras.beta_2,
            weight_decay=decay,
            eps=epsilon,
            maximize=False,
        )

    def sync(self) -> None:
        """Gives the step count to the Keras optimiser; its slots were updated in place."""
        self._keras.iterations.assign(self._iteration)


def _float32_power(base: float, exponents: np.ndarray) -> np.ndarray:
    return (float(np.float32(base)) ** exponents.astype(np.float64)).astype(np.float32)


class _TracedOptimizer:
    """Any Keras optimiser's own `stateless_apply`, traced once; run untraced where tracing fails."""

    def __init__(self, task: Task, say: Callable[[str], None]) -> None:
        self._keras = task.optimizer
        self._say = say
        self._graph: Callable[..., Any] | None = None
        self.pull()

    def pull(self) -> None:
        """Takes the slots from the Keras optimiser."""
        self._slots = [v.value for v in self._keras.variables]

    def plan(self, step: int, count: int) -> list[None]:
        """Nothing: the graph computes everything from the iteration count."""
        return [None] * count

    def apply(self, trainable: list[torch.Tensor], gradients: list[torch.Tensor], planned: None) -> None:
        """One step; `trainable` is updated in place or its entries replaced."""
        if self._graph is None:
            self._graph = self._trace((trainable, self._slots, gradients))
        new_trainable, new_slots = self._graph((trainable, self._slots, gradients))
        trainable[:] = new_trainable
        self._slots = list(new_slots)

    def sync(self) -> None:
        """Gives the slots to the Keras optimiser."""
        _write_back(self._keras.variables, self._slots)

    def _trace(self, arguments: tuple[list[torch.Tensor], ...]) -> Callable[..., Any]:
        """Keras's PyTorch update as a graph; where that cannot be, its backend-neutral one."""
        why = ""
        for update in (self._update, self._neutral_update):
            try:
                graph = _trace(update, _copies(arguments))
            except (RuntimeError, TypeError, AttributeError) as error:
                why = why or str(error)
                continue
            if _holds_later(graph, update, arguments):
                return graph
            why = why or "it takes a number of the first step for a constant"
        self._say(f"PyTorch: {type(self._keras).__name__} cannot be traced ({why}); runs as it is")
        return lambda packed: self._update(*packed)

    def _update(
        self,
        trainable: list[torch.Tensor],
        slots: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        new_trainable, new_slots = self._keras.stateless_apply(slots, gradients, trainable)
        return list(new_trainable), list(new_slots)

    def _neutral_update(
        self,
        trainable: list[torch.Tensor],
        slots: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The formula that Keras has for all backends: some of those for PyTorch read values (SGD, Nadam)."""
        optimizer = self._keras
        neutral = next(c for c in type(optimizer).__mro__ if c.__module__.startswith("keras.src.optimizers."))
        vars(optimizer)["_backend_update_step"] = partial(neutral._backend_update_step, optimizer)
        try:
            return self._update(trainable, slots, gradients)
        finally:
            del vars(optimizer)["_backend_update_step"]


def _holds_later(
    graph: Callable[..., Any], update: Callable[..., Any], arguments: tuple[list[torch.Tensor], ...]
) -> bool:
    """Whether a traced update still equals the update a step later, with other gradients."""
    trainable, slots, gradients = _copies(arguments)
    trainable, slots = update(trainable, slots, gradients)
    later = trainable, slots, [0.3 * g for g in arguments[2]]
    expected, found = update(*_copies(later)), graph(_copies(later))
    return all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for old, new in zip(expected, found)
        for a, b in zip(old, new)
    )
