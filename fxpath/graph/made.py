"""Tensors that are made with the shape of another one, whatever its values are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpath.graph.schema import bind

__all__ = ["MADE_FROM_SHAPE", "fill_of", "read_by"]

aten = torch.ops.aten

#: Tensors made from the shape of another one: the fill value, or the argument that holds it.
MADE_FROM_SHAPE: dict[Any, float | str] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.zero.default: 0.0,
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.fill.Scalar: "value",
    aten.fill.Tensor: "value",
}


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
