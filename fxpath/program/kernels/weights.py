"""Operators on weights: |theta|^q, and where their scores are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxpath.graph import ops
from fxpath.graph.power import power_into
from fxpath.program.kernels.operator import operator


@operator(
    "lifted(Tensor value, ScalarType dtype, float q) -> Tensor",
    lambda value, dtype, q: value.new_empty(value.shape, dtype=dtype),
)
def lifted(value: Tensor, dtype: torch.dtype, q: float) -> Tensor:
    """``|value| ** q``."""
    return power_into(value.new_empty(value.shape, dtype=dtype), value, q)


@operator("lift_(Tensor(a!) out, Tensor value, float q) -> ()", lambda out, value, q: None)
def lift_(out: Tensor, value: Tensor, q: float) -> None:
    """``|value| ** q`` in the caller's memory."""
    power_into(out, value, q)


@operator("times_(Tensor(a!)[] outs, Tensor[] others) -> ()", lambda outs, others: None)
def times_(outs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``out *= other`` for each pair: one step for all small leaves of a model."""
    if outs:
        torch._foreach_mul_(list(outs), list(others))


@operator("plus_(Tensor(a!) out, Tensor a, Tensor b) -> ()", lambda out, a, b: None)
def plus_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a * b``."""
    out.addcmul_(a, b)


@operator("clear_(Tensor(a!) out) -> ()", lambda out: None)
def clear_(out: Tensor) -> None:
    """``out = 0``."""
    out.zero_()


@operator(
    "filled(int[] shape, float value, ScalarType dtype, Device device) -> Tensor",
    lambda shape, value, dtype, device: torch.empty(shape, dtype=dtype, device=device),
)
def filled(shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number everywhere."""
    return torch.full(shape, value, dtype=dtype, device=device)


@operator(
    "normalizer(Tensor? gamma, Tensor var, float eps) -> Tensor",
    lambda gamma, var, eps: var.new_empty(var.shape, dtype=torch.float64),
)
def normalizer(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """See :func:`fxpath.graph.ops.normalizer`."""
    return ops.normalizer(gamma, var, eps)


@operator(
    "folded_bias(Tensor? bias, Tensor factor, Tensor? beta, Tensor mean) -> Tensor",
    lambda bias, factor, beta, mean: torch.empty_like(factor),
)
def folded_bias(bias: Tensor | None, factor: Tensor, beta: Tensor | None, mean: Tensor) -> Tensor:
    """See :func:`fxpath.graph.ops.folded_bias`."""
    return ops.folded_bias(bias, factor, beta, mean)
