"""What an operation of a lifted graph costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from fxpath.graph import ops
from fxpath.graph.links import extents
from fxpath.graph.schema import arguments

__all__ = ["multiply_adds"]


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
