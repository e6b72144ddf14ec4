"""Making a pair: another set of weights is held against a captured model, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxpath import ops
from fxpath.capture import Captured, Given, Model, check_finite, named_tensors
from fxpath.errors import module_path
from fxpath.loading.states import fit_state_dict
from fxpath.pairs.pair import LEAVES, Pair, Side
from fxpath.passes.links import mark_static, static
from fxpath.passes.unsign import unsign
from fxpath.program import build
from fxpath.schema import arguments

__all__ = ["Other", "make_pair"]

Other = Model | Mapping[str, Tensor]


def make_pair(
    model: Model,
    other: Other,
    given: Given,
) -> Pair:
    """Capture ``model`` and hold ``other`` against it.

    Args:
        model: as for :func:`fxpath.analyze`.
        other: a model of the same architecture, or a state dict with the model's own names.  A
            model may hold its weights in another way (pruned, parametrized, batch norms fused): its
            effective parameters count.
        given: inputs, and the part of the model to compare.

    Raises:
        TypeError: if ``other`` is neither.
        ValueError: for another architecture, missing or unknown keys, other shapes, NaN.
        UnsupportedModelError: as :func:`fxpath.analyze`.
    """
    ours = build(model, given, reduced=False)
    tensors = {name: tensor.detach().clone() for name, tensor in ours.captured.live().items()}
    mark_static(ours.signed.graph)
    leaves = _number_leaves(ours.signed.graph)
    mine = Side(ours.captured, ours.signed, tensors, leaves)
    if isinstance(other, (nn.Module, ExportedProgram)):
        theirs = build(other, given, reduced=False)
        mark_static(theirs.signed.graph)
        _check_other(theirs.captured.tensors, theirs.captured.live())
        same = _match(ours.signed, theirs.signed)
        live = _copied(theirs.captured, theirs.captured.live(), ours.captured, tensors)
        side = Side(theirs.captured, theirs.signed, live, [same[leaf] for leaf in leaves])
    elif isinstance(other, Mapping):
        values = _from_state(ours.captured, ours.signed, other)
        state = _copied(ours.captured, values, ours.captured, tensors)
        side = Side(ours.captured, ours.signed, state, leaves)
    else:
        raise TypeError(
            f"other is a {type(other).__name__}: pass a model of the same architecture, or a state "
            "dict with the model's own names"
        )
    return Pair(unsign(ours.signed), mine, side)


def _copied(
    captured: Captured, live: Mapping[str, Tensor], first: Captured, copied: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of a network's tensors, since they may change later; equal ones of both are shared."""
    known = {first.tensors[placeholder]: tensor for placeholder, tensor in copied.items()}
    found = {}
    for placeholder, tensor in live.items():
        own = known.get(captured.tensors[placeholder])
        same = (
            own is not None
            and own.dtype == tensor.dtype
            and own.device == tensor.device
            and torch.equal(own, tensor)
        )
        found[placeholder] = own if own is not None and same else tensor.detach().clone()
    return found


def _number_leaves(graph: fx.Graph) -> list[fx.Node]:
    """Leaves in order; what a slope reads is one, too."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        leaf = node
        if node.target is ops.slope and isinstance(arguments(node)[1], fx.Node):
            leaf = arguments(node)[1]
        elif node.target not in LEAVES:
            continue
        if "leaf" not in leaf.meta:
            leaf.meta["leaf"] = len(found)
            leaf.meta["fixed"] = leaf.target is not ops.coordinate
            found.append(leaf)
    return found


def _check_other(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    try:
        check_finite({names[key]: tensor for key, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"other: {error}") from None


def _from_state(
    captured: Captured, lifted: fx.GraphModule, state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a state dict for the placeholders of a captured model."""
    own, stored = named_tensors(captured.source), _stored(captured.source)
    read = {
        node.name: captured.tensors[node.name]
        for node in captured.graph_module.graph.nodes
        if node.op == "placeholder" and node.users and node.name in captured.tensors
    }
    # What the graph does not read may be missing; so may a buffer that no state dict holds.
    needed = {name for name in read.values() if name in stored and name not in captured.constants}
    try:
        given = fit_state_dict(state, {**stored, **own}, optional={*stored, *own} - needed)
    except ValueError as error:
        raise ValueError(
            f"other: {error}; if its weights are held in another way, pass the model itself"
        ) from None
    tensors = {**captured.live(), **{key: given[n] for key, n in read.items() if n in given}}
    _check_other(read, {key: tensors[key] for key in read})
    _check_baked(lifted, read, captured.live(), tensors)
    device = {key: value.device for key, value in captured.live().items()}
    return {key: value.to(device[key]) for key, value in tensors.items()}


