"""Making a pair: another set of weights is held against a captured model, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxpath.capture.loading.states import fit_state_dict
from fxpath.errors import module_path
from fxpath.graph import ops
from fxpath.graph.aten import CASTS
from fxpath.graph.leaves import LEAVES
from fxpath.graph.links import static
from fxpath.graph.schema import arguments
from fxpath.model import Captured, Given, Model, check_finite, named_tensors, skeleton
from fxpath.pairs.pair import Pair, Side, same_entries
from fxpath.program.program import build
from fxpath.sharding import GATHER, any_sharded

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
    mine = side_of(ours.captured, ours.lifted)
    return Pair(ours.lifted, mine, _held_against(mine, other, given)).remember()


def side_of(captured: Captured, lifted: fx.GraphModule) -> Side:
    """A captured model as one side of a pair; ``replace(side, tensors=...)`` is the other one."""
    leaves = [node for node in lifted.graph.nodes if "leaf" in node.meta]
    leaves.sort(key=lambda node: int(node.meta["leaf"]))
    return Side(captured, lifted, _detached(captured.live()), leaves)


def _held_against(mine: Side, other: Other, given: Given) -> Side:
    if isinstance(other, (nn.Module, ExportedProgram)):
        return _other_side(mine, other, given)
    if not isinstance(other, Mapping):
        raise TypeError(
            f"other is a {type(other).__name__}: pass a model of the same architecture, or a state "
            "dict with the model's own names"
        )
    if any_sharded(value for value in other.values() if isinstance(value, Tensor)):
        raise ValueError(f"other has sharded tensors (DTensors): {GATHER}")
    try:
        state, named = state_tensors(mine.captured, other)
    except ValueError as error:
        raise ValueError(
            f"other: {error}; if its weights are held in another way, pass the model itself"
        ) from None
    read = names_read(mine.captured)
    _check_other(read, {key: state[key] for key in read})
    changed = changed_numbers(mine.captured, named)
    if changed:
        return _traced_again(mine, named, changed, given)
    return replace(mine, tensors=_detached(state))


def _other_side(mine: Side, other: Model, given: Given) -> Side:
    """A model held against a captured one: its leaves in the order of the first one's."""
    theirs = build(other, given, reduced=False)
    _check_other(theirs.captured.tensors, theirs.captured.live())
    same = _match(mine.module, theirs.lifted)
    _check_casts(mine.captured, theirs.captured)
    leaves = [same[leaf] for leaf in mine.nodes]
    return Side(theirs.captured, theirs.lifted, _detached(theirs.captured.live()), leaves)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors themselves: a pair copies nothing, and notices when they change."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_other(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    try:
        check_finite({names[key]: tensor for key, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"other: {error}") from None


def state_tensors(captured: Captured, state: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a state dict: by placeholders of a captured model, and by name.

    Raises:
        ValueError: for missing or unknown names, or other shapes.
    """
    own, stored = named_tensors(captured.source), _stored(captured.source)
    read = names_read(captured)
    # What the graph does not read may be missing; so may a buffer that no state dict holds.
    needed = {name for name in read.values() if name in stored and name not in captured.constants}
    given = fit_state_dict(state, {**stored, **own}, optional={*stored, *own} - needed)
    live = captured.live()
    tensors = {**live, **{key: given[n] for key, n in read.items() if n in given}}
    return {key: value.to(live[key].device) for key, value in tensors.items()}, given


def names_read(captured: Captured) -> dict[str, str]:
    """Placeholder -> name of those tensors of a model that its graph reads."""
    return {
        node.name: captured.tensors[node.name]
        for node in captured.graph_module.graph.nodes
        if node.op == "placeholder" and node.users and node.name in captured.tensors
    }


def _stored(model: Model) -> dict[str, Tensor]:
    """The model's own state dict."""
    return dict(model.state_dict if isinstance(model, ExportedProgram) else model.state_dict())


def changed_numbers(captured: Captured, state: Mapping[str, Tensor]) -> list[str]:
    """Masks, index lists and numbers that the model's graph was made for, where they differ."""
    return [
        name
        for name, known in captured.baked.items()
        if name in state and not same_entries(known, state[name].to(known.device))
    ]


def _traced_again(
    mine: Side, state: Mapping[str, Tensor], changed: Sequence[str], given: Given
) -> Side:
    """The model with the tensors of a state dict, whose numbers may make another graph."""
    problem = (
        f"other: {', '.join(changed)} select entries of activations or are read as numbers, and "
        "differ from the model's: this is another architecture"
    )
    source = mine.captured.source
    if isinstance(source, ExportedProgram):
        raise ValueError(problem)
    loaded = skeleton(source)
    values: dict[int, Tensor] = {}
    for name, tensor in named_tensors(source).items():
        if name in state and isinstance(tensor, nn.Parameter):
            values.setdefault(id(tensor), nn.Parameter(state[name].detach(), requires_grad=False))
        elif name in state:
            values.setdefault(id(tensor), state[name])
    for module in loaded.modules():
        # Tied tensors stay one.
        for held in (module._buffers, module._parameters):
            for key, own in held.items():
                held[key] = values.get(id(own), own)  # type: ignore[assignment]
    try:
        return _other_side(mine, loaded, given)
    except ValueError as error:
        raise ValueError(f"{problem} ({error})") from None


# -- two graphs ------------------------------------------------------------------------------------


def _match(first: fx.GraphModule, second: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Pairs of corresponding nodes of two lifted graphs.

    Raises:
        ValueError: naming the first operation in which they differ.
    """
    ours, theirs = (
        [n for n in module.graph.nodes if n.op == "call_function" and not static(n)]
        for module in (first, second)
    )
    same: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours, theirs, strict=False):
        if not _same_operation((first, a), (second, b), same):
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


def _same_operation(
    ours: tuple[fx.GraphModule, fx.Node], theirs: tuple[fx.GraphModule, fx.Node], same: Any
) -> bool:
    (first, a), (second, b) = ours, theirs
    return (
        a.target is b.target
        and a.meta.get("input") == b.meta.get("input")
        and _alike((first, a.args), (second, b.args), same)
        and _alike((first, tuple(a.kwargs.items())), (second, tuple(b.kwargs.items())), same)
    )


def _described(node: fx.Node) -> str:
    origin = node.meta.get("origin")
    shape = "x".join(map(str, node.meta["val"].shape))
    if node.target is ops.total:
        return f"the end of the network ({len(arguments(node)[0])} outputs, in order)"
    if origin is None:
        return f"input {node.meta['input']} ({shape})" if "input" in node.meta else "nothing"
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
        return same_entries(getattr(first, str(a.target)), getattr(second, str(b.target)))
    if "leaf" in a.meta:
        if a.target in LEAVES and a.target is not b.target:
            return False
        if tuple(a.meta["val"].shape) != tuple(b.meta["val"].shape):
            return False
    elif not _same_operation(ours, theirs, same):
        return False
    same[a] = b
    return True


def _check_casts(first: Captured, second: Captured) -> None:
    """Refuse networks of which one rounds activations to a shorter format where the other doesn't.

    A cast is no part of Phi, but what it rounds off belongs to the function.
    """
    ours, theirs = (_rounding_casts(captured) for captured in (first, second))
    for a, b in itertools.zip_longest(ours, theirs):
        if a is None or b is None or a.meta["val"].dtype != b.meta["val"].dtype:
            one, two = (
                "no further cast"
                if n is None
                else f"{n.target} to {n.meta['val'].dtype} of {module_path(n) or n.name}"
                for n in (a, b)
            )
            raise ValueError(
                f"other is of another architecture: {one} in the model is {two} there, which "
                "rounds activations"
            )


def _rounding_casts(captured: Captured) -> list[fx.Node]:
    """Casts of activations to a format of fewer digits."""
    active: set[fx.Node] = set()
    found = []
    for node in captured.graph_module.graph.nodes:
        fed = node.op == "placeholder" and node.name not in captured.tensors
        if not fed and not any(n in active for n in node.all_input_nodes):
            continue
        active.add(node)
        if node.target in CASTS:
            before, after = (n.meta["val"].dtype for n in (node.args[0], node))
            if after.is_floating_point and before.is_floating_point:
                if torch.finfo(after).eps > torch.finfo(before).eps:
                    found.append(node)
    return found
