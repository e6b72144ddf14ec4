"""Blocks of code that torch.export keeps apart (``with torch.no_grad():``) go back into one graph.

Requires an exported program.  Ensures a graph without higher-order operators, in which operators
with a composition of the user's are written out.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fxpath.capture.own_operators import written_out
from fxpath.errors import CUT, Problem, SupportReport, UnsupportedModelError, problem
from fxpath.graph.compositions import COMPOSITIONS
from fxpath.private import HigherOrderOperator, tree_leaves

#: Higher-order operator -> position of its subgraph among the arguments.
_SUBGRAPH = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "wrap_activation_checkpoint": 0,
    "tag_activation_checkpoint": 0,
}
#: Why a choice between subgraphs is refused, and what to do.
CHOICE = (
    "data-dependent control flow: values at run time decide which of its subgraphs runs, and a "
    "path-lifting belongs to one graph",
    f"replace the branch by tensor operations, or {CUT}",
)


def flat(program: ExportedProgram) -> fx.Graph:
    """Copy the program's graph, with the subgraphs of blocks that change nothing written out.

    Raises:
        UnsupportedModelError: naming every block that does change something.
    """
    graph, problems = fx.Graph(), list[Problem]()
    _copy(graph, program.graph_module, None, problems)
    if problems:
        raise UnsupportedModelError(SupportReport(tuple(problems)))
    return graph


def _copy(
    graph: fx.Graph, module: fx.GraphModule, inputs: Sequence[Any] | None, problems: list[Problem]
) -> Any:
    """Append a module's nodes; ``inputs`` stand for the placeholders of a subgraph."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs or ())
    for node in module.graph.nodes:
        if node.op == "placeholder" and inputs is not None:
            values[node] = next(given)
        elif node.op == "output":
            result = fx.map_arg(node.args[0], values.__getitem__)
            if inputs is None:
                copied = graph.output(result)
                copied.meta = node.meta.copy()
            return result
        elif node.op == "get_attr" and isinstance(_attribute(module, node), fx.GraphModule):
            continue  # read where it is called
        elif isinstance(node.target, HigherOrderOperator):
            values[node] = _block(graph, module, node, values, problems)
        elif node.target in COMPOSITIONS:
            values[node] = _composed(graph, node, values, problems)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple | list):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    raise AssertionError("a graph without an output node")


def _composed(
    graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], problems: list[Problem]
) -> Any:
    """Append what an operator of the user's is made of."""
    operands = [values[read] for read in node.all_input_nodes]
    results = _copy(graph, written_out(node), operands, problems)
    several = isinstance(node.meta["val"], tuple | list)
    return tuple(results) if several else results[0]


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _block(
    graph: fx.Graph,
    module: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    problems: list[Problem],
) -> Any:
    position = _SUBGRAPH.get(_name(node))
    if position is None:
        problems.append(problem(node, *CHOICE))
        return _stand_in(graph, node)
    inner = _attribute(module, _node(node.args[position]))
    reason = _lowers_precision(node, inner)
    if reason is not None:
        # The block has no source line of its own.
        first = next((n for n in inner.graph.nodes if n.meta.get("stack_trace")), node)
        problems.append(
            replace(problem(first, *reason), operation=str(node.target), node=node.name)
        )
        return _stand_in(graph, node)
    operands = fx.map_arg(list(node.args[position + 1 :]), values.__getitem__)
    return _copy(graph, inner, operands, problems)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _name(node: fx.Node) -> str:
    target = node.target
    return target.name() if isinstance(target, HigherOrderOperator) else ""


def _stand_in(graph: fx.Graph, node: fx.Node) -> Any:
    """Something that later nodes of a graph that is refused anyway can refer to."""
    stand_in = graph.create_node("call_function", operator.getitem, ((), 0))
    results = node.meta.get("val")
    return (stand_in,) * len(results) if isinstance(results, tuple | list) else stand_in


def _lowers_precision(node: fx.Node, inner: fx.GraphModule) -> tuple[str, str] | None:
    """Why the block of an autocast is refused; ``None`` for one that changes nothing."""
    if _name(node) != "wrap_with_autocast":
        return None
    kind, dtype, enabled = node.args[:3]
    touched = enabled and any(
        x.device.type == kind and x.is_floating_point() and x.dtype != torch.float64
        for x in _tensors(inner)
    )
    if not touched:
        return None
    return (
        f"autocast computes this block in {dtype or 'a lower precision'}, where weights are "
        "rounded, and the path-norm of the rounded network is another one",
        "leave autocast away in eval mode (enabled=self.training), or analyse a float64 copy",
    )


def _tensors(module: fx.GraphModule) -> list[Tensor]:
    values: list[Any] = [node.meta.get("val") for node in module.graph.nodes]
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
