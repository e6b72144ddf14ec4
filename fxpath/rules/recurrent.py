"""Rules: ReLU networks that run along a sequence, unrolled.

    h_t = ReLU(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

An initial state of zeros has no paths, so nothing starts there; one that depends on parameters
alone makes an effective bias W_hh h_0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

#: What goes into the first step: of one layer in one direction, by its number and its parameters.
Start = Callable[[int, Sequence[Any]], Any]
#: One step: from ``W_ih x + b_ih`` and what goes in, the new states and what goes into the next.
#: Parameters are W_ih, W_hh, b_ih, b_hh, the biases perhaps ``None``, and what else there is.
Step = Callable[
    [Builder, fx.Node, fx.Node, Any, Sequence[Any]],
    tuple[list[fx.Node], Any],
]


@rule(aten.rnn_relu_cell.default)
def _cell(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(build, args, "w_ih", "w_hh", "b_ih", "b_hh")
    parameters = [args[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh")]
    seen = from_inputs(build, node, build.node(args["input"]), parameters)
    fed_back = (
        None if build.is_zero(args["hx"]) else _from_start(build, node, args["hx"], parameters)
    )
    return _next(build, node, seen, fed_back, parameters)


@rule(aten.rnn_relu.input)
def _rnn(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return unrolled(build, node, args, _beginning(build, node, args["hx"]), _step)


def _beginning(build: Builder, node: fx.Node, states: Any) -> Start:
    def begin(number: int, parameters: Sequence[Any]) -> fx.Node | None:
        if build.is_zero(states):
            return None
        return _from_start(build, node, states, parameters, number)

    return begin


def _step(
    build: Builder, node: fx.Node, seen: fx.Node, fed_back: Any, parameters: Sequence[Any]
) -> tuple[list[fx.Node], Any]:
    state = _next(build, node, seen, fed_back, parameters)
    return [state], linear_map(build, node, state, parameters[1])


def unrolled(
    build: Builder, node: fx.Node, args: Args, begin: Start, step: Step
) -> list[fx.Node | None]:
    """Layers that run along a sequence, in one direction or both, step by step.

    Returns:
        The first state at all steps, then each of the states after the last step.
    """
    if args["train"] and args["dropout"]:
        raise Refusal(*TRAINING)
    if any(build.is_active(each) for each in args["params"]):
        raise Refusal("its weights depend on activations", "keep the weights constant")
    x = build.node(args["input"])
    time = 1 if args["batch_first"] else 0
    directions = 2 if args["bidirectional"] else 1
    each = len(args["params"]) // (args["num_layers"] * directions)
    finals = []
    for layer in range(args["num_layers"]):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            parameters = args["params"][number * each : (number + 1) * each]
            biased = [*parameters[:2], *(parameters[2:4] if args["has_biases"] else (None, None))]
            biased += parameters[4 if args["has_biases"] else 2 :]
            carried = begin(number, biased)
            steps = _run(build, node, x, time, carried, biased, step, reverse=direction == 1)
            finals.append(steps[0] if direction else steps[-1])
            outputs.append(_joined(build, [states[0] for states in steps], time))
        x = outputs[0] if directions == 1 else build.emit(CAT, outputs, 2)
    return [x, *(_joined(build, each, 0) for each in zip(*finals, strict=True))]


def _run(
    build: Builder,
    node: fx.Node,
    x: fx.Node,
    time: int,
    carried: Any,
    parameters: Sequence[Any],
    step: Step,
    reverse: bool,
) -> list[list[fx.Node]]:
    """States of one layer in one direction, in the order of the sequence."""
    seen = from_inputs(build, node, x, parameters)
    shape = build.shape(seen)
    steps: dict[int, list[fx.Node]] = {}
    order = range(shape[time])
    for t in reversed(order) if reverse else order:
        piece = build.emit(SLICE, seen, time, t, t + 1)
        piece = build.reshape(piece, (*shape[:time], *shape[time + 1 :]))
        steps[t], carried = step(build, node, piece, carried, parameters)
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
    return linear_map(build, node, state, parameters[1])


def linear_map(build: Builder, node: fx.Node, x: fx.Node, weight: Any) -> fx.Node:
    """A linear map without a bias."""
    equation = linear(len(build.shape(x)))
    return build.emit(ops.contract, x, build.weight(weight, node), None, equation)


def from_inputs(build: Builder, node: fx.Node, x: fx.Node, parameters: Sequence[Any]) -> fx.Node:
    """``W_ih x + b_ih``."""
    y = linear_map(build, node, x, parameters[0])
    return bias_along(build, y, parameters[2], node, -1)


def _next(
    build: Builder,
    node: fx.Node,
    seen: fx.Node,
    fed_back: fx.Node | None,
    parameters: Sequence[Any],
) -> fx.Node:
    if fed_back is not None:
        seen = build.emit(ops.add, seen, fed_back)
    return build.emit(ops.relu, bias_along(build, seen, parameters[3], node, -1))


def _joined(build: Builder, steps: Sequence[fx.Node], dim: int) -> fx.Node:
    shape = build.shape(steps[0])
    each = (*shape[:dim], 1, *shape[dim:])
    return build.emit(CAT, [build.reshape(step, each) for step in steps], dim)
