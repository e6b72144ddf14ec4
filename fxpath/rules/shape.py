"""Rules: operations that only move, repeat or join entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpath.graph.aten import CAT, PERMUTE, SELECTIONS
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import target
from fxpath.graph.stencil import Stencil
from fxpath.rules.common import places, spread
from fxpath.rules.refused import NOT_REAL
from fxpath.rules.registry import rule

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
def _reshape(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if node.target is aten.view.dtype and node.meta["val"].dtype != args["self"].meta["val"].dtype:
        raise Refusal(*NOT_REAL)
    return build.reshape(build.node(args["self"]), tuple(node.meta["val"].shape))


def permute(build: Builder, x: fx.Node, dims: list[int]) -> fx.Node:
    """Reorder axes; nothing is emitted where the order stays."""
    dims = [d % len(dims) for d in dims]
    return x if dims == sorted(dims) else build.emit(PERMUTE, x, dims)


@rule(aten.permute.default)
def _permute(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return permute(build, build.node(args["self"]), list(args["dims"]))


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def _transpose(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    dims = list(range(len(build.shape(x))))
    a, b = (args[k] for k in list(args)[1:3])
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return permute(build, x, dims)


@rule(
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.mH.default,
    aten.adjoint.default,
)
def _t(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    dims = list(range(len(build.shape(x))))
    reverses = node.target in (aten.t.default, aten.numpy_T.default)
    last = dims[::-1] if reverses else [*dims[:-2], dims[-1], dims[-2]]
    return permute(build, x, last)


@rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _movedim(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    rank = len(build.shape(x))
    source, target = (
        [d % rank for d in ([v] if isinstance(v, int) else v)]
        for v in (args["source"], args["destination"])
    )
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    return permute(build, x, order)


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return build.expand(build.node(args["self"]), tuple(node.meta["val"].shape))


@rule(aten.repeat.default, aten.tile.default)
def _repeat(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    shape = tuple(node.meta["val"].shape)
    x = build.reshape(x, (1,) * (len(shape) - len(build.shape(x))) + build.shape(x))
    for dim, out in enumerate(shape):
        size = build.shape(x)[dim]
        x = build.along(x, dim, Stencil.select(size, [p % size for p in range(out)]))
    return x


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, dim = build.node(args["self"]), args["dim"]
    if dim is None:
        x, dim = build.reshape(x, (-1,)), 0
    size = build.shape(x)[dim]
    positions = [p for p in range(size) for _ in range(args["repeats"])]
    return build.along(x, dim, Stencil.select(size, positions))


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _cat(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    # torch lets an empty vector stand among tensors of any rank.
    tensors = args["tensors"]
    pieces = [x for x in tensors if tuple(x.meta["val"].shape) != (0,)] or tensors
    return build.emit(CAT, [build.node(x) for x in pieces], args["dim"])


@rule(aten.hstack.default)
def _hstack(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    pieces = [build.node(x) for x in args["tensors"]]
    return build.emit(CAT, pieces, int(len(node.meta["val"].shape) > 1))


@rule(aten.vstack.default, aten.dstack.default, aten.column_stack.default)
def _stack_with_axes(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """Pieces that lack axes are given them first."""
    least, dim = JOINED[target(node)]
    pieces = []
    for each in args["tensors"]:
        x = build.node(each)
        shape = build.shape(x)
        if len(shape) < least:
            if node.target is aten.column_stack.default:
                shape = (*shape, *(1,) * (least - len(shape)))
            elif len(shape) < 2:
                shape = (1, *(shape or (1,)))
            shape = (*shape, *(1,) * (least - len(shape)))
        pieces.append(build.reshape(x, shape))
    return build.emit(CAT, pieces, dim)


#: Axes that the pieces have at least, and the one along which they are joined.
JOINED = {
    aten.vstack.default: (2, 0),
    aten.dstack.default: (3, 2),
    aten.column_stack.default: (2, 1),
}


@rule(aten.block_diag.default)
def _block_diag(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    rows, columns = shape = tuple(node.meta["val"].shape)
    terms, row, column = [], 0, 0
    for each in args["tensors"]:
        x = build.node(each)
        x = build.reshape(x, (1,) * (2 - len(build.shape(x))) + build.shape(x))
        height, width = build.shape(x)
        where = places(shape)[row : row + height, column : column + width]
        terms.append(spread(build, x, where, shape))
        row, column = row + height, column + width
    return build.add(terms, shape)


@rule(aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing)
def _broadcast(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    grid = node.target is not aten.broadcast_tensors.default
    pieces: list[fx.Node | None] = []
    for i, (each, value) in enumerate(zip(args["tensors"], node.meta["val"], strict=True)):
        x, shape = build.node(each), list(value.shape)
        if grid:
            swapped = args.get("indexing") == "xy" and i < 2 and len(shape) > 1
            axis = 1 - i if swapped else i
            x = build.reshape(x, [shape[d] if d == axis else 1 for d in range(len(shape))])
        pieces.append(build.expand(x, shape))
    return pieces


@rule(aten.stack.default)
def _stack(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    shape = list(node.meta["val"].shape)
    dim = args["dim"] % len(shape)
    shape[dim] = 1
    pieces = [build.reshape(build.node(x), shape) for x in args["tensors"]]
    return build.emit(CAT, pieces, dim)


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, r = build.node(args["self"]), args["upscale_factor"]
    *lead, c, h, w = build.shape(x)
    n = len(lead)
    x = build.reshape(x, (*lead, c // r**2, r, r, h, w))
    x = permute(build, x, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return build.reshape(x, tuple(node.meta["val"].shape))


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, r = build.node(args["self"]), args["downscale_factor"]
    *lead, c, h, w = build.shape(x)
    n = len(lead)
    x = build.reshape(x, (*lead, c, h // r, r, w // r, r))
    x = permute(build, x, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return build.reshape(x, tuple(node.meta["val"].shape))


@rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def _channel_shuffle(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    batch, channels, *rest = build.shape(x)
    x = build.reshape(x, (batch, args["groups"], channels // args["groups"], *rest))
    x = permute(build, x, [0, 2, 1, *range(3, 3 + len(rest))])
    return build.reshape(x, (batch, channels, *rest))


@rule(*SELECTIONS)
def _as_it_is(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """The operation itself does it to any kind of value."""
    x, *rest = args.values()
    return build.emit(target(node), build.node(x), *rest)
