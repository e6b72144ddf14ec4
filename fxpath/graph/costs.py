"""What an operation of a lifted graph costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from fxpath.graph import ops
from fxpath.graph.equations import letters
from fxpath.graph.links import extents
from fxpath.graph.schema import arguments


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
        x, weight, transposed, groups = (arguments(node)[i] for i in (0, 1, 6, 8))
        kernel = extents(weight)
        if not transposed:
            return positions * math.prod(kernel[1:])
        if out is None or tuple(out) == full:  # each input position is multiplied by every tap
            return math.prod(extents(x)) * math.prod(kernel[1:])
        return positions * kernel[0] // int(groups) * math.prod(kernel[2:])
    if node.target is ops.contract:
        x, weight, _, equation = arguments(node)
        sizes = letters(equation).sizes(extents(x), extents(weight))
        return positions * math.prod(sizes[letter] for letter in letters(equation).summed)
    return 0


def mapping(shape: Sequence[int], out: Mapping[int, int]) -> int:
    """Multiply-adds of fixed maps along axes one by one, from axis to extent behind its map."""
    now, cost = list(shape), 0
    for axis, size in out.items():
        now[axis] = size
        cost += math.prod(now) * shape[axis]
    return cost
