"""How the axes of a lifted operation's result hang on the axes of its arguments.

Along an axis a result reads its argument through stencils (one for each tap of a kernel, one for
everything else), or it mixes the axis with weights or other axes: then the axis is kept at full
extent (a fence).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import CAT, EXPAND, PERMUTE, RESHAPE
from fxpath.graph.edit import inputs_first
from fxpath.graph.equations import letters
from fxpath.graph.exact import Coefficient
from fxpath.graph.power import power_of_number
from fxpath.graph.schema import arguments
from fxpath.graph.stencil import Stencil

POINTWISE = {
    *(ops.scale, ops.shift, ops.add, ops.maximum, ops.minimum, ops.clamp, ops.slope),
    *ops.IGNORED,
}


@dataclass(frozen=True)
class Kernel(Sequence[Stencil]):
    """What each tap of a (transposed) convolution reads along one axis.

    A tap's stencil is made when it is asked for: there may be a hundred, over a hundred thousand
    samples each.
    """

    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    transposed: bool

    def __len__(self) -> int:
        return self.kernel

    def __getitem__(self, index: int) -> Stencil:  # type: ignore[override]
        shift = range(self.kernel)[index] * self.dilation - self.padding
        if self.transposed:
            # Position p is read at p * stride + shift.
            position, row = _in_step(self.size, self.out, self.stride, shift)
        else:
            row, position = _in_step(self.out, self.size, self.stride, shift)
        return Stencil.plain(self.size, self.out, row, position)


def _in_step(count: int, size: int, stride: int, shift: int) -> tuple[Tensor, Tensor]:
    """Those n below ``count`` with ``0 <= n * stride + shift < size``, and that number."""
    first, end = max(0, -(shift // stride)), min(count, -((shift - size) // stride))
    n = torch.arange(first, max(first, end))
    return n, n * stride + shift


#: One stencil for each tap of a kernel, one for everything else.
Taps = tuple[Stencil, ...] | Kernel


@dataclass(frozen=True)
class Link:
    """Axis ``dim`` of a result reads axis ``source_dim`` of an argument through ``taps``."""

    dim: int
    source_dim: int
    taps: Taps


def extents(node: fx.Node) -> tuple[int, ...]:
    """Shape of a lifted value."""
    return tuple(node.meta["val"].shape)


def seen_through(node: fx.Node) -> fx.Node:
    """The activation that path mass sees: behind words that it ignores."""
    while node.target in ops.IGNORED or (node.target is ops.clamp and not any(node.args[1:])):
        node = arguments(node)[0]
    return node


def on_paths(graph: fx.Graph) -> set[fx.Node]:
    """What path mass depends on: without what only a gate reads."""
    output = next(iter(reversed(graph.nodes)))
    return set(inputs_first(output, (), _read_by_mass))


def _read_by_mass(node: fx.Node) -> list[fx.Node]:
    return [arguments(node)[0]] if node.target is ops.gate else node.all_input_nodes


def mark_static(graph: fx.Graph) -> None:
    """Note in each node whether it is computed from the model's tensors alone."""
    for node in graph.nodes:
        begins = node.target in (ops.source, ops.constant)
        node.meta["static"] = not begins and all(static(n) for n in node.all_input_nodes)


def static(node: fx.Node) -> bool:
    """Whether a node is a weight or constant, not an activation."""
    found: bool = node.meta["static"]
    return found


@functools.lru_cache(maxsize=64)
def identity(size: int) -> Stencil:
    """The stencil that does nothing."""
    return placed(size, 0, size)


@functools.lru_cache(maxsize=64)
def spread(size: int, out: int) -> Stencil:
    """Pointwise along an axis, with broadcasting."""
    if size == out:
        return identity(size)
    return Stencil.plain(size, out, torch.arange(out), torch.zeros(out, dtype=torch.int64))


def placed(size: int, start: int, out: int) -> Stencil:
    """All positions, from ``start`` on in a longer axis."""
    position = torch.arange(size)
    return Stencil.plain(size, out, position + start if start else position, position)


