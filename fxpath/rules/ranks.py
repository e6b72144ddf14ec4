"""Rules: order statistics.

The entry of rank k along an axis is a k-max-pooling neuron over the axis (Def. A.1), so that a
sorted axis is as many of them as it has positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph.aten import PERMUTE
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import bind, target
from fxpath.graph.stencil import ONE, Stencil, rational
from fxpath.rules.common import LARGEST, SMALLEST, Args, axes, known
from fxpath.rules.registry import rule

aten = torch.ops.aten


def ranked(build: Builder, x: fx.Node, dim: int, ranks: Sequence[int]) -> fx.Node:
    """Entries along an axis by rank: 1 is the largest one, -1 the smallest."""
    if not build.shape(x):
        return x
    size = build.shape(x)[dim]
    rows = ([(p, ONE) for p in range(size)] for _ in ranks)
    return build.along(x, dim, Stencil.of(size, rows), [_plain(k, size) for k in ranks])


def _plain(rank: int, size: int) -> int:
    """One name for each rank: those from below count from the top, but for the smallest."""
    counted = rank if rank > 0 else size + 1 + rank
    return -1 if counted == size > 1 else counted


def _values(build: Builder, node: fx.Node, x: fx.Node, dim: int, ranks: Sequence[int]) -> fx.Node:
    held = node.meta["val"]
    first = held if isinstance(held, torch.Tensor) else held[0]
    return build.reshape(ranked(build, x, dim, ranks), tuple(first.shape))


@rule(aten.sort.default, aten.sort.stable)
def _sort(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, dim = build.node(args["self"]), args["dim"]
    size = build.shape(x)[dim] if build.shape(x) else 1
    sign = 1 if args["descending"] else -1
    return [ranked(build, x, dim, [sign * (k + 1) for k in range(size)]), None]


@rule(aten.msort.default)
def _msort(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    return ranked(build, x, 0, [-1 - k for k in range(build.shape(x)[0] if build.shape(x) else 1)])


@rule(aten.kthvalue.default)
def _kthvalue(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [_values(build, node, build.node(args["self"]), args["dim"], [-args["k"]]), None]


#: What reads entries of an axis whatever their order is.
SYMMETRIC = {
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default),
    *(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
    *(aten.max.dim, aten.min.dim),
}


@rule(aten.topk.default)
def _topk(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    rank = node.meta["val"][0].dim()
    if not args["sorted"] and args["k"] > 1 and not _order_is_lost(node, args["dim"], rank):
        raise Refusal(
            "the values of topk(sorted=False) come in no defined order, so none has a rank",
            "pass sorted=True: it returns the same values",
        )
    sign = 1 if args["largest"] else -1
    ranks = [sign * (k + 1) for k in range(args["k"])]
    return [_values(build, node, build.node(args["self"]), args["dim"], ranks), None]


def _order_is_lost(node: fx.Node, dim: int, rank: int) -> bool:
    """Whether the values are only read by what sums or pools along the axis."""
    values = [user for user in node.users if user.args[1] == 0]
    return all(
        user.target in SYMMETRIC and dim % rank in axes(bind(user).get("dim"), rank)
        for value in values
        for user in value.users
    )


@rule(aten.median.default, aten.nanmedian.default)
def _median(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    size = math.prod(build.shape(x))
    return _values(build, node, build.reshape(x, (size,)), 0, [-((size + 1) // 2)])


@rule(aten.median.dim, aten.nanmedian.dim)
def _median_dim(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, dim = build.node(args["self"]), args["dim"]
    size = build.shape(x)[dim] if build.shape(x) else 1
    return [_values(build, node, x, dim, [-((size + 1) // 2)]), None]


@rule(
    aten.quantile.scalar,
    aten.quantile.default,
    aten.nanquantile.scalar,
    aten.nanquantile.default,
)
def _quantile(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """Order statistics, and fixed means of two that are neighbours."""
    x, dim = build.node(args["self"]), args["dim"]
    if dim is None:
        x, dim = build.reshape(x, (math.prod(build.shape(x)),)), 0
    if not build.shape(x):
        return x
    dim %= len(build.shape(x))
    size = build.shape(x)[dim]
    dtype = node.meta["val"].dtype
    given = args["q"]
    given = known(build, given) if isinstance(given, fx.Node) else torch.tensor(given, dtype=dtype)
    places = (given.to(dtype) * (size - 1)).reshape(-1)
    rows = [_between(place, args["interpolation"]) for place in places.tolist()]
    used = sorted({p for row in rows for p, _ in row})
    y = ranked(build, x, dim, [-1 - p for p in used])
    taps = [[(used.index(p), c) for p, c in row] for row in rows]
    y = build.along(y, dim, Stencil.of(len(used), taps))
    rank = len(build.shape(y))
    order = [dim, *(d for d in range(rank) if d != dim)]  # one for each q, in front
    return build.reshape(build.emit(PERMUTE, y, order), tuple(node.meta["val"].shape))


def _between(place: float, interpolation: str) -> list[tuple[int, Any]]:
    """Order statistics, counted from the smallest, and their coefficients."""
    low, high = math.floor(place), math.ceil(place)
    if interpolation in ("lower", "higher", "nearest"):
        return [({"lower": low, "higher": high, "nearest": round(place)}[interpolation], ONE)]
    part = rational(0.5 if interpolation == "midpoint" else place - low)
    return [(low, 1 - part), (high, part)]


CUMULATIVE = {aten.cummax.default: LARGEST, aten.cummin.default: SMALLEST}


@rule(*CUMULATIVE)
def _cumulative(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x = build.node(args["self"])
    if not build.shape(x):
        return [x, None]
    size = build.shape(x)[args["dim"]]
    rows = ([(p, ONE) for p in range(o + 1)] for o in range(size))
    return [build.along(x, args["dim"], Stencil.of(size, rows), CUMULATIVE[target(node)]), None]
