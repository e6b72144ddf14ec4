"""Rules: ReLU and its relatives, clamps, maxima of two tensors, identities of eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import CAST, RESHAPE
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.rules.affine import only_first_active
from fxpath.rules.refused import COMPLEX, JUMPING, TRAINING
from fxpath.rules.registry import rule

aten = torch.ops.aten
Args = dict[str, Any]


@rule(aten.relu.default)
def _relu(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return build.emit(ops.relu, build.node(args["self"]))


@rule(aten.abs.default, aten.absolute.default)
def _abs(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return build.emit(ops.absolute, build.node(args["self"]))


@rule(aten.copysign.Tensor, aten.copysign.Scalar)
def _copysign(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """``|x|`` with constant signs."""
    signs = None if build.is_active(args["other"]) else build.constant(args["other"])
    if build.is_active(args["other"]):
        raise Refusal(*JUMPING)
    if signs is None:
        raise Refusal("its signs depend on parameters, which may jump", "keep them in a buffer")
    x = build.expand(build.node(args["self"]), tuple(node.meta["val"].shape))
    held = build.buffer(torch.copysign(torch.ones(()), signs), "signs")
    return build.emit(ops.scale, build.emit(ops.absolute, x), build.emit(ops.coefficient, held))


@rule(aten.neg.default, aten.negative.default)
def _neg(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return build.emit(ops.negative, build.node(args["self"]))


@rule(
    aten.positive.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.nan_to_num.default,  # what is finite stays as it is
    aten.real.default,
)
def _identity(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if args["self"].meta["val"].dtype.is_complex:
        raise Refusal(*COMPLEX)
    return build.node(args["self"])


@rule(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def _cast(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    dtype = node.meta["val"].dtype
    if dtype.is_complex:
        raise Refusal(*COMPLEX)
    if not dtype.is_floating_point:
        raise Refusal("rounding to integers is not continuous", "keep activations floating point")
    return build.node(args["self"])


@rule(
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
def _dropout(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if args["train"] and args["p"] != 0:
        raise Refusal(*TRAINING)
    return build.node(args["input"])


@rule(aten.native_dropout.default)
def _native_dropout(build: Builder, node: fx.Node, args: Args) -> list[fx.Node | None]:
    if args["train"] is not False and args["p"] != 0:
        raise Refusal(*TRAINING)
    return [build.node(args["input"]), None]


@rule(aten.leaky_relu.default)
def _leaky_relu(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return build.emit(ops.slope, build.node(args["self"]), float(args["negative_slope"]))


@rule(aten.rrelu.default)
def _rrelu(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if args["training"]:
        raise Refusal(*TRAINING)
    mean = (float(args["lower"]) + float(args["upper"])) / 2
    return build.emit(ops.slope, build.node(args["self"]), mean)


@rule(aten.prelu.default)
def _prelu(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    only_first_active(build, args, "weight")
    x, slopes = build.node(args["self"]), build.static(args["weight"])
    shape = [1] * len(build.shape(x))
    if len(shape) > 1:
        shape[1] = -1
    return build.emit(ops.slope, x, build.emit(RESHAPE, slopes, shape))


@rule(aten.threshold.default)
def _threshold(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """``x`` above the threshold, else the value: a maximum where both are one number."""
    if args["threshold"] != args["value"]:
        raise Refusal(
            "a threshold whose value is another number jumps there",
            "use one number for both, which is a maximum",
        )
    return _bounded(build, node, args["self"], args["threshold"], None)


@rule(aten.hardsigmoid.default)
def _hardsigmoid(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """``clamp(x + 3, 0, 6) / 6``."""
    x = build.emit(ops.shift, build.node(args["self"]), build.weight(3.0, node))
    return build.emit(ops.scale, build.emit(ops.clamp, x, 0.0, 6.0), build.weight(1 / 6, node))


# -- bounds ----------------------------------------------------------------------------------------


def _bounded(build: Builder, node: fx.Node, x: Any, lo: Any, hi: Any) -> fx.Node:
    """Clamp to [lo, hi]; a bound that is 0, None or infinite adds nothing."""
    y = build.node(x)
    low, high = _number(lo, -math.inf), _number(hi, math.inf)
    if low == 0 and high is None:
        y = build.emit(ops.relu, y)
    elif low is not None or high is not None:
        y = build.emit(ops.clamp, y, low, high)
    for bound, word, open_ in ((lo, ops.maximum, -math.inf), (hi, ops.minimum, math.inf)):
        if build.is_active(bound):
            y = build.emit(word, y, build.node(bound))
        elif isinstance(bound, fx.Node):
            y = _against(build, y, bound, word, open_)
    return y


def _number(bound: Any, open_: float) -> float | None:
    """A bound that is a number; ``None`` where it bounds nothing."""
    if bound is None or isinstance(bound, fx.Node) or bound == open_:
        return None
    if not math.isfinite(bound):
        raise Refusal(f"a bound is {bound}, which leaves no finite value", "give finite bounds")
    return float(bound)


def _against(
    build: Builder, x: fx.Node, bound: fx.Node, word: Callable[..., Tensor], open_: float
) -> fx.Node:
    """Entries against constant bounds; those that are infinite bound nothing."""
    value = build.constant(bound)
    if value is None or bool(torch.isfinite(value).all()):
        return build.emit(word, x, _bound_neurons(build, bound))
    inside = torch.isfinite(value)
    if not bool((value[~inside] == open_).all()):
        raise Refusal("a bound leaves no finite value, or is NaN", "give finite bounds")
    numbers = build.buffer(torch.where(inside, value, torch.zeros_like(value)), "bound")
    bounded = build.emit(word, x, build.emit(ops.constant, build.emit(ops.coefficient, numbers)))
    kept, free = (
        build.emit(ops.coefficient, build.buffer(mask.to(torch.float32), "mask"))
        for mask in (inside, ~inside)
    )
    return build.emit(ops.add, build.emit(ops.scale, bounded, kept), build.emit(ops.scale, x, free))


def _bound_neurons(build: Builder, bound: fx.Node) -> fx.Node:
    """Constant neurons: bounds are architecture, so they carry no score."""
    static = build.static(bound)
    if not static.meta["val"].is_floating_point():
        static = build.emit(CAST, static, torch.float32)
    return build.emit(ops.constant, build.emit(ops.coefficient, static))


@rule(aten.hardtanh.default)
def _hardtanh(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _bounded(build, node, args["self"], args["min_val"], args["max_val"])


@rule(aten.relu6.default)
def _relu6(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _bounded(build, node, args["self"], 0, 6)


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
def _clamp(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, lo, hi = args["self"], args.get("min"), args.get("max")
    if not build.is_active(x):  # clamp_min(constant, x) is maximum(constant, x)
        raise Refusal(
            "a constant is clamped by activations", "write it as torch.maximum or torch.minimum"
        )
    return _bounded(build, node, x, lo, hi)


@rule(aten.maximum.default, aten.max.other, aten.fmax.default)
def _maximum(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, bound = _active_first(build, args)
    return _bounded(build, node, x, bound, None)


@rule(aten.minimum.default, aten.min.other, aten.fmin.default)
def _minimum(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, bound = _active_first(build, args)
    return _bounded(build, node, x, None, bound)


def _active_first(build: Builder, args: Args) -> tuple[Any, Any]:
    a, b = args["self"], args["other"]
    return (a, b) if build.is_active(a) else (b, a)


# -- selection by constant masks -------------------------------------------------------------------


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _blend(build, node, args["condition"], args["self"], args["other"])


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _blend(build, node, args["mask"], args["value"], args["self"])


def _blend(build: Builder, node: fx.Node, condition: Any, chosen: Any, other: Any) -> fx.Node:
    """``chosen`` where a constant condition holds, ``other`` elsewhere."""
    mask = None if build.is_active(condition) else build.constant(condition)
    if mask is None:
        raise Refusal(
            "it selects by a condition that depends on activations or parameters, which may jump",
            "use maximum, minimum, clamp or ReLU instead of a mask, or keep the mask in a buffer",
        )
    shape = tuple(node.meta["val"].shape)
    halves = []
    for value, keep in ((chosen, mask), (other, ~mask)):
        if isinstance(value, fx.Node) and build.is_active(value):
            x = build.node(value)
        elif not isinstance(value, fx.Node) and not math.isfinite(float(value)):
            raise Refusal("it fills with an infinite value", "fill with a finite value")
        else:
            x = build.emit(ops.constant, build.weight(value, node, "bias"))
        kept = build.emit(ops.coefficient, build.buffer(keep.to(torch.float32), "mask"))
        halves.append(build.emit(ops.scale, x, kept))
    y = build.emit(ops.add, *halves)
    return build.expand(y, shape)
