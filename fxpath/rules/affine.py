"""Rules: convolutions, linear maps and frozen batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.stencil import pad, per_axis
from fxpath.passes.fold import BATCH_NORMS, WITH_STATISTICS, effective_norm, frozen
from fxpath.rules.refused import OWN_STATISTICS, PRODUCT, TRAINING
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten
Args = dict[str, Any]


def bias_along(lift: Lift, x: fx.Node, bias: Any, user: fx.Node, axis: int) -> fx.Node:
    """Add a bias (``None``: none) along one axis of a lifted value."""
    if bias is None:
        return x
    weight = lift.weight(bias, user, "bias")
    shape = [1] * len(lift.shape(x))
    if shape:
        shape[axis] = -1
    return lift.emit(ops.shift, x, lift.emit(aten.reshape.default, weight, shape))


def only_first_active(lift: Lift, args: Args, *constants: str) -> None:
    """Refuse weights that depend on the network's inputs."""
    for name in constants:
        if lift.is_active(args[name]):
            raise Refusal(*PRODUCT)


# -- convolution -----------------------------------------------------------------------------------


def _convolve(
    lift: Lift,
    node: fx.Node,
    args: Args,
    padding: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] | int = 0,
    x: fx.Node | None = None,
) -> fx.Node:
    only_first_active(lift, args, "weight", "bias")
    axes = args["weight"].meta["val"].dim() - 2
    x = lift.node(args["input"]) if x is None else x
    unbatched = len(lift.shape(x)) == axes + 1
    if unbatched:
        x = lift.reshape(x, (1, *lift.shape(x)))
    y = lift.emit(
        ops.conv,
        x,
        lift.weight(args["weight"], node),
        per_axis(args["stride"], axes),
        per_axis(padding, axes),
        per_axis(args["dilation"], axes),
        transposed,
        per_axis(output_padding, axes),
        args["groups"],
    )
    y = bias_along(lift, y, args["bias"], node, 1)
    return lift.reshape(y, lift.shape(y)[1:]) if unbatched else y


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _conv(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _convolve(lift, node, args, args["padding"])


@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def _conv_named_padding(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    kernel = list(args["weight"].meta["val"].shape[2:])
    dilation = per_axis(args["dilation"], len(kernel))
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if args["padding"] == "valid" or all(span % 2 == 0 for span in spans):
        same = args["padding"] == "same"
        return _convolve(lift, node, args, [span // 2 * same for span in spans])
    # An odd total puts the extra position on the right, which no symmetric padding expresses.
    x = lift.node(args["input"])
    for i, span in enumerate(spans):
        dim = i - len(spans)
        extra = pad(lift.shape(x)[dim], span // 2, span - span // 2, "constant")
        x = lift.along(x, dim, extra)
    return _convolve(lift, node, args, [0] * len(spans), x=x)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _convolve(lift, node, args, args["padding"], True, args["output_padding"])


@rule(aten.convolution.default)
def _convolution(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _convolve(lift, node, args, args["padding"], args["transposed"], args["output_padding"])


# -- linear maps -----------------------------------------------------------------------------------


@rule(aten.linear.default)
def _linear(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(lift, args, "weight", "bias")
    x, weight = lift.node(args["input"]), lift.weight(args["weight"], node)
    if len(lift.shape(weight)) == 1:  # one output neuron, and no axis for it
        return bias_along(lift, lift.emit(ops.matmul, x, weight, False), args["bias"], node, -1)
    y = lift.emit(ops.linear, x, weight)
    return bias_along(lift, y, args["bias"], node, -1)


# -- frozen statistics -----------------------------------------------------------------------------


@rule(*BATCH_NORMS)
def _batch_norm(lift: Lift, node: fx.Node, args: Args) -> Any:
    if not frozen(node):
        raise Refusal(*(OWN_STATISTICS if node.target is aten.instance_norm.default else TRAINING))
    only_first_active(lift, args, "weight", "bias", "running_mean", "running_var")
    factor, shift = effective_norm(lift.captured, node, args, None, before=node)
    x = lift.node(args["input"])
    shape = [1] * len(lift.shape(x))
    shape[1] = -1
    weight = lift.emit(aten.reshape.default, lift.weight(factor, node), shape)
    y = bias_along(lift, lift.emit(ops.scale, x, weight), shift, node, 1)
    return [y, None, None] if node.target in WITH_STATISTICS else y
