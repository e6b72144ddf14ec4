"""Rules: entries that are written to constant positions, and sums over them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import CAT, RELABELLING
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import INFINITE, Refusal
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
from fxpath.rules.registry import rule

aten = torch.ops.aten


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


# -- copies ----------------------------------------------------------------------------------------


@rule(aten.copy.default)
def _copy(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if not node.meta["val"].is_floating_point():
        raise Refusal("rounding to integers is not continuous", "keep activations floating point")
    return filled(build, node, args["src"], _shape(node)) or build.zeros(_shape(node))


@rule(aten.fill.Tensor)
def _fill(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return filled(build, node, args["value"], _shape(node)) or build.zeros(_shape(node))


@rule(aten.select_scatter.default)
def _select_scatter(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    size = _shape(node)[args["dim"]]
    return _written(build, node, args, [args["index"] % size], squeezed=True)


@rule(aten.slice_scatter.default)
def _slice_scatter(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    size = _shape(node)[args["dim"]]
    into = list(span(size, args["start"], args["end"], args["step"]))
    return _written(build, node, args, into, squeezed=False)


def _written(build: Builder, node: fx.Node, args: Args, into: list[int], squeezed: bool) -> fx.Node:
    """Positions ``into`` of one axis are overwritten: the others, plus the new ones in place."""
    shape = _shape(node)
    dim = args["dim"] % len(shape)
    place = {p: i for i, p in enumerate(into)}
    terms = []
    if len(place) < shape[dim] and not build.is_zero(args["self"]):
        kept = [None if p in place else p for p in range(shape[dim])]
        terms.append(select(build, build.node(args["self"]), dim, kept))
    piece = (*shape[:dim], len(into), *shape[dim + 1 :])
    flat = (*shape[:dim], *shape[dim + 1 :]) if squeezed else piece
    y = filled(build, node, args["src"], flat)
    if y is not None:
        y = build.reshape(y, piece)
        terms.append(select(build, y, dim, [place.get(p) for p in range(shape[dim])]))
    return build.add(terms, shape)


@rule(aten.diagonal_scatter.default)
def _diagonal_scatter(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = places(_shape(node)).diagonal(args["offset"], args["dim1"], args["dim2"])
    piece = filled(build, node, args["src"], tuple(where.shape))
    return overwrite(build, node, args["self"], piece, where)


@rule(aten.as_strided_scatter.default)
def _as_strided_scatter(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = strided(args)
    piece = filled(build, node, args["src"], tuple(where.shape))
    return overwrite(build, node, args["self"], piece, where)


# -- constant index lists --------------------------------------------------------------------------


@rule(aten.index_put.default)
def _index_put(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = indexed(build, args)
    piece = filled(build, node, args["values"], tuple(where.shape))
    if args["accumulate"]:
        return _added(build, node, args["self"], piece, where)
    return overwrite(build, node, args["self"], piece, where)


def _added(
    build: Builder, node: fx.Node, base: Any, piece: fx.Node | None, where: Tensor
) -> fx.Node:
    terms = [] if build.is_zero(base) else [build.node(base)]
    if piece is not None:
        terms.append(spread(build, piece, where, _shape(node)))
    return build.add(terms, _shape(node))


@rule(aten.put.default)
def _put(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    index = known(build, args["index"], math.prod(_shape(node)), negative=True)
    where = places(_shape(node)).take(index)
    piece = filled(build, node, args["source"], tuple(args["source"].meta["val"].shape))
    if piece is not None:
        piece = build.reshape(piece, tuple(where.shape))
    if args["accumulate"]:
        return _added(build, node, args["self"], piece, where)
    return overwrite(build, node, args["self"], piece, where)


def _index_places(build: Builder, node: fx.Node, args: Args, negative: bool = False) -> Tensor:
    shape = _shape(node)
    size = shape[args["dim"]] if shape else 1
    index = known(build, args["index"], size, negative).reshape(-1) % size
    return places(shape).index_select(args["dim"], index) if shape else torch.zeros(()).long()


@rule(aten.index_copy.default)
def _index_copy(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _index_places(build, node, args)
    piece = filled(build, node, args["source"], tuple(where.shape))
    return overwrite(build, node, args["self"], piece, where)


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    # The same value is written everywhere, so that it may be written twice.
    where = _index_places(build, node, args, negative=True).unique()
    piece = filled(build, node, args["value"], tuple(where.shape))
    return overwrite(build, node, args["self"], piece, where)


@rule(aten.index_add.default)
def _index_add(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _index_places(build, node, args)
    piece = filled(build, node, args["source"], tuple(where.shape))
    if piece is not None:
        piece = build.times(piece, args["alpha"])
    return _added(build, node, args["self"], piece, where)


@rule(aten.masked_scatter.default)
def _masked_scatter(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    shape = _shape(node)
    where = places(shape)[known(build, args["mask"]).expand(shape)]
    source = tuple(args["source"].meta["val"].shape)
    piece = filled(build, node, args["source"], source)
    if piece is not None:
        piece = move(build, build.reshape(piece, (math.prod(source),)), torch.arange(len(where)))
    return overwrite(build, node, args["self"], piece, where)


# -- scatter ---------------------------------------------------------------------------------------


def _scatter_places(build: Builder, node: fx.Node, args: Args) -> Tensor:
    shape = _shape(node)
    index = known(build, args["index"], shape[args["dim"]] if shape else 1)
    return places(shape).gather(args["dim"], index)


def _scattered(build: Builder, node: fx.Node, args: Args, where: Tensor) -> fx.Node | None:
    """The entries of ``src`` that are written: as many along each axis as the index has."""
    piece = filled(build, node, args["src"], tuple(args["src"].meta["val"].shape))
    if piece is None:
        return None
    for dim, size in enumerate(where.shape):
        piece = select(build, piece, dim, range(size))
    return piece


@rule(aten.scatter.src)
def _scatter(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(build, node, args)
    return overwrite(build, node, args["self"], _scattered(build, node, args, where), where)


@rule(aten.scatter.value)
def _scatter_value(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(build, node, args).unique()
    piece = filled(build, node, args["value"], tuple(where.shape))
    return overwrite(build, node, args["self"], piece, where)


@rule(aten.scatter_add.default)
def _scatter_add(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(build, node, args)
    return _added(build, node, args["self"], _scattered(build, node, args, where), where)


@rule(aten.scatter_reduce.two, aten.scatter.reduce)
def _scatter_reduce(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _scatter_places(build, node, args)
    piece = _scattered(build, node, args, where)
    included = args.get("include_self", True)
    return _grouped(build, node, args["self"], piece, where, args["reduce"], included)


@rule(aten.index_reduce.default)
def _index_reduce(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    where = _index_places(build, node, args)
    piece = filled(build, node, args["source"], tuple(where.shape))
    return _grouped(build, node, args["self"], piece, where, args["reduce"], args["include_self"])


def _grouped(
    build: Builder,
    node: fx.Node,
    base: Any,
    piece: fx.Node | None,
    where: Tensor,
    how: str,
    included: bool,
) -> fx.Node:
    """Entries that come to one place are added, averaged, or compared (k-max-pooling)."""
    shape = _shape(node)
    piece = build.zeros(tuple(where.shape)) if piece is None else piece
    count = torch.bincount(where.reshape(-1), minlength=math.prod(shape))
    own = count.new_ones(len(count)) if included else (count == 0).long()
    kept = torch.where(own > 0, places((len(count),)), -1).reshape(shape)
    if how in ("sum", "add", "mean"):
        terms = [] if build.is_zero(base) else [move(build, build.node(base), kept)]
        y = build.add([*terms, spread(build, piece, where, shape)], shape)
        if how != "mean":
            return y
        parts = (1 / (count + own).double()).reshape(shape)
        return build.emit(ops.scale, y, build.emit(ops.coefficient, build.buffer(parts, "parts")))
    if how not in ("amax", "amin"):
        raise Refusal(
            f"reduce={how!r} multiplies activations with each other", "add or compare them instead"
        )
    # One axis that holds both, the entries of the base first.
    n = len(count)
    base, own = _finite(build, base, own, count, -math.inf if how == "amax" else math.inf)
    rows: list[list[tuple[int, int]]] = [[(p, ONE)] if own[p] else [] for p in range(n)]
    for k, position in enumerate(where.reshape(-1).tolist()):
        rows[position].append((n + k, ONE))
    flat = [build.reshape(x, (-1,)) for x in (base, piece)]
    both = build.emit(CAT, flat, 0)
    ranks = LARGEST if how == "amax" else SMALLEST
    y = build.along(both, 0, Stencil.of(n + where.numel(), rows), ranks)
    return build.reshape(y, shape)


def _finite(
    build: Builder, base: Any, own: Tensor, count: Tensor, open_: float
) -> tuple[fx.Node, Tensor]:
    """The base, and which of its entries are compared: infinite ones never win, so are no edge."""
    held = None if build.is_active(base) else build.peek(base)
    if held is None or bool(torch.isfinite(held).all()):
        return build.node(base), own
    held = held.reshape(-1)
    if not bool(((held == open_) | torch.isfinite(held) | (own == 0))[count > 0].all()):
        raise Refusal(*INFINITE)
    if not bool(torch.isfinite(held[count == 0]).all()):
        raise Refusal(
            "it compares nothing at some places, where an infinite value stays",
            "start from finite values there",
        )
    build.constant(base)  # the graph is made for it
    own = torch.where(torch.isfinite(held), own, 0)
    finite = build.buffer(torch.where(torch.isfinite(held), held, 0.0), "base")
    return build.emit(ops.constant, build.emit(ops.coefficient, finite)), own


# -- writing through a view that repeats entries ---------------------------------------------------

WRITES = {
    *(aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default),
    *(aten.as_strided_scatter.default, aten.index_put.default, aten.copy.default),
}


def written_through(build: Builder, node: fx.Node) -> fx.Node | None:
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
    mask = _mask(build, new, base)
    if mask is None or not build.is_active(new):
        return None
    counts = mask.long().sum(dims, keepdim=True) if dims else mask.long()
    shape = _shape(node)
    if counts.numel() != math.prod(shape) or bool((counts > 1).any()):
        return None
    x = build.node(new)
    y = move(build, x, torch.where(mask, places(build.shape(x)), -1))
    for dim in dims:
        size = build.shape(y)[dim]
        y = build.along(y, dim, Stencil.of(size, [[(p, ONE) for p in range(size)]]))
    terms = [build.reshape(y, shape)]
    kept = torch.where(counts.reshape(shape) > 0, -1, places(shape))
    if bool((kept >= 0).any()):
        terms.insert(0, move(build, build.node(base), kept))
    return build.add(terms, shape)


def _calls(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.target in targets


def _mask(build: Builder, new: Any, base: Any) -> Tensor | None:
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
            args["indices"] = [None if i is None else known(build, i) for i in args["indices"]]
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
