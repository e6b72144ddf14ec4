"""What of a network was taken as a gate, read off its lifted graph."""

from __future__ import annotations

import torch
from torch import fx

from fxpath.errors import module_path, source_line
from fxpath.gates import Gate
from fxpath.graph import ops
from fxpath.graph.constants import active_nodes
from fxpath.graph.gating import Chosen, find_gates, made_by
from fxpath.graph.links import on_paths
from fxpath.graph.schema import arguments
from fxpath.model import Captured

aten = torch.ops.aten

#: Sums and products, of which one operand may be a constant.
_ARITHMETIC = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor),
    *(aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor),
}


def find_taken(captured: Captured, lifted: fx.GraphModule) -> tuple[Gate, ...]:
    """The gates on the paths of a network, in order of execution; none where none were asked for.

    Args:
        captured: the model.
        lifted: its lifted graph.
    """
    if not captured.gates:
        return ()
    counted = on_paths(lifted.graph)
    nodes = [n for n in lifted.graph.nodes if n in counted and n.target in (ops.squash, ops.gate)]
    if not nodes:
        return ()
    graph = nodes[0].meta["origin"].graph
    active = active_nodes(graph, captured)
    chosen = find_gates(graph, active.__contains__).chosen
    found = (_gate(node, chosen.get(node.meta["origin"]), active) for node in nodes)
    # An operation that is unrolled over steps says the same at each.
    return tuple(dict.fromkeys(found))


def _gate(node: fx.Node, chosen: Chosen | None, active: set[fx.Node]) -> Gate:
    origin = node.meta["origin"]
    signal = factor = ""
    followed, size = True, arguments(node)[-1]
    if node.target is ops.gate:
        x, other, _ = arguments(node)
        followed = other is not None
        signal, factor = (
            (_named(made_by(chosen.signal)), _named(_bounded(chosen.factor, active)))
            if chosen is not None
            else (_source(x, origin), _source(other, origin))
        )
    return Gate(
        operation=str(origin.target),
        node=origin.name,
        module_path=module_path(origin),
        source_line=source_line(origin),
        size=float(size),
        signal=signal,
        factor=factor,
        followed=followed,
    )


def _bounded(factor: fx.Node, active: set[fx.Node]) -> fx.Node:
    """What makes a factor bounded, behind constants that it is multiplied with or added to."""
    node = made_by(factor)
    while node.target in _ARITHMETIC:
        read = [each for each in node.all_input_nodes if each in active]
        if len(read) != 1:
            break
        node = made_by(read[0])
    return node


def _named(node: fx.Node) -> str:
    """Which value of the captured graph it is, and in which module it was made."""
    place = module_path(node)
    return f"{node.name} in {place}" if place else node.name


def _source(value: object, origin: fx.Node) -> str:
    """Where a factor within one operation of the captured graph comes from."""
    while isinstance(value, fx.Node):
        if value.target is ops.squash:
            return str(arguments(value)[1])
        before = value.meta.get("origin")
        if before is not None and before is not origin:
            return _named(before)
        value = next(iter(value.all_input_nodes), None)
    return ""
