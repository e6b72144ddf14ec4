"""A bias that is added to weighted sums right away belongs to the same neurons.

Rules write down what operations do one by one; whatever reads the graph finds a neuron with its
bias, and does not have to look at who reads what.
"""

from __future__ import annotations

from torch import fx

from fxpath.graph import ops
from fxpath.graph.links import extents, mark_static, static
from fxpath.graph.schema import arguments, bias_of


def own_biases(graph: fx.Graph) -> None:
    """Give weighted sums the bias that alone reads them, in place."""
    mark_static(graph)
    for node in list(graph.nodes):
        if node.target is not ops.shift:
            continue
        x, bias = arguments(node)
        weighs = x.target in (ops.conv, ops.contract, ops.scale) and not static(x)
        if weighs and bias_of(x) is None and len(x.users) == 1 and extents(x) == extents(node):
            node.prepend(x)  # behind what the bias is computed from
            x.args = (*x.args[:2], bias, *x.args[3:])
            node.replace_all_uses_with(x)
            graph.erase_node(node)
