"""Rules: resampling, and other linear maps with coefficients that are fixed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import stencil
from fxpath.graph.aten import CAT, SLICE
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import target
from fxpath.graph.stencil import Stencil, per_axis, rational
from fxpath.rules.common import Args, apply, known
from fxpath.rules.registry import rule

aten = torch.ops.aten


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


def _upsample(
    build: Builder, node: fx.Node, args: Args, axes: int, run: Callable[[Tensor, Any, Any], Tensor]
) -> fx.Node:
    """Read each axis' taps off the operation itself, in one dimension."""
    x = build.node(args["input"])
    factors = per_axis(args["scale_factors"], axes) if args["scale_factors"] else [None] * axes
    sizes = [
        None if f is not None else n
        for f, n in zip(factors, node.meta["val"].shape[-axes:], strict=True)
    ]
    stencils = []
    for size, out, factor in zip(build.shape(x)[-axes:], sizes, factors, strict=True):
        given = (None if out is None else [out], None if factor is None else [factor])
        stencils.append(stencil.resample(size, functools.partial(_on_axis, run, given)))
    return apply(build, x, stencils)


def _on_axis(run: Callable[..., Tensor], given: tuple[Any, Any], eye: Tensor) -> Tensor:
    return run(eye, *given)


@rule(*NEAREST)
def _upsample_nearest(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    axes, name = NEAREST[target(node)]
    return _upsample(build, node, args, axes, getattr(aten, name).vec)


@rule(*LINEAR)
def _upsample_linear(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    def run(eye: Tensor, size: Any, factor: Any) -> Tensor:
        return aten.upsample_linear1d.vec(eye, size, args["align_corners"], factor)

    return _upsample(build, node, args, LINEAR[target(node)], run)


TWO_AXES = {
    aten._upsample_bilinear2d_aa.vec,
    aten.upsample_bicubic2d.vec,
    aten._upsample_bicubic2d_aa.vec,
}


@rule(*TWO_AXES)
def _upsample_two_axes(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    def run(eye: Tensor, size: Any, factor: Any) -> Tensor:
        # Two equal columns: on images of width 1 the operation itself mixes up its memory formats.
        images = eye[0][:, None, :, None].repeat(1, 1, 1, 2)
        resized = target(node)(
            images,
            None if size is None else [*size, 2],
            args["align_corners"],
            None if factor is None else [*factor, 1.0],
        )
        return resized[None, :, 0, :, 0]

    return _upsample(build, node, args, 2, run)


# -- sums of differences ---------------------------------------------------------------------------


@rule(aten.diff.default)
def _diff(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    pieces = [args["prepend"], args["self"], args["append"]]
    parts = [build.node(piece) for piece in pieces if piece is not None]
    rank = len(build.shape(parts[0]))
    dim, times = args["dim"] % rank, args["n"]
    x = parts[0] if len(parts) == 1 else build.emit(CAT, parts, dim)
    size = build.shape(x)[dim]
    taps = [(-1) ** (times - k) * math.comb(times, k) for k in range(times + 1)]
    rows = [[(o + k, c) for k, c in enumerate(taps)] for o in range(node.meta["val"].shape[dim])]
    return build.along(x, dim, Stencil.of(size, rows))


def _trapezoids(build: Builder, args: Args, size: int, dim: int) -> list[Fraction]:
    """Half the width of each interval between two positions."""
    if "dx" in args:
        return [rational(float(args["dx"])) / 2] * (size - 1)
    places = known(build, args["x"])
    if places.dim() != 1:
        raise Refusal("its positions differ from row to row", "give one list of positions")
    return [rational(width) / 2 for width in places.double().diff().tolist()]


@rule(aten.cumulative_trapezoid.dx, aten.cumulative_trapezoid.x)
def _cumulative_trapezoid(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["y"])
    dim = args["dim"] % len(build.shape(x))
    size = build.shape(x)[dim]
    halves = list(enumerate(_trapezoids(build, args, size, dim)))
    rows = ([(p + s, half) for p, half in halves[:o] for s in (0, 1)] for o in range(1, size))
    return build.along(x, dim, Stencil.of(size, rows))


@rule(aten.trapezoid.dx, aten.trapezoid.x)
def _trapezoid(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x = build.node(args["y"])
    dim = args["dim"] % len(build.shape(x))
    size = build.shape(x)[dim]
    halves = _trapezoids(build, args, size, dim)
    row = [(p + side, half) for p, half in enumerate(halves) for side in (0, 1)]
    y = build.along(x, dim, Stencil.of(size, [row]))
    return build.reshape(y, tuple(node.meta["val"].shape))


# -- windows and grids -----------------------------------------------------------------------------


@rule(aten.col2im.default)
def _col2im(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """Windows added up where they overlap: the transpose of cutting them out."""
    x = build.node(args["self"])
    sizes = tuple(args["output_size"])
    spec = [args[key] for key in ("kernel_size", "dilation", "padding", "stride")]
    # Zero stands for padding.
    marked = torch.arange(1.0, math.prod(sizes) + 1, dtype=torch.float64).reshape(1, 1, *sizes)
    flat = aten.im2col.default(marked, *spec).long().reshape(-1) - 1
    shape = tuple(node.meta["val"].shape)
    y = build.reshape(x, (*shape[:-2], len(flat)))
    dim = len(shape) - 2
    rows: list[list[tuple[int, int]]] = [[] for _ in range(math.prod(sizes))]
    for k, position in enumerate(flat.tolist()):
        if position >= 0:
            rows[position].append((k, 1))
    return build.reshape(build.along(y, dim, Stencil.of(len(flat), rows)), shape)


#: Coefficients up to which a map over all positions at once is read off the operation.
LARGEST_GRID = 1 << 24


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def _grid_sample(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if build.is_active(args["grid"]):
        raise Refusal(
            "it samples at positions that depend on activations, which is not piecewise linear",
            "sample at positions that are constant, kept in a buffer",
        )
    grid = build.constant(args["grid"])
    if grid is None:
        raise Refusal(
            "it samples at positions that are computed from parameters: no weights of a layer",
            "keep the grid in a buffer",
        )
    x = build.node(args["input"])
    batch, channels, *sizes = build.shape(x)
    count, out = math.prod(sizes), tuple(node.meta["val"].shape[2:])
    if count * math.prod(out) > LARGEST_GRID:
        raise Refusal(
            f"its map from {count} to {math.prod(out)} positions is too large to be written down",
            "sample smaller images",
        )
    eye = torch.eye(count, dtype=torch.float64).reshape(1, count, *sizes)
    rest = [args[k] for k in ("interpolation_mode", "padding_mode", "align_corners")]
    samples = []
    for i in range(batch):
        own = x if batch == 1 else build.emit(SLICE, x, 0, i, i + 1)
        sampled = aten.grid_sampler.default(eye, grid[i : i + 1].double(), *rest)
        matrix = sampled.reshape(count, -1).T
        rows: list[list[tuple[int, Any]]] = [[] for _ in range(len(matrix))]
        for o, p in matrix.nonzero().tolist():
            rows[o].append((p, rational(float(matrix[o, p]))))
        flat = build.reshape(own, (1, channels, count))
        y = build.along(flat, 2, Stencil.of(count, rows))
        samples.append(build.reshape(y, (1, channels, *out)))
    return samples[0] if batch == 1 else build.emit(CAT, samples, 0)
