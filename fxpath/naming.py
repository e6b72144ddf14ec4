"""Names of the coordinates of theta."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpath.capture import Captured
from fxpath.errors import module_path

__all__ = [
    "RELABELLING",
    "SAME",
    "SPLITTING",
    "coordinate_name",
    "depends_on_parameter",
    "parameter_of",
]

aten = torch.ops.aten

#: Operations on a parameter that only show its entries in another order or shape: the coordinates
#: stay the parameter's own.
RELABELLING = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.expand.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
    aten.swapaxes.default,
    aten.flip.default,
}


#: Operations that show a parameter as it is; ``detach`` would cut the scores off.
SAME = {
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
}

#: Operations whose pieces are entries of the parameter that they split.
SPLITTING = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}


def parameter_of(captured: Captured, node: Any) -> str | None:
    """Qualified name of the parameter that a placeholder stands for."""
    if isinstance(node, fx.Node) and node.op == "placeholder":
        name = captured.tensors.get(node.name)
        return name if name in captured.parameters else None
    return None


def depends_on_parameter(captured: Captured, node: fx.Node) -> bool:
    """Whether a value that is computed without activations has a parameter among its inputs."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if parameter_of(captured, current) is not None:
            return True
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def coordinate_name(captured: Captured, value: Any, user: fx.Node, suffix: str) -> str | None:
    """Name of the coordinates held by ``value`` where ``user`` reads it.

    The parameter's own qualified name, or for a computed weight (pruned, parametrized) its module's
    ``weight``/``bias``; ``None`` if no parameter is involved.
    """
    own = parameter_of(captured, value)
    if own is not None:
        return own
    if not isinstance(value, fx.Node) or not depends_on_parameter(captured, value):
        return None
    path = module_path(user)
    return f"{path}.{suffix}" if path else suffix
