"""Pass: the signed graph without what path mass ignores.

Requires a signed graph.  Ensures the same path-norm; no ReLU, absolute value or negation is left,
minima are maxima, clamps that bound nothing but by 0 are gone, and fixed coefficients have no sign.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpath.graph import ops
from fxpath.graph.edit import written
from fxpath.graph.schema import arguments
from fxpath.passes.setting import Setting

__all__ = ["unsign"]

IDENTITIES = (ops.relu, ops.absolute, ops.negative)


def unsign(signed: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Drop signs and activations; ``signed`` itself is not changed."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(signed.graph, copied))
    held: dict[str, Any] = dict(signed.named_buffers())
    for node in list(copied.values()):
        if node.target in IDENTITIES or _is_open(node):
            node.replace_all_uses_with(arguments(node)[0])
            graph.erase_node(node)
        elif node.target is ops.minimum:
            node.target = ops.maximum
        elif node.target is ops.along:
            taps = str(arguments(node)[3].target)
            held[taps] = held[taps].abs()
            dim, stencil = node.meta["stencil"]
            node.meta["stencil"] = dim, stencil.unsigned()
    return written(held, graph)


def _is_open(node: fx.Node) -> bool:
    """Whether a clamp has no bound but 0, which adds no path mass and has no scale."""
    return node.target is ops.clamp and not any(arguments(node)[1:])
