"""Rules: maps with weights, and sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxpath import ops
from fxpath.passes.fold import BATCH_NORMS, effective_norm, frozen
from fxpath.rules.refused import TRAINING
from fxpath.rules.registry import Refusal, rule
from fxpath.stencil import pad, per_axis

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten
Args = dict[str, Any]

PRODUCT = Refusal(
    "it multiplies activations with each other, which is not piecewise linear in them",
    'keep one factor constant, or analyse the network up to the module before it with until="..."',
)


def bias_along(lift: Lift, x: fx.Node, bias: Any, user: fx.Node, axis: int) -> fx.Node:
    """Add a bias (``None``: none) along one axis of a lifted value."""
    if bias is None:
        return x
    weight = lift.weight(bias, user, "bias")
    shape = [1] * len(lift.shape(x))
    shape[axis] = -1
    return lift.emit(ops.shift, x, lift.emit(aten.reshape.default, weight, shape))


def only_first_active(lift: Lift, args: Args, *constants: str) -> None:
    """Refuse weights that depend on the network's inputs."""
    for name in constants:
        if lift.is_active(args[name]):
            raise PRODUCT


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
    y = lift.emit(ops.linear, lift.node(args["input"]), lift.weight(args["weight"], node))
    return bias_along(lift, y, args["bias"], node, -1)


def _product(lift: Lift, node: fx.Node, a: Any, b: Any) -> fx.Node:
    if lift.is_active(a) and lift.is_active(b):
        raise PRODUCT
    if lift.is_active(a):
        return lift.emit(ops.matmul, lift.node(a), lift.weight(b, node), False)
    return lift.emit(ops.matmul, lift.node(b), lift.weight(a, node), True)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    a, b = list(args.values())[:2]
    return _product(lift, node, a, b)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def _addmm(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    start, a, b = list(args.values())[:3]
    product = _times(lift, _product(lift, node, a, b), args["alpha"])
    if args["beta"] == 0:
        return product
    if lift.is_active(start):
        return lift.emit(ops.add, _times(lift, lift.node(start), args["beta"]), product)
    bias = _times(lift, lift.weight(start, node, "bias"), args["beta"])
    return lift.emit(ops.shift, product, bias)


@rule(aten.einsum.default)
def _einsum(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    operands = args["tensors"]
    live = [lift.is_active(operand) for operand in operands]
    if len(operands) != 2 or sum(live) != 1:
        raise PRODUCT
    inputs, arrow, output = args["equation"].replace(" ", "").partition("->")
    letters = inputs.split(",")
    x, weight = (0, 1) if live[0] else (1, 0)
    if not arrow:  # einsum's implicit output: letters that occur once, in alphabetical order
        output = "".join(sorted(c for c in set(inputs) if inputs.count(c) == 1 and c.isalpha()))
    equation = f"{letters[x]},{letters[weight]}->{output}"
    return lift.emit(
        ops.einsum, lift.node(operands[x]), lift.weight(operands[weight], node), equation
    )


# -- elementwise -----------------------------------------------------------------------------------


def _times(lift: Lift, x: fx.Node, factor: Any) -> fx.Node:
    """A coefficient such as ``alpha``, of an activation or of a weight."""
    if factor == 1:
        return x
    if factor == -1:
        return lift.emit(ops.negative, x)
    return lift.emit(ops.scale, x, lift.weight(factor, x))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    a, b = args["self"], args["other"]
    if lift.is_active(a) and lift.is_active(b):
        raise PRODUCT
    x, weight = (a, b) if lift.is_active(a) else (b, a)
    return lift.emit(ops.scale, lift.node(x), lift.weight(weight, node))


@rule(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, divisor = args["self"], args["other"]
    if lift.is_active(divisor):
        raise PRODUCT
    if args.get("rounding_mode") is not None:
        raise Refusal("rounding is not continuous", "divide without rounding_mode")
    if not isinstance(divisor, fx.Node):
        return lift.emit(ops.scale, lift.node(x), lift.weight(1.0 / divisor, node))
    graph = lift.captured.graph_module.graph
    with graph.inserting_before(node):
        inverse = graph.call_function(aten.reciprocal.default, (divisor,))
    inverse.meta["val"] = divisor.meta["val"]
    return lift.emit(ops.scale, lift.node(x), lift.weight(inverse, node))


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _sum(lift, node, args["self"], args["other"], 1, args["alpha"])


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _sum(lift, node, args["self"], args["other"], 1, -args["alpha"])


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _sum(lift, node, args["self"], args["other"], -args["alpha"], 1)


def _sum(lift: Lift, node: fx.Node, a: Any, b: Any, alpha: Any, beta: Any) -> fx.Node:
    terms = [(a, alpha), (b, beta)]
    active = [(lift.node(v), c) for v, c in terms if lift.is_active(v)]
    if len(active) == 2:
        (x, c), (y, d) = active
        return lift.emit(ops.add, _times(lift, x, c), _times(lift, y, d))
    x, c = active[0]
    constant, d = next((v, d) for v, d in terms if not lift.is_active(v))
    bias = _times(lift, lift.weight(constant, node, "bias"), d)
    return lift.emit(ops.shift, _times(lift, x, c), bias)


@rule(*BATCH_NORMS)
def _batch_norm(lift: Lift, node: fx.Node, args: Args) -> Any:
    if not frozen(node):
        raise Refusal(*TRAINING)
    only_first_active(lift, args, "weight", "bias", "running_mean", "running_var")
    factor, shift = effective_norm(lift.captured, node, args, None, before=node)
    x = lift.node(args["input"])
    shape = [1] * len(lift.shape(x))
    shape[1] = -1
    weight = lift.emit(aten.reshape.default, lift.weight(factor, node), shape)
    y = bias_along(lift, lift.emit(ops.scale, x, weight), shift, node, 1)
    return y if node.target is aten.batch_norm.default else [y, None, None]
