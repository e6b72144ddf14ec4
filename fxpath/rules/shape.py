"""Rules: operations that only move, repeat or join entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxpath.graph.schema import target
from fxpath.graph.stencil import Stencil
from fxpath.rules.common import places, spread
from fxpath.rules.refused import NOT_REAL
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten
Args = dict[str, Any]


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.ravel.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
    aten.view.dtype,
)
def _reshape(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    if node.target is aten.view.dtype and node.meta["val"].dtype != args["self"].meta["val"].dtype:
        raise Refusal(*NOT_REAL)
    return lift.reshape(lift.node(args["self"]), tuple(node.meta["val"].shape))


def permute(lift: Lift, x: fx.Node, dims: list[int]) -> fx.Node:
    """Reorder axes; nothing is emitted where the order stays."""
    dims = [d % len(dims) for d in dims]
    return x if dims == sorted(dims) else lift.emit(aten.permute.default, x, dims)


@rule(aten.permute.default)
def _permute(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return permute(lift, lift.node(args["self"]), list(args["dims"]))


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def _transpose(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    dims = list(range(len(lift.shape(x))))
    a, b = (args[k] for k in list(args)[1:3])
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return permute(lift, x, dims)


@rule(
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.mH.default,
    aten.adjoint.default,
)
def _t(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    dims = list(range(len(lift.shape(x))))
    reverses = node.target in (aten.t.default, aten.numpy_T.default)
    last = dims[::-1] if reverses else [*dims[:-2], dims[-1], dims[-2]]
    return permute(lift, x, last)


@rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _movedim(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    rank = len(lift.shape(x))
    source, target = (
        [d % rank for d in ([v] if isinstance(v, int) else v)]
        for v in (args["source"], args["destination"])
    )
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    return permute(lift, x, order)


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return lift.expand(lift.node(args["self"]), tuple(node.meta["val"].shape))


@rule(aten.repeat.default, aten.tile.default)
def _repeat(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    shape = tuple(node.meta["val"].shape)
    x = lift.reshape(x, (1,) * (len(shape) - len(lift.shape(x))) + lift.shape(x))
    for dim, out in enumerate(shape):
        size = lift.shape(x)[dim]
        x = lift.along(x, dim, Stencil.select(size, [p % size for p in range(out)]))
    return x


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, dim = lift.node(args["self"]), args["dim"]
    if dim is None:
        x, dim = lift.reshape(x, (-1,)), 0
    size = lift.shape(x)[dim]
    positions = [p for p in range(size) for _ in range(args["repeats"])]
    return lift.along(x, dim, Stencil.select(size, positions))


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _cat(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    # torch lets an empty vector stand among tensors of any rank.
    tensors = args["tensors"]
    pieces = [x for x in tensors if tuple(x.meta["val"].shape) != (0,)] or tensors
    return lift.emit(aten.cat.default, [lift.node(x) for x in pieces], args["dim"])


@rule(aten.hstack.default)
def _hstack(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    pieces = [lift.node(x) for x in args["tensors"]]
    return lift.emit(aten.cat.default, pieces, int(len(node.meta["val"].shape) > 1))


@rule(aten.vstack.default, aten.dstack.default, aten.column_stack.default)
def _stack_with_axes(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    """Pieces that lack axes are given them first."""
    least, dim = JOINED[target(node)]
    pieces = []
    for each in args["tensors"]:
        x = lift.node(each)
        shape = lift.shape(x)
        if len(shape) < least:
            if node.target is aten.column_stack.default:
                shape = (*shape, *(1,) * (least - len(shape)))
            elif len(shape) < 2:
                shape = (1, *(shape or (1,)))
            shape = (*shape, *(1,) * (least - len(shape)))
        pieces.append(lift.reshape(x, shape))
    return lift.emit(aten.cat.default, pieces, dim)


#: Axes that the pieces have at least, and the one along which they are joined.
JOINED = {
    aten.vstack.default: (2, 0),
    aten.dstack.default: (3, 2),
    aten.column_stack.default: (2, 1),
}


@rule(aten.block_diag.default)
def _block_diag(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    rows, columns = shape = tuple(node.meta["val"].shape)
    terms, row, column = [], 0, 0
    for each in args["tensors"]:
        x = lift.node(each)
        x = lift.reshape(x, (1,) * (2 - len(lift.shape(x))) + lift.shape(x))
        height, width = lift.shape(x)
        where = places(shape)[row : row + height, column : column + width]
        terms.append(spread(lift, x, where, shape))
        row, column = row + height, column + width
    return lift.add(terms, shape)


@rule(aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing)
def _broadcast(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    grid = node.target is not aten.broadcast_tensors.default
    pieces: list[fx.Node | None] = []
    for i, (each, value) in enumerate(zip(args["tensors"], node.meta["val"], strict=True)):
        x, shape = lift.node(each), list(value.shape)
        if grid:
            swapped = args.get("indexing") == "xy" and i < 2 and len(shape) > 1
            axis = 1 - i if swapped else i
            x = lift.reshape(x, [shape[d] if d == axis else 1 for d in range(len(shape))])
        pieces.append(lift.expand(x, shape))
    return pieces


@rule(aten.stack.default)
def _stack(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    shape = list(node.meta["val"].shape)
    dim = args["dim"] % len(shape)
    shape[dim] = 1
    pieces = [lift.reshape(lift.node(x), shape) for x in args["tensors"]]
    return lift.emit(aten.cat.default, pieces, dim)


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, r = lift.node(args["self"]), args["upscale_factor"]
    *lead, c, h, w = lift.shape(x)
    n = len(lead)
    x = lift.reshape(x, (*lead, c // r**2, r, r, h, w))
    x = permute(lift, x, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return lift.reshape(x, tuple(node.meta["val"].shape))


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, r = lift.node(args["self"]), args["downscale_factor"]
    *lead, c, h, w = lift.shape(x)
    n = len(lead)
    x = lift.reshape(x, (*lead, c, h // r, r, w // r, r))
    x = permute(lift, x, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return lift.reshape(x, tuple(node.meta["val"].shape))


@rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def _channel_shuffle(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    batch, channels, *rest = lift.shape(x)
    x = lift.reshape(x, (batch, args["groups"], channels // args["groups"], *rest))
    x = permute(lift, x, [0, 2, 1, *range(3, 3 + len(rest))])
    return lift.reshape(x, (batch, channels, *rest))


@rule(
    aten.diagonal.default,
    aten.unfold.default,
    aten.im2col.default,
    aten.tril.default,
    aten.triu.default,
)
def _as_it_is(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    """Selections with a layout of their own: the operation itself does it to any kind of value."""
    x, *rest = args.values()
    return lift.emit(target(node), lift.node(x), *rest)
