"""Edges one by one: the weighted sums of a lifted graph, unrolled in blocks.

What is not linear in the edges (a minimum or a maximum over them, weights that differ from position
to position as those of N(theta) do) needs every edge u -> v of the network, not only the weights of
a layer.  An :class:`Unrolled` map lays them out as ``[groups, out, in, positions]``, a few output
channels and one kernel tap at a time, so that a block stays in cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxpath.graph.equations import Letters, letters
from fxpath.graph.links import Kernel

#: Entries of one block: half a MiB of float64.
BLOCK = 1 << 16

Map = Callable[[Tensor], Tensor]
#: Activations, and what stands at positions outside of them (padding) -> one entry for each edge.
Read = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Block:
    """Some edges of a map.

    Attributes:
        out: the output channels that they end at.
        read: activations at the edges' sources, ``[groups, 1, in, positions]``; a convolution's
            padding is filled with a given number.
        weigh: weights of the edges, broadcastable to ``[groups, out, in, positions]``.
    """

    out: slice
    read: Read
    weigh: Map


@dataclass(frozen=True)
class Unrolled:
    """A weighted sum as blocks of edges.

    Attributes:
        shape: ``(groups, out, positions)`` of the result.
        fan_in: edges that end at one output neuron.
        pieces: for each kernel tap, how activations and weights are laid out.
        split: the result's own layout -> ``[groups, out, positions]``.
        join: back.
    """

    shape: tuple[int, int, int]
    fan_in: int
    pieces: Sequence[tuple[Read, Map]]
    split: Map
    join: Map

    def blocks(self) -> Iterator[Block]:
        """All edges, a few output channels at a time."""
        groups, out, positions = self.shape
        per_channel = max(1, groups * positions * self.fan_in // max(1, len(self.pieces)))
        step = max(1, BLOCK // per_channel)
        for read, weigh in self.pieces:
            once = _Once(read)
            for start in range(0, out, step):
                channels = slice(start, min(start + step, out))
                yield Block(channels, once, functools.partial(_weighed, weigh, channels))


class _Once:
    """Lays activations out for one kernel tap, once for all output channels."""

    def __init__(self, read: Read) -> None:
        self.read = read
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, fill: float) -> Tensor:
        if id(x) not in self.known:
            # The tensor is kept, too, so that no other one gets its identity.
            self.known[id(x)] = x, self.read(x, fill).contiguous()
        return self.known[id(x)][1]


def _weighed(weigh: Map, channels: slice, weight: Tensor) -> Tensor:
    weight = weigh(weight)
    return weight if weight.shape[1] == 1 else weight[:, channels]


def linear(shape: Sequence[int], weight: Sequence[int], dim: int) -> Unrolled:
    """A matrix ``[out, in]`` along one axis of activations of shape ``shape``."""
    out, size = weight
    rest = [n for d, n in enumerate(shape) if d != dim]
    positions = math.prod(rest)

    def split(y: Tensor) -> Tensor:
        return y.movedim(dim, 0).reshape(1, y.shape[dim], positions)

    def join(y: Tensor) -> Tensor:
        return y.reshape(out, *rest).movedim(0, dim)

    def read(x: Tensor, fill: float) -> Tensor:
        return split(x)[:, None]

    return Unrolled((1, out, positions), size, [(read, lambda w: w[None, :, :, None])], split, join)


def pointwise(shape: Sequence[int]) -> Unrolled:
    """One edge for each entry of a result of shape ``shape``, with broadcasting."""
    total = math.prod(shape)

    def split(y: Tensor) -> Tensor:
        return y.expand(tuple(shape)).reshape(1, 1, total)

    def read(x: Tensor, fill: float) -> Tensor:
        return split(x)[:, None]

    def weigh(weight: Tensor) -> Tensor:
        return split(weight)[:, None]

    return Unrolled((1, 1, total), 1, [(read, weigh)], split, lambda y: y.reshape(tuple(shape)))


def identity(shape: Sequence[int]) -> Unrolled:
    """The same with weights ``[1]``: parameter-free edges."""
    plain = pointwise(shape)
    read = plain.pieces[0][0]
    return Unrolled(
        plain.shape, 1, [(read, lambda w: w.reshape(1, 1, 1, 1))], plain.split, plain.join
    )


def contraction(x: Sequence[int], weight: Sequence[int], equation: str) -> Unrolled:
    """A contraction, from the shapes of activations and weights."""
    form = letters(equation)
    if form.matrix is not None:
        return _matrix(form, x, weight)
    size, contracted = form.sizes(x, weight), form.summed
    order = "".join(contracted) + form.out
    full = [size[c] for c in order]
    fan_in = math.prod(full[: len(contracted)])
    shape = full[len(contracted) :]
    positions = math.prod(shape)

    def aligned(value: Tensor, letters: str) -> Tensor:
        kept = "".join(c for c in order if c in letters)
        value = torch.einsum(f"{letters}->{kept}", value)
        place = [value.shape[kept.index(c)] if c in kept else 1 for c in order]
        return value.reshape(place).expand(full).reshape(1, 1, fan_in, positions)

    return Unrolled(
        (1, 1, positions),
        fan_in,
        [(lambda v, fill: aligned(v, form.x), lambda w: aligned(w, form.weight))],
        lambda y: y.reshape(1, 1, positions),
        lambda y: y.reshape(shape),
    )


def _matrix(form: Letters, x: Sequence[int], weight: Sequence[int]) -> Unrolled:
    """One matrix for all positions."""
    assert form.matrix is not None
    into, made = form.matrix
    if form.weight[0] == made:
        return linear(x, weight, form.x.index(into))
    plain = linear(x, weight[::-1], form.x.index(into))
    read = plain.pieces[0][0]
    return replace(plain, pieces=[(read, lambda w: w.T[None, :, :, None])])


def convolution(
    x: Sequence[int],
    weight: Sequence[int],
    y: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Unrolled:
    """A convolution, tap by tap; shapes of activations, weights and result."""
    kernel = weight[2:]
    batch, spatial = x[0], tuple(y[2:])
    per_in, per_out = x[1] // groups, y[1] // groups
    positions = batch * math.prod(spatial)
    stencils = [
        Kernel(x[2 + i], y[2 + i], k, stride[i], padding[i], dilation[i], transposed)
        for i, k in enumerate(kernel)
    ]

    def reader(taps: Sequence[int]) -> Read:
        rows = [s[t].rows for s, t in zip(stencils, taps, strict=True)]
        index = [torch.tensor([row[0][0] if row else 0 for row in axis]) for axis in rows]
        inside = [torch.tensor([bool(row) for row in axis]) for axis in rows]

        def read(value: Tensor, fill: float) -> Tensor:
            for i, (positions_, mask) in enumerate(zip(index, inside, strict=True)):
                value = value.index_select(2 + i, positions_.to(value.device))
                if not bool(mask.all()):
                    shape = [1] * value.dim()
                    shape[2 + i] = -1
                    value = torch.where(mask.to(value.device).reshape(shape), value, fill)
            grouped = value.reshape(batch, groups, per_in, -1).permute(1, 2, 0, 3)
            return grouped.reshape(groups, 1, per_in, positions)

        return read

    def weigher(taps: Sequence[int]) -> Map:
        def weigh(value: Tensor) -> Tensor:
            index: list[Any] = [slice(None), slice(None), *taps]
            tap = value[tuple(index)]
            if transposed:  # [in, out / groups] -> [groups, out / groups, in / groups]
                return tap.reshape(groups, per_in, per_out).transpose(1, 2)[..., None]
            return tap.reshape(groups, per_out, per_in)[..., None]

        return weigh

    taps = list(itertools.product(*[range(k) for k in kernel]))
    return Unrolled(
        (groups, per_out, positions),
        per_in * len(taps),
        [(reader(t), weigher(t)) for t in taps],
        lambda v: (
            v.reshape(batch, groups, per_out, -1)
            .permute(1, 2, 0, 3)
            .reshape(groups, per_out, positions)
        ),
        lambda v: (
            v.reshape(groups, per_out, batch, -1)
            .permute(2, 0, 1, 3)
            .reshape(batch, groups * per_out, *spatial)
        ),
    )
