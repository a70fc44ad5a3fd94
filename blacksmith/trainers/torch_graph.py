"""Traces PyTorch functions into flat graphs of tensor operations, which run without Keras and autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

_ATEN = torch.ops.aten

Tensors = list[Tensor]


def copies(tensors: Any) -> Any:
    """Detached copies of tensors in nested containers."""
    return torch.utils._pytree.tree_map(lambda t: t.detach().clone(), tensors)


def trace(function: Callable[..., Any], arguments: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The graph of `function`, which takes its arguments as one tuple.

    The function runs once, on copies, because it may update tensors in place.
    """

    # One argument, because `make_fx` miscounts the arguments of bound methods.
    def call(packed: tuple[Any, ...]) -> Any:
        return function(*packed)

    return make_fx(call)(copies(arguments))


def simplify(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """The graph without detaches, and with biases fused into matrix products; takes the tensors flat."""
    # Without autograd a detach does nothing, but costs a call.
    for node in list(graph.graph.nodes):
        if node.target is _ATEN.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    # Keras computes x @ w + b in two operations; addmm needs only one pass over the memory.
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
    # The default code generator packs and unpacks nested arguments in every call.
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    return graph.forward
