"""Extents and multiply-adds of a program, node by node."""

from __future__ import annotations

from typing import TypedDict

from torch import fx

from fxpath.errors import module_path
from fxpath.graph.costs import multiply_adds
from fxpath.graph.links import extents, seen_through, static


class SizeRow(TypedDict):
    """One activation: its extent at full resolution and as the program keeps it."""

    node: str
    layer: str
    operation: str
    full: tuple[int, ...]
    reduced: tuple[int, ...]
    full_macs: int
    reduced_macs: int


def sizes(lifted: fx.GraphModule, program: fx.GraphModule) -> list[SizeRow]:
    """A row for each activation of the lifted network, in order of execution.

    Args:
        lifted: the graph at full resolution.
        program: the graph that runs, ``lifted`` itself or reduced from it.

    Returns:
        Rows with the multiply-adds of both; those of a reduced node include its maps between bases.
        Where one node stands for several activations, the first one has them all.
    """
    kept: dict[str, fx.Node] = {}
    macs: dict[str, int] = {}
    pending = 0
    for node in program.graph.nodes:
        pending += multiply_adds(node) if node.op == "call_function" else 0
        full = node.meta.get("full", (node,) if lifted is program else ())
        for source in (each for each in full if seen_through(each) is each):
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
