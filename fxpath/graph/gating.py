"""Which factor of a product is the gate, and what is on a path to an output at all.

Both are read off the captured graph before it is lifted: what only a gate reads need have no rule.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxpath.graph.intervals import Interval, above, intervals
from fxpath.graph.schema import bind
from fxpath.private import OpOverload, schema

aten = torch.ops.aten

#: Products of two activations, entry by entry.
PRODUCTS = {aten.mul.Tensor, aten.multiply.Tensor}
#: Products of matrices.
MATRIX_PRODUCTS = {aten.matmul.default, aten.bmm.default}
#: Averages of values by a softmax of their own.
ATTENTION = aten.scaled_dot_product_attention.default


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
    """Decide for each product of activations, and what paths run through then.

    Args:
        graph: a functional ATen graph.
        active: whether a value depends on the network's inputs.
    """
    known = intervals(graph, active)
    found = Gating()
    barred: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not active(node):
            continue
        chosen = _choose(node, known, active, barred)
        if chosen is not None:
            found.chosen[node] = chosen
        through = [chosen.signal] if chosen else node.all_input_nodes
        if _name(node) in _BARS or not barred.isdisjoint(through):
            barred.add(node)
    output = next(iter(reversed(graph.nodes)))
    found.signals.update(output.all_input_nodes)
    for node in reversed(graph.nodes):
        if node in found.signals:
            at = found.chosen.get(node)
            found.signals.update([at.signal] if at else node.all_input_nodes)
    return found


def _choose(
    node: fx.Node,
    known: dict[fx.Node, Interval],
    active: Callable[[Any], bool],
    barred: set[fx.Node],
) -> Chosen | None:
    if node.target is ATTENTION:
        args = bind(node)
        averaged = active(args["value"]) and not args["dropout_p"]
        return Chosen(args["value"], args["query"], 1.0) if averaged else None
    if node.target not in PRODUCTS and node.target not in MATRIX_PRODUCTS:
        return None
    a, b = list(bind(node).values())[:2]
    if not (active(a) and active(b)):
        return None
    if node.target in MATRIX_PRODUCTS:
        # Weights that are parts of one: the values are averaged.
        if _rows_are_parts(a):
            return Chosen(b, a, 1.0)
        return Chosen(a, b, 1.0) if _columns_are_parts(b) else None
    options = [
        Chosen(signal, factor, above(max(map(abs, known[factor]))))
        for signal, factor in ((a, b), (b, a))
        if factor in known
    ]
    options = [option for option in options if math.isfinite(option.size)]
    # What no path may run through can only be a gate; else the smaller factor is, and of two of
    # one size what is not 0 at 0.
    options.sort(key=lambda o: (o.signal in barred, o.size, _name(made_by(o.signal)) in _SHIFTED))
    return options[0] if options else None


#: Functions that no path runs through: they are not 0 at 0, or unbounded.
_BARS = {
    *("sigmoid", "special_expit", "cos", "softmax", "_softmax", "log_sigmoid", "log_softmax"),
    *("_log_softmax", "softplus", "exp", "layer_norm", "group_norm", "instance_norm"),
}
#: Functions that paths run through, but that are not 0 at 0.
_SHIFTED = {"hardsigmoid"}


def _name(node: fx.Node) -> str:
    return schema(node.target).name.split("::")[1] if isinstance(node.target, OpOverload) else ""


#: What moves entries of one value.
_MOVES = {
    *("view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "permute", "transpose"),
    *("flatten", "unflatten", "contiguous", "clone", "slice", "select", "alias", "to", "dropout"),
}


def made_by(node: fx.Node) -> fx.Node:
    """What made a value, behind what only moves its entries."""
    while _name(node) in _MOVES or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _rows_are_parts(node: fx.Node) -> bool:
    """Whether the entries along the last axis of a value are parts of one."""
    while _name(node) in _KEEPING_ROWS and not _drops(node):
        inner = node.all_input_nodes[0]
        if inner.meta["val"].shape[-1:] != node.meta["val"].shape[-1:]:
            return False
        node = inner
    if _name(node) not in ("softmax", "_softmax"):
        return False
    axes = len(node.meta["val"].shape)
    return axes > 0 and int(bind(node)["dim"]) % axes == axes - 1


def _columns_are_parts(node: fx.Node) -> bool:
    """Whether the entries along the last axis but one of a value are parts of one."""
    axes = len(node.meta["val"].shape)
    if axes > 1 and _name(node) in ("softmax", "_softmax"):
        return int(bind(node)["dim"]) % axes == axes - 2
    if axes < 2 or _name(node) not in ("transpose", "permute", "mT", "t"):
        return False
    swapped = [*range(axes - 2), axes - 1, axes - 2]
    args = bind(node)
    if "dims" in args:
        moved = [dim % axes for dim in args["dims"]] == swapped
    else:
        ends = {args.get(key, end) % axes for key, end in (("dim0", -2), ("dim1", -1))}
        moved = ends == {axes - 2, axes - 1}
    return moved and _rows_are_parts(node.all_input_nodes[0])


#: What leaves rows as they are, if it leaves their length.
_KEEPING_ROWS = {
    *("dropout", "contiguous", "clone", "alias", "to", "view", "reshape", "_unsafe_view", "expand"),
    *("squeeze", "unsqueeze"),
}


def _drops(node: fx.Node) -> bool:
    """Whether it leaves entries out at random, and scales those that stay."""
    args = bind(node)
    return bool(args.get("train") and args.get("p"))
