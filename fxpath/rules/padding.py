"""Rules: padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops, stencil
from fxpath.graph.aten import MAX_POOLS, MAX_POOLS_WITH_INDICES
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import bind
from fxpath.graph.stencil import Stencil
from fxpath.rules.common import Args, apply
from fxpath.rules.registry import rule

aten = torch.ops.aten

CONSTANT = {aten.pad.default, aten.constant_pad_nd.default}


@rule(aten.pad.default)
def _pad(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _padded(build, node, args["self"], args["pad"], args["mode"], args["value"])


@rule(aten.constant_pad_nd.default)
def _constant_pad(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _padded(build, node, args["self"], args["pad"], "constant", args["value"])


@rule(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def _reflection_pad(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _padded(build, node, args["self"], args["padding"], "reflect", None)


@rule(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)
def _replication_pad(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _padded(build, node, args["self"], args["padding"], "replicate", None)


def _padded(
    build: Builder, node: fx.Node, value: fx.Node, widths: Sequence[int], mode: str, fill: Any
) -> fx.Node:
    x = build.node(value)
    stencils = _stencils(build.shape(x), widths, mode)
    if fill is None or fill == 0 or mode != "constant":
        return apply(build, x, stencils)
    windows = {*MAX_POOLS, *MAX_POOLS_WITH_INDICES}
    if fill == -math.inf and all(user.target in windows for user in node.users):
        return apply(build, x, stencils)  # they look behind it: see without_padding
    if math.isnan(fill):
        raise Refusal("it fills with NaN", "pad with a finite constant")
    if not math.isfinite(fill):
        raise Refusal(
            "infinite padding is no edge only where a max-pooling reads it directly",
            "pad with a finite constant, or right before the max-pooling",
        )
    inside = torch.ones((), dtype=torch.float64)
    for each in stencils:
        inside = inside[..., None] * (each.reads > 0)
    bias = build.buffer((1 - inside) * fill, "padding")
    return build.emit(ops.shift, apply(build, x, stencils), build.emit(ops.coefficient, bias))


def _stencils(shape: Sequence[int], widths: Sequence[int], mode: str) -> list[Stencil]:
    """One for each of the last axes, whose widths come first."""
    axes = len(widths) // 2
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in reversed(range(axes))]
    sizes = shape[len(shape) - axes :]
    return [stencil.pad(n, *pair, mode) for n, pair in zip(sizes, pairs, strict=True)]


def without_padding(build: Builder, value: fx.Node) -> tuple[fx.Node, list[Stencil]]:
    """What stands before a padding by minus infinity, which is no edge, and how it is read."""
    if value.target in CONSTANT:
        args = bind(value)
        if args.get("mode", "constant") == "constant" and args["value"] == -math.inf:
            x = build.node(args["self"])
            return x, _stencils(build.shape(x), args["pad"], "constant")
    return build.node(value), []