def _stored(model: Model) -> dict[str, Tensor]:
    """The model's own state dict."""
    return dict(model.state_dict if isinstance(model, ExportedProgram) else model.state_dict())


def _check_baked(
    lifted: fx.GraphModule,
    read: Mapping[str, str],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> None:
    """Refuse other masks and index lists: the lifted graph was made for the model's own."""
    live = {n.target for n in lifted.graph.nodes if n.op == "placeholder" and n.users}
    changed = [
        name
        for key, name in read.items()
        if key not in live and not torch.equal(ours[key], theirs[key].to(ours[key].device))
    ]
    if changed:
        raise ValueError(
            f"other: {', '.join(changed)} select entries of activations, and differ from the "
            "model's: this is another architecture"
        )


# -- two graphs ------------------------------------------------------------------------------------


def _match(first: fx.GraphModule, second: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Pairs of corresponding nodes of two signed graphs.

    Raises:
        ValueError: naming the first operation in which they differ.
    """
    ours, theirs = (
        [n for n in module.graph.nodes if n.op == "call_function" and not static(n)]
        for module in (first, second)
    )
    same: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours, theirs, strict=False):
        if a.target is not b.target or not _alike((first, a.args), (second, b.args), same):
            raise ValueError(
                f"other is of another architecture: {_described(a)} in the model is "
                f"{_described(b)} there"
            )
        same[a] = b
    if len(ours) != len(theirs):
        longer = ours if len(ours) > len(theirs) else theirs
        raise ValueError(
            "other is of another architecture: one of the two goes on with "
            f"{_described(longer[min(len(ours), len(theirs))])}"
        )
    return same


def _described(node: fx.Node) -> str:
    origin = node.meta.get("origin")
    shape = "x".join(map(str, node.meta["val"].shape))
    if origin is None:
        return f"an input or output ({shape})"
    literals = [str(a) for a in origin.args if not isinstance(a, fx.Node) and a is not None]
    called = f"{origin.target}({', '.join(literals)})" if literals else str(origin.target)
    return f"{called} of {module_path(origin) or origin.name} ({shape})"


def _alike(
    ours: tuple[fx.GraphModule, Any], theirs: tuple[fx.GraphModule, Any], same: dict[Any, Any]
) -> bool:
    (first, a), (second, b) = ours, theirs
    if isinstance(a, (list, tuple)):
        return (
            isinstance(b, (list, tuple))
            and len(a) == len(b)
            and all(_alike((first, x), (second, y), same) for x, y in zip(a, b, strict=True))
        )
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b)
    if a in same or not static(a):
        return same.get(a) is b
    if a.op == "get_attr" and b.op == "get_attr":
        one, two = getattr(first, str(a.target)), getattr(second, str(b.target))
        return one.shape == two.shape and torch.equal(one, two)
    if "leaf" in a.meta:
        if a.target in LEAVES and a.target is not b.target:
            return False
        if tuple(a.meta["val"].shape) != tuple(b.meta["val"].shape):
            return False
    elif a.target is not b.target or not _alike((first, a.args), (second, b.args), same):
        return False
    same[a] = b
    return True
