"""What several rules share: stencils along axes, and entries that constant positions move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.stencil import ONE, Stencil, whole

aten = torch.ops.aten
Args = dict[str, Any]

#: Ranks of windows along an axis: their largest entry, or their smallest.
LARGEST, SMALLEST = (1,), (-1,)

UNKNOWN_POSITIONS = (
    "it moves entries to positions that depend on activations or on parameters",
    "keep the positions in a buffer or a literal",
)
#: For each axis that is moved: its length, and the positions.
Moves = list[tuple[int, list[int | None]]]


def apply(
    build: Builder, x: fx.Node, stencils: Sequence[Stencil], ranks: Sequence[int] | None = None
) -> fx.Node:
    """One stencil for each of the last axes."""
    for i, each in enumerate(stencils):
        x = build.along(x, i - len(stencils), each, ranks)
    return x


def select(build: Builder, x: fx.Node, dim: int, positions: Iterable[int | None]) -> fx.Node:
    """Positions along one axis; ``None`` reads nothing."""
    return build.along(x, dim, Stencil.select(build.shape(x)[dim], positions))


def axes(dims: Any, rank: int) -> list[int]:
    """Axes that an operation names, each once; all of them where it names none."""
    chosen = [dims] if isinstance(dims, int) else list(dims if dims else range(rank))
    return sorted({d % rank for d in chosen}) if rank else []


def summed(
    build: Builder, x: fx.Node, dims: Any, shape: Sequence[int], coefficient: Any = ONE
) -> fx.Node:
    """Sum over axes, each position times a coefficient; ``shape`` is that of the result."""
    for dim in axes(dims, len(build.shape(x))):
        x = build.along(x, dim, whole(build.shape(x)[dim], coefficient))
    return build.reshape(x, shape)


def pooled(
    build: Builder, x: fx.Node, dims: Any, shape: Sequence[int], ranks: Sequence[int]
) -> fx.Node:
    """The largest or smallest entry over axes."""
    for dim in axes(dims, len(build.shape(x))):
        x = build.along(x, dim, whole(build.shape(x)[dim], ONE), ranks)
    return build.reshape(x, shape)


# -- constant positions ----------------------------------------------------------------------------


def known(build: Builder, value: Any, size: int | None = None, negative: bool = False) -> Tensor:
    """A constant tensor: a mask, or positions along an axis of length ``size``.

    Args:
        build: the builder.
        value: a node of the original graph.
        size: length of the axis, if the tensor holds positions.
        negative: whether the operation counts negative positions from the end.

    Raises:
        Refusal: if it depends on activations or on parameters, or leaves the axis.
    """
    found = None if build.is_active(value) else build.constant(value)
    if found is None:
        raise Refusal(*UNKNOWN_POSITIONS)
    if size is not None:
        in_range(found, size, negative)
    return found.cpu()


def in_range(positions: Tensor, size: int, negative: bool) -> None:
    """Refuse positions that an axis of length ``size`` does not have."""
    if positions.dtype == torch.bool or not positions.numel():
        return
    low, high = int(positions.min()), int(positions.max())
    if high >= size or low < (-size if negative else 0):
        raise Refusal(
            f"it reads position {high if high >= size else low} of an axis of length {size}",
            "check the positions; if the first axis of the inputs holds no samples, pass "
            "batch_dim=None",
        )


def places(shape: Sequence[int]) -> Tensor:
    """The position of each entry among all entries, int64 of ``shape``."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def move(build: Builder, x: fx.Node, flat: Tensor) -> fx.Node:
    """Entry o of the result is entry ``flat[o]`` of ``x``, or 0 where that is negative."""
    shape = build.shape(x)
    lead, trail, moved = _factored(flat, shape)
    ends = shape[:lead], shape[len(shape) - trail :]
    y = build.reshape(x, (*ends[0], *(size for size, _ in moved), *ends[1]))
    for i, (size, positions) in enumerate(moved):
        y = build.along(y, lead + i, Stencil.select(size, positions))
    return build.reshape(y, tuple(flat.shape))


