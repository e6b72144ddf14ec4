"""Rules: convolutions, linear maps and frozen batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.aten import BATCH_NORMS, INSTANCE_NORM, RESHAPE
from fxpath.graph.builder import Builder
from fxpath.graph.equations import linear, product
from fxpath.graph.refusal import Refusal
from fxpath.graph.stencil import pad, per_axis
from fxpath.graph.values import frozen
from fxpath.rules.refused import ORDER, OWN_STATISTICS, PRODUCT, TRAINING
from fxpath.rules.registry import rule

aten = torch.ops.aten
Args = dict[str, Any]


def bias_along(build: Builder, x: fx.Node, bias: Any, user: fx.Node, axis: int) -> fx.Node:
    """Add a bias (``None``: none) along one axis of a lifted value."""
    if bias is None:
        return x
    weight = build.weight(bias, user, "bias")
    shape = [1] * len(build.shape(x))
    if shape:
        shape[axis] = -1
    return build.emit(ops.shift, x, build.emit(RESHAPE, weight, shape))


def only_first_active(build: Builder, args: Args, *constants: str) -> None:
    """Refuse weights that depend on the network's inputs."""
    for name in constants:
        if build.is_active(args[name]):
            raise Refusal(*PRODUCT)


# -- convolution -----------------------------------------------------------------------------------


def _convolve(
    build: Builder,
    node: fx.Node,
    args: Args,
    padding: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] | int = 0,
    x: fx.Node | None = None,
) -> fx.Node:
    only_first_active(build, args, "weight", "bias")
    axes = args["weight"].meta["val"].dim() - 2
    x = build.node(args["input"]) if x is None else x
    unbatched = len(build.shape(x)) == axes + 1
    if unbatched:
        x = build.reshape(x, (1, *build.shape(x)))
    y = build.emit(
        ops.conv,
        x,
        build.weight(args["weight"], node),
        None,
        per_axis(args["stride"], axes),
        per_axis(padding, axes),
        per_axis(args["dilation"], axes),
        transposed,
        per_axis(output_padding, axes),
        args["groups"],
    )
    y = bias_along(build, y, args["bias"], node, 1)
    return build.reshape(y, build.shape(y)[1:]) if unbatched else y


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _conv(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _convolve(build, node, args, args["padding"])


@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def _conv_named_padding(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    kernel = list(args["weight"].meta["val"].shape[2:])
    dilation = per_axis(args["dilation"], len(kernel))
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if args["padding"] == "valid" or all(span % 2 == 0 for span in spans):
        same = args["padding"] == "same"
        return _convolve(build, node, args, [span // 2 * same for span in spans])
    # An odd total puts the extra position on the right, which no symmetric padding expresses.
    x = build.node(args["input"])
    for i, span in enumerate(spans):
        dim = i - len(spans)
        extra = pad(build.shape(x)[dim], span // 2, span - span // 2, "constant")
        x = build.along(x, dim, extra)
    return _convolve(build, node, args, [0] * len(spans), x=x)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _convolve(build, node, args, args["padding"], True, args["output_padding"])


@rule(aten.convolution.default)
def _convolution(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _convolve(build, node, args, args["padding"], args["transposed"], args["output_padding"])


# -- linear maps -----------------------------------------------------------------------------------


@rule(aten.linear.default)
def _linear(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(build, args, "weight", "bias")
    x, weight = build.node(args["input"]), build.weight(args["weight"], node)
    rank = len(build.shape(x))
    one = len(build.shape(weight)) == 1  # one output neuron, and no axis for it
    equation = product(rank, 1, weight_first=False) if one else linear(rank)
    y = build.emit(ops.contract, x, weight, None, equation)
    return bias_along(build, y, args["bias"], node, -1)


# -- frozen statistics -----------------------------------------------------------------------------


@rule(*BATCH_NORMS)
def _batch_norm(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """What is left of batch norms once the frozen ones are folded."""
    if not frozen(node):
        raise Refusal(*(OWN_STATISTICS if node.target is INSTANCE_NORM else TRAINING))
    only_first_active(build, args, "weight", "bias", "running_mean", "running_var")
    raise Refusal(*ORDER)
