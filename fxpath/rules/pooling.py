"""Rules: maxima, means and sums over windows and over whole axes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops, stencil
from fxpath.graph.schema import target
from fxpath.graph.stencil import ONE, Stencil, per_axis
from fxpath.rules.common import LARGEST, SMALLEST, Args, apply, axes, pooled, summed
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten

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
ALL_MAX_POOLS = {*MAX_POOLS, *MAX_POOLS_WITH_INDICES}
AVG_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}


def _whole(size: int) -> Stencil:
    """Every position as it is."""
    return Stencil.select(size, range(size))


# -- maxima ----------------------------------------------------------------------------------------


def _max_pool(lift: Lift, args: Args, axes_: int) -> fx.Node:
    x = lift.node(args["self"])
    kernel, padding = per_axis(args["kernel_size"], axes_), per_axis(args["padding"], axes_)
    stride = per_axis(args["stride"] or kernel, axes_)
    dilation = per_axis(args["dilation"], axes_)
    stencils = [
        stencil.max_pool(size, kernel[i], stride[i], padding[i], dilation[i], args["ceil_mode"])
        for i, size in enumerate(lift.shape(x)[-axes_:])
    ]
    if "unpadded" in x.meta:
        # Minus infinity is no edge: the windows read past it.  Axes are matched from the last one.
        shape = lift.shape(x)
        x, pads = x.meta["unpadded"]
        rank = max(len(stencils), len(pads))
        both = ([*map(_whole, shape[-rank:][: rank - len(s)]), *s] for s in (stencils, pads))
        stencils = [window.after(pad) for window, pad in zip(*both, strict=True)]
    if not all(bool(each.reads.all()) for each in stencils):
        raise Refusal(
            "a pooling window covers padding only, so its maximum is -inf",
            "reduce the padding or the dilation",
        )
    return apply(lift, x, stencils, LARGEST)


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
    x, shape = lift.node(args["self"]), tuple(node.meta["val"].shape)
    return pooled(lift, x, args.get("dim"), shape, EXTREMA[target(node)])


@rule(aten.max.dim, aten.min.dim)
def _max_dim(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, shape = lift.node(args["self"]), tuple(node.meta["val"][0].shape)
    return [pooled(lift, x, args["dim"], shape, EXTREMA[target(node)]), None]


@rule(aten.aminmax.default)
def _aminmax(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, shape = lift.node(args["self"]), tuple(node.meta["val"][0].shape)
    dims = args["dim"]
    return [pooled(lift, x, dims, shape, ranks) for ranks in (SMALLEST, LARGEST)]


# -- means and sums --------------------------------------------------------------------------------


@rule(aten.mean.dim, aten.mean.default, aten.nanmean.default)
def _mean(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, shape = lift.node(args["self"]), tuple(node.meta["val"].shape)
    for dim in axes(args.get("dim"), len(lift.shape(x))):
        size = lift.shape(x)[dim]
        if not size:
            raise Refusal("it takes the mean of nothing, which is NaN", "leave it out")
        x = lift.along(x, dim, stencil.whole(size, Fraction(1, size)))
    return lift.reshape(x, shape)


@rule(aten.sum.dim_IntList, aten.sum.default, aten.nansum.default)
def _sum(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    shape = tuple(node.meta["val"].shape)
    return summed(lift, lift.node(args["self"]), args.get("dim"), shape)


@rule(aten.cumsum.default)
def _cumsum(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x = lift.node(args["self"])
    if not lift.shape(x):
        return x
    size = lift.shape(x)[args["dim"]]
    rows = ([(p, ONE) for p in range(o + 1)] for o in range(size))
    return lift.along(x, args["dim"], Stencil.of(size, rows))


@rule(*AVG_POOLS)
def _avg_pool(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    axes_ = AVG_POOLS[target(node)]
    x = lift.node(args["self"])
    kernel, padding = per_axis(args["kernel_size"], axes_), per_axis(args["padding"], axes_)
    stride = per_axis(args["stride"] or kernel, axes_)
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
        for i, size in enumerate(lift.shape(x)[-axes_:])
    ]
    y = apply(lift, x, stencils)
    return y if divisor is None else lift.emit(ops.scale, y, lift.weight(1.0 / divisor, node))


def _adaptive(lift: Lift, node: fx.Node, args: Args, ranks: Sequence[int] | None = None) -> fx.Node:
    x = lift.node(args["self"])
    value: Any = node.meta["val"]
    sizes = args["output_size"]
    out = (value if isinstance(value, Tensor) else value[0]).shape[-len(sizes) :]
    shape = lift.shape(x)[-len(sizes) :]
    stencils = [stencil.adaptive_pool(n, m, not ranks) for n, m in zip(shape, out, strict=True)]
    return apply(lift, x, stencils, ranks)


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def _adaptive_avg_pool(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _adaptive(lift, node, args)
