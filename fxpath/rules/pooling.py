"""Rules: maxima, means and sums over windows and over whole axes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops, stencil
from fxpath.graph.aten import MAX_POOLS, MAX_POOLS_WITH_INDICES
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import target
from fxpath.graph.stencil import ONE, Stencil, per_axis
from fxpath.rules.common import LARGEST, SMALLEST, Args, apply, axes, pooled, summed
from fxpath.rules.padding import without_padding
from fxpath.rules.registry import rule

aten = torch.ops.aten

AVG_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}


def _whole(size: int) -> Stencil:
    """Every position as it is."""
    return Stencil.select(size, range(size))


# -- maxima ----------------------------------------------------------------------------------------


def _max_pool(build: Builder, args: Args, axes_: int) -> fx.Node:
    sizes = build.shape(build.node(args["self"]))
    kernel, padding = per_axis(args["kernel_size"], axes_), per_axis(args["padding"], axes_)
    stride = per_axis(args["stride"] or kernel, axes_)
    dilation = per_axis(args["dilation"], axes_)
    stencils = [
        stencil.max_pool(size, kernel[i], stride[i], padding[i], dilation[i], args["ceil_mode"])
        for i, size in enumerate(sizes[-axes_:])
    ]
    x, pads = without_padding(build, args["self"])
    if pads:
        # The windows read past the padding.  Axes are matched from the last one.
        rank = max(len(stencils), len(pads))
        both = ([*map(_whole, sizes[-rank:][: rank - len(s)]), *s] for s in (stencils, pads))
        stencils = [window.after(pad) for window, pad in zip(*both, strict=True)]
    if not all(bool(each.reads.all()) for each in stencils):
        raise Refusal(
            "a pooling window covers padding only, so its maximum is -inf",
            "reduce the padding or the dilation",
        )
    return apply(build, x, stencils, LARGEST)


@rule(*MAX_POOLS)
def _max_pool_values(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _max_pool(build, args, MAX_POOLS[target(node)])


@rule(*MAX_POOLS_WITH_INDICES)
def _max_pool_indices(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [_max_pool(build, args, MAX_POOLS_WITH_INDICES[target(node)]), None]


@rule(
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)
def _adaptive_max_pool(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    return [_adaptive(build, node, args, LARGEST), None]


EXTREMA = {
    **dict.fromkeys((aten.amax.default, aten.max.dim, aten.max.default), LARGEST),
    **dict.fromkeys((aten.amin.default, aten.min.dim, aten.min.default), SMALLEST),
}


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def _amax(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, shape = build.node(args["self"]), tuple(node.meta["val"].shape)
    return pooled(build, x, args.get("dim"), shape, EXTREMA[target(node)])


@rule(aten.max.dim, aten.min.dim)
def _max_dim(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, shape = build.node(args["self"]), tuple(node.meta["val"][0].shape)
    return [pooled(build, x, args["dim"], shape, EXTREMA[target(node)]), None]


@rule(aten.aminmax.default)
def _aminmax(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    x, shape = build.node(args["self"]), tuple(node.meta["val"][0].shape)
    dims = args["dim"]
    return [pooled(build, x, dims, shape, ranks) for ranks in (SMALLEST, LARGEST)]


# -- means and sums --------------------------------------------------------------------------------


@rule(aten.mean.dim, aten.mean.default, aten.nanmean.default)
def _mean(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, shape = build.node(args["self"]), tuple(node.meta["val"].shape)
    for dim in axes(args.get("dim"), len(build.shape(x))):
        size = build.shape(x)[dim]
        if not size:
            raise Refusal("it takes the mean of nothing, which is NaN", "leave it out")
        x = build.along(x, dim, stencil.whole(size, Fraction(1, size)))
    return build.reshape(x, shape)


@rule(aten.sum.dim_IntList, aten.sum.default, aten.nansum.default)
def _sum(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    shape = tuple(node.meta["val"].shape)
    return summed(build, build.node(args["self"]), args.get("dim"), shape)


@rule(aten.cumsum.default)
def _cumsum(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["self"])
    if not build.shape(x):
        return x
    size = build.shape(x)[args["dim"]]
    rows = ([(p, ONE) for p in range(o + 1)] for o in range(size))
    return build.along(x, args["dim"], Stencil.of(size, rows))


@rule(*AVG_POOLS)
def _avg_pool(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    axes_ = AVG_POOLS[target(node)]
    x = build.node(args["self"])
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
        for i, size in enumerate(build.shape(x)[-axes_:])
    ]
    y = apply(build, x, stencils)
    return y if divisor is None else build.emit(ops.scale, y, build.weight(1.0 / divisor, node))


def _adaptive(
    build: Builder, node: fx.Node, args: Args, ranks: Sequence[int] | None = None
) -> fx.Node:
    x = build.node(args["self"])
    value: Any = node.meta["val"]
    sizes = args["output_size"]
    out = (value if isinstance(value, Tensor) else value[0]).shape[-len(sizes) :]
    shape = build.shape(x)[-len(sizes) :]
    stencils = [stencil.adaptive_pool(n, m, not ranks) for n, m in zip(shape, out, strict=True)]
    return apply(build, x, stencils, ranks)


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def _adaptive_avg_pool(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _adaptive(build, node, args)
