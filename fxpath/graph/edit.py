"""What passes do with graphs: order, dead nodes, shapes of results."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.graph import ops
from fxpath.private import LazyGraphModule


def written(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose Python code is written when it is called or printed.

    Programs are interpreted, and a module of ten thousand lines takes a second to compile.
    """
    graph.lint()
    return LazyGraphModule(root, graph)


def drop_dead(graph: fx.Graph) -> None:
    """Erase what no output depends on; nothing in a functional graph has side effects."""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def inputs_first(
    node: fx.Node,
    known: Container[fx.Node],
    inputs: Callable[[fx.Node], Iterable[fx.Node]] = lambda n: n.all_input_nodes,
) -> list[fx.Node]:
    """What has to be computed for a node, each after its inputs, without what is known.

    Without recursion: a mask may be computed in a thousand steps.
    """
    order: dict[fx.Node, None] = {}
    stack = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if current in known or current in order:
            continue
        if ready:
            order[current] = None
        else:
            stack.append((current, True))
            stack += [(n, False) for n in inputs(current)]
    return list(order)


def form(value: Any) -> Any:
    """A tensor's shape and dtype, as a meta tensor; anything else as it is."""
    if isinstance(value, Tensor):
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
    return value


class Forms:
    """What operations return for arguments of a given form; each is asked for once.

    A deep network repeats a few operations on a few shapes, and to try one takes longer than all
    else that a pass does with a node.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, function: Callable[..., Any], args: Any) -> Any:
        """The form of ``function(*args)``, where nodes stand for what their ``meta`` says.

        Tensors among the arguments are forms themselves, on the meta device.
        """
        # The name of a coordinate says nothing about its shape.
        told = args[:1] if function is ops.coordinate else args
        # Numbers made from nothing have the format that the caller has set.
        key = function, torch.get_default_dtype(), repr(fx.node.map_aggregate(told, _look))
        if key not in self._known:
            self._known[key] = form(function(*fx.map_arg(args, lambda n: n.meta["val"])))
        return self._known[key]


def _look(value: Any) -> Any:
    """An argument, or how it looks."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    elif not isinstance(value, Tensor):
        return value
    return f"{value.dtype} {tuple(value.shape)}"
