"""Arguments of graph nodes."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpath.graph import ops
from fxpath.private import OpOverload, schema

#: Operation -> where its bias stands among its arguments.
_BIASES = {
    **dict.fromkeys((ops.conv, ops.contract, ops.scale, ops.window), 2),
    ops.shift: 1,
    ops.constant: 0,
}


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments; what they are is known from the node's target."""
    return node.args


def target(node: fx.Node) -> Any:
    """What a node calls."""
    return node.target


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of an operation of the vocabulary, if it has one."""
    place = bias_place(node)
    return None if place is None or place >= len(node.args) else arguments(node)[place]


def bias_place(node: fx.Node) -> int | None:
    """Where an operation of the vocabulary has its bias among its arguments, if it can have one."""
    return _BIASES.get(target(node))


def bind(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by the names of its schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema(node.target).arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound
