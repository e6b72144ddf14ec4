"""Operators that keep a running power-of-two scale in every tensor.

Scales live on the host, as 1-d float64 tensors on the CPU that begin with the exponent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxpath.graph import ops
from fxpath.program.kernels.operator import host, operator, scalar

#: Entries of new tensors that are at least so large lost no digit to underflow, which is below
#: 2^-126 (2^-1022) for each of at most some 2^17 terms of a sum.
SMALLEST = {torch.float32: 2.0**-85, torch.float64: 2.0**-900}

#: Sums of gradients up to which the part of the norm that was lost to underflow is below the last
#: digit.
MASS = {torch.float32: 2.0**85, torch.float64: 2.0**900}

#: Exponents of the largest entry that are left as they are: a step saved.
SLACK = 24

#: Exponent of a tensor of zeros, which fits any scale.
VOID = -(10**9)

#: Exponents that one power of two can undo in each number format.
LIMIT = {torch.float32: 120, torch.float64: 1000}

#: Exponents below it make a zero of any number.
NOTHING = -10000


def times(value: Tensor, exponent: int) -> Tensor:
    """``value * 2 ** exponent``, a new tensor; the power of two alone may be beyond float64."""
    exponent = max(exponent, NOTHING)
    while exponent < -1000:
        value, exponent = value * 2.0**-1000, exponent + 1000
    return value * 2.0**exponent


def _fake_settle(
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight: Tensor | None,
    axis: int,
    dim: int | None,
) -> tuple[Tensor, Tensor]:
    shape = list(torch.broadcast_shapes(*(v.shape for v in values)) if dim is None else ())
    if dim is not None:
        shape = list(values[0].shape)
        shape[dim] = sum(v.shape[dim] for v in values)
    return values[0].new_empty(shape), torch.empty(2 + len(values), dtype=torch.float64)


@operator(
    "settle(Tensor[] values, Tensor[] scales, Tensor? weight, int axis, int? dim)"
    " -> (Tensor, Tensor)",
    _fake_settle,
)
def settle(
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    weight: Tensor | None,
    axis: int,
    dim: int | None,
) -> tuple[Tensor, Tensor]:
    """Bring tensors to a common scale and add them (or join them along ``dim``).

    Args:
        values: mantissas.
        scales: for each of them a tensor that begins with its exponent.
        weight: 1-d, multiplied along ``axis`` with the first of them, if given.
        axis: see ``weight``.
        dim: axis to join along.

    Returns:
        The result with its largest entry near 1, and its scale: a 1-d tensor of the exponent, the
        smallest entry before scaling in units of the coarsest rounding that went into it, and the
        exponents of the powers of two that each tensor was multiplied by.
    """
    limit = LIMIT[values[0].dtype]
    weighed = [1.0]
    if weight is not None:
        # Before any scaling: a large entry often meets a small weight.
        weighed += [float(v.amax()) for v in (values[0], weight) if v.numel()]
        values = [values[0] * ops.beside(weight, values[0], axis), *values[1:]]
    powers = [int(scale.tolist()[0]) for scale in scales]
    tops = [_top(v, scale) for v, scale in zip(values, scales, strict=True)]
    common = max(tops)
    exponents = [min(limit, power - common) for power in powers]
    factors = [2.0 ** max(-2 * limit, exponent) for exponent in exponents]
    # Rounding of a factor of the first term is multiplied by the other one.
    coarsest = max(1.0, factors[0] * max(weighed), *factors)
    terms = [_times(v, f) for v, f in zip(values, factors, strict=True)]
    joined = _join(terms, dim)
    low, high = (float(bound) for bound in torch.aminmax(joined)) if joined.numel() else (1.0, 1.0)
    step = _exponent(high, limit)
    if abs(step) > SLACK:
        joined = joined * 2.0**-step
    else:
        step = 0
        if joined is values[0] and weight is None:
            joined = joined.clone()  # an operator must not return its argument
    found = [common + step if high else VOID, low / coarsest, *(e - step for e in exponents)]
    return joined.contiguous(), host(found)


def _top(value: Tensor, scale: Tensor) -> int:
    """Exponent of the largest entry, up to :data:`SLACK`; of constants the exact one."""
    if len(scale) > 1:
        return int(scale[0])
    largest = float(value.amax()) if value.numel() else 0.0
    return math.frexp(largest)[1] if largest else VOID


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _join(terms: list[Tensor], dim: int | None) -> Tensor:
    if dim is not None:
        return torch.cat(terms, dim)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _exponent(value: float, limit: int) -> int:
    return max(-limit, min(limit, math.frexp(value)[1]))


@operator(
    "settle_backward(Tensor grad, Tensor scale, Tensor[] values, Tensor? weight, int axis,"
    " int? dim) -> Tensor[]",
    lambda grad, scale, values, *_: [*(v.new_empty(v.shape) for v in values), scalar()],
)
def settle_backward(
    grad: Tensor,
    scale: Tensor,
    values: Sequence[Tensor],
    weight: Tensor | None,
    axis: int,
    dim: int | None,
) -> list[Tensor]:
    """Gradients of the terms of :func:`settle`, and the largest sum of any gradient in it."""
    exponents = [int(exponent) for exponent in scale.tolist()[2:]]
    if dim is None:
        pieces = [grad] * len(values)
        sums = [float(grad.sum())] * len(values)
    else:
        pieces = list(grad.split([v.shape[dim] for v in values], dim))
        sums = [float(piece.sum()) for piece in pieces]
    masses = [
        *sums,
        *(math.ldexp(s, max(NOTHING, e)) for s, e in zip(sums, exponents, strict=True)),
    ]
    # New tensors: an operator must not return its argument.
    if weight is None:
        first = times(pieces[0], exponents[0])
    else:
        scaled = times(pieces[0], exponents[0]) if exponents[0] else pieces[0]
        masses.append(float(torch.dot(scaled.reshape(-1), values[0].reshape(-1))))
        first = scaled * ops.beside(weight, grad, axis)
        masses.append(float(first.sum()))
    # Summed before they are scaled: a bias has few entries.
    others = [
        times(sum_to(piece, value), exponent)
        for piece, value, exponent in zip(pieces[1:], values[1:], exponents[1:], strict=True)
    ]
    grads = [sum_to(first, values[0]), *others]
    return [*(g.contiguous() for g in grads), host(max(masses))]


def sum_to(value: Tensor, like: Tensor) -> Tensor:
    """Sum over what was broadcast from ``like``."""
    return value.sum_to_size(like.shape) if value.shape != like.shape else value


@operator(
    "total(Tensor[] values, Tensor[] scales) -> (Tensor, Tensor)",
    lambda values, scales: (scalar(), torch.empty(2 + len(values), dtype=torch.float64)),
)
def total(values: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of all entries: its mantissa, and its scale as in :func:`settle`."""
    limit = LIMIT[torch.float64]
    sums = [float(v.sum(dtype=torch.float64)) for v in values]
    powers = [int(scale[0]) for scale in scales]
    tops = [e + _exponent(s, limit) for s, e in zip(sums, powers, strict=True) if s != 0]
    common = max(tops, default=0)
    exponents = [e - common for e in powers]
    mantissa = sum(math.ldexp(s, max(NOTHING, e)) for s, e in zip(sums, exponents, strict=True))
    return host(mantissa), host([common, 0.0, *exponents])


