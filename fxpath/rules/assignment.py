"""Rules: entries that are written to constant positions, and sums over them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.naming import RELABELLING
from fxpath.graph.schema import arguments, bind, target
from fxpath.graph.stencil import ONE, Stencil
from fxpath.rules.common import (
    LARGEST,
    SMALLEST,
    Args,
    filled,
    known,
    move,
    overwrite,
    places,
    select,
    spread,
)
from fxpath.rules.indexing import indexed, span, strided
from fxpath.rules.refused import INFINITE
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


# -- copies ----------------------------------------------------------------------------------------


@rule(aten.copy.default)
def _copy(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    if not node.meta["val"].is_floating_point():
        raise Refusal("rounding to integers is not continuous", "keep activations floating point")
    return filled(lift, node, args["src"], _shape(node)) or lift.zeros(_shape(node))


@rule(aten.fill.Tensor)
def _fill(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return filled(lift, node, args["value"], _shape(node)) or lift.zeros(_shape(node))


@rule(aten.select_scatter.default)
def _select_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    size = _shape(node)[args["dim"]]
    return _written(lift, node, args, [args["index"] % size], squeezed=True)


@rule(aten.slice_scatter.default)
def _slice_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    size = _shape(node)[args["dim"]]
    into = list(span(size, args["start"], args["end"], args["step"]))
    return _written(lift, node, args, into, squeezed=False)


def _written(lift: Lift, node: fx.Node, args: Args, into: list[int], squeezed: bool) -> fx.Node:
    """Positions ``into`` of one axis are overwritten: the others, plus the new ones in place."""
    shape = _shape(node)
    dim = args["dim"] % len(shape)
    place = {p: i for i, p in enumerate(into)}
    terms = []
    if len(place) < shape[dim] and not lift.is_zero(args["self"]):
        kept = [None if p in place else p for p in range(shape[dim])]
        terms.append(select(lift, lift.node(args["self"]), dim, kept))
    piece = (*shape[:dim], len(into), *shape[dim + 1 :])
    flat = (*shape[:dim], *shape[dim + 1 :]) if squeezed else piece
    y = filled(lift, node, args["src"], flat)
    if y is not None:
        y = lift.reshape(y, piece)
        terms.append(select(lift, y, dim, [place.get(p) for p in range(shape[dim])]))
    return lift.add(terms, shape)


@rule(aten.diagonal_scatter.default)
def _diagonal_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = places(_shape(node)).diagonal(args["offset"], args["dim1"], args["dim2"])
    piece = filled(lift, node, args["src"], tuple(where.shape))
    return overwrite(lift, node, args["self"], piece, where)


@rule(aten.as_strided_scatter.default)
def _as_strided_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = strided(args)
    piece = filled(lift, node, args["src"], tuple(where.shape))
    return overwrite(lift, node, args["self"], piece, where)


# -- constant index lists --------------------------------------------------------------------------


@rule(aten.index_put.default)
def _index_put(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = indexed(lift, args)
    piece = filled(lift, node, args["values"], tuple(where.shape))
    if args["accumulate"]:
        return _added(lift, node, args["self"], piece, where)
    return overwrite(lift, node, args["self"], piece, where)


def _added(lift: Lift, node: fx.Node, base: Any, piece: fx.Node | None, where: Tensor) -> fx.Node:
    terms = [] if lift.is_zero(base) else [lift.node(base)]
    if piece is not None:
        terms.append(spread(lift, piece, where, _shape(node)))
    return lift.add(terms, _shape(node))


@rule(aten.put.default)
def _put(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    index = known(lift, args["index"], math.prod(_shape(node)), negative=True)
    where = places(_shape(node)).take(index)
    piece = filled(lift, node, args["source"], tuple(args["source"].meta["val"].shape))
    if piece is not None:
        piece = lift.reshape(piece, tuple(where.shape))
    if args["accumulate"]:
        return _added(lift, node, args["self"], piece, where)
    return overwrite(lift, node, args["self"], piece, where)


def _index_places(lift: Lift, node: fx.Node, args: Args, negative: bool = False) -> Tensor:
    shape = _shape(node)
    size = shape[args["dim"]] if shape else 1
    index = known(lift, args["index"], size, negative).reshape(-1) % size
    return places(shape).index_select(args["dim"], index) if shape else torch.zeros(()).long()


@rule(aten.index_copy.default)
def _index_copy(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _index_places(lift, node, args)
    piece = filled(lift, node, args["source"], tuple(where.shape))
    return overwrite(lift, node, args["self"], piece, where)


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    # The same value is written everywhere, so that it may be written twice.
    where = _index_places(lift, node, args, negative=True).unique()
    piece = filled(lift, node, args["value"], tuple(where.shape))
    return overwrite(lift, node, args["self"], piece, where)


@rule(aten.index_add.default)
def _index_add(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _index_places(lift, node, args)
    piece = filled(lift, node, args["source"], tuple(where.shape))
    if piece is not None:
        piece = lift.times(piece, args["alpha"])
    return _added(lift, node, args["self"], piece, where)


@rule(aten.masked_scatter.default)
def _masked_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    shape = _shape(node)
    where = places(shape)[known(lift, args["mask"]).expand(shape)]
    source = tuple(args["source"].meta["val"].shape)
    piece = filled(lift, node, args["source"], source)
    if piece is not None:
        piece = move(lift, lift.reshape(piece, (math.prod(source),)), torch.arange(len(where)))
    return overwrite(lift, node, args["self"], piece, where)


# -- scatter ---------------------------------------------------------------------------------------


def _scatter_places(lift: Lift, node: fx.Node, args: Args) -> Tensor:
    shape = _shape(node)
    index = known(lift, args["index"], shape[args["dim"]] if shape else 1)
    return places(shape).gather(args["dim"], index)


def _scattered(lift: Lift, node: fx.Node, args: Args, where: Tensor) -> fx.Node | None:
    """The entries of ``src`` that are written: as many along each axis as the index has."""
    piece = filled(lift, node, args["src"], tuple(args["src"].meta["val"].shape))
    if piece is None:
        return None
    for dim, size in enumerate(where.shape):
        piece = select(lift, piece, dim, range(size))
    return piece


@rule(aten.scatter.src)
def _scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(lift, node, args)
    return overwrite(lift, node, args["self"], _scattered(lift, node, args, where), where)


@rule(aten.scatter.value)
def _scatter_value(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(lift, node, args).unique()
    piece = filled(lift, node, args["value"], tuple(where.shape))
    return overwrite(lift, node, args["self"], piece, where)


@rule(aten.scatter_add.default)
def _scatter_add(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(lift, node, args)
    return _added(lift, node, args["self"], _scattered(lift, node, args, where), where)


@rule(aten.scatter_reduce.two, aten.scatter.reduce)
def _scatter_reduce(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(lift, node, args)
    piece = _scattered(lift, node, args, where)
    included = args.get("include_self", True)
    return _grouped(lift, node, args["self"], piece, where, args["reduce"], included)


@rule(aten.index_reduce.default)
def _index_reduce(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    where = _index_places(lift, node, args)
    piece = filled(lift, node, args["source"], tuple(where.shape))
    return _grouped(lift, node, args["self"], piece, where, args["reduce"], args["include_self"])


def _grouped(
    lift: Lift,
    node: fx.Node,
    base: Any,
    piece: fx.Node | None,
    where: Tensor,
    how: str,
    included: bool,
) -> fx.Node:
    """Entries that come to one place are added, averaged, or compared (k-max-pooling)."""
    shape = _shape(node)
    piece = lift.zeros(tuple(where.shape)) if piece is None else piece
    count = torch.bincount(where.reshape(-1), minlength=math.prod(shape))
    own = count.new_ones(len(count)) if included else (count == 0).long()
    kept = torch.where(own > 0, places((len(count),)), -1).reshape(shape)
    if how in ("sum", "add", "mean"):
        terms = [] if lift.is_zero(base) else [move(lift, lift.node(base), kept)]
        y = lift.add([*terms, spread(lift, piece, where, shape)], shape)
        if how != "mean":
            return y
        parts = (1 / (count + own).double()).reshape(shape)
        return lift.emit(ops.scale, y, lift.emit(ops.coefficient, lift.buffer(parts, "parts")))
    if how not in ("amax", "amin"):
        raise Refusal(
            f"reduce={how!r} multiplies activations with each other", "add or compare them instead"
        )
    # One axis that holds both, the entries of the base first.
    n = len(count)
    base, own = _finite(lift, base, own, count, -math.inf if how == "amax" else math.inf)
    rows: list[list[tuple[int, int]]] = [[(p, ONE)] if own[p] else [] for p in range(n)]
    for k, position in enumerate(where.reshape(-1).tolist()):
        rows[position].append((n + k, ONE))
    flat = [lift.reshape(x, (-1,)) for x in (base, piece)]
    both = lift.emit(aten.cat.default, flat, 0)
    ranks = LARGEST if how == "amax" else SMALLEST
    y = lift.along(both, 0, Stencil.of(n + where.numel(), rows), ranks)
    return lift.reshape(y, shape)


def _finite(
    lift: Lift, base: Any, own: Tensor, count: Tensor, open_: float
) -> tuple[fx.Node, Tensor]:
    """The base, and which of its entries are compared: infinite ones never win, so are no edge."""
    held = None if lift.is_active(base) else lift.peek(base)
    if held is None or bool(torch.isfinite(held).all()):
        return lift.node(base), own
    held = held.reshape(-1)
    if not bool(((held == open_) | torch.isfinite(held) | (own == 0))[count > 0].all()):
        raise Refusal(*INFINITE)
    if not bool(torch.isfinite(held[count == 0]).all()):
        raise Refusal(
            "it compares nothing at some places, where an infinite value stays",
            "start from finite values there",
        )
    lift.constant(base)  # the graph is made for it
    own = torch.where(torch.isfinite(held), own, 0)
    finite = lift.buffer(torch.where(torch.isfinite(held), held, 0.0), "base")
    return lift.emit(ops.constant, lift.emit(ops.coefficient, finite)), own


# -- writing through a view that repeats entries ---------------------------------------------------

WRITES = {
    *(aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default),
    *(aten.as_strided_scatter.default, aten.index_put.default, aten.copy.default),
}


def written_through(lift: Lift, node: fx.Node) -> fx.Node | None:
    """``base + sum(new - base)``, by which torch writes through a view that repeats its base.

    torch allows a write only where no entry of the base is written twice, so that the result holds
    the entries that were written, and those of the base elsewhere.
    """
    base, change = arguments(node)[:2] if len(arguments(node)) > 1 else (None, None)
    dims: list[int] = []
    if _calls(change, aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        change = arguments(change)[0]
    if _calls(change, aten.sum.dim_IntList):
        dims = list(arguments(change)[1])
        change = arguments(change)[0]
    if not _calls(change, aten.sub.Tensor) or not _same(arguments(change)[1], base):
        return None
    new = arguments(change)[0]
    mask = _mask(lift, new, base)
    if mask is None or not lift.is_active(new):
        return None
    counts = mask.long().sum(dims, keepdim=True) if dims else mask.long()
    shape = _shape(node)
    if counts.numel() != math.prod(shape) or bool((counts > 1).any()):
        return None
    x = lift.node(new)
    y = move(lift, x, torch.where(mask, places(lift.shape(x)), -1))
    for dim in dims:
        size = lift.shape(y)[dim]
        y = lift.along(y, dim, Stencil.of(size, [[(p, ONE) for p in range(size)]]))
    terms = [lift.reshape(y, shape)]
    kept = torch.where(counts.reshape(shape) > 0, -1, places(shape))
    if bool((kept >= 0).any()):
        terms.insert(0, move(lift, lift.node(base), kept))
    return lift.add(terms, shape)


def _calls(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.target in targets


def _mask(lift: Lift, new: Any, base: Any) -> Tensor | None:
    """Which entries of ``new`` were written, where it is a written copy of the expanded base."""
    chain = []
    while isinstance(new, fx.Node) and new.target in WRITES and new.target is not aten.copy.default:
        chain.append(new)
        new = bind(new)["self"]
    if not chain:
        # Written as a whole: an operation on the expanded base.
        reads = isinstance(new, fx.Node) and any(_expands(n, base) for n in new.all_input_nodes)
        whole = torch.ones(tuple(new.meta["val"].shape), dtype=torch.bool) if reads else None
        return whole
    if not _expands(new, base):
        return None
    mask = torch.zeros(tuple(new.meta["val"].shape), dtype=torch.bool)
    for write in reversed(chain):
        args = dict(bind(write))
        args["self"] = mask
        for key in ("src", "values"):
            if key in args:
                args[key] = torch.ones((), dtype=torch.bool).expand(
                    tuple(args[key].meta["val"].shape)
                )
        if "indices" in args:
            args["indices"] = [None if i is None else known(lift, i) for i in args["indices"]]
        mask = target(write)(**args)
    return mask


def _expands(value: Any, base: Any) -> bool:
    return _calls(value, aten.expand.default) and _same(arguments(value)[0], base)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one, or the same view of one."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a is b or a == b)
    if a.target is not b.target or a.target not in RELABELLING or a.kwargs or b.kwargs:
        return False
    return len(a.args) == len(b.args) and all(map(_same, a.args, b.args))
