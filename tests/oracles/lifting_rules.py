"""The rules of the float64 oracle: what each PyTorch function does to a lifted network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.lifted import Affine, Lifted, Lifting, UnknownOperation, along, power
from tests.oracles.lifting_windows import adaptive_pool, avg_pool, interpolate, max_pool, pad

# --------------------------------------------------------------------------------------------------
# Rules: each has the signature of the PyTorch function and returns a value


def _affine(
    lifting: Lifting,
    input: Lifted,
    weight: Tensor,
    bias: Tensor | None,
    apply: Callable[[Tensor, Tensor], Tensor],
    channel_axis: Callable[[Tensor], int],
) -> Lifted:
    """A map with weights: remembers its parts, for a BatchNorm may fold into it."""
    if not isinstance(input, Lifted) or isinstance(weight, Lifted):
        raise UnknownOperation("a linear map whose weight is an activation")
    without_bias = apply(lifting.read(input), lifting.factor(weight))
    axis = channel_axis(without_bias) % without_bias.dim()
    value, lifted_bias = without_bias, None
    if bias is not None:
        lifted_bias = lifting.operand(bias)
        value = without_bias + along(lifted_bias, axis, without_bias.dim())
    result = lifting.wrap(value)
    result.affine = Affine(next(lifting.calls), without_bias, bias, lifted_bias, axis == 1)
    return result


def _convolution(transposed: bool, dimensions: int) -> Callable[..., Lifted]:
    function = getattr(F, f"conv{'_transpose' * transposed}{dimensions}d")

    def conv(
        lifting: Lifting,
        input: Lifted,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Lifted:
        return _affine(
            lifting,
            input,
            weight,
            bias,
            lambda x, w: function(x, w, None, *args, **kwargs),
            lambda y: y.dim() - dimensions - 1,
        )

    return conv


def _linear(lifting: Lifting, input: Any, weight: Any, bias: Any = None) -> Lifted:
    return _affine(lifting, input, weight, bias, F.linear, lambda y: -1)


def _matmul(lifting: Lifting, input: Any, other: Any) -> Tensor:
    if isinstance(input, Lifted):
        return lifting.read(input) @ lifting.factor(other)
    return lifting.factor(input) @ lifting.read(other)


def _batch_norm(
    lifting: Lifting,
    input: Lifted,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        raise UnknownOperation("BatchNorm that normalizes with the batch's own statistics")
    scale = running_var.add(eps).rsqrt()
    scale = scale if weight is None else scale * weight
    offset = -scale * running_mean if bias is None else bias - scale * running_mean
    norm_name = lifting.buffers[id(running_mean)]
    weight_name = lifting.names.get(id(weight), lifting.sibling(norm_name, "weight"))
    bias_name = lifting.names.get(id(bias), lifting.sibling(norm_name, "bias"))
    value, affine = lifting.read(input), input.affine
    if affine and affine.call not in lifting.shared and affine.channels_at_axis_1:
        # Folded: the convolution gets the scale, and both biases become one before the modulus.
        if affine.bias is not None:
            lifting.coordinates.pop(id(affine.lifted_bias), None)
            offset = offset + scale * affine.bias
        value, slope = affine.without_bias, power(scale.detach(), lifting.q)
    else:
        slope = lifting.coordinate(weight_name, scale)
    constant = lifting.coordinate(bias_name, offset)
    return value * along(slope, 1, value.dim()) + along(constant, 1, value.dim())


def _identity(lifting: Lifting, input: Lifted, inplace: bool = False) -> Tensor:
    return lifting.read(input)


def _dropout(
    lifting: Lifting,
    input: Lifted,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if training:
        raise UnknownOperation("dropout in training mode")
    return lifting.read(input)


def _conversion(lifting: Lifting, input: Lifted, *args: Any, **kwargs: Any) -> Tensor:
    return lifting.read(input)


def _slope(lifting: Lifting, input: Lifted, slope: Any) -> Tensor:
    factor = torch.as_tensor(slope, dtype=torch.float64).detach().abs().clamp(min=1) ** lifting.q
    if factor.dim():
        factor = factor if factor.numel() == 1 else along(factor, 1, input.dim())
    return lifting.read(input) * factor


def _leaky_relu(
    lifting: Lifting, input: Lifted, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor:
    return _slope(lifting, input, negative_slope)


def _prelu(lifting: Lifting, input: Lifted, weight: Tensor) -> Tensor:
    return _slope(lifting, input, weight)


def _rrelu(
    lifting: Lifting,
    input: Lifted,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if training:
        raise UnknownOperation("rrelu in training mode")
    return _slope(lifting, input, (lower + upper) / 2)


def _clamp(
    lifting: Lifting, input: Lifted, min: Any = None, max: Any = None, inplace: bool = False
) -> Tensor:
    """Maximum and minimum with a constant: a pooling that has the constant among its inputs."""
    value = lifting.read(input)
    for bound in (min, max):
        if isinstance(bound, Lifted):
            value = value + lifting.read(bound)
        elif isinstance(bound, Tensor):
            finite = torch.where(bound.isfinite(), bound, 0.0)
            value = value + power(finite.detach(), lifting.q)
        elif bound is not None and math.isfinite(bound):
            value = value + power(bound, lifting.q)
    return value


def _hardtanh(
    lifting: Lifting,
    input: Lifted,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    return _clamp(lifting, input, min_val, max_val)


def _relu6(lifting: Lifting, input: Lifted, inplace: bool = False) -> Tensor:
    return _clamp(lifting, input, 0, 6)


def _clamp_min(lifting: Lifting, input: Lifted, min: Any) -> Tensor:
    return _clamp(lifting, input, min)


def _extremum(lifting: Lifting, input: Any, other: Any) -> Tensor:
    if not isinstance(input, Lifted):
        input, other = other, input
    return _clamp(lifting, input, other)


def _add(lifting: Lifting, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """Sum or difference; the summand may be an activation, a parameter or a constant."""
    left, right = (
        lifting.operand(x) if isinstance(x, Tensor) else power(x, lifting.q) for x in (input, other)
    )
    return left + right * power(alpha, lifting.q)


def _mul(lifting: Lifting, input: Any, other: Any) -> Tensor:
    if not isinstance(input, Lifted):
        input, other = other, input
    return lifting.read(input) * lifting.factor(other)


def _div(lifting: Lifting, input: Any, other: Any, *, rounding_mode: Any = None) -> Tensor:
    if not isinstance(input, Lifted) or isinstance(other, Lifted) or rounding_mode is not None:
        raise UnknownOperation("division by an activation, or with rounding")
    if isinstance(other, Tensor) and other.requires_grad:
        raise UnknownOperation("division by a parameter: what is its coordinate?")
    return lifting.read(input) / lifting.factor(other)


def _sum(lifting: Lifting, input: Lifted, dim: Any = None, keepdim: bool = False) -> Tensor:
    value = lifting.read(input)
    axes = range(value.dim()) if dim is None or dim == () else dim
    return value.sum(dim=[axes] if isinstance(axes, int) else list(axes), keepdim=keepdim)


def _mean(lifting: Lifting, input: Lifted, dim: Any = None, keepdim: bool = False) -> Tensor:
    total = _sum(lifting, input, dim, keepdim)
    return total * power(total.numel() / input.numel(), lifting.q)


RULES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": lambda lifting, input, other: _matmul(lifting, other, input),
    "batch_norm": _batch_norm,
    "relu": _identity,
    "abs": _identity,
    "neg": _identity,
    "dropout": _dropout,
    "dropout1d": _dropout,
    "dropout2d": _dropout,
    "dropout3d": _dropout,
    "alpha_dropout": _dropout,
    "feature_alpha_dropout": _dropout,
    "to": _conversion,
    "double": _conversion,
    "detach": _conversion,
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "rrelu": _rrelu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": lambda lifting, input, max: _clamp(lifting, input, max),
    "hardtanh": _hardtanh,
    "relu6": _relu6,
    "maximum": _extremum,
    "minimum": _extremum,
    "add": _add,
    "sub": _add,
    "__radd__": _add,
    "rsub": lambda lifting, input, other, *, alpha=1: _add(lifting, other, input, alpha=alpha),
    "__rsub__": _add,
    "mul": _mul,
    "__rmul__": _mul,
    "div": _div,
    "__truediv__": _div,
    "sum": _sum,
    "amax": _sum,
    "amin": _sum,
    "mean": _mean,
    "interpolate": interpolate,
    "pad": pad,
}


for _d in (1, 2, 3):
    RULES[f"conv{_d}d"] = _convolution(False, _d)
    RULES[f"conv_transpose{_d}d"] = _convolution(True, _d)
    RULES[f"max_pool{_d}d"] = max_pool(_d)
    RULES[f"avg_pool{_d}d"] = avg_pool(_d)
    RULES[f"adaptive_max_pool{_d}d"] = adaptive_pool(_d, average=False)
    RULES[f"adaptive_avg_pool{_d}d"] = adaptive_pool(_d, average=True)
