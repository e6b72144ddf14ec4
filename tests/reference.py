"""A slow float64 oracle for the path-norm and the Path-Mag shares of a model.

It shares neither code nor idea with the package: no graph is captured. The model's own `forward`
runs at full resolution on tensors of class `Lifted`, whose `__torch_function__` replaces each
operation by its lifted counterpart: a weight w becomes |w|^q, ReLU the identity, a maximum the sum
over what it ranges over. The input is all ones; the sum S of all outputs is then ||Phi||_q^q, and
autograd gives the shares a dlog(S)/da for a = |w|^q.

An operation without a rule raises `UnknownOperation`; nothing passes unseen.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree


class UnknownOperation(NotImplementedError):
    """The oracle has no rule for an operation."""


@dataclass
class Reference:
    """What `reference` returns; all numbers are float64."""

    path_norm: float
    log10_path_norm: float
    scores: dict[str, Tensor]


def reference(
    model: nn.Module,
    inputs_or_shape: Any,
    q: float = 1.0,
    *,
    until: str | None = None,
    scores: bool = True,
) -> Reference:
    """Return ||Phi||_q and every parameter's share of ||Phi||_q^q.

    Args:
        model: Any module in any mode; a copy in float64 and eval mode is evaluated.
        inputs_or_shape: A shape without batch axis, a list of such shapes, a tensor, or a tuple or
            list of tensors (of which only the shapes without their batch axis matter).
        q: The exponent; 0 counts the paths that are not zero.
        until: Name of a module; its output becomes the output of the network.
        scores: Whether to differentiate, which takes two thirds of the time.

    Raises:
        UnknownOperation: An operation has no rule here.
    """
    twin = _float64_copy(model)
    shapes = _shapes(inputs_or_shape)
    # Whether a BatchNorm is the only reader of a convolution is known after a whole pass only.
    with torch.no_grad():
        scout = _Lifting(twin, q, sole_readers=frozenset())
        scout.run(shapes, until)
        sole_readers = frozenset(call for call, count in scout.readers.items() if count == 1)
        del scout
    lifting = _Lifting(twin, q, sole_readers=sole_readers)
    with torch.set_grad_enabled(scores):
        total = lifting.run(shapes, until)

    coordinates = list(lifting.coordinates.values())
    del lifting, twin  # a gigabyte for VGG: only the leaves are needed from here on
    shares: dict[str, Tensor] = {}
    if coordinates and total.requires_grad:
        leaves = [leaf for _, leaf in coordinates]
        gradients: list[Tensor | None] = [*torch.autograd.grad(total, leaves, allow_unused=True)]
        for i, (name, leaf) in enumerate(coordinates):
            share = torch.zeros_like(leaf)
            gradient, gradients[i] = gradients[i], None
            if gradient is not None and total.item():
                share = leaf.detach() * gradient.div(total.item())
            # A parameter that is used several times collects the shares of all its uses.
            shares[name] = shares[name] + share if name in shares else share
    log10_sum = math.log10(total.item()) if total.item() else -math.inf
    root = q or 1.0
    return Reference(total.item() ** (1 / root), log10_sum / root, shares)


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Give every BatchNorm random statistics and weights, and everything a random bias, in place.

    BatchNorm weights and biases of both signs and conv biases of the order of the weights make
    every mistake in folding visible.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                    module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
                if module.weight is not None:
                    sign = uniform(module.weight, -1, 1).sign()
                    module.weight.copy_(sign * uniform(module.weight, 0.5, 1.5))
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(uniform(bias, -0.3, 0.3))
    return model


# --------------------------------------------------------------------------------------------------
# The machine


@dataclass
class _Affine:
    """Where a convolution's or linear map's output comes from, for a BatchNorm that reads it."""

    call: int
    without_bias: Tensor
    bias: Tensor | None
    lifted_bias: Tensor | None
    channels_at_axis_1: bool


class Lifted(torch.Tensor):
    """An activation of the lifted network.

    Its shape and dtype are what the model's code sees; the number is `value`, an ordinary tensor
    with an autograd history, which in-place operations replace.
    """

    value: Tensor
    lifting: _Lifting
    affine: _Affine | None
    aliased: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _operation_name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lifted = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Lifted))
        return lifted.lifting.call(name, func, args, kwargs)


class _Stop(Exception):
    """Ends the forward pass at the module named by ``until``."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Lifting:
    """One forward pass of the lifted network."""

    def __init__(self, model: nn.Module, q: float, sole_readers: frozenset[int]) -> None:
        self.model = model
        self.q = q
        self.sole_readers = sole_readers
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.module_stack: list[str] = []
        self.readers: Counter[int] = Counter()
        self.coordinates: dict[int, tuple[str, Tensor]] = {}
        self.calls = itertools.count()

    def run(self, shapes: Sequence[tuple[int, ...]], until: str | None) -> Tensor:
        """Return the sum of all entries of all outputs."""
        if until is not None and until not in dict(self.model.named_modules()):
            raise ValueError(f"no module is called {until!r}")
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True))
            handles.append(module.register_forward_hook(self._leave(path == until)))
        inputs = [self.wrap(torch.ones(1, *shape, dtype=torch.float64)) for shape in shapes]
        try:
            output = self.model(*inputs)
        except _Stop as stop:
            output = stop.output
        finally:
            for handle in handles:
                handle.remove()
        outputs = [x for x in pytree.tree_leaves(output) if x is not None]
        for x in outputs:
            if not isinstance(x, Lifted):
                raise UnknownOperation(f"an output that depends on no input: {type(x)}")
        return torch.stack([self.read(x).sum() for x in outputs]).sum()

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda *_: self.module_stack.append(path)

    def _leave(self, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.module_stack.pop()
            if stop:
                raise _Stop(output)

        return hook

    def call(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply the rule of an operation; ``name`` without underscore for its in-place form."""
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if in_place else name
        if name in _STRUCTURAL and not in_place:
            values = pytree.tree_map(self.operand, (args, kwargs))
            result = func(*values[0], **values[1])
            result = pytree.tree_map(self.wrap, result)
            if name not in _COPYING:
                for x in pytree.tree_leaves((args, kwargs, result)):
                    if isinstance(x, Lifted):
                        x.aliased = True
            return result
        if name not in _RULES:
            raise UnknownOperation(resolve_name(func) or str(func))
        rule = _RULES[name]
        bound = inspect.signature(rule).bind(self, *args, **kwargs)
        in_place = in_place or bound.arguments.get("inplace", False)
        result = rule(*bound.args, **bound.kwargs)
        if not in_place:
            return result if isinstance(result, Lifted) else self.wrap(result)
        target = args[0]
        value = result.value if isinstance(result, Lifted) else result
        if target.aliased and value is not target.value:
            raise UnknownOperation(f"{name} in place on a tensor that shares memory with another")
        target.value, target.affine = value, None
        return target

    def wrap(self, value: Any) -> Any:
        """Make an activation; contiguous, for `view` must not depend on how a rule computed it."""
        if not isinstance(value, Tensor):
            return value
        assert value.dtype == torch.float64
        value = value.contiguous()
        lifted = value.detach().as_subclass(Lifted)
        lifted.value, lifted.lifting, lifted.affine, lifted.aliased = value, self, None, False
        return lifted

    def read(self, x: Lifted) -> Tensor:
        """Return the value, counting the reader of a convolution or linear map."""
        if x.affine is not None:
            self.readers[x.affine.call] += 1
        return x.value

    def operand(self, x: Any, slot: str = "bias") -> Any:
        """Lift an argument: an activation, a parameter, or a constant tensor; others pass."""
        if isinstance(x, Lifted):
            return self.read(x)
        if not isinstance(x, Tensor):
            return x
        if id(x) in self.names:
            return self.coordinate(self.names[id(x)], x)
        if x.requires_grad:  # computed from parameters
            return self.coordinate(self.sibling(self.module_stack[-1] + ".", slot), x)
        return _power(x, self.q) if x.is_floating_point() else x

    def factor(self, x: Any, slot: str = "weight") -> Any:
        """Lift an argument that must not be an activation; numbers are raised to q as well."""
        if isinstance(x, Lifted):
            raise UnknownOperation("a product or quotient of two activations")
        return self.operand(x, slot) if isinstance(x, Tensor) else _power(x, self.q)

    def coordinate(self, name: str, effective: Tensor) -> Tensor:
        """Return |effective|^q as a leaf whose share is booked under ``name``."""
        leaf = _power(effective.detach(), self.q).requires_grad_()
        self.coordinates[id(leaf)] = (name, leaf)
        return leaf

    @staticmethod
    def sibling(name: str, slot: str) -> str:
        """Return the name of another parameter of the same module."""
        return f"{name.rpartition('.')[0]}.{slot}".lstrip(".")


# --------------------------------------------------------------------------------------------------
# Rules: each has the signature of the PyTorch function and returns a value


def _affine(
    lifting: _Lifting,
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
        value = without_bias + _along(lifted_bias, axis, without_bias.dim())
    result = lifting.wrap(value)
    result.affine = _Affine(next(lifting.calls), without_bias, bias, lifted_bias, axis == 1)
    return result


def _convolution(transposed: bool, dimensions: int) -> Callable[..., Lifted]:
    function = getattr(F, f"conv{'_transpose' * transposed}{dimensions}d")

    def conv(
        lifting: _Lifting,
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


def _linear(lifting: _Lifting, input: Any, weight: Any, bias: Any = None) -> Lifted:
    return _affine(lifting, input, weight, bias, F.linear, lambda y: -1)


def _matmul(lifting: _Lifting, input: Any, other: Any) -> Tensor:
    if isinstance(input, Lifted):
        return lifting.read(input) @ lifting.factor(other)
    return lifting.factor(input) @ lifting.read(other)


def _batch_norm(
    lifting: _Lifting,
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
    if affine and affine.call in lifting.sole_readers and affine.channels_at_axis_1:
        # Folded: the convolution gets the scale, and both biases become one before the modulus.
        if affine.bias is not None:
            lifting.coordinates.pop(id(affine.lifted_bias), None)
            offset = offset + scale * affine.bias
        value, slope = affine.without_bias, _power(scale.detach(), lifting.q)
    else:
        slope = lifting.coordinate(weight_name, scale)
    constant = lifting.coordinate(bias_name, offset)
    return value * _along(slope, 1, value.dim()) + _along(constant, 1, value.dim())


def _identity(lifting: _Lifting, input: Lifted, inplace: bool = False) -> Tensor:
    return lifting.read(input)


def _dropout(
    lifting: _Lifting,
    input: Lifted,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if training:
        raise UnknownOperation("dropout in training mode")
    return lifting.read(input)


def _conversion(lifting: _Lifting, input: Lifted, *args: Any, **kwargs: Any) -> Tensor:
    return lifting.read(input)


def _slope(lifting: _Lifting, input: Lifted, slope: Any) -> Tensor:
    factor = torch.as_tensor(slope, dtype=torch.float64).detach().abs().clamp(min=1) ** lifting.q
    if factor.dim():
        factor = factor if factor.numel() == 1 else _along(factor, 1, input.dim())
    return lifting.read(input) * factor


def _leaky_relu(
    lifting: _Lifting, input: Lifted, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor:
    return _slope(lifting, input, negative_slope)


def _prelu(lifting: _Lifting, input: Lifted, weight: Tensor) -> Tensor:
    return _slope(lifting, input, weight)


def _rrelu(
    lifting: _Lifting,
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
    lifting: _Lifting, input: Lifted, min: Any = None, max: Any = None, inplace: bool = False
) -> Tensor:
    """Maximum and minimum with a constant: a pooling that has the constant among its inputs."""
    value = lifting.read(input)
    for bound in (min, max):
        if isinstance(bound, Lifted):
            value = value + lifting.read(bound)
        elif isinstance(bound, Tensor):
            finite = torch.where(bound.isfinite(), bound, 0.0)
            value = value + _power(finite.detach(), lifting.q)
        elif bound is not None and math.isfinite(bound):
            value = value + _power(bound, lifting.q)
    return value


def _hardtanh(
    lifting: _Lifting,
    input: Lifted,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    return _clamp(lifting, input, min_val, max_val)


def _relu6(lifting: _Lifting, input: Lifted, inplace: bool = False) -> Tensor:
    return _clamp(lifting, input, 0, 6)


def _clamp_min(lifting: _Lifting, input: Lifted, min: Any) -> Tensor:
    return _clamp(lifting, input, min)


def _extremum(lifting: _Lifting, input: Any, other: Any) -> Tensor:
    if not isinstance(input, Lifted):
        input, other = other, input
    return _clamp(lifting, input, other)


def _add(lifting: _Lifting, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """Sum or difference; the summand may be an activation, a parameter or a constant."""
    left, right = (
        lifting.operand(x) if isinstance(x, Tensor) else _power(x, lifting.q)
        for x in (input, other)
    )
    return left + right * _power(alpha, lifting.q)


def _mul(lifting: _Lifting, input: Any, other: Any) -> Tensor:
    if not isinstance(input, Lifted):
        input, other = other, input
    return lifting.read(input) * lifting.factor(other)


def _div(lifting: _Lifting, input: Any, other: Any, *, rounding_mode: Any = None) -> Tensor:
    if not isinstance(input, Lifted) or isinstance(other, Lifted) or rounding_mode is not None:
        raise UnknownOperation("division by an activation, or with rounding")
    if isinstance(other, Tensor) and other.requires_grad:
        raise UnknownOperation("division by a parameter: what is its coordinate?")
    return lifting.read(input) / lifting.factor(other)


def _sum(lifting: _Lifting, input: Lifted, dim: Any = None, keepdim: bool = False) -> Tensor:
    value = lifting.read(input)
    axes = range(value.dim()) if dim is None or dim == () else dim
    return value.sum(dim=[axes] if isinstance(axes, int) else list(axes), keepdim=keepdim)


def _mean(lifting: _Lifting, input: Lifted, dim: Any = None, keepdim: bool = False) -> Tensor:
    total = _sum(lifting, input, dim, keepdim)
    return total * _power(total.numel() / input.numel(), lifting.q)


def _max_pool(dimensions: int) -> Callable[..., Tensor]:
    def max_pool(
        lifting: _Lifting,
        input: Lifted,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if return_indices:
            raise UnknownOperation("max pooling that returns indices")
        value = lifting.read(input)
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = zip(
            *(_each(x, dimensions) for x in (kernel_size, stride, padding, dilation)), strict=True
        )
        for axis, (k, s, p, d) in enumerate(geometry, start=value.dim() - dimensions):
            starts = _window_starts(value.shape[axis], k, s, p, d, ceil_mode)
            windows = [[i for i in range(o, o + k * d, d)] for o in starts]
            value = _sum_windows(value, axis, windows)
        return value

    return max_pool


def _avg_pool(dimensions: int) -> Callable[..., Tensor]:
    def avg_pool(
        lifting: _Lifting,
        input: Lifted,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        value = lifting.read(input)
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = zip(*(_each(x, dimensions) for x in (kernel_size, stride, padding)), strict=True)
        divisor = torch.ones((), dtype=torch.float64)
        for axis, (k, s, p) in enumerate(geometry, start=value.dim() - dimensions):
            size = value.shape[axis]
            starts = _window_starts(size, k, s, p, 1, ceil_mode)
            value = _sum_windows(value, axis, [list(range(o, o + k)) for o in starts])
            first, end = (-p, size + p) if count_include_pad else (0, size)
            counts = [float(min(o + k, end) - max(o, first)) for o in starts]
            divisor = divisor[..., None] * torch.tensor(counts, dtype=torch.float64)
        if divisor_override is not None:
            divisor = torch.tensor(float(divisor_override), dtype=torch.float64)
        return value / _power(divisor, lifting.q)

    return avg_pool


def _adaptive_pool(dimensions: int, average: bool) -> Callable[..., Tensor]:
    def adaptive_pool(
        lifting: _Lifting, input: Lifted, output_size: Any, return_indices: bool = False
    ) -> Tensor:
        if return_indices:
            raise UnknownOperation("max pooling that returns indices")
        value = lifting.read(input)
        sizes = _each(output_size, dimensions)
        for axis, size in enumerate(sizes, start=value.dim() - dimensions):
            length = value.shape[axis]
            size = length if size is None else size
            windows = [
                list(range(o * length // size, -(-(o + 1) * length // size))) for o in range(size)
            ]
            value = _sum_windows(value, axis, windows)
            if average:
                counts = torch.tensor([float(len(w)) for w in windows], dtype=torch.float64)
                value = value / _along(_power(counts, lifting.q), axis, value.dim())
        return value

    return adaptive_pool


def _interpolate(
    lifting: _Lifting,
    input: Lifted,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    value = lifting.read(input)
    dimensions = value.dim() - 2
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear") or antialias:
        raise UnknownOperation(f"interpolation with mode {mode!r}, antialias={antialias}")
    sizes, scales = _each(size, dimensions), _each(scale_factor, dimensions)
    for axis, (length, scale) in enumerate(zip(sizes, scales, strict=True), start=2):
        # The matrix of the map along one axis: what it does to the unit vectors. Taps that hit one
        # source position are added in it, so the power comes after.
        unit_vectors = torch.eye(value.shape[axis], dtype=torch.float64)[None]
        matrix = F.interpolate(
            unit_vectors,
            size=length,
            scale_factor=scale,
            mode="linear" if mode.endswith("linear") else mode,
            align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor,
        )[0]
        value = (value.movedim(axis, -1) @ _power(matrix, lifting.q)).movedim(-1, axis)
    return value


def _pad(
    lifting: _Lifting, input: Lifted, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant":
        return F.pad(lifting.read(input), pad, mode=mode)
    if not math.isfinite(value or 0):
        raise UnknownOperation("padding with an infinite value")
    return F.pad(lifting.read(input), pad, value=_power(value or 0, lifting.q))


_RULES: dict[str, Callable[..., Any]] = {
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
    "interpolate": _interpolate,
    "pad": _pad,
}
for _d in (1, 2, 3):
    _RULES[f"conv{_d}d"] = _convolution(False, _d)
    _RULES[f"conv_transpose{_d}d"] = _convolution(True, _d)
    _RULES[f"max_pool{_d}d"] = _max_pool(_d)
    _RULES[f"avg_pool{_d}d"] = _avg_pool(_d)
    _RULES[f"adaptive_max_pool{_d}d"] = _adaptive_pool(_d, average=False)
    _RULES[f"adaptive_avg_pool{_d}d"] = _adaptive_pool(_d, average=True)

# Operations that only move entries around: they run on the values as they are.
_COPYING = {
    *("cat", "concat", "stack", "hstack", "vstack", "clone", "contiguous", "repeat"),
    *("repeat_interleave", "roll", "flip", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
}
_STRUCTURAL = _COPYING | {
    *("flatten", "unflatten", "view", "view_as", "reshape", "permute", "transpose", "swapaxes"),
    *("movedim", "t", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind"),
    *("select", "narrow", "expand", "expand_as", "__getitem__"),
}
_METADATA = {
    *("dim", "size", "numel", "nelement", "is_floating_point", "__len__", "__hash__"),
    *(f"{field}.__get__" for field in ("shape", "ndim", "dtype", "device", "layout")),
    *(f"{field}.__get__" for field in ("requires_grad", "is_cuda", "is_nested")),
}


# --------------------------------------------------------------------------------------------------
# Small helpers


def _operation_name(func: Callable[..., Any]) -> str:
    """Return the name that functions, methods and ATen builtins share, like ``conv2d``."""
    name = resolve_name(func) or str(func)
    for namespace in ("torch.nn.functional.", "torch.Tensor.", "torch._C._nn.", "torch."):
        if name.startswith(namespace):
            return name.removeprefix(namespace)
    return name


def _power(x: Any, q: float) -> Any:
    """Return |x|^q with 0^0 = 0, of a number or a tensor (in float64)."""
    if isinstance(x, Tensor):
        size = x.detach().double().abs()
        return (size != 0).double() if q == 0 else size if q == 1 else size**q
    return float(x != 0) if q == 0 else float(abs(x)) ** q


def _along(vector: Tensor, axis: int, dimensions: int) -> Tensor:
    """Shape a vector so that it broadcasts along one axis."""
    return vector.reshape([-1 if i == axis else 1 for i in range(dimensions)])


def _each(x: Any, dimensions: int) -> list[Any]:
    """Expand PyTorch's "an int or one per dimension"."""
    if isinstance(x, (tuple, list)):
        return list(x) * (dimensions if len(x) == 1 else 1)
    return [x] * dimensions


def _window_starts(size: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> list[int]:
    """First position of each pooling window, negative in the padding."""
    room = size + 2 * p - d * (k - 1) - 1  # how far a window can move in the padded axis
    count = (-(-room // s) if ceil_mode else room // s) + 1
    starts = [o * s - p for o in range(count)]
    # ceil_mode adds a window that sticks out, unless it starts in the padding at the end.
    return [start for start in starts if start < size or not ceil_mode]


def _sum_windows(value: Tensor, axis: int, windows: list[list[int]]) -> Tensor:
    """Sum over windows of positions along one axis; positions outside the tensor count nothing."""
    size = value.shape[axis]
    return torch.stack(
        [value[_at(axis, [i for i in w if 0 <= i < size])].sum(axis) for w in windows], dim=axis
    )


def _at(axis: int, positions: list[int]) -> tuple[Any, ...]:
    """Index the given positions of one axis."""
    return (*[slice(None)] * axis, positions)


def _shapes(inputs_or_shape: Any) -> list[tuple[int, ...]]:
    """Normalize the ways to name inputs to a list of shapes without batch axis."""
    if isinstance(inputs_or_shape, Tensor):
        return [tuple(inputs_or_shape.shape[1:])]
    if all(isinstance(x, int) for x in inputs_or_shape):
        return [tuple(inputs_or_shape)]
    return [tuple(x.shape[1:]) if isinstance(x, Tensor) else tuple(x) for x in inputs_or_shape]


def _float64_copy(model: nn.Module) -> nn.Module:
    """Copy the model to float64 and eval mode, parameters requiring gradients."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attribute in vars(module).values():
            # deepcopy refuses computed tensors, such as the masked weight of torch's own pruning.
            if isinstance(attribute, Tensor) and attribute.grad_fn is not None:
                memo[id(attribute)] = attribute.detach().clone()
    twin = copy.deepcopy(model, memo).double().eval()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    return twin
