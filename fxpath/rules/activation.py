"""Rules: ReLU and its relatives, clamps, maxima of two tensors, identities of eval mode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxpath import ops
from fxpath.rules.affine import only_first_active
from fxpath.rules.refused import TRAINING
from fxpath.rules.registry import Refusal, rule

if TYPE_CHECKING:
    from fxpath.passes.lift import Lift

aten = torch.ops.aten
Args = dict[str, Any]


@rule(
    aten.relu.default,
    aten.abs.default,
    aten.neg.default,
    aten.positive.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
def _identity(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return lift.node(args["self"])


@rule(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
)
def _cast(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    if not node.meta["val"].is_floating_point():
        raise Refusal("rounding to integers is not continuous", "keep activations floating point")
    return lift.node(args["self"])


@rule(
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
def _dropout(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    if args["train"] and args["p"] != 0:
        raise Refusal(*TRAINING)
    return lift.node(args["input"])


@rule(aten.native_dropout.default)
def _native_dropout(lift: Lift, node: fx.Node, args: Args) -> list[fx.Node | None]:
    if args["train"] is not False and args["p"] != 0:
        raise Refusal(*TRAINING)
    return [lift.node(args["input"]), None]


@rule(aten.leaky_relu.default)
def _leaky_relu(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return lift.emit(ops.slope, lift.node(args["self"]), float(args["negative_slope"]))


@rule(aten.rrelu.default)
def _rrelu(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    if args["training"]:
        raise Refusal(*TRAINING)
    mean = (float(args["lower"]) + float(args["upper"])) / 2
    return lift.emit(ops.slope, lift.node(args["self"]), mean)


@rule(aten.prelu.default)
def _prelu(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(lift, args, "weight")
    x, slopes = lift.node(args["self"]), lift.static(args["weight"])
    shape = [1] * len(lift.shape(x))
    if len(shape) > 1:
        shape[1] = -1
    return lift.emit(ops.slope, x, lift.emit(aten.reshape.default, slopes, shape))


@rule(aten.threshold.default)
def _threshold(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    if args["threshold"] != 0 or args["value"] != 0:
        raise Refusal("a threshold with a jump is not continuous", "use threshold 0 and value 0")
    return lift.node(args["self"])


# -- bounds ----------------------------------------------------------------------------------------


def _bounded(lift: Lift, node: fx.Node, x: Any, lo: Any, hi: Any) -> fx.Node:
    """Clamp to [lo, hi]; a bound that is 0, None or infinite adds nothing."""
    y = lift.node(x)
    numbers = [0.0 if b is None or isinstance(b, fx.Node) else float(b) for b in (lo, hi)]
    finite = [0.0 if math.isinf(b) else b for b in numbers]
    if any(math.isnan(b) for b in finite):
        raise Refusal("a bound is NaN", "give numbers as bounds")
    if any(finite):
        y = lift.emit(ops.clamp, y, *finite)
    for bound in (lo, hi):
        if lift.is_active(bound):
            y = lift.emit(ops.maximum, y, lift.node(bound))
        elif isinstance(bound, fx.Node):
            y = lift.emit(ops.maximum, y, _bound_neurons(lift, bound))
    return y


def _bound_neurons(lift: Lift, bound: fx.Node) -> fx.Node:
    """Constant neurons: bounds are architecture, so they carry no score."""
    value = lift.constant(bound)
    if value is not None and not bool(torch.isfinite(value).all()):
        value = torch.where(torch.isfinite(value), value, torch.zeros_like(value))
        return lift.emit(ops.constant, lift.emit(ops.coefficient, lift.buffer(value, "bound")))
    static = lift.static(bound)
    if not static.meta["val"].is_floating_point():
        static = lift.emit(aten.to.dtype, static, torch.float32)
    return lift.emit(ops.constant, lift.emit(ops.coefficient, static))


@rule(aten.hardtanh.default)
def _hardtanh(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _bounded(lift, node, args["self"], args["min_val"], args["max_val"])


@rule(aten.relu6.default)
def _relu6(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _bounded(lift, node, args["self"], 0, 6)


@rule(
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clip.default,
    aten.clip.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.clamp_max.default,
    aten.clamp_max.Tensor,
)
def _clamp(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    x, lo, hi = args["self"], args.get("min"), args.get("max")
    if not lift.is_active(x):  # clamp_min(constant, x) is maximum(constant, x)
        raise Refusal(
            "a constant is clamped by activations", "write it as torch.maximum or torch.minimum"
        )
    return _bounded(lift, node, x, lo, hi)


@rule(
    aten.maximum.default,
    aten.minimum.default,
    aten.max.other,
    aten.min.other,
    aten.fmax.default,
    aten.fmin.default,
)
def _maximum(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    a, b = args["self"], args["other"]
    if not lift.is_active(a):
        a, b = b, a
    return _bounded(lift, node, a, b, None)


# -- selection by constant masks -------------------------------------------------------------------


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _blend(lift, node, args["condition"], args["self"], args["other"])


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(lift: Lift, node: fx.Node, args: Args) -> fx.Node:
    return _blend(lift, node, args["mask"], args["value"], args["self"])


def _blend(lift: Lift, node: fx.Node, condition: Any, chosen: Any, other: Any) -> fx.Node:
    """``chosen`` where a constant condition holds, ``other`` elsewhere."""
    mask = None if lift.is_active(condition) else lift.constant(condition)
    if mask is None:
        raise Refusal(
            "it selects by a condition that depends on activations, which may jump",
            "use maximum, minimum, clamp or ReLU instead of a mask",
        )
    shape = tuple(node.meta["val"].shape)
    halves = []
    for value, keep in ((chosen, mask), (other, ~mask)):
        if isinstance(value, fx.Node) and lift.is_active(value):
            x = lift.node(value)
        elif not isinstance(value, fx.Node) and not math.isfinite(float(value)):
            raise Refusal("it fills with an infinite value", "fill with a finite value")
        else:
            x = lift.emit(ops.constant, lift.weight(value, node, "bias"))
        kept = lift.emit(ops.coefficient, lift.buffer(keep.to(torch.float32), "mask"))
        halves.append(lift.emit(ops.scale, x, kept))
    y = lift.emit(ops.add, *halves)
    return y if lift.shape(y) == shape else lift.emit(aten.expand.default, y, list(shape))
