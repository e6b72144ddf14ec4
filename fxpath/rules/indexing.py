"""Rules: entries that are picked by constant positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph.aten import PERMUTE
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import target
from fxpath.rules.common import (
    UNKNOWN_POSITIONS,
    Args,
    in_range,
    known,
    move,
    places,
    select,
    summed,
)
from fxpath.rules.registry import rule

aten = torch.ops.aten


# -- positions along an axis -----------------------------------------------------------------------


def span(size: int, start: Any, end: Any, step: int) -> range:
    """Positions of a slice."""
    return range(*slice(start, end, step).indices(size))


@rule(aten.slice.Tensor)
def _slice(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, dim = build.node(args["self"]), args["dim"]
    return select(
        build, x, dim, span(build.shape(x)[dim], args["start"], args["end"], args["step"])
    )


@rule(aten.narrow.default)
def _narrow(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, start = build.node(args["self"]), args["start"]
    start %= build.shape(x)[args["dim"]] or 1
    return select(build, x, args["dim"], range(start, start + args["length"]))


@rule(aten.select.int)
def _select_int(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, dim = build.node(args["self"]), args["dim"]
    y = select(build, x, dim, [args["index"] % build.shape(x)[dim]])
    return build.reshape(y, tuple(node.meta["val"].shape))


SPLIT_ALONG = {
    **dict.fromkeys((aten.vsplit.int, aten.vsplit.array), 0),
    **dict.fromkeys((aten.dsplit.int, aten.dsplit.array), 2),
}


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.unbind.int,
    aten.hsplit.int,
    aten.hsplit.array,
    aten.vsplit.int,
    aten.vsplit.array,
    aten.dsplit.int,
    aten.dsplit.array,
)
def _split(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x = build.node(args["self"])
    dim = args.get("dim", SPLIT_ALONG.get(target(node)))
    if dim is None:  # hsplit of a vector
        dim = int(len(build.shape(x)) > 1)
    pieces: list[fx.Node | None] = []
    start = 0
    for value in node.meta["val"]:
        size = 1 if node.target is aten.unbind.int else value.shape[dim]
        piece = select(build, x, dim, range(start, start + size))
        pieces.append(build.reshape(piece, tuple(value.shape)))
        start += size
    return pieces


@rule(aten.flip.default)
def _flip(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    for dim in args["dims"]:
        x = select(build, x, dim, reversed(range(build.shape(x)[dim])))
    return x


@rule(aten.roll.default)
def _roll(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    shape = build.shape(x)
    if not args["dims"]:
        x = build.reshape(x, (math.prod(shape),))
    for shift, dim in zip(args["shifts"], args["dims"] or [0], strict=True):
        size = build.shape(x)[dim]
        x = select(build, x, dim, [(p - shift) % size for p in range(size)])
    return build.reshape(x, shape)


@rule(aten.index_select.default)
def _index_select(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _indexed(build, args["self"], args["dim"], known(build, args["index"]), negative=False)


@rule(aten.index.Tensor)
def _index(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    used = [(dim, index) for dim, index in enumerate(args["indices"]) if index is not None]
    if len(used) == 1:
        dim = used[0][0]
        positions = known(build, used[0][1])
        if positions.dim() <= 1 and (positions.dtype != torch.bool or positions.dim() == 1):
            y = _indexed(build, args["self"], dim, positions, negative=True)
            return build.reshape(y, tuple(node.meta["val"].shape))
    return move(build, build.node(args["self"]), indexed(build, args))


def indexed(build: Builder, args: Args) -> Tensor:
    """The places that ``self[indices]`` reads."""
    indices = args["indices"]
    shape = args["self"].meta["val"].shape
    if any(build.is_active(index) for index in indices):
        raise Refusal(*UNKNOWN_POSITIONS)
    chosen: list[Any] = []
    axis = 0
    for index in indices:
        if index is None:
            chosen.append(slice(None))
            axis += 1
        else:
            chosen.append(known(build, index, shape[axis], negative=True))
            axis += chosen[-1].dim() if chosen[-1].dtype == torch.bool else 1
    return places(shape)[tuple(chosen)]


def _indexed(build: Builder, value: Any, dim: int, positions: Tensor, negative: bool) -> fx.Node:
    if not build.is_active(value):  # only the positions are activations
        raise Refusal(*UNKNOWN_POSITIONS)
    x = build.node(value)
    if not build.shape(x):
        return x
    if positions.dtype == torch.bool:
        positions = positions.nonzero()[:, 0]
    size = build.shape(x)[dim]
    in_range(positions, size, negative)
    return select(build, x, dim, [p % size for p in positions.reshape(-1).tolist()])


@rule(aten.gather.default)
def _gather(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    index = known(build, args["index"], build.shape(x)[args["dim"]] if build.shape(x) else 1)
    return move(build, x, places(build.shape(x)).gather(args["dim"], index))


@rule(aten.take_along_dim.default)
def _take_along_dim(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, dim = build.node(args["self"]), args["dim"]
    shape = build.shape(x)
    size = math.prod(shape) if dim is None else shape[dim]
    index = known(build, args["indices"], size, negative=True)
    flat = torch.take_along_dim(places(shape), index, dim)
    return move(build, x, flat)


@rule(aten.take.default)
def _take(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    index = known(build, args["index"], math.prod(build.shape(x)), negative=True)
    return move(build, x, places(build.shape(x)).take(index))


@rule(aten.masked_select.default)
def _masked_select(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, mask = build.node(args["self"]), known(build, args["mask"])
    return move(build, x, places(build.shape(x)).masked_select(mask))


@rule(aten.embedding.default)
def _embedding(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if build.is_active(args["indices"]):
        raise Refusal(
            "it looks entries up by integer inputs, which is not a function of real inputs",
            "analyse the network from the embedded vectors on",
        )
    index = known(build, args["indices"])
    y = _indexed(build, args["weight"], 0, index, negative=False)
    return build.reshape(y, tuple(node.meta["val"].shape))


@rule(aten.as_strided.default)
def _as_strided(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return move(build, build.node(args["self"]), strided(args))


def strided(args: Args) -> Tensor:
    """The places that a strided window into the memory of ``self`` shows."""
    held = args["self"].meta["val"]
    if not held.is_contiguous() or held.storage_offset():
        raise Refusal(
            "as_strided shows memory whatever the layout of its tensor is",
            "call it on a contiguous tensor that owns its memory, or index instead",
        )
    flat = torch.tensor(args["storage_offset"] or 0)
    for size, stride in zip(args["size"], args["stride"], strict=True):
        flat = flat[..., None] + torch.arange(size) * stride
    if flat.numel() and int(flat.max()) >= held.numel():
        raise Refusal("as_strided reads beyond its tensor", "index instead")
    return flat


@rule(aten.diag.default)
def _diag(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    return move(build, x, (places(build.shape(x)) + 1).diag(args["diagonal"]) - 1)


@rule(aten.diag_embed.default)
def _diag_embed(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, *where = args.values()
    x = build.node(x)
    return move(build, x, torch.diag_embed(places(build.shape(x)) + 1, *where) - 1)


@rule(aten.trace.default)
def _trace(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    y = move(build, x, places(build.shape(x)).diagonal())
    return summed(build, y, None, ())


@rule(aten.rot90.default)
def _rot90(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, (a, b) = build.node(args["self"]), args["dims"]
    order = list(range(len(build.shape(x))))
    order[a], order[b] = order[b], order[a]
    turns = args["k"] % 4
    for dim in {0: (), 1: (b,), 2: (a, b), 3: (a,)}[turns]:
        x = select(build, x, dim, reversed(range(build.shape(x)[dim])))
    return x if turns % 2 == 0 else build.emit(PERMUTE, x, order)
