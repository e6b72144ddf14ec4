"""Extents and multiply-adds of a program, node by node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from torch import fx

from fxpath import ops
from fxpath.errors import module_path
from fxpath.passes.links import extents, mark_static, static
from fxpath.schema import arguments

__all__ = ["SizeRow", "multiply_adds", "sizes"]


class SizeRow(TypedDict):
    """One activation: its extent at full resolution and as the program keeps it."""

    node: str
    layer: str
    operation: str
    full: tuple[int, ...]
    reduced: tuple[int, ...]
    full_macs: int
    reduced_macs: int


def multiply_adds(node: fx.Node, out: Sequence[int] | None = None) -> int:
    """Multiply-adds of one operation: those with weights, and those of maps between bases.

    Args:
        node: an operation of a lifted graph; elementwise steps and sums of fixed coefficients,
            which the reduction writes down as maps, count as nothing.
        out: extents of the result, where it is kept at others than its own; what is summed over is
            read at full extent.
    """
    full = extents(node)
    positions = math.prod(full if out is None else out)
    if node.target is ops.mix:
        return positions * extents(arguments(node)[0])[arguments(node)[1]]
    if node.target is ops.conv:
        x, weight, transposed, groups = (arguments(node)[i] for i in (0, 1, 5, 7))
        kernel = extents(weight)
        if not transposed:
            return positions * math.prod(kernel[1:])
        if out is None or tuple(out) == full:  # each input position is multiplied by every tap
            return math.prod(extents(x)) * math.prod(kernel[1:])
        return positions * kernel[0] // int(groups) * math.prod(kernel[2:])
    if node.target is ops.linear:
        return positions * extents(arguments(node)[1])[-1]
    if node.target is ops.matmul:
        x, _, weight_first = arguments(node)
        return positions * extents(x)[-2 if weight_first and len(extents(x)) > 1 else -1]
    if node.target is ops.einsum:
        return positions * _contracted(node)
    return 0


def _contracted(node: fx.Node) -> int:
    """How many products an einsum adds up for each entry of its result."""
    x, weight, equation = arguments(node)
    terms, output = str(equation).split("->")
    lengths: dict[str, int] = {}
    for term, shape in zip(terms.split(","), (extents(x), extents(weight)), strict=True):
        # Axes that an ellipsis stands for are named by their place before its end.
        before, _, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        names = [*before, *(f"{i}" for i in reversed(range(hidden))), *after]
        for name, length in zip(names, shape, strict=True):
            lengths[name] = max(length, lengths.get(name, 1))  # of length 1: broadcast
    kept = set(output) - {"."}
    if "..." in output:
        kept |= {name for name in lengths if name.isdigit()}
    return math.prod(length for name, length in lengths.items() if name not in kept)


def sizes(lifted: fx.GraphModule, program: fx.GraphModule) -> list[SizeRow]:
    """A row for each activation of the lifted network, in order of execution.

    Args:
        lifted: the graph at full resolution.
        program: the graph that runs, ``lifted`` itself or reduced from it.

    Returns:
        Rows with the multiply-adds of both; those of a reduced node include its maps between bases.
    """
    mark_static(lifted.graph)
    kept: dict[str, fx.Node] = {}
    macs: dict[str, int] = {}
    pending = 0
    for node in program.graph.nodes:
        pending += multiply_adds(node) if node.op == "call_function" else 0
        for source in node.meta.get("full", (node,) if lifted is program else ())[-1:]:
            kept[source.name], macs[source.name] = node, pending
            pending = 0
    rows = []
    for node in lifted.graph.nodes:
        if node.op == "call_function" and not static(node) and node.name in kept:
            rows.append(
                SizeRow(
                    node=node.name,
                    layer=_layer(node),
                    operation=getattr(node.target, "__name__", str(node.target)),
                    full=extents(node),
                    reduced=extents(kept[node.name]),
                    full_macs=multiply_adds(node),
                    reduced_macs=macs[node.name],
                )
            )
    return rows


def _layer(node: fx.Node) -> str:
    origin = node.meta.get("origin")
    return module_path(origin) if isinstance(origin, fx.Node) else ""
