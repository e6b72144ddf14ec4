"""Entries of the effective parameter vector theta: their names, shapes and values."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated


def score_shapes(module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Coordinate name -> shape."""
    return {
        str(arguments(node)[1]): tuple(node.meta["val"].shape)
        for node in module.graph.nodes
        if node.target is ops.coordinate
    }


def coordinates(
    module: fx.GraphModule, tensors: Mapping[str, Tensor], names: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Entries of the effective parameter vector theta, one array after the other.

    Args:
        module: a lifted graph.
        tensors: the model's tensors by the names of the graph's placeholders.
        names: of the coordinates that are asked for; all of them by default.
    """
    read = [
        node
        for node in module.graph.nodes
        if node.target is ops.coordinate and (names is None or arguments(node)[1] in names)
    ]
    for node, value in evaluated(module, tensors, read):
        yield str(arguments(node)[1]), value


def sparsity(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction of zero entries of each coordinate array, at its first use; arguments as above."""
    found: dict[str, float] = {}
    for name, value in coordinates(module, tensors):
        zeros = 1 - int(torch.count_nonzero(value)) / max(1, value.numel())
        found.setdefault(name, zeros)
    return found
