"""Which factor of a product is the gate, and what is on a path to an output at all.

Both are read off the captured graph before it is lifted: what only a gate reads need have no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxpath.graph.intervals import Interval, above, intervals
from fxpath.graph.schema import bind
from fxpath.graph.squashes import squash_of
from fxpath.private import OpOverload, schema

aten = torch.ops.aten

#: Products of two activations, entry by entry.
PRODUCTS = {aten.mul.Tensor, aten.multiply.Tensor}
#: Products of matrices.
MATRIX_PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True)
class Chosen:
    """A product of two activations.

    Attributes:
        signal: the factor that paths run through.
        factor: the gate.
        size: its largest size, whatever the parameters.
    """

    signal: fx.Node
    factor: fx.Node
    size: float


@dataclass
class Gating:
    """The gates of a captured graph.

    Attributes:
        chosen: for each product of activations with a bounded factor, which it is.
        signals: nodes that a path to an output runs through.
    """

    chosen: dict[fx.Node, Chosen] = field(default_factory=dict)
    signals: set[fx.Node] = field(default_factory=set)


def find_gates(graph: fx.Graph, active: Callable[[Any], bool]) -> Gating:
    """Decide for each product of activations, from the outputs to the inputs.

    Args:
        graph: a functional ATen graph.
        active: whether a value depends on the network's inputs.
    """
    known = intervals(graph, active)
    found = Gating()
    output = next(iter(reversed(graph.nodes)))
    found.signals.update(output.all_input_nodes)
    for node in reversed(graph.nodes):
        chosen = _choose(node, known, active)
        if chosen is not None:
            found.chosen[node] = chosen
        if node in found.signals:
            found.signals.update([chosen.signal] if chosen else node.all_input_nodes)
    return found


def _choose(
    node: fx.Node, known: dict[fx.Node, Interval], active: Callable[[Any], bool]
) -> Chosen | None:
    if node.target not in PRODUCTS and node.target not in MATRIX_PRODUCTS:
        return None
    a, b = list(bind(node).values())[:2]
    if not (active(a) and active(b)):
        return None
    if node.target in MATRIX_PRODUCTS:
        # Weights that are parts of one: the values are averaged.
        rows = _softmax_axis(a) == len(a.meta["val"].shape) - 1
        return Chosen(b, a, 1.0) if rows else None
    options = [
        Chosen(signal, factor, above(max(map(abs, known[factor]))))
        for signal, factor in ((a, b), (b, a))
        if factor in known
    ]
    # A factor that is not 0 at 0 can only be a gate; else the smaller one is.
    options.sort(key=lambda each: (_only_gate(each.signal), each.size))
    return options[0] if options else None


def _only_gate(node: fx.Node) -> bool:
    """Whether a value, but for moves, comes out of a function that no path runs through."""
    found = made_by(node)
    name = schema(found.target).name.split("::")[1] if isinstance(found.target, OpOverload) else ""
    squash = squash_of(name) if name in ("sigmoid", "cos") else None
    return squash is not None or name in ("softmax", "_softmax")


#: What moves entries of one value.
_MOVES = {
    *("view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "permute", "transpose"),
    *("flatten", "unflatten", "contiguous", "clone", "slice", "select", "alias", "to", "dropout"),
}


def made_by(node: fx.Node) -> fx.Node:
    """What made a value, behind what only moves its entries."""
    while True:
        called = node.target
        if isinstance(called, OpOverload):
            name = schema(called).name.split("::")[1]
            if name not in _MOVES:
                return node
        elif node.op != "call_function":
            return node
        node = node.all_input_nodes[0]


def _softmax_axis(node: fx.Node) -> int | None:
    """Along which axis the entries of a value are parts of one; ``None`` if along none."""
    while isinstance(node.target, OpOverload):
        name = schema(node.target).name.split("::")[1]
        if name in ("softmax", "_softmax"):
            return int(bind(node)["dim"]) % max(1, len(node.meta["val"].shape))
        if name not in ("dropout", "contiguous", "clone", "alias", "to"):
            return None
        node = node.all_input_nodes[0]
    return None
