"""Which entries of a tensor were allocated by ``torch.empty``, and not written yet.

The operations that write into a tensor, or show part of one, say it themselves: they do the same to
the masks of unwritten entries as to the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.made import UNWRITTEN
from fxpath.naming import RELABELLING, SAME
from fxpath.schema import target

__all__ = ["reads_unwritten", "unwritten"]

aten = torch.ops.aten

#: Operations that move entries, and apply to a mask as they do to a tensor.
MOVING = {
    *RELABELLING,
    *SAME,
    *(aten.copy.default, aten.slice_scatter.default, aten.select_scatter.default),
    *(aten.diagonal_scatter.default, aten.as_strided_scatter.default, aten.index_put.default),
    *(aten.as_strided.default, aten.diagonal.default, aten.narrow.default, aten.cat.default),
    *(aten.index_copy.default, aten.scatter.src, aten.slice.Tensor, aten.lift_fresh_copy.default),
}
#: Operations that overwrite every entry.
FILLING = {aten.fill.Scalar, aten.fill.Tensor, aten.zero.default}


def unwritten(
    node: fx.Node, known: Mapping[fx.Node, Tensor], constant: Callable[[Any], Tensor | None]
) -> Tensor | None:
    """Mask of the entries of a result that are undefined; ``None`` if there are none.

    What computes with such entries is not followed: see :func:`reads_unwritten`.

    Args:
        node: the operation.
        known: masks of what it may read.
        constant: evaluates positions.
    """
    if node.target in UNWRITTEN:
        return torch.ones(tuple(node.meta["val"].shape), dtype=torch.bool)
    if node.target in FILLING or not any(n in known for n in node.all_input_nodes):
        return None
    if node.target not in MOVING:
        return None

    def mask(argument: fx.Node) -> Any:
        held = argument.meta["val"]
        if not held.is_floating_point():
            return constant(argument)
        return known.get(argument, torch.zeros(tuple(held.shape), dtype=torch.bool))

    args, kwargs = fx.map_arg((node.args, node.kwargs), mask)
    found: Tensor = target(node)(*args, **kwargs)
    return found if bool(found.any()) else None


def reads_unwritten(node: fx.Node, known: Mapping[fx.Node, Tensor]) -> bool:
    """Whether an operation computes with undefined entries."""
    moves = node.target in MOVING or node.target in FILLING or node.target in UNWRITTEN
    return not moves and any(n in known for n in node.all_input_nodes)
