"""Tensors that are made with the shape of another one, whatever its values are."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxpath.graph.aten import MADE_FROM_SHAPE
from fxpath.graph.schema import bind


def fill_of(node: fx.Node) -> Any:
    """What such a tensor is filled with: a number, or a node."""
    found = MADE_FROM_SHAPE[node.target]
    return bind(node)[found] if isinstance(found, str) else found


def read_by(node: fx.Node) -> list[fx.Node]:
    """What an operation takes values from, not only a shape."""
    if node.target not in MADE_FROM_SHAPE:
        return node.all_input_nodes
    value = fill_of(node)
    return [value] if isinstance(value, fx.Node) else []
