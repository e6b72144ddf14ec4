"""Which parameters have no score, and why: none is absent without a word."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from torch import fx

from fxpath.graph import ops
from fxpath.graph.constants import active_nodes
from fxpath.graph.edit import inputs_first
from fxpath.graph.gating import find_gates
from fxpath.graph.made import read_by
from fxpath.graph.schema import arguments
from fxpath.model import Captured
from fxpath.model.captured import named_tensors

UNUSED = "unused"
UNREACHED = "not reached by a path"
GATED = "inside a gate, which has no path mass"


def find_unscored(
    captured: Captured, lifted: fx.GraphModule, scores: Container[str], cut: bool
) -> dict[str, str]:
    """The parameters of a model that have no score of their own, each with the reason.

    Args:
        captured: the model.
        lifted: its lifted graph.
        scores: names of what is scored.
        cut: whether only a part of the model was asked for; what is read behind it is not known.

    Returns:
        Parameter name -> reason, in the model's order; tied ones under each of their names.
    """
    met = _met(captured, lifted, scores)
    read = None if cut else _read(captured)
    gated = _only_gates_read(captured)
    parameters = {id(p) for p in captured.source.parameters()}
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(captured.source).items():
        if id(tensor) in parameters:
            names.setdefault(id(tensor), []).append(name)
    found = {}
    for tied in names.values():
        unread = read is not None and read.isdisjoint(tied)
        reasons = [
            *(f"same tensor as {name}" for name in tied if name in scores),
            *(met[name] for name in tied if name in met),
            *(GATED for name in tied if name in gated),
            UNUSED if unread else UNREACHED,
        ]
        found.update({name: reasons[0] for name in tied if name not in scores})
    return found


def summary(unscored: Mapping[str, str]) -> str:
    """One line: how many, and the first of each kind.

    Example:
        >>> summary({"bn.weight": "normalization factor, part of fc.weight", "act.weight": "slope"})
        'not scored: 2 parameters (bn.weight: normalization factor; act.weight: slope)'
        >>> summary({"a": "slope", "b": "slope", "c": "slope"})
        'not scored: 3 parameters (a: slope, as 2 more)'
    """
    kinds: dict[str, list[str]] = {}
    for name, reason in unscored.items():
        kinds.setdefault(" ".join(reason.split()[:2]), []).append(name)
    shown = []
    for first, *more in kinds.values():
        reason = unscored[first].partition(",")[0]
        shown.append(f"{first}: {reason}" + f", as {len(more)} more" * bool(more))
    count = f"{len(unscored)} parameter{'s' * (len(unscored) != 1)}"
    return f"not scored: {count} ({'; '.join(shown)})"


def _met(captured: Captured, lifted: fx.GraphModule, scores: Container[str]) -> dict[str, str]:
    """Parameters that paths meet: as architecture, or in the coordinates of another name."""
    found: dict[str, str] = {}
    parts: dict[str, dict[str, None]] = {}
    factors: set[str] = set()
    for node in lifted.graph.nodes:
        if node.target is ops.coordinate and arguments(node)[1] in scores:
            value, name = arguments(node)
            for parameter, normalizes in _computed_from(captured, value):
                parts.setdefault(parameter, {})[name] = None
                factors.update([parameter] * normalizes)
        elif node.target in (ops.slope, ops.coefficient):
            kind = "slope" if node.target is ops.slope else "bound"
            for parameter, _ in _computed_from(captured, arguments(node)[-1]):
                found.setdefault(parameter, kind)
    for parameter, scored in parts.items():
        kind = "normalization factor, " * (parameter in factors)
        found[parameter] = f"{kind}part of {' and '.join(scored)}"
    return found


def _computed_from(captured: Captured, value: object) -> Iterator[tuple[str, bool]]:
    """Parameters in an expression, and whether each is one of a batch norm's factor there."""
    stack, seen = [(value, False)], set[tuple[object, bool]]()
    while stack:
        node, normalizes = stack.pop()
        if not isinstance(node, fx.Node) or (node, normalizes) in seen:
            continue
        seen.add((node, normalizes))
        if node.op == "placeholder" and captured.tensors[node.name] in captured.parameters:
            yield captured.tensors[node.name], normalizes
        inside = normalizes or node.target is ops.normalizer
        stack += [(n, inside) for n in reversed(node.all_input_nodes)]


def _only_gates_read(captured: Captured) -> set[str]:
    """Tensors that are read, but on no path."""
    if not captured.gates:
        return set()
    graph = captured.graph_module.graph
    signals = find_gates(graph, active_nodes(graph, captured).__contains__).signals
    unseen = [n.name for n in graph.nodes if n.op == "placeholder" and n not in signals]
    return {captured.tensors[name] for name in unseen if name in captured.tensors} & _read(captured)


def _read(captured: Captured) -> set[str]:
    """Tensors whose values an output is computed from, or seems to be."""
    (results,) = next(iter(reversed(captured.graph_module.graph.nodes))).args
    seen: dict[fx.Node, None] = {}
    for result in results:
        seen.update(dict.fromkeys(inputs_first(result, seen, read_by)))
    return {captured.tensors[node.name] for node in seen if node.name in captured.tensors}
