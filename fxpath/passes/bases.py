"""Values or sums: in which of two bases each activation is kept.

A tensor holds one value for each reachable class, or one sum for each observable class.  What is
read from a tensor in sums is in sums too, so the cheapest choice is a minimum cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import networkx
from torch import fx

from fxpath.graph import ops
from fxpath.graph.costs import multiply_adds
from fxpath.passes.classes import Classes, Partition

#: Node -> whether it is kept in sums.
Choice = Mapping[fx.Node, bool]
Choose = Callable[[Classes], Choice]


def partitions(classes: Classes, node: fx.Node, sums: bool) -> list[Partition]:
    """The classes that a node's axes are kept by."""
    return (classes.observable if sums else classes.reachable)[node]


def cost(classes: Classes, node: fx.Node, sums: bool) -> int:
    """Multiply-adds of a node in one of the two bases, at least one for each entry."""
    if node.target is ops.total:
        return 0
    out = [len(p) for p in partitions(classes, node, sums)]
    return max(multiply_adds(node, out), math.prod(out))


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
    """The choice of least cost; sums where both cost the same."""
    graph = networkx.DiGraph()
    constrained = edges(classes)
    graph.add_nodes_from(("sums", "values"))
    graph.add_edges_from(constrained)  # no capacity: infinite
    choice = {}
    for node in classes.reachable:
        # What a node costs in either basis cancels; only the difference has to be cut.
        saved = cost(classes, node, sums=False) - cost(classes, node, sums=True)
        choice[node] = saved >= 0
        if node in graph and saved > 0:
            graph.add_edge("sums", node, capacity=saved)
        elif node in graph and saved < 0:
            graph.add_edge(node, "values", capacity=-saved)
    _, (in_sums, _) = networkx.minimum_cut(graph, "sums", "values")
    return choice | {node: node in in_sums for node in graph if isinstance(node, fx.Node)}
