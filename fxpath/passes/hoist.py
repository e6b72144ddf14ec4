"""Pass: fixed maps move in front of the layers behind which they lower the number of positions.

A pooling reads fewer combinations of a layer's positions than the layer has.  Folded into the taps
of that layer it leaves as many output positions as there are combinations, and what the layer
reads is mapped instead; so on upwards, through whatever treats the positions of an axis alike.

Requires a reduced graph.  Ensures that the graph computes the same polynomial in |theta|, with no
more multiply-adds; a value that something else reads stays, and has its map behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import RESHAPE
from fxpath.graph.costs import mapping, multiply_adds
from fxpath.graph.links import Kernel, Taps, extents, links, mark_static, static
from fxpath.graph.schema import arguments, bias_of, bias_place, target
from fxpath.graph.writer import Writer
from fxpath.passes.setting import Setting

#: Entries up to which taps are written down as a matrix.
LARGEST = 1 << 20


def hoist(module: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Move fixed maps upwards in a reduced graph; ``module`` itself is not changed.

    Returns:
        A graph module with the same placeholders, in the same vocabulary.  A node that takes the
        place of several stands for all that they stood for.
    """
    return _Hoisting(module, setting.q).run()


@dataclass(eq=False)
class _Ask:
    """A value, read through a matrix ``[out, in]`` along one axis.

    Attributes:
        x: the value.
        axis: the axis.
        matrix: the matrix.
        within: by argument of ``x``, what is asked of it if the map moves in front of ``x``.
        bias: what is asked of the bias of ``x`` then.
        cost: multiply-adds that come, less those that go.
        moves: whether the map moves in front of ``x``.
        made: the result.
    """

    x: fx.Node
    axis: int
    matrix: Tensor
    within: dict[fx.Node, _Ask] = field(default_factory=dict)
    bias: _Ask | None = None
    cost: int = 0
    moves: bool = False
    made: fx.Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the result."""
        before = extents(self.x)
        return *before[: self.axis], len(self.matrix), *before[self.axis + 1 :]

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be done."""
        rows, columns = self.matrix.shape
        return rows == columns and torch.equal(self.matrix, _eye(rows))

    @property
    def merges(self) -> bool:
        """Whether the value is a map along the same axis, which becomes one with this one."""
        return self.x.target is ops.mix and arguments(self.x)[1] == self.axis

    @property
    def parts(self) -> list[_Ask]:
        """What is asked instead, if the map moves."""
        return [*self.within.values(), *([] if self.bias is None else [self.bias])]