@operator(
    "total_backward(Tensor grad, Tensor scale, Tensor[] values) -> Tensor[]",
    lambda grad, scale, values: list(map(torch.empty_like, values)),
)
def total_backward(grad: Tensor, scale: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the terms of :func:`total`."""
    outer, exponents = float(grad), scale[2:].tolist()
    return [
        torch.full_like(v, math.ldexp(outer, max(NOTHING, int(e))))
        for v, e in zip(values, exponents, strict=True)
    ]


@operator("sum_of(Tensor a, Tensor b) -> Tensor", lambda a, b: a.new_empty(a.shape))
def sum_of(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``, of equal shapes: gradients of a value that is read twice."""
    return (a + b).contiguous()


@operator("mass(Tensor grad) -> Tensor", lambda grad: scalar())
def mass(grad: Tensor) -> Tensor:
    """Sum of a gradient, on the host."""
    return host(float(grad.sum()))


def _fake_lift_loss(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(2, dtype=torch.float64), scalar()


@operator("lift_loss(Tensor value, ScalarType dtype) -> (Tensor, Tensor)", _fake_lift_loss)
def lift_loss(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far a conversion to ``dtype`` stays within its normal range.

    Returns:
        What :func:`settle` says as a scale, and :func:`settle_backward` as a mass, so that
        either passes for sufficient only if no entry that is not 0 loses digits.
    """
    sizes = value.abs()
    smallest = float(torch.where(sizes == 0, math.inf, sizes).amin()) if sizes.numel() else math.inf
    margin = smallest / torch.finfo(dtype).tiny
    bound = SMALLEST[dtype] * margin, MASS[dtype] / margin if margin else math.inf
    return host([0.0, bound[0]]), host(bound[1])


@operator("inverse(Tensor value) -> Tensor", lambda value: torch.empty_like(value))
def inverse(value: Tensor) -> Tensor:
    """``1 / value``, and 0 for 0: the derivative of log ||Phi||, where there are paths."""
    return torch.where(value == 0, value, 1 / value)


@operator("least(Tensor[] scales) -> Tensor", lambda scales: scalar())
def least(scales: Sequence[Tensor]) -> Tensor:
    """Smallest entry of any tensor before scaling, inf for none; NaN if there is one."""
    return torch.stack([scale[1] for scale in scales]).amin() if scales else host(math.inf)


@operator("most(Tensor[] values) -> Tensor", lambda values: scalar())
def most(values: Sequence[Tensor]) -> Tensor:
    """Maximum of 0-d tensors, 0 for none; NaN if one of them is."""
    return torch.stack(list(values)).amax() if values else host(0.0)
