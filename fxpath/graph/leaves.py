"""Leaves of a lifted graph: where it reads effective parameters, or fixed numbers."""

from __future__ import annotations

from torch import fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments

#: What effective parameters and fixed numbers are read by.
LEAVES = (ops.coordinate, ops.coefficient)


def number_leaves(graph: fx.Graph) -> None:
    """Number leaves in order, and note which are architecture; what a slope reads is one, too."""
    count = 0
    for node in graph.nodes:
        leaf = node
        if node.target is ops.slope and isinstance(arguments(node)[1], fx.Node):
            leaf = arguments(node)[1]
        elif node.target not in LEAVES:
            continue
        if "leaf" not in leaf.meta:
            leaf.meta["leaf"] = count
            leaf.meta["fixed"] = leaf.target is not ops.coordinate
            count += 1