class _Hoisting(Writer):
    def __init__(self, module: fx.GraphModule, q: float) -> None:
        super().__init__()
        self.copy(module)
        self.q = q

    def run(self) -> fx.GraphModule:
        mark_static(self.graph)
        for node in list(self.graph.nodes):
            made = node
            for axis in [] if static(node) else list(_lowering(node)):
                # What is asked for is the node itself, made in another way.
                asks = self._plan(_Ask(made, axis, _eye(extents(node)[axis])))
                if asks[0].moves:
                    made = self._carry_out(asks)
        for node in list(self.graph.nodes):
            if node.target is ops.conv:
                self._overlap(node)
        return self.finish()

    def _plan(self, root: _Ask) -> list[_Ask]:
        """What is cheapest, for a value and all behind it that nothing else reads."""
        asks = [root]
        for ask in asks:  # which grows
            if ask is root or len(ask.x.users) == 1:
                self._look_before(ask)
                asks += ask.parts
        for ask in reversed(asks):
            ask.cost = mapping(
                extents(ask.x), {} if ask.is_identity else {ask.axis: ask.shape[ask.axis]}
            )
            if ask.within:
                again = 0 if ask.merges else multiply_adds(ask.x, ask.shape)
                moved = sum(part.cost for part in ask.parts) + again - multiply_adds(ask.x)
                if moved < ask.cost:
                    ask.cost, ask.moves = moved, True
        return asks

    def _look_before(self, ask: _Ask) -> None:
        """Find what is asked of a value's arguments instead; of none, if it is not the same."""
        x, axis, matrix = ask.x, ask.axis, ask.matrix
        if x.target is ops.mix:
            inner, _, other = arguments(x)
            both = matrix @ self.held(other) if ask.merges else matrix
            ask.within = {inner: _Ask(inner, axis, both)}
        elif not static(x) and not (x.target is ops.conv and arguments(x)[6]):
            asks = {}
            for argument, axes in links(x, self.q):
                link = next((each for each in axes if each.dim == axis), None)
                read = None if link is None else _through(matrix, link.taps)
                if link is None or read is None:
                    return
                asks[argument] = _Ask(argument, link.source_dim, read)
            ask.within, bias = asks, bias_of(x)
            if bias is not None and asks:
                ask.bias = self._bias(bias, axis - len(extents(x)), matrix)

    def _bias(self, bias: fx.Node, axis: int, matrix: Tensor) -> _Ask:
        """What is asked of a bias; axes count from the last one, as broadcasting does."""
        if len(extents(bias)) < -axis:
            with self.graph.inserting_after(bias):
                bias = self.reshape(bias, (*[1] * (-axis - len(extents(bias))), *extents(bias)))
            bias.meta["static"] = True
        at = len(extents(bias)) + axis
        return _Ask(bias, at, _sums(matrix) if extents(bias)[at] == 1 else matrix)

    # -- writing down what was planned ------------------------------------------------------------

    def _carry_out(self, asks: list[_Ask]) -> fx.Node:
        """Replace a node as planned; nothing that is no longer read is left."""
        wanted = asks[:1]
        for ask in wanted:  # which grows
            wanted += ask.parts if ask.moves else []
        old = asks[0].x
        with self.graph.inserting_before(old):
            for ask in reversed(wanted):
                ask.made = self._made(ask)
        new = _done(asks[0])
        old.replace_all_uses_with(new)
        for ask in wanted:
            if ask.moves:
                self.graph.erase_node(ask.x)
        mark_static(self.graph)
        return new

    def _made(self, ask: _Ask) -> fx.Node:
        x = ask.x
        if not ask.moves:
            return x if ask.is_identity else self._mix(x, ask.axis, ask.matrix)
        made = _done(ask.parts[0]) if ask.merges else self._again(ask)
        return _standing_for(x, made)

    def _again(self, ask: _Ask) -> fx.Node:
        """An operation on mapped arguments."""
        x, axis = ask.x, ask.axis
        args: list[Any] = [
            *fx.map_arg(arguments(x), lambda n: _done(ask.within[n]) if n in ask.within else n)
        ]
        place = bias_place(x)
        if ask.bias is not None and place is not None:
            args[place] = _done(ask.bias)
        if x.target is ops.clamp:
            return self._clamp(args, len(extents(x)), axis, _sums(ask.matrix))
        if x.target is RESHAPE:
            args[1] = list(ask.shape)
        elif x.target is ops.conv and axis >= 2:
            _set_spec(args, axis, extents(args[1])[axis], 0)
        return self.emit(target(x), *args)

    def _overlap(self, conv: fx.Node) -> None:
        """Lay down once what output positions that are neighbours both read."""
        args: list[Any] = [*arguments(conv)]
        x, maps = args[0], dict[int, tuple[fx.Node, Tensor]]()
        while x.target is ops.mix and len(x.users) == 1 and arguments(x)[1] not in maps:
            inner, axis, matrix = arguments(x)
            taps = self.held(matrix)
            if axis >= 2 and _side_by_side(conv, axis):
                kernel = extents(args[1])[axis]
                taps, stride, padding = _overlapped(taps.unflatten(0, (-1, kernel)))
                _set_spec(args, axis, stride, padding)
            maps[axis], x = (x, taps), inner
        if args == [*arguments(conv)]:
            return
        with self.graph.inserting_before(conv):
            for axis, (old, matrix) in reversed(maps.items()):
                x = _standing_for(old, self._made(_Ask(x, axis, matrix)))
            made = _standing_for(conv, self.emit(ops.conv, x, *args[1:]))
        conv.replace_all_uses_with(made)

    def _clamp(self, args: list[Any], rank: int, axis: int, sums: Tensor) -> fx.Node:
        """Bounds count as often as positions are added up: they become biases."""
        x, *bounds = args
        if float(sums[0]) == len(sums) == 1:
            return self.emit(ops.clamp, x, *bounds)
        for bound in bounds:
            if bound:
                number = torch.full((1,) * rank, float(bound), dtype=torch.float64)
                value = self.emit(ops.coefficient, self.buffer(number, "bound"))
                x = self.emit(ops.shift, x, self._mix(value, axis, sums))
        return x

    def _mix(self, x: fx.Node, axis: int, matrix: Tensor) -> fx.Node:
        return self.emit(ops.mix, x, axis, self.buffer(matrix, "matrix"))


