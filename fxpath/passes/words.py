"""Words of lowered graphs as steps, each with its transpose.

The lifted network is linear in each activation and in each weight, so that every word has a
transpose: what it does to the gradient of log ||Phi|| on the way back.  :data:`WORDS` is the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops, products, shapes
from fxpath.graph.aten import (
    CAT,
    CONVOLUTION_BACKWARD,
    EXPAND,
    PERMUTE,
    PICKING,
    RELABELLING,
    RESHAPE,
    SELECTION_BACKWARD,
)
from fxpath.graph.equations import letters
from fxpath.graph.links import extents
from fxpath.graph.power import power, power_of_number
from fxpath.graph.schema import bind, target
from fxpath.passes.tape import Factored, Fixed, Outer, Tape, Unsettled, Value

Weight = Value | Factored
Sum = Value | Unsettled

#: From a tape, the word's node, and its arguments, to what it makes.
Word = Callable[..., Value | Factored | Unsettled]


# -- where a value begins --------------------------------------------------------------------------


def _source(t: Tape, node: fx.Node, shape: Sequence[int]) -> Value:
    ones = t.emit(shapes.filled, tuple(shape), 1.0, t.dtype, t.device)
    return Value(ones, tuple(shape), active=True)


def _constant(t: Tape, node: fx.Node, bias: Value) -> Value:
    return t.settle([bias], extents(node), [True])


# -- weighted sums ---------------------------------------------------------------------------------


def _weighed(
    t: Tape,
    x: Value,
    weight: Weight,
    bias: Value | None,
    y: fx.Node,
    node: fx.Node,
    back: Callable[[fx.Node], None],
) -> Sum:
    """Weighted sums with their bias, settled, unless the sum that reads them does it."""
    factor = weight.factor if isinstance(weight, Factored) else None
    wanted = x.wanted or _inner(weight).wanted
    made = t.made(y, x, back, shape=extents(node), wanted=wanted)
    terms = (made,) if bias is None else (made, bias)
    if [user.target for user in node.users] == [ops.add]:
        (user,) = node.users
        if user.args[0] is not user.args[1] and extents(user) == extents(node):
            return Unsettled(terms, factor)
    return t.settle(terms, extents(node), [True] * len(terms), factor)


def _inner(weight: Weight) -> Value:
    return weight.weight if isinstance(weight, Factored) else weight


def _factored(t: Tape, node: fx.Node, weight: Value, factor: Value) -> Factored:
    return Factored(weight, factor)


def _window(
    t: Tape,
    node: fx.Node,
    x: Value,
    weight: Weight,
    bias: Value | None,
    matrices: Sequence[Fixed | None],
    ends: Sequence[int],
    groups: int,
) -> Sum:
    inner, columns = _inner(weight), t.emit(ops.columns, x.node, matrices)
    if groups == 1:
        made = t.emit(products.product, inner.node, columns)
    else:
        made = t.emit(products.grouped, inner.node, columns, groups)

    def back(grad: fx.Node) -> None:
        flat = t.emit(shapes.channels_first, grad)
        if groups == 1:
            t.give(inner, Outer(flat, columns))
        elif inner.wanted:
            t.give(inner, t.emit(products.grouped_outer, flat, columns, groups, inner.shape))
        if x.wanted:
            through = (
                t.emit(products.product_back, inner.node, flat)
                if groups == 1
                else t.emit(products.grouped_back, inner.node, flat, groups)
            )
            t.give(x, t.emit(ops.uncolumns, through, x.shape, matrices))

    y = t.emit(shapes.batch_first, made, x.shape[0], list(ends))
    return _weighed(t, x, weight, bias, y, node, back)


def _conv(t: Tape, node: fx.Node, x: Value, weight: Weight, bias: Value | None, *spec: Any) -> Sum:
    inner = _inner(weight)

    def back(grad: fx.Node) -> None:
        asked = [x.wanted, inner.wanted, False]
        found = t.emit(CONVOLUTION_BACKWARD, grad, x.node, inner.node, None, *spec, asked)
        for i, value in enumerate((x, inner)):
            if value.wanted:
                t.give(value, t.item(found, i))

    y = t.emit(ops.conv, x.node, inner.node, None, *spec)
    return _weighed(t, x, weight, bias, y, node, back)


def _contract(
    t: Tape, node: fx.Node, x: Value, weight: Weight, bias: Value | None, equation: str
) -> Sum:
    form, inner = letters(equation), _inner(weight)
    if form.dense:
        return _dense(t, node, x, weight, bias)

    def back(grad: fx.Node) -> None:
        for value, own, other, theirs in (
            (x, form.x, inner, form.weight),
            (inner, form.weight, x, form.x),
        ):
            if value.wanted:
                spec = form.out, theirs, own, value.shape
                t.give(value, t.emit(shapes.contract_back, grad, other.node, *spec))

    y = t.emit(ops.contract, x.node, inner.node, None, equation)
    return _weighed(t, x, weight, bias, y, node, back)


def _dense(t: Tape, node: fx.Node, x: Value, weight: Weight, bias: Value | None) -> Sum:
    """A matrix along the last axis."""
    inner, columns = _inner(weight), t.emit(shapes.last_first, x.node)

    def back(grad: fx.Node) -> None:
        flat = t.emit(shapes.last_first, grad)
        t.give(inner, Outer(flat, columns))
        if x.wanted:
            through = t.emit(products.product_back, inner.node, flat)
            t.give(x, t.emit(shapes.last_last, through, x.shape))

    made = t.emit(products.product, inner.node, columns)
    y = t.emit(shapes.last_last, made, extents(node))
    return _weighed(t, x, weight, bias, y, node, back)


def _scale(t: Tape, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Sum:
    def back(grad: fx.Node) -> None:
        for value, other in ((x, weight), (weight, x)):
            if value.wanted:
                scaled = t.emit(torch.mul, grad, other.node)
                t.give(value, t.emit(shapes.sum_to, scaled, value.shape))

    y = t.emit(torch.mul, x.node, weight.node)
    if x.active:
        return _weighed(t, x, weight, bias, y, node, back)
    return t.made(y, x, back, shape=extents(node), wanted=x.wanted or weight.wanted)


# -- sums of values --------------------------------------------------------------------------------


def _add(t: Tape, node: fx.Node, *terms: Sum) -> Value:
    values: list[Value] = []
    measured: list[bool] = []
    factor = None
    # One that has a factor comes first, and there is room for one.
    for term in sorted(terms, key=lambda each: not isinstance(each, Unsettled) or not each.factor):
        if isinstance(term, Value):
            values.append(term)
            measured.append(t.grown(term.bits))
        elif not term.factor or not values:
            values += term.values
            measured += [True] * len(term.values)
            factor = factor or term.factor
        else:
            own = [True] * len(term.values)
            values.append(t.settle(term.values, extents(node), own, term.factor))
            measured.append(False)
    return t.settle(values, extents(node), measured, factor)


def _shift(t: Tape, node: fx.Node, x: Value, bias: Value) -> Value:
    if x.active:
        return t.settle([x, bias], extents(node), [t.grown(x.bits), True])

    def back(grad: fx.Node) -> None:
        for value in (x, bias):
            if value.wanted:
                t.give(value, t.emit(shapes.sum_to, grad, value.shape))

    y = t.emit(torch.add, x.node, bias.node)
    return t.made(y, x, back, shape=extents(node), wanted=x.wanted or bias.wanted)


def _clamp(t: Tape, node: fx.Node, x: Value, lo: float | None, hi: float | None) -> Value:
    bounds = [Fraction(bound) for bound in ops.bound_sizes(lo, hi)]
    size = float(sum(power_of_number(bound, t.q) for bound in bounds))
    if not size:
        return x
    return _shift(t, node, x, Value(t.emit(shapes.filled, (), size, t.dtype, t.device), ()))


def _slope(t: Tape, node: fx.Node, x: Value, a: Value | float) -> Sum:
    if isinstance(a, float | int):
        factor = float(ops.steepness(a, t.dtype)) ** t.q
        if factor == 1:
            return x

        def scaled(grad: fx.Node) -> None:
            t.give(x, t.emit(torch.mul, grad, factor))

        return t.fixed(x, t.emit(torch.mul, x.node, factor), x.shape, factor, scaled)
    return _scale(t, node, x, a)


# -- fixed maps ------------------------------------------------------------------------------------


def _mix(t: Tape, node: fx.Node, x: Value, dim: int, matrix: Fixed) -> Value:
    def back(grad: fx.Node) -> None:
        t.give(x, t.emit(ops.mix, grad, dim, t.emit(torch.t, matrix)))

    gain = float(matrix.tensor.sum(1).max()) if matrix.tensor.numel() else 0.0
    return t.fixed(x, t.emit(ops.mix, x.node, dim, matrix), extents(node), gain, back)


def _along(
    t: Tape, node: fx.Node, x: Value, dim: int, index: Fixed, weight: Fixed, *_: Any
) -> Value:
    taps = t.hold(power(weight.tensor.double(), t.q), f"taps_{node.name}")

    def back(grad: fx.Node) -> None:
        t.give(x, t.emit(shapes.along_back, grad, dim, index, taps, x.shape[dim]))

    gain = float(taps.tensor.sum(1).max()) if taps.tensor.numel() else 0.0
    return t.fixed(x, t.emit(ops.along, x.node, dim, index, taps), extents(node), gain, back)


def _reshape(t: Tape, node: fx.Node, x: Value, *_: Any) -> Value:
    def back(grad: fx.Node) -> None:
        t.give(x, t.emit(RESHAPE, grad, list(x.shape)))

    return t.fixed(x, t.emit(RESHAPE, x.node, list(extents(node))), extents(node), 1, back)


def _expand(t: Tape, node: fx.Node, x: Value, *_: Any) -> Value:
    def back(grad: fx.Node) -> None:
        t.give(x, t.emit(shapes.sum_to, grad, x.shape))

    return t.fixed(x, t.emit(EXPAND, x.node, list(extents(node))), extents(node), 1, back)


def _permute(t: Tape, node: fx.Node, x: Value, dims: Sequence[int]) -> Value:
    order = [d % len(x.shape) for d in dims]
    inverse = [order.index(d) for d in range(len(order))]

    def back(grad: fx.Node) -> None:
        t.give(x, t.emit(PERMUTE, grad, inverse))

    return t.fixed(x, t.emit(PERMUTE, x.node, order), extents(node), 1, back)


def _cat(t: Tape, node: fx.Node, pieces: Sequence[Value], dim: int = 0) -> Value:
    dim, shape = dim % len(extents(node)), extents(node)
    if pieces[0].active:
        return t.join(pieces, dim, shape)

    def back(grad: fx.Node) -> None:
        start = 0
        for piece in pieces:
            if piece.wanted:
                t.give(piece, t.emit(torch.narrow, grad, dim, start, piece.shape[dim]))
            start += piece.shape[dim]

    joined, wanted = t.emit(CAT, [p.node for p in pieces], dim), any(p.wanted for p in pieces)
    return t.made(joined, pieces[0], back, shape=shape, wanted=wanted)


def _select(t: Tape, node: fx.Node, x: Value, *_: Any) -> Value:
    """A selection of entries, with the transpose that ATen has for it."""
    spec = list(bind(node).values())[1:]

    def back(grad: fx.Node) -> None:
        t.give(x, t.emit(SELECTION_BACKWARD[node.target], grad, list(x.shape), *spec))

    return t.fixed(x, t.emit(target(node), x.node, *spec), extents(node), 1, back)


def _relabel(t: Tape, node: fx.Node, x: Value, *args: Any) -> Value:
    """Another order or shape of all entries."""
    seen = target(node)(torch.empty(x.shape, device="meta"), *args)
    # Axes in the order of memory, which is that of the argument.
    order = sorted(range(seen.dim()), key=lambda d: -seen.stride(d))

    def back(grad: fx.Node) -> None:
        turned = t.emit(PERMUTE, grad, order)
        t.give(x, t.emit(RESHAPE, turned, list(x.shape)))

    return t.made(t.emit(target(node), x.node, *args), x, back, shape=extents(node))


def _pick(t: Tape, node: fx.Node, x: Value, *args: Any) -> Value:
    """Entries by constant lists of positions."""

    def back(grad: fx.Node) -> None:
        every = t.emit(shapes.positions, x.shape, t.device)
        picked = t.emit(target(node), every, *args)
        t.give(x, t.emit(shapes.put_back, grad, picked, x.shape))

    return t.made(t.emit(target(node), x.node, *args), x, back, shape=extents(node))


def _ignored(t: Tape, node: fx.Node, x: Value, *told: Any) -> Value:
    return x


WORDS: Mapping[Any, Word] = {
    # What only weights are moved by.
    **dict.fromkeys(RELABELLING, _relabel),
    **dict.fromkeys(PICKING, _pick),
    **dict.fromkeys(ops.IGNORED, _ignored),
    ops.source: _source,
    ops.constant: _constant,
    ops.factored: _factored,
    ops.window: _window,
    ops.conv: _conv,
    ops.contract: _contract,
    ops.scale: _scale,
    ops.shift: _shift,
    **dict.fromkeys((ops.add, ops.maximum, ops.minimum), _add),
    ops.clamp: _clamp,
    ops.slope: _slope,
    ops.mix: _mix,
    **dict.fromkeys((ops.along, ops.pool), _along),
    RESHAPE: _reshape,
    EXPAND: _expand,
    PERMUTE: _permute,
    CAT: _cat,
    **dict.fromkeys(SELECTION_BACKWARD, _select),
}
