"""Rules of the generalised path-norm: LSTM and GRU networks, unrolled.

    LSTM:  c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g),    h_t = sigmoid(o) tanh(c_t)
    GRU:   h_t = (1 - sigmoid(z)) n + sigmoid(z) h_(t-1),    n = tanh(g + sigmoid(r) u)

with i, f, g, o, and r, z, g, affine in x_t and h_(t-1), and u affine in h_(t-1).  Paths run through
g, u, n, c and h; the sigmoids are gates, and the rows of the weights that make them have no mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.aten import SLICE
from fxpath.graph.builder import Builder
from fxpath.rules.affine import bias_along, only_first_active
from fxpath.rules.common import Args
from fxpath.rules.gating import by_gate, squashed
from fxpath.rules.recurrent import Start, Step, from_inputs, linear_map, unrolled
from fxpath.rules.registry import rule

aten = torch.ops.aten

#: States that go into a step; ``None`` stands for zeros.
States = Sequence[fx.Node | None]


@rule(aten.lstm.input, gated=True)
def _lstm(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return unrolled(build, node, args, _beginning(build, args["hx"]), _lstm_step)


@rule(aten.gru.input, gated=True)
def _gru(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return unrolled(build, node, args, _beginning(build, [args["hx"]]), _gru_step)


@rule(aten.rnn_tanh.input, gated=True)
def _rnn(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return unrolled(build, node, args, _beginning(build, [args["hx"]]), _tanh_step)


@rule(aten.lstm_cell.default, gated=True)
def _lstm_cell(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [*_cell(build, node, args, args["hx"], _lstm_step)]


@rule(aten.gru_cell.default, gated=True)
def _gru_cell(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _cell(build, node, args, [args["hx"]], _gru_step)[0]


@rule(aten.rnn_tanh_cell.default, gated=True)
def _rnn_cell(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _cell(build, node, args, [args["hx"]], _tanh_step)[0]


def _cell(
    build: Builder, node: fx.Node, args: Args, states: Sequence[fx.Node], step: Step
) -> list[fx.Node]:
    only_first_active(build, args, "w_ih", "w_hh", "b_ih", "b_hh")
    parameters = [args[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh")]
    seen = from_inputs(build, node, build.node(args["input"]), parameters)
    given = [None if build.is_zero(state) else build.node(state) for state in states]
    return step(build, node, seen, given, parameters)[0]


def _beginning(build: Builder, states: Sequence[fx.Node]) -> Start:
    """The states of one layer in one direction, of those of all."""

    def of(state: fx.Node, number: int) -> fx.Node | None:
        if build.is_zero(state):
            return None
        piece = build.emit(SLICE, build.node(state), 0, number, number + 1)
        return build.reshape(piece, build.shape(piece)[1:])

    return lambda number, parameters: [of(state, number) for state in states]


def _lstm_step(
    build: Builder, node: fx.Node, seen: fx.Node, states: States, parameters: Sequence[Any]
) -> tuple[list[fx.Node], States]:
    h, c = states
    fed_back = _from_state(build, node, h, parameters, build.shape(seen))
    i, f, g, o = _parts(build, _sum(build, seen, fed_back), 4)
    new = by_gate(build, squashed(build, g, "tanh"), squashed(build, i, "sigmoid"), 1.0)
    if c is not None:
        kept = build.expand(c, build.shape(new))
        new = build.emit(ops.add, by_gate(build, kept, squashed(build, f, "sigmoid"), 1.0), new)
    out = by_gate(build, squashed(build, new, "tanh"), squashed(build, o, "sigmoid"), 1.0)
    if len(parameters) > 4:  # projected
        out = linear_map(build, node, out, parameters[4])
    return [out, new], [out, new]


def _gru_step(
    build: Builder, node: fx.Node, seen: fx.Node, states: States, parameters: Sequence[Any]
) -> tuple[list[fx.Node], States]:
    (h,) = states
    fed_back = _from_state(build, node, h, parameters, build.shape(seen))
    r, z, g = _parts(build, seen, 3)
    if fed_back is not None:
        more_r, more_z, u = _parts(build, fed_back, 3)
        r, z = _sum(build, r, more_r), _sum(build, z, more_z)
        g = build.emit(ops.add, g, by_gate(build, u, squashed(build, r, "sigmoid"), 1.0))
    z = squashed(build, z, "sigmoid")
    rest = build.emit(ops.shift, build.emit(ops.negative, z), build.number(1.0))
    new = by_gate(build, squashed(build, g, "tanh"), rest, 1.0)
    if h is not None:
        kept = build.expand(h, build.shape(new))
        new = build.emit(ops.add, new, by_gate(build, kept, z, 1.0))
    return [new], [new]


def _tanh_step(
    build: Builder, node: fx.Node, seen: fx.Node, states: States, parameters: Sequence[Any]
) -> tuple[list[fx.Node], States]:
    (h,) = states
    fed_back = _from_state(build, node, h, parameters, build.shape(seen))
    new = squashed(build, _sum(build, seen, fed_back), "tanh")
    return [new], [new]


def _from_state(
    build: Builder,
    node: fx.Node,
    state: fx.Node | None,
    parameters: Sequence[Any],
    shape: Sequence[int],
) -> fx.Node | None:
    """``W_hh h + b_hh``, of a shape; ``None`` if that is zero."""
    bias = parameters[3]
    if state is not None:
        fed_back = linear_map(build, node, state, parameters[1])
        return build.expand(bias_along(build, fed_back, bias, node, -1), shape)
    if bias is None:
        return None
    return build.expand(build.emit(ops.constant, build.weight(bias, node, "bias")), shape)


def _sum(build: Builder, x: fx.Node, y: fx.Node | None) -> fx.Node:
    return x if y is None else build.emit(ops.add, x, y)


def _parts(build: Builder, x: fx.Node, count: int) -> list[fx.Node]:
    """Pieces of one size along the last axis."""
    axis, size = len(build.shape(x)) - 1, build.shape(x)[-1] // count
    return [build.emit(SLICE, x, axis, k * size, (k + 1) * size) for k in range(count)]
