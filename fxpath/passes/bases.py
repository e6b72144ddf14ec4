"""Values or sums: in which of two bases each activation is kept.

A tensor holds one value for each reachable class, or one sum for each observable class.  What is
read from a tensor in sums is in sums too, so the cheapest choice is a minimum cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import networkx
from torch import fx

from fxpath import ops
from fxpath.passes.classes import Classes, Partition
from fxpath.passes.links import extents
from fxpath.schema import arguments

__all__ = ["Choose", "cheapest", "cost", "edges"]

#: Node -> whether it is kept in sums.
Choice = Mapping[fx.Node, bool]
Choose = Callable[[Classes], Choice]


def partitions(classes: Classes, node: fx.Node, sums: bool) -> list[Partition]:
    """The classes that a node's axes are kept by."""
    return (classes.observable if sums else classes.reachable)[node]


def cost(classes: Classes, node: fx.Node, sums: bool) -> int:
    """Multiply-adds of a node in one of the two bases."""
    if node.target is ops.total:
        return 0
    positions = math.prod(len(p) for p in partitions(classes, node, sums))
    if node.target is ops.conv:
        return positions * math.prod(extents(arguments(node)[1])[1:])
    if node.target in (ops.linear, ops.matmul):
        return positions * extents(arguments(node)[0])[-1]
    return positions


def edges(classes: Classes) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs (read, reader) that must not go from sums back to values."""
    pairs = []
    for node, reads in classes.reads.items():
        for argument, axes in reads:
            lost = any(
                not classes.observable[argument][link.source_dim].is_trivial for link in axes
            )
            if lost and node.target is not ops.total:
                pairs.append((argument, node))
    return pairs


def cheapest(classes: Classes) -> Choice:
    """The choice of least cost."""
    graph = networkx.DiGraph()
    for node in classes.reachable:
        graph.add_edge("sums", node, capacity=cost(classes, node, sums=False))
        graph.add_edge(node, "values", capacity=cost(classes, node, sums=True))
    for read, reader in edges(classes):
        graph.add_edge(read, reader)  # no capacity: infinite
    _, (in_sums, _) = networkx.minimum_cut(graph, "sums", "values")
    return {node: node in in_sums for node in classes.reachable}
