"""Rules: ReLU networks that run along a sequence, unrolled.

    h_t = ReLU(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

An initial state of zeros has no paths, so nothing starts there; one that depends on parameters
alone makes an effective bias W_hh h_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.rules.affine import bias_along, only_first_active
from fxpath.rules.common import Args
from fxpath.rules.refused import TRAINING
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten


@rule(aten.rnn_relu_cell.default)
def _cell(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(lift, args, "w_ih", "w_hh", "b_ih", "b_hh")
    parameters = [args[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh")]
    seen = _inputs(lift, node, lift.node(args["input"]), parameters)
    fed_back = None if lift.is_zero(args["hx"]) else _from_start(lift, node, args["hx"], parameters)
    return _next(lift, node, seen, fed_back, parameters)


@rule(aten.rnn_relu.input)
def _rnn(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    if args["train"] and args["dropout"]:
        raise Refusal(*TRAINING)
    if any(lift.is_active(each) for each in args["params"]):
        raise Refusal("its weights depend on activations", "keep the weights constant")
    x = lift.node(args["input"])
    time = 1 if args["batch_first"] else 0
    directions, each = (2 if args["bidirectional"] else 1), (4 if args["has_biases"] else 2)
    finals = []
    for layer in range(args["num_layers"]):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            parameters = args["params"][number * each : (number + 1) * each]
            start = None
            if not lift.is_zero(args["hx"]):
                start = _from_start(lift, node, args["hx"], parameters, number)
            steps = _run(lift, node, x, time, start, parameters, reverse=direction == 1)
            finals.append(steps[0] if direction else steps[-1])
            outputs.append(_joined(lift, steps, time))
        x = outputs[0] if directions == 1 else lift.emit(aten.cat.default, outputs, 2)
    return [x, _joined(lift, finals, 0)]


def _run(
    lift: Lift,
    node: fx.Node,
    x: fx.Node,
    time: int,
    fed_back: fx.Node | None,
    parameters: Sequence[Any],
    reverse: bool,
) -> list[fx.Node]:
    """States of one layer in one direction, in the order of the sequence."""
    seen = _inputs(lift, node, x, parameters)
    shape = lift.shape(seen)
    steps: dict[int, fx.Node] = {}
    order = range(shape[time])
    for t in reversed(order) if reverse else order:
        piece = lift.emit(aten.slice.Tensor, seen, time, t, t + 1)
        piece = lift.reshape(piece, (*shape[:time], *shape[time + 1 :]))
        steps[t] = _next(lift, node, piece, fed_back, parameters)
        fed_back = lift.emit(ops.linear, steps[t], lift.weight(parameters[1], node))
    return [steps[t] for t in order]


def _from_start(
    lift: Lift, node: fx.Node, states: fx.Node, parameters: Sequence[Any], number: int | None = None
) -> fx.Node:
    """What the initial state adds to the first step; one of several if it is numbered."""
    if not lift.is_active(states):
        if number is not None:
            states = lift.compute(aten.select.int, states, 0, number)
        constant = lift.compute(aten.linear.default, states, parameters[1])
        return lift.emit(ops.constant, lift.weight(constant, node, "bias"))
    state = lift.node(states)
    if number is not None:
        piece = lift.emit(aten.slice.Tensor, state, 0, number, number + 1)
        state = lift.reshape(piece, lift.shape(state)[1:])
    return lift.emit(ops.linear, state, lift.weight(parameters[1], node))


def _inputs(lift: Lift, node: fx.Node, x: fx.Node, parameters: Sequence[Any]) -> fx.Node:
    y = lift.emit(ops.linear, x, lift.weight(parameters[0], node))
    return bias_along(lift, y, parameters[2] if len(parameters) > 2 else None, node, -1)


def _next(
    lift: Lift, node: fx.Node, seen: fx.Node, fed_back: fx.Node | None, parameters: Sequence[Any]
) -> fx.Node:
    if fed_back is not None:
        seen = lift.emit(ops.add, seen, fed_back)
    bias = parameters[3] if len(parameters) > 3 else None
    return lift.emit(ops.relu, bias_along(lift, seen, bias, node, -1))


def _joined(lift: Lift, steps: Sequence[fx.Node], dim: int) -> fx.Node:
    shape = lift.shape(steps[0])
    each = (*shape[:dim], 1, *shape[dim:])
    return lift.emit(aten.cat.default, [lift.reshape(step, each) for step in steps], dim)