def links(node: fx.Node, q: float) -> Iterator[tuple[fx.Node, list[Link]]]:
    """For each activation that an operation reads, the axes that it reads through stencils.

    Fixed coefficients are raised to ``q``.  Axes of the result, or of an argument, without a link
    are fences.
    """
    active = [a for a in node.all_input_nodes if not static(a)]
    out = extents(node)
    if node.target is CAT:
        yield from _cat(node)
    elif node.target is ops.conv:
        yield arguments(node)[0], [Link(0, 0, (identity(out[0]),)), *_conv(node)]
    elif node.target is ops.contract:
        yield active[0], _contract(node)
    elif "stencil" in node.meta:
        dim, stencil = node.meta["stencil"]
        powered = {dim: row_power(stencil, q)}
        taps = {d: identity(n) for d, n in enumerate(out)} | powered
        yield active[0], [Link(d, d, (each,)) for d, each in taps.items()]
    elif node.target in POINTWISE or node.target is EXPAND:
        fixed = _varying(node)
        for argument in active:
            shape = extents(argument)
            shared = range(len(out)) if len(shape) == len(out) else ()
            yield (
                argument,
                [Link(d, d, (spread(shape[d], out[d]),)) for d in shared if d not in fixed],
            )
    elif node.target is PERMUTE:
        dims: Sequence[int] = arguments(node)[1]
        yield active[0], [Link(d, s, (identity(out[d]),)) for d, s in enumerate(dims)]
    elif node.target is RESHAPE:
        pairs = _kept(extents(active[0]), out)
        yield active[0], [Link(d, s, (identity(out[d]),)) for s, d in pairs]
    elif node.target is ops.total:
        for argument in active:
            yield argument, [Link(d, d, (identity(n),)) for d, n in enumerate(extents(argument))]
    else:
        for argument in active:
            yield argument, []


def _varying(node: fx.Node) -> set[int]:
    """Axes along which a factor differs from entry to entry."""
    if node.target not in (ops.scale, ops.slope) or not isinstance(arguments(node)[1], fx.Node):
        return set()
    shape, rank = extents(arguments(node)[1]), len(extents(node))
    return {d + rank - len(shape) for d, n in enumerate(shape) if n > 1}


def _cat(node: fx.Node) -> Iterator[tuple[fx.Node, list[Link]]]:
    out = extents(node)
    pieces: Sequence[fx.Node] = arguments(node)[0]
    dim = int(arguments(node)[1]) % len(out)
    start = 0
    for piece in pieces:
        shape = extents(piece)
        taps = {d: identity(n) for d, n in enumerate(out)}
        taps[dim] = placed(shape[dim], start, out[dim])
        start += shape[dim]
        yield piece, [Link(d, d, (each,)) for d, each in taps.items()]


def _contract(node: fx.Node) -> list[Link]:
    """Axes that an activation has alone are read as they are; the others are mixed."""
    x, weight, _, equation = arguments(node)
    form = letters(equation)
    sizes = dict(zip(form.weight, extents(weight), strict=True))
    return [
        Link(d, form.x.index(letter), (identity(size),))
        for d, (letter, size) in enumerate(zip(form.out, extents(node), strict=True))
        if form.x.count(letter) == 1 and sizes.get(letter, 1) == 1
    ]


def _conv(node: fx.Node) -> Iterator[Link]:
    """One stencil for each tap of the kernel, along each spatial axis."""
    x, weight, _, stride, padding, dilation, transposed = arguments(node)[:7]
    kernel = extents(weight)[2:]
    for i, k in enumerate(kernel):
        size, out = extents(x)[2 + i], extents(node)[2 + i]
        spec = (stride[i], padding[i], dilation[i], bool(transposed))
        yield Link(2 + i, 2 + i, Kernel(size, out, k, *spec))


def _kept(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int]]:
    """Axes that a reshape leaves alone, as (before, after) pairs."""
    pairs: list[tuple[int, int]] = []
    if 0 in before:
        return pairs
    i = j = 0
    while i < len(before) and j < len(after):
        start_i, start_j = i, j
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        if i - start_i == 1 and j - start_j == 1:
            pairs.append((start_i, start_j))
    return pairs


def row_power(stencil: Stencil, q: float) -> Stencil:
    """``|c| ** q``, exactly where q is an integer; 0 counts non-zero ones."""
    if q == 1 and all(c >= 0 for c in stencil.table):
        return stencil
    table: dict[Coefficient, int] = {}
    codes = [table.setdefault(power_of_number(c, q), len(table)) for c in stencil.table]
    code = torch.tensor(codes, dtype=torch.int64)[stencil.code]
    return replace(stencil, code=code, table=tuple(table))
