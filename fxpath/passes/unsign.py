"""Pass: signed graph -> lifted graph, without what path mass does not depend on.

Requires a graph as the rules write it.  Ensures that ReLU, absolute value and sign are gone, and
that minimum and maximum are one; all other nodes keep what is noted in them.
"""

from __future__ import annotations

from torch import fx

from fxpath import ops
from fxpath.graphs import written
from fxpath.schema import arguments

__all__ = ["unsign"]

IDENTITIES = (ops.relu, ops.absolute, ops.negative)


def unsign(signed: fx.GraphModule) -> fx.GraphModule:
    """Drop signs and activations; ``signed`` itself is not changed."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(signed.graph, copied))
    for node in list(copied.values()):
        if node.target in IDENTITIES or _is_open(node):
            node.replace_all_uses_with(arguments(node)[0])
            graph.erase_node(node)
        elif node.target is ops.minimum:
            node.target = ops.maximum
    return written(signed, graph)


def _is_open(node: fx.Node) -> bool:
    """Whether a clamp has no bound but 0, which adds no path mass and has no scale."""
    return node.target is ops.clamp and not any(arguments(node)[1:])
