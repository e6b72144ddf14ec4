"""Rules: what works along axes with fixed coefficients: pooling, means, padding, upsampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxpath import ops, stencil
from fxpath.rules.registry import Refusal, rule
from fxpath.schema import target
from fxpath.stencil import Stencil, per_axis

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten
Args = dict[str, Any]

MAX_POOLS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}
MAX_POOLS_WITH_INDICES = {
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
}
AVG_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}


#: Ranks of windows along an axis: their largest entry, or their smallest.
LARGEST, SMALLEST = (1,), (-1,)


def _apply(
    lift: Lift, x: fx.Node, stencils: Sequence[Stencil], ranks: Sequence[int] | None = None
) -> fx.Node:
    """One stencil for each of the last axes."""
    for i, each in enumerate(stencils):
        x = lift.along(x, i - len(stencils), each, ranks)
    return x


def _whole(size: int) -> Stencil:
    """Every position as it is."""
    return Stencil.select(size, range(size))


# -- maxima ----------------------------------------------------------------------------------------


def _max_pool(lift: Lift, args: Args, axes: int) -> fx.Node:
    x = lift.node(args["self"])
    kernel, padding = per_axis(args["kernel_size"], axes), per_axis(args["padding"], axes)
    stride = per_axis(args["stride"] or kernel, axes)
    dilation = per_axis(args["dilation"], axes)
    stencils = [
        stencil.max_pool(size, kernel[i], stride[i], padding[i], dilation[i], args["ceil_mode"])
        for i, size in enumerate(lift.shape(x)[-axes:])
    ]
    if "unpadded" in x.meta:
        # Minus infinity is no edge: the windows read past it.  Axes are matched from the last one.
        shape = lift.shape(x)
        x, pads = x.meta["unpadded"]
        rank = max(len(stencils), len(pads))
        axes_, pads = ([*map(_whole, shape[-rank:][: rank - len(s)]), *s] for s in (stencils, pads))
        stencils = [window.after(pad) for window, pad in zip(axes_, pads, strict=True)]
    if not all(bool(each.reads.all()) for each in stencils):
        raise Refusal(
            "a pooling window covers padding only, so its maximum is -inf",
            "reduce the padding or the dilation",
        )
    return _apply(lift, x, stencils, LARGEST)


@rule(*MAX_POOLS)
def _max_pool_values(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _max_pool(lift, args, MAX_POOLS[target(node)])


@rule(*MAX_POOLS_WITH_INDICES)
def _max_pool_indices(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [_max_pool(lift, args, MAX_POOLS_WITH_INDICES[target(node)]), None]


@rule(
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)
def _adaptive_max_pool(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [_adaptive(lift, node, args, LARGEST), None]


EXTREMA = {
    **dict.fromkeys((aten.amax.default, aten.max.dim, aten.max.default), LARGEST),
    **dict.fromkeys((aten.amin.default, aten.min.dim, aten.min.default), SMALLEST),
}


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def _amax(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _reduce(lift, node, args["self"], args.get("dim"), ranks=EXTREMA[target(node)])


@rule(aten.max.dim, aten.min.dim)
def _max_dim(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    kept = lift.node(args["self"])
    dim = args["dim"] % max(1, len(lift.shape(kept)))
    whole = stencil.whole(lift.shape(kept)[dim], stencil.ONE)
    y = lift.along(kept, dim, whole, EXTREMA[target(node)])
    return [lift.reshape(y, tuple(node.meta["val"][0].shape)), None]


# -- means and sums --------------------------------------------------------------------------------


def _reduce(
    lift: Lift,
    node: fx.Node,
    value: fx.Node,
    dims: Any,
    ranks: Sequence[int] | None = None,
    mean: bool = False,
) -> fx.Node:
    x = lift.node(value)
    rank = len(lift.shape(x))
    chosen = [dims] if isinstance(dims, int) else list(dims or range(rank))
    for dim in {d % rank for d in chosen} if rank else ():
        size = lift.shape(x)[dim]
        coefficient = Fraction(1, size) if mean else stencil.ONE
        x = lift.along(x, dim, stencil.whole(size, coefficient), ranks)
    return lift.reshape(x, tuple(node.meta["val"].shape))


@rule(aten.mean.dim, aten.mean.default)
def _mean(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _reduce(lift, node, args["self"], args.get("dim"), mean=True)


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _reduce(lift, node, args["self"], args.get("dim"))


@rule(aten.cumsum.default)
def _cumsum(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    size = lift.shape(x)[args["dim"]]
    rows = ([(p, stencil.ONE) for p in range(o + 1)] for o in range(size))
    return lift.along(x, args["dim"], Stencil.of(size, rows))


@rule(*AVG_POOLS)
def _avg_pool(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    axes = AVG_POOLS[target(node)]
    x = lift.node(args["self"])
    kernel, padding = per_axis(args["kernel_size"], axes), per_axis(args["padding"], axes)
    stride = per_axis(args["stride"] or kernel, axes)
    divisor = args.get("divisor_override")
    stencils = [
        stencil.avg_pool(
            size,
            kernel[i],
            stride[i],
            padding[i],
            args["ceil_mode"],
            args["count_include_pad"],
            divide=divisor is None,
        )
        for i, size in enumerate(lift.shape(x)[-axes:])
    ]
    y = _apply(lift, x, stencils)
    return y if divisor is None else lift.emit(ops.scale, y, lift.weight(1.0 / divisor, node))


def _adaptive(lift: Lift, node: fx.Node, args: Args, ranks: Sequence[int] | None = None) -> fx.Node:
    x = lift.node(args["self"])
    value = node.meta["val"]
    sizes = args["output_size"]
    out = (value if isinstance(value, Tensor) else value[0]).shape[-len(sizes) :]
    shape = lift.shape(x)[-len(sizes) :]
    stencils = [stencil.adaptive_pool(n, m, not ranks) for n, m in zip(shape, out, strict=True)]
    return _apply(lift, x, stencils, ranks)


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def _adaptive_avg_pool(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _adaptive(lift, node, args)


# -- padding ---------------------------------------------------------------------------------------


@rule(aten.pad.default)
def _pad(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _padded(lift, node, args["self"], args["pad"], args["mode"], args["value"])


@rule(aten.constant_pad_nd.default)
def _constant_pad(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _padded(lift, node, args["self"], args["pad"], "constant", args["value"])


@rule(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def _reflection_pad(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _padded(lift, node, args["self"], args["padding"], "reflect", None)


@rule(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)
def _replication_pad(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _padded(lift, node, args["self"], args["padding"], "replicate", None)


def _padded(
    lift: Lift, node: fx.Node, value: fx.Node, widths: Sequence[int], mode: str, fill: Any
) -> fx.Node:
    x = lift.node(value)
    axes = len(widths) // 2
    sizes = lift.shape(x)[-axes:]
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in reversed(range(axes))]
    stencils = [
        stencil.pad(size, before, after, mode)
        for size, (before, after) in zip(sizes, pairs, strict=True)
    ]
    if fill is None or fill == 0 or mode != "constant":
        return _apply(lift, x, stencils)
    if fill == -math.inf and all(user.target in ALL_MAX_POOLS for user in node.users):
        y = _apply(lift, x, stencils)
        y.meta["unpadded"] = (x, stencils)
        return y
    if not math.isfinite(fill):
        raise Refusal(
            "infinite padding is no edge only where a max-pooling reads it directly",
            "pad with a finite constant, or right before the max-pooling",
        )
    inside = torch.ones((), dtype=torch.float64)
    for each in stencils:
        inside = inside[..., None] * (each.reads > 0)
    bias = lift.buffer((1 - inside) * fill, "padding")
    return lift.emit(ops.shift, _apply(lift, x, stencils), lift.emit(ops.coefficient, bias))


ALL_MAX_POOLS = {*MAX_POOLS, *MAX_POOLS_WITH_INDICES}


# -- upsampling ------------------------------------------------------------------------------------

NEAREST = {
    **{getattr(aten, f"upsample_nearest{n}d").vec: (n, "upsample_nearest1d") for n in (1, 2, 3)},
    **{
        getattr(aten, f"_upsample_nearest_exact{n}d").vec: (n, "_upsample_nearest_exact1d")
        for n in (1, 2, 3)
    },
}
LINEAR = {
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
}
ANTIALIASED = {aten._upsample_bilinear2d_aa.vec: 2}


def _upsample(
    lift: Lift, node: fx.Node, args: Args, axes: int, run: Callable[[Tensor, Any, Any], Tensor]
) -> fx.Node:
    """Read each axis' taps off the operation itself, in one dimension."""
    x = lift.node(args["input"])
    factors = per_axis(args["scale_factors"], axes) if args["scale_factors"] else [None] * axes
    sizes = [
        None if f is not None else n
        for f, n in zip(factors, node.meta["val"].shape[-axes:], strict=True)
    ]
    stencils = []
    for size, out, factor in zip(lift.shape(x)[-axes:], sizes, factors, strict=True):
        given = (None if out is None else [out], None if factor is None else [factor])
        stencils.append(stencil.resample(size, functools.partial(_on_axis, run, given)))
    return _apply(lift, x, stencils)


