"""Rules: ReLU networks that run along a sequence, unrolled.

    h_t = ReLU(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

An initial state of zeros has no paths, so nothing starts there; one that depends on parameters
alone makes an effective bias W_hh h_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.aten import CAT, SLICE
from fxpath.graph.builder import Builder
from fxpath.graph.equations import linear
from fxpath.graph.refusal import Refusal
from fxpath.rules.affine import bias_along, only_first_active
from fxpath.rules.common import Args
from fxpath.rules.refused import TRAINING
from fxpath.rules.registry import rule

aten = torch.ops.aten


@rule(aten.rnn_relu_cell.default)
def _cell(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(build, args, "w_ih", "w_hh", "b_ih", "b_hh")
    parameters = [args[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh")]
    seen = _inputs(build, node, build.node(args["input"]), parameters)
    fed_back = (
        None if build.is_zero(args["hx"]) else _from_start(build, node, args["hx"], parameters)
    )
    return _next(build, node, seen, fed_back, parameters)


@rule(aten.rnn_relu.input)
def _rnn(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    if args["train"] and args["dropout"]:
        raise Refusal(*TRAINING)
    if any(build.is_active(each) for each in args["params"]):
        raise Refusal("its weights depend on activations", "keep the weights constant")
    x = build.node(args["input"])
    time = 1 if args["batch_first"] else 0
    directions, each = (2 if args["bidirectional"] else 1), (4 if args["has_biases"] else 2)
    finals = []
    for layer in range(args["num_layers"]):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            parameters = args["params"][number * each : (number + 1) * each]
            start = None
            if not build.is_zero(args["hx"]):
                start = _from_start(build, node, args["hx"], parameters, number)
            steps = _run(build, node, x, time, start, parameters, reverse=direction == 1)
            finals.append(steps[0] if direction else steps[-1])
            outputs.append(_joined(build, steps, time))
        x = outputs[0] if directions == 1 else build.emit(CAT, outputs, 2)
    return [x, _joined(build, finals, 0)]


def _run(
    build: Builder,
    node: fx.Node,
    x: fx.Node,
    time: int,
    fed_back: fx.Node | None,
    parameters: Sequence[Any],
    reverse: bool,
) -> list[fx.Node]:
    """States of one layer in one direction, in the order of the sequence."""
    seen = _inputs(build, node, x, parameters)
    shape = build.shape(seen)
    steps: dict[int, fx.Node] = {}
    order = range(shape[time])
    for t in reversed(order) if reverse else order:
        piece = build.emit(SLICE, seen, time, t, t + 1)
        piece = build.reshape(piece, (*shape[:time], *shape[time + 1 :]))
        steps[t] = _next(build, node, piece, fed_back, parameters)
        fed_back = _linear(build, node, steps[t], parameters[1])
    return [steps[t] for t in order]


def _from_start(
    build: Builder,
    node: fx.Node,
    states: fx.Node,
    parameters: Sequence[Any],
    number: int | None = None,
) -> fx.Node:
    """What the initial state adds to the first step; one of several if it is numbered."""
    if not build.is_active(states):
        if number is not None:
            states = build.compute(aten.select.int, states, 0, number)
        constant = build.compute(aten.linear.default, states, parameters[1])
        return build.emit(ops.constant, build.weight(constant, node, "bias"))
    state = build.node(states)
    if number is not None:
        piece = build.emit(SLICE, state, 0, number, number + 1)
        state = build.reshape(piece, build.shape(state)[1:])
    return _linear(build, node, state, parameters[1])


def _linear(build: Builder, node: fx.Node, x: fx.Node, weight: Any) -> fx.Node:
    equation = linear(len(build.shape(x)))
    return build.emit(ops.contract, x, build.weight(weight, node), None, equation)


def _inputs(build: Builder, node: fx.Node, x: fx.Node, parameters: Sequence[Any]) -> fx.Node:
    y = _linear(build, node, x, parameters[0])
    return bias_along(build, y, parameters[2] if len(parameters) > 2 else None, node, -1)


def _next(
    build: Builder,
    node: fx.Node,
    seen: fx.Node,
    fed_back: fx.Node | None,
    parameters: Sequence[Any],
) -> fx.Node:
    if fed_back is not None:
        seen = build.emit(ops.add, seen, fed_back)
    bias = parameters[3] if len(parameters) > 3 else None
    return build.emit(ops.relu, bias_along(build, seen, bias, node, -1))


def _joined(build: Builder, steps: Sequence[fx.Node], dim: int) -> fx.Node:
    shape = build.shape(steps[0])
    each = (*shape[:dim], 1, *shape[dim:])
    return build.emit(CAT, [build.reshape(step, each) for step in steps], dim)
