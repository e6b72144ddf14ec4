"""A user's own operator is written out as the composition of torch operations that it is.

Requires that the operator is in :data:`~fxpath.graph.compositions.COMPOSITIONS`.  Ensures that the
operations that take its place return tensors of the same shape and format, and bear the place of
its call: module path and source line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graph.compositions import COMPOSITIONS
from fxpath.graph.schema import target
from fxpath.private import OpOverload, schema

#: Notes of a call that whatever is written in its place bears as well.
_PLACE = ("nn_module_stack", "stack_trace", "custom")
_REMEDY = "correct the function that was passed to fxpath.register_rule"


class _Composition(nn.Module):
    """A call of an operator, with the function that it is registered to be the same as."""

    def __init__(self, node: fx.Node, copies: bool) -> None:
        super().__init__()
        self.node, self.copies = node, copies

    def forward(self, *values: Any) -> Any:
        if self.copies:
            values = tuple(x.clone() if isinstance(x, Tensor) else x for x in values)
        given = dict(zip(self.node.all_input_nodes, values, strict=True))
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), given.__getitem__)
        return COMPOSITIONS[target(self.node)](*args, **kwargs)


def written_out(node: fx.Node) -> fx.GraphModule:
    """What a call of a registered operator computes, as a graph over the call's input nodes.

    Raises:
        UnsupportedModelError: if the function cannot be traced, holds tensors of its own, or
            returns others than the operator does.
    """
    try:
        traced = _traced(node, copies=False)
        if any(_mutates(step) for step in _steps(traced)):
            # The operator leaves its arguments alone, so what is written to are copies.
            traced = _traced(node, copies=True)
    # Whatever a function of the user's raises, or torch.export of what it does.
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), "")
        raise _refused(node, f"cannot be traced: {type(error).__name__}: {text}") from error
    if any(step.target is node.target for step in _steps(traced)):
        raise _refused(node, "calls the operator itself")
    inputs = [step for step in traced.graph.nodes if step.op == "placeholder"]
    if len(inputs) != len(node.all_input_nodes):
        raise _refused(node, "holds tensors that are no arguments of the operator")
    results = next(iter(reversed(traced.graph.nodes))).args[0]
    made = fx.map_arg(results, lambda step: _form(step.meta["val"]))
    value = node.meta["val"]
    own = tuple(map(_form, value if isinstance(value, tuple | list) else [value]))
    if tuple(made) != own:
        raise _refused(node, f"returns {_shown(made)}, and the operator {_shown(own)}")
    for step in _steps(traced):
        step.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
    return traced


def _traced(node: fx.Node, copies: bool) -> fx.GraphModule:
    values = tuple(read.meta["val"] for read in node.all_input_nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Composition(node, copies), values, strict=False)
    return program.graph_module


def _steps(traced: fx.GraphModule) -> Iterator[fx.Node]:
    """All nodes, also those of blocks that torch.export keeps apart."""
    for part in traced.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _mutates(step: fx.Node) -> bool:
    called = target(step)
    return isinstance(called, OpOverload) and schema(called).is_mutable


def _form(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _shown(forms: Any) -> str:
    return ", ".join(f"{list(form[0])} in {form[1]}" if form else str(form) for form in forms)


def _refused(node: fx.Node, what: str) -> UnsupportedModelError:
    function = COMPOSITIONS[target(node)]
    name = getattr(function, "__qualname__", repr(function))
    found = problem(node, f"{name}, which is registered as its rule, {what}", _REMEDY)
    return UnsupportedModelError(SupportReport((found,)))
