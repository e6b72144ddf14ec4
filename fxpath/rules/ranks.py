"""Rules: order statistics.

The entry of rank k along an axis is a k-max-pooling neuron over the axis (Def. A.1), so that a
sorted axis is as many of them as it has positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxpath.graph.schema import bind, target
from fxpath.graph.stencil import ONE, Stencil, rational
from fxpath.rules.common import LARGEST, SMALLEST, Args, axes, known
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten


def ranked(lift: Lift, x: fx.Node, dim: int, ranks: Sequence[int]) -> fx.Node:
    """Entries along an axis by rank: 1 is the largest one, -1 the smallest."""
    if not lift.shape(x):
        return x
    size = lift.shape(x)[dim]
    rows = ([(p, ONE) for p in range(size)] for _ in ranks)
    return lift.along(x, dim, Stencil.of(size, rows), [_plain(k, size) for k in ranks])


def _plain(rank: int, size: int) -> int:
    """One name for each rank: those from below count from the top, but for the smallest."""
    counted = rank if rank > 0 else size + 1 + rank
    return -1 if counted == size > 1 else counted


def _values(lift: Lift, node: fx.Node, x: fx.Node, dim: int, ranks: Sequence[int]) -> fx.Node:
    held = node.meta["val"]
    first = held if isinstance(held, torch.Tensor) else held[0]
    return lift.reshape(ranked(lift, x, dim, ranks), tuple(first.shape))


@rule(aten.sort.default, aten.sort.stable)
def _sort(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, dim = lift.node(args["self"]), args["dim"]
    size = lift.shape(x)[dim] if lift.shape(x) else 1
    sign = 1 if args["descending"] else -1
    return [ranked(lift, x, dim, [sign * (k + 1) for k in range(size)]), None]


@rule(aten.msort.default)
def _msort(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    return ranked(lift, x, 0, [-1 - k for k in range(lift.shape(x)[0] if lift.shape(x) else 1)])


@rule(aten.kthvalue.default)
def _kthvalue(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [_values(lift, node, lift.node(args["self"]), args["dim"], [-args["k"]]), None]


#: What reads entries of an axis whatever their order is.
SYMMETRIC = {
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default),
    *(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
    *(aten.max.dim, aten.min.dim),
}


@rule(aten.topk.default)
def _topk(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    rank = node.meta["val"][0].dim()
    if not args["sorted"] and args["k"] > 1 and not _order_is_lost(node, args["dim"], rank):
        raise Refusal(
            "the values of topk(sorted=False) come in no defined order, so none has a rank",
            "pass sorted=True: it returns the same values",
        )
    sign = 1 if args["largest"] else -1
    ranks = [sign * (k + 1) for k in range(args["k"])]
    return [_values(lift, node, lift.node(args["self"]), args["dim"], ranks), None]


def _order_is_lost(node: fx.Node, dim: int, rank: int) -> bool:
    """Whether the values are only read by what sums or pools along the axis."""
    values = [user for user in node.users if user.args[1] == 0]
    return all(
        user.target in SYMMETRIC and dim % rank in axes(bind(user).get("dim"), rank)
        for value in values
        for user in value.users
    )


@rule(aten.median.default, aten.nanmedian.default)
def _median(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    size = math.prod(lift.shape(x))
    return _values(lift, node, lift.reshape(x, (size,)), 0, [-((size + 1) // 2)])


@rule(aten.median.dim, aten.nanmedian.dim)
def _median_dim(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, dim = lift.node(args["self"]), args["dim"]
    size = lift.shape(x)[dim] if lift.shape(x) else 1
    return [_values(lift, node, x, dim, [-((size + 1) // 2)]), None]


@rule(
    aten.quantile.scalar,
    aten.quantile.default,
    aten.nanquantile.scalar,
    aten.nanquantile.default,
)
def _quantile(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    """Order statistics, and fixed means of two that are neighbours."""
    x, dim = lift.node(args["self"]), args["dim"]
    if dim is None:
        x, dim = lift.reshape(x, (math.prod(lift.shape(x)),)), 0
    if not lift.shape(x):
        return x
    dim %= len(lift.shape(x))
    size = lift.shape(x)[dim]
    dtype = node.meta["val"].dtype
    given = args["q"]
    given = known(lift, given) if isinstance(given, fx.Node) else torch.tensor(given, dtype=dtype)
    places = (given.to(dtype) * (size - 1)).reshape(-1)
    rows = [_between(place, args["interpolation"]) for place in places.tolist()]
    used = sorted({p for row in rows for p, _ in row})
    y = ranked(lift, x, dim, [-1 - p for p in used])
    taps = [[(used.index(p), c) for p, c in row] for row in rows]
    y = lift.along(y, dim, Stencil.of(len(used), taps))
    rank = len(lift.shape(y))
    order = [dim, *(d for d in range(rank) if d != dim)]  # one for each q, in front
    return lift.reshape(lift.emit(aten.permute.default, y, order), tuple(node.meta["val"].shape))


def _between(place: float, interpolation: str) -> list[tuple[int, Any]]:
    """Order statistics, counted from the smallest, and their coefficients."""
    low, high = math.floor(place), math.ceil(place)
    if interpolation in ("lower", "higher", "nearest"):
        return [({"lower": low, "higher": high, "nearest": round(place)}[interpolation], ONE)]
    part = rational(0.5 if interpolation == "midpoint" else place - low)
    return [(low, 1 - part), (high, part)]


CUMULATIVE = {aten.cummax.default: LARGEST, aten.cummin.default: SMALLEST}


@rule(*CUMULATIVE)
def _cumulative(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x = lift.node(args["self"])
    if not lift.shape(x):
        return [x, None]
    size = lift.shape(x)[args["dim"]]
    rows = ([(p, ONE) for p in range(o + 1)] for o in range(size))
    return [lift.along(x, args["dim"], Stencil.of(size, rows), CUMULATIVE[target(node)]), None]