def spread(build: Builder, x: fx.Node, flat: Tensor, shape: Sequence[int]) -> fx.Node:
    """Entry k of ``x`` is added to entry ``flat[k]`` of the result, or dropped where negative."""
    lead, trail, moved = _factored(flat, shape)
    ends = shape[:lead], shape[len(shape) - trail :]
    y = build.reshape(x, (*ends[0], *(len(positions) for _, positions in moved), *ends[1]))
    for i, (size, positions) in enumerate(moved):
        rows: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for k, position in enumerate(positions):
            if position is not None:
                rows[position].append((k, ONE))
        y = build.along(y, lead + i, Stencil.of(len(positions), rows))
    return build.reshape(y, shape)


def _factored(flat: Tensor, sizes: Sequence[int]) -> tuple[int, int, Moves]:
    """Axes at either end that stay as they are, and the moves along those between them.

    The moves are axis by axis where they can be, else along all of them in one.
    """
    rest = list(sizes)
    lead = trail = 0
    while flat.numel() and rest and flat.dim() and flat.shape[0] == rest[0]:
        inner, first = math.prod(rest[1:]), flat[0]
        step = torch.arange(len(flat)).reshape(-1, *[1] * first.dim()) * inner
        if bool((first >= inner).any()) or not flat.equal(torch.where(first < 0, -1, first + step)):
            break
        flat, rest, lead = first, rest[1:], lead + 1
    while flat.numel() and rest and flat.dim() and flat.shape[-1] == rest[-1]:
        first = flat[..., :1]
        start = first.div(rest[-1], rounding_mode="floor")
        whole_ = torch.where(first < 0, -1, start * rest[-1] + torch.arange(rest[-1]))
        if not flat.equal(whole_):
            break
        flat, rest, trail = torch.where(first < 0, -1, start)[..., 0], rest[:-1], trail + 1
    if not rest and not flat.dim() and int(flat) == 0:
        return lead, trail, []
    by_axis = _by_axis(flat, rest) if flat.dim() == len(rest) > 1 and flat.numel() else None
    if by_axis is not None:
        return lead, trail, by_axis
    return lead, trail, [(math.prod(rest), _positions(flat.reshape(-1)))]


def _positions(flat: Tensor) -> list[int | None]:
    return [None if p < 0 else p for p in flat.tolist()]


def _by_axis(flat: Tensor, sizes: Sequence[int]) -> Moves | None:
    """Positions axis by axis, if each depends on its own axis alone."""
    used = flat >= 0
    rebuilt, there = torch.zeros_like(flat), torch.ones_like(used)
    found: Moves = []
    for axis, size in enumerate(sizes):
        others = [d for d in range(flat.dim()) if d != axis]
        stride = math.prod(sizes[axis + 1 :])
        own = torch.where(used, flat.div(stride, rounding_mode="floor") % size, -1)
        positions = own.amax(others)
        shape = [-1 if d == axis else 1 for d in range(flat.dim())]
        rebuilt = rebuilt + positions.reshape(shape) * stride
        there = there & (positions >= 0).reshape(shape)
        found.append((size, _positions(positions)))
    return found if flat.equal(torch.where(there, rebuilt, -1)) else None


def overwrite(
    build: Builder, node: fx.Node, base: Any, piece: fx.Node | None, flat: Tensor
) -> fx.Node:
    """``base`` with the entries of ``piece`` (``None``: zeros) at the places ``flat``.

    Raises:
        Refusal: if two entries are written to one place.
    """
    shape = tuple(node.meta["val"].shape)
    count = torch.bincount(flat.reshape(-1), minlength=math.prod(shape))
    if bool((count > 1).any()):
        raise Refusal(
            "it writes several entries to one place, and torch does not say which one stays",
            "give each entry a place of its own, or add them up (accumulate=True, index_add)",
        )
    kept = torch.where(count > 0, -1, places((len(count),))).reshape(shape)
    terms = [] if piece is None else [spread(build, piece, flat, shape)]
    if bool((kept >= 0).any()) and not build.is_zero(base):
        terms.insert(0, move(build, build.node(base), kept))
    return build.add(terms, shape)


def filled(build: Builder, node: fx.Node, value: Any, shape: Sequence[int]) -> fx.Node | None:
    """Neurons that hold a number or a constant alone; ``None`` for zeros."""
    if build.is_zero(value):
        return None
    if build.is_active(value):
        x = build.node(value)
    else:
        x = build.emit(ops.constant, build.weight(value, node, "bias"))
    return build.expand(x, shape)
