"""Pass: ATen graph -> lifted graph in the vocabulary of :mod:`fxpath.graph.ops`.

Requires a functional ATen graph with static shapes and without frozen batch norms.  Ensures that
every operation between the inputs and the outputs was claimed by a rule (or is listed in the
report), that every intermediate shape is the one of the original network, and that every
coordinate of theta has a name of its own.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from fxpath.capture.sources import unreliable
from fxpath.errors import SupportReport, UnsupportedModelError
from fxpath.graph import ops
from fxpath.graph.builder import Builder
from fxpath.graph.edit import inputs_first
from fxpath.graph.leaves import number_leaves
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import arguments, bind, target
from fxpath.graph.values import check_shape, is_float
from fxpath.passes.biases import own_biases
from fxpath.passes.setting import Setting
from fxpath.rules import GATED, RULES, refusal
from fxpath.rules.refused import ORDER


def lift(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Lift a captured model.

    Returns:
        A graph module that takes the model's tensors (placeholders named as in the captured
        graph) and returns the path-norm, without care for range.

    Raises:
        UnsupportedModelError: listing every operation without an exact rule.
        ValueError: if no output is of floating point.
    """
    build = Builder(module.graph, setting.captured)
    build.problems += unreliable(module.graph)
    try:
        _walk(build, module.graph)
    finally:
        build.release()
    if build.problems:
        raise UnsupportedModelError(SupportReport(tuple(build.problems)))
    own_biases(build.graph)
    lifted = build.finish()
    number_leaves(lifted.graph)
    return lifted


def _walk(build: Builder, graph: fx.Graph) -> None:
    """Lift node by node; problems are collected, not raised."""
    output = next(iter(reversed(graph.nodes)))
    needed = set(inputs_first(output, ()))
    inputs = 0
    for node in graph.nodes:
        if not build.is_active(node):
            continue
        if node.op == "placeholder":
            _input(build, node, inputs)
            inputs += 1
        elif node in needed:
            build.lifted[node] = _apply(build, node)
            if _shapeless(build.lifted[node]):
                return  # nothing after it can be looked at
    outputs = [_output(build, value) for value in output.args[0] if is_float(value)]
    if not outputs and not build.problems:
        raise ValueError("the model has no floating-point output, so it has no paths")
    build.graph.output(build.emit(ops.total, outputs or [build.emit(ops.source, (1,))]))


def _input(build: Builder, node: fx.Node, position: int) -> None:
    if isinstance(node.meta.get("val"), Tensor):
        source = build.emit(ops.source, tuple(node.meta["val"].shape))
        source.meta["input"] = position
        build.lifted[node] = source


def _apply(build: Builder, node: fx.Node) -> Any:
    build.current = node
    try:
        if node.target is operator.getitem:
            return _item(build, node)
        rule = RULES.get(target(node))
        if rule is None and build.gating is not None:
            rule = GATED.get(target(node))
        if rule is None:
            raise refusal(node)
        fx.node.map_aggregate(node.meta.get("val"), check_shape)
        lifted = rule(build, node, bind(node))
    except Refusal as why:
        if build.is_signal(node):
            build.refuse(node, why)
        else:
            build.unfollowed[node] = why
        return _stand_in(build, node.meta.get("val"))
    if not build.is_signal(node):
        _inherit(build, node)
    if isinstance(lifted, fx.Node):
        expected, found = tuple(node.meta["val"].shape), build.shape(lifted)
        if expected != found:
            raise AssertionError(f"{node.name}: lifted to {found}, but it is {expected}")
    return lifted


def _inherit(build: Builder, node: fx.Node) -> None:
    """What only gates read is followed where all is that it reads."""
    reasons = [build.unfollowed[n] for n in node.all_input_nodes if n in build.unfollowed]
    if reasons:
        build.unfollowed[node] = reasons[0]


def _item(build: Builder, node: fx.Node) -> fx.Node:
    source, index = arguments(node)
    pieces = build.lifted[source]
    piece = pieces[index] if isinstance(pieces, list) else None
    if piece is None:
        raise Refusal(*ORDER)
    return piece


class _Unknown:
    """Stands in for a value whose shape depends on values."""


def _stand_in(build: Builder, value: Any) -> Any:
    """A value of the right shape, so that later operations are checked as well."""
    if isinstance(value, Tensor):
        if not all(isinstance(n, int) for n in value.shape):
            return _Unknown()
        return build.emit(ops.source, tuple(value.shape))
    return [_stand_in(build, v) for v in value] if isinstance(value, (list, tuple)) else []


def _shapeless(lifted: Any) -> bool:
    each = lifted if isinstance(lifted, list) else [lifted]
    return any(isinstance(v, _Unknown) for v in each)


def _output(build: Builder, value: fx.Node) -> fx.Node:
    try:
        return build.node(value)
    except Refusal as why:
        build.refuse(value, why)
        return build.emit(ops.source, tuple(value.meta["val"].shape))
