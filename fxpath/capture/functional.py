"""Pass: in-place operations become functional ones.

Requires an exported program.  Ensures that no operation of its graph writes to a tensor.
"""

from __future__ import annotations

import warnings

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from fxpath.capture.inline import flat
from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graph.aten import MAY_ALIAS
from fxpath.graph.aten import functional as functional_of
from fxpath.private import OpOverload, schema


def functionalize(program: ExportedProgram) -> tuple[fx.Graph, ExportGraphSignature]:
    """Copy the program's graph without in-place operations; its signature goes with it.

    An in-place operation on a tensor that nothing else shares (``ReLU(inplace=True)``, ``out +=
    x``) is renamed on the spot.  Where views are involved (``y[:, 0] = 0``), torch's own
    functionalization does it, with an empty decomposition table so that convolutions and linear
    maps stay whole.
    """
    graph = flat(program)
    through_alias = _rename(graph)
    if through_alias is not None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = program.run_decompositions({})
        # Of the many types that torch raises for what it cannot follow.
        except Exception as error:
            text = next(iter(str(error).splitlines()), type(error).__name__)
            reason = f"it writes through a view, which torch cannot make functional ({text})"
            written = problem(through_alias, reason, "compute the result without writing in place")
            raise UnsupportedModelError(SupportReport((written,))) from error
        graph = flat(program)
    graph.lint()
    return graph, program.graph_signature


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and schema(node.target).is_mutable


def _rename(graph: fx.Graph) -> fx.Node | None:
    """Make in-place operations functional; returns the first that writes through an alias."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    storage: dict[fx.Node, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        storage[node] = storage[node.args[0]] if _aliases(node) else node
        sharing.setdefault(storage[node], []).append(node)
        if not _mutates(node):
            continue
        target = node.args[0]
        functional = functional_of(node.target)
        shared = any(
            other not in (node, target) and any(order[user] > order[node] for user in other.users)
            for other in sharing[storage[node]]
        )
        if functional is None or shared:
            return node
        node.target = functional
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    return None


def _aliases(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if not isinstance(node.target, OpOverload):
        return True  # getitem on the pieces of a split
    returns = schema(node.target).returns
    return node.target in MAY_ALIAS or any(r.alias_info is not None for r in returns)
