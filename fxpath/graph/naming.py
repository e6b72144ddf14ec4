"""Names of the coordinates of theta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxpath.errors import module_path
from fxpath.graph.made import read_by
from fxpath.model import Captured


def parameter_of(captured: Captured, node: Any) -> str | None:
    """Qualified name of the parameter that a placeholder stands for."""
    if isinstance(node, fx.Node) and node.op == "placeholder":
        name = captured.tensors.get(node.name)
        return name if name in captured.parameters else None
    return None


def depends_on_parameter(captured: Captured, node: fx.Node) -> bool:
    """Whether a value that is computed without activations has a parameter among its inputs."""
    return any(True for _ in _parameters_in(captured, node))


def _parameters_in(captured: Captured, node: fx.Node) -> Iterator[str]:
    """Parameters that a value is computed from."""
    seen: set[fx.Node] = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        name = parameter_of(captured, current)
        if name is not None:
            yield name
        new = [n for n in read_by(current) if n not in seen]
        seen.update(new)
        stack.extend(reversed(new))


def coordinate_name(captured: Captured, value: Any, user: fx.Node, suffix: str) -> str | None:
    """Name of the coordinates held by ``value`` where ``user`` reads it.

    The parameter's own qualified name, also of a weight that is computed from one parameter alone.
    A weight that its module computes (pruned, parametrized) bears the name under which the module
    shows it, as ``conv.weight``; any other one that of its first parameter.  ``None`` if no
    parameter is involved.
    """
    own = parameter_of(captured, value)
    if own is not None:
        return own
    if not isinstance(value, fx.Node):
        return None
    found = list(dict.fromkeys(_parameters_in(captured, value)))
    if not found:
        return None
    shown = {_shown_as(captured, name) for name in found}
    if len(shown) == 1:
        return shown.pop()
    path = module_path(user)
    return f"{path}.{suffix}" if _has(captured, path, suffix) else found[0]


def name_without_parameter(captured: Captured, user: fx.Node, suffix: str, *holders: Any) -> str:
    """Name of coordinates that no parameter holds: what a batch norm without any has learned.

    The module's ``weight`` or ``bias`` if it has such an attribute (also if that is ``None``), else
    the name of the first of ``holders`` that is a tensor of the model.
    """
    path = module_path(user)
    if _has(captured, path, suffix):
        return f"{path}.{suffix}"
    names = [captured.tensors.get(h.name) for h in holders if isinstance(h, fx.Node)]
    return next((name for name in names if name is not None), f"{user.name}.{suffix}")


def _shown_as(captured: Captured, name: str) -> str:
    """The attribute that a parameter of a pruned or parametrized module stands for."""
    parent, _, leaf = name.rpartition(".")
    head, _, attribute = parent.rpartition(".")
    if leaf.startswith("original") and head.rpartition(".")[2] == "parametrizations":
        base = head.rpartition(".")[0]
        return f"{base}.{attribute}" if base else attribute
    for ending in ("_orig", "_g", "_v"):  # pruning and the older norms of torch.nn.utils
        short = leaf.removesuffix(ending)
        if short != leaf and _has(captured, parent, short):
            return f"{parent}.{short}" if parent else short
    return name


def _has(captured: Captured, path: str, attribute: str) -> bool:
    """Whether a module shows an attribute."""
    source = captured.source
    if not isinstance(source, nn.Module):
        return any(name.startswith(f"{path}.") for name in captured.tensors.values())
    try:
        module = source.get_submodule(path)
    except AttributeError:
        return False
    held = {**vars(module), **module._parameters, **module._buffers}
    shown = attribute in held and isinstance(held[attribute], (Tensor, type(None)))
    return shown or parametrize.is_parametrized(module, attribute)
