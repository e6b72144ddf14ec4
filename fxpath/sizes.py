"""Extents and multiply-adds of a program, node by node."""

from __future__ import annotations

import math
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


def multiply_adds(node: fx.Node) -> int:
    """Multiply-adds with weights; sums of fixed coefficients are counted where they are kept."""
    out = math.prod(extents(node))
    if node.target is ops.conv:
        weight, transposed = arguments(node)[1], arguments(node)[5]
        per_output = math.prod(extents(weight)[1:])
        if not transposed:
            return out * per_output
        return math.prod(extents(arguments(node)[0])) * per_output
    if node.target is ops.linear:
        return out * extents(arguments(node)[1])[-1]
    if node.target is ops.matmul:
        x, _, weight_first = arguments(node)
        return out * extents(x)[-2 if weight_first and len(extents(x)) > 1 else -1]
    if node.target is ops.mix:
        return out * extents(arguments(node)[0])[arguments(node)[1]]
    return 0


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
        source = node.meta.get("full", node if lifted is program else None)
        if source is not None:
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