def _standing_for(old: fx.Node, new: fx.Node) -> fx.Node:
    """Note that one node takes the place of another, besides what it stood for."""
    new.meta.setdefault("origin", old.meta.get("origin"))
    if "full" in old.meta:
        new.meta["full"] = *new.meta.get("full", ()), *old.meta["full"]
    return new


def _lowering(node: fx.Node) -> Iterator[int]:
    """Axes along which an operation reads fewer combinations of positions than there are."""
    if node.target is ops.mix:
        x, axis, matrix = arguments(node)
        if extents(node)[axis] < extents(x)[axis]:
            yield axis
    elif node.target is ops.conv:
        x, weight = arguments(node)[:2]
        axes = zip(extents(x)[2:], extents(node)[2:], extents(weight)[2:], strict=True)
        for axis, (size, out, kernel) in enumerate(axes, 2):
            if out * kernel < size and out * kernel * size <= LARGEST:
                yield axis


def _through(matrix: Tensor, taps: Taps) -> Tensor | None:
    """What an argument is read through instead, where a value is read through a matrix.

    Rows are ordered by output position, then tap.  ``None`` where nothing gets fewer.
    """
    if not isinstance(taps, Kernel):
        return matrix if len(taps) == 1 and taps[0].is_identity else None
    rows, before = matrix.shape
    if rows * len(taps) * taps.size > LARGEST:
        return None
    if rows >= before and rows * len(taps) >= taps.size:
        return None
    read = matrix.new_zeros(rows, len(taps), taps.size)
    for k, tap in enumerate(taps):
        read[:, k].index_add_(1, tap.position, matrix[:, tap.row])
    return read.flatten(0, 1)


def _side_by_side(conv: fx.Node, axis: int) -> bool:
    """Whether each tap of each output position reads a position of its own, in this order."""
    x, weight, _, *spec = arguments(conv)[:6]
    kernel = extents(weight)[axis]
    lies = [each[axis - 2] for each in spec] == [kernel, 0, 1] and not arguments(conv)[6]
    return lies and 1 < kernel == extents(x)[axis] / extents(conv)[axis]


def _set_spec(args: list[Any], axis: int, stride: int, padding: int) -> None:
    """Let a convolution read taps that lie side by side along an axis."""
    for place, number in ((3, stride), (4, padding), (5, 1)):
        args[place] = [*args[place][: axis - 2], number, *args[place][axis - 1 :]]


def _overlapped(taps: Tensor) -> tuple[Tensor, int, int]:
    """The fewest rows from which a convolution reads ``[out, taps, in]``, its stride and padding.

    Output positions that are neighbours share what they read, and beyond a border is nothing.
    """
    out, kernel, _ = taps.shape
    shared = (s for s in range(1, kernel) if torch.equal(taps[1:, : kernel - s], taps[:-1, s:]))
    step = next(shared, kernel)
    rows = torch.cat((taps[: out - 1, :step].flatten(0, 1), *taps[out - 1 :]))
    read = rows.any(1).nonzero()
    beyond = min(int(read[0]), len(rows) - 1 - int(read[-1])) if len(read) else 0
    return rows[beyond : len(rows) - beyond], step, beyond


def _sums(matrix: Tensor) -> Tensor:
    """Row sums, how often a constant is added up: ``[out, 1]``, or one row if all are the same."""
    sums = matrix.sum(1, keepdim=True)
    # A mean over 49 positions is one up to rounding.
    rounded = torch.where((sums - 1).abs() < 1e-14, 1.0, sums)
    return rounded[:1] if bool((rounded == rounded[:1]).all()) else rounded


def _done(ask: _Ask) -> fx.Node:
    assert ask.made is not None
    return ask.made


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)