def _on_axis(run: Callable[..., Tensor], given: tuple[Any, Any], eye: Tensor) -> Tensor:
    return run(eye, *given)


@rule(*NEAREST)
def _upsample_nearest(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    axes, name = NEAREST[target(node)]
    return _upsample(lift, node, args, axes, getattr(aten, name).vec)


@rule(*LINEAR)
def _upsample_linear(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    def run(eye: Tensor, size: Any, factor: Any) -> Tensor:
        return aten.upsample_linear1d.vec(eye, size, args["align_corners"], factor)

    return _upsample(lift, node, args, LINEAR[target(node)], run)


@rule(*ANTIALIASED)
def _upsample_antialiased(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    def run(eye: Tensor, size: Any, factor: Any) -> Tensor:
        # Two equal columns: on images of width 1 the operation itself mixes up its memory formats.
        images = eye[0][:, None, :, None].repeat(1, 1, 1, 2)
        resized = aten._upsample_bilinear2d_aa.vec(
            images,
            None if size is None else [*size, 2],
            args["align_corners"],
            None if factor is None else [*factor, 1.0],
        )
        return resized[None, :, 0, :, 0]

    return _upsample(lift, node, args, 2, run)


# -- positions along an axis -----------------------------------------------------------------------


def _select(lift: Lift, x: fx.Node, dim: int, positions: Iterable[int | None]) -> fx.Node:
    return lift.along(x, dim, Stencil.select(lift.shape(x)[dim], positions))


def _range(size: int, start: Any, end: Any, step: int) -> range:
    return range(*slice(start, end, step).indices(size))


@rule(aten.slice.Tensor)
def _slice(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, dim = lift.node(args["self"]), args["dim"]
    return _select(
        lift, x, dim, _range(lift.shape(x)[dim], args["start"], args["end"], args["step"])
    )


@rule(aten.narrow.default)
def _narrow(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, start = lift.node(args["self"]), args["start"]
    start %= lift.shape(x)[args["dim"]] or 1
    return _select(lift, x, args["dim"], range(start, start + args["length"]))


@rule(aten.select.int)
def _select_int(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, dim = lift.node(args["self"]), args["dim"]
    y = _select(lift, x, dim, [args["index"] % lift.shape(x)[dim]])
    return lift.reshape(y, tuple(node.meta["val"].shape))


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
)
def _split(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, dim = lift.node(args["self"]), args["dim"]
    pieces: list[fx.Node | None] = []
    start = 0
    for value in node.meta["val"]:
        size = 1 if node.target is aten.unbind.int else value.shape[dim]
        piece = _select(lift, x, dim, range(start, start + size))
        pieces.append(lift.reshape(piece, tuple(value.shape)))
        start += size
    return pieces


@rule(aten.flip.default)
def _flip(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    for dim in args["dims"]:
        x = _select(lift, x, dim, reversed(range(lift.shape(x)[dim])))
    return x


@rule(aten.roll.default)
def _roll(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    shape = lift.shape(x)
    if not args["dims"]:
        x = lift.reshape(x, (math.prod(shape),))
    for shift, dim in zip(args["shifts"], args["dims"] or [0], strict=True):
        size = lift.shape(x)[dim]
        x = _select(lift, x, dim, [(p - shift) % size for p in range(size)])
    return lift.reshape(x, shape)


@rule(aten.index_select.default)
def _index_select(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _indexed(lift, args["self"], args["dim"], args["index"])


@rule(aten.index.Tensor)
def _index(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    used = [(dim, index) for dim, index in enumerate(args["indices"]) if index is not None]
    if len(used) != 1:
        raise Refusal("it indexes several axes at once", "index one axis after the other")
    return _indexed(lift, args["self"], *used[0])


def _indexed(lift: Lift, value: Any, dim: int, index: Any) -> fx.Node:
    known = None if lift.is_active(index) else lift.constant(index)
    if known is None or known.dim() > 1 or not lift.is_active(value):
        raise Refusal(
            "it indexes by something else than a constant list of positions along one axis",
            "keep the positions in a buffer or a literal",
        )
    x = lift.node(value)
    if known.dtype == torch.bool:
        known = known.nonzero()[:, 0]
    size = lift.shape(x)[dim]
    return _select(lift, x, dim, [p % size for p in known.reshape(-1).tolist()])


@rule(aten.select_scatter.default)
def _select_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    src = args["src"]
    size = node.meta["val"].shape[args["dim"]]
    return _scatter(lift, node, args, src, [args["index"] % size], squeezed=True)


@rule(aten.slice_scatter.default)
def _slice_scatter(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    size = node.meta["val"].shape[args["dim"]]
    into = list(_range(size, args["start"], args["end"], args["step"]))
    return _scatter(lift, node, args, args["src"], into, squeezed=False)


def _scatter(
    lift: Lift, node: fx.Node, args: Args, src: Any, into: list[int], squeezed: bool
) -> fx.Node:
    """Positions ``into`` of one axis are overwritten: the others, plus the new ones in place."""
    shape = tuple(node.meta["val"].shape)
    dim = args["dim"] % len(shape)
    kept = [p for p in range(shape[dim]) if p not in set(into)]
    back = {p: i for i, p in enumerate(kept)}
    x = lift.node(args["self"])
    x = _select(lift, _select(lift, x, dim, kept), dim, [back.get(p) for p in range(shape[dim])])
    y = lift.node(src)
    piece = (*shape[:dim], len(into), *shape[dim + 1 :])
    flat = (*shape[:dim], *shape[dim + 1 :]) if squeezed else piece
    if lift.shape(y) != flat:
        y = lift.emit(aten.expand.default, y, list(flat))
    y = lift.reshape(y, piece)
    place = {p: i for i, p in enumerate(into)}
    y = _select(lift, y, dim, [place.get(p) for p in range(shape[dim])])
    return lift.emit(ops.add, x, y)
