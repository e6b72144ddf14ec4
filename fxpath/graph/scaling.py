"""Steps of a derived graph that keep numbers in range, in plain ATen: nothing is read on the host.

A scaled value is a tensor and an exponent of two, 0-d, which stay on the data's own device; the
exponent ``None`` is zero, that of zeros is minus infinity or far below all others.  A *settle*
brings the terms of a sum to one exponent, near that of the largest entry, by powers of two; its
transpose multiplies by the same ones.  They are constants for differentiation.

Two witnesses tell whether a number format sufficed.  A sum of products loses at most its number of
terms times the format's smallest number t to underflow.  This is harmless where the smallest entry
of every tensor is far above t; and also where t times the sum of the gradient of log ||Phi||, which
is the part of the path-norm that may be lost, is far below 1: small or zero entries that nothing
blows up again do not count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Entries of new tensors that are at least so large lost no digit to underflow, which is below
#: 2^-126 (2^-1022) for each of at most some 2^17 terms of a sum.
SMALLEST = {torch.float32: 2.0**-85, torch.float64: 2.0**-900}

#: Sums of gradients up to which the part of the norm that was lost to underflow is below the last
#: digit.
MASS = {torch.float32: 2.0**85, torch.float64: 2.0**900}

#: Exponent from which on a tensor is taken for zeros.
VOID = -1e6

#: Exponent of a power of two that float64 holds in any case.
NEAR = 1000.0


def settle(
    values: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    measured: Sequence[bool],
    factor: Tensor | None = None,
    watch: bool = True,
    zeros: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """The sum of scaled values, at a common exponent.

    Args:
        values: mantissas, which broadcast to the first one or to each other.
        scales: their exponents.
        measured: whether to look for the largest entry; one that is known to be near 1 need not.
        factor: multiplied with the first value, along axis 1, if given.
        watch: whether to look for the smallest entry.
        zeros: whether a tensor of zeros keeps its exponent, as one of ones would.  Gradients by
            what made it zero are right then; without, nothing is scaled down for its sake.

    Returns:
        The sum, its exponent; the powers of two that the values were multiplied by, and their
        exponents; if asked for the smallest entry, in units of the coarsest rounding; and the
        largest entry that was measured, if any was.
    """
    every = zip(values, measured, strict=True)
    entries = [v.max() for v, known in every if known and v.numel()]
    largest = _largest(entries) if entries else None
    tops = [
        _top(v, e, m, zeros, factor if i == 0 else None)
        for i, (v, e, m) in enumerate(zip(values, scales, measured, strict=True))
    ]
    common, shifts = _common(tops, scales, measured)
    powers = [torch.exp2(shift) for shift in shifts]
    first = powers[0] if factor is None else beside(powers[0] * factor, values[0])
    terms = [v * p for v, p in zip(values[1:], powers[1:], strict=True)]
    if terms:
        total = torch.addcmul(functools.reduce(torch.add, terms), values[0], first)
    else:
        total = values[0] * first
    # Rounding of a value or its factor is multiplied by the other one.
    both = [] if factor is None else [v.max() * powers[0] for v in (values[0], factor) if v.numel()]
    # So is that of a power, which may be far below 1 where a value is far above.
    both += [] if largest is None else [largest]
    smallest = _smallest(total, [*powers, *both]) if watch else None
    return total, common, powers, shifts, smallest, largest


def settle_back(
    grad: Tensor,
    values: Sequence[Tensor],
    powers: Sequence[Tensor],
    shifts: Sequence[Tensor] | None,
    factor: Tensor | None,
    needed: Sequence[bool],
    largest: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The transpose of :func:`settle`.

    Args:
        grad: of the sum.
        values: as there.
        powers: what it returned.
        shifts: what it returned, if powers of two below the number format count, since the gradient
            is far above it.
        factor: as there.
        needed: of which values, and whether of the factor, gradients are asked for.
        largest: what it returned.

    Returns:
        The sums of gradients that tell what underflow may have lost, and the gradients of the
        values, and the factor, that are ``needed``.
    """
    more: list[Tensor] = []
    if factor is None:
        sums = grad.sum()
        masses = [sums, sums * powers[0]]
        first = _times(grad, powers, shifts, 0)
    else:
        dims = [d for d in range(grad.dim()) if d != 1]
        by_channel = grad.sum(dims)
        sums = by_channel.sum()
        scaled = powers[0] * factor
        more = [_times((grad * values[0]).sum(dims), powers, shifts, 0)]
        # The last one is what a rounding of the factor may lose.
        masses = [sums, sums * powers[0], (by_channel * scaled).sum(), more[0].sum()]
        if shifts is None:
            first = grad * beside(scaled, grad)
        else:
            first = _times(grad * beside(factor, grad), powers, shifts, 0)
    grads = [_sum_to(first, values[0])]
    for i, value in enumerate(values[1:], 1):
        # Summed before it is scaled: a bias has few entries.
        grads.append(_times(_sum_to(grad, value), powers, shifts, i))
    if largest is not None:
        masses.append(sums * largest)  # what a rounding of a power may lose
    every = zip([*grads, *more], needed, strict=True)
    return masses, [g if asked else None for g, asked in every]


def join(
    values: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    measured: Sequence[bool],
    dim: int,
    watch: bool = True,
    zeros: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Scaled values side by side along an axis; see :func:`settle`."""
    tops = [_top(*each, zeros) for each in zip(values, scales, measured, strict=True)]
    common, shifts = _common(tops, scales, measured)
    powers = [torch.exp2(shift) for shift in shifts]
    joined = torch.cat([v * p for v, p in zip(values, powers, strict=True)], dim)
    return joined, common, powers, shifts, _smallest(joined, powers) if watch else None


def join_back(
    grad: Tensor,
    sizes: Sequence[int],
    powers: Sequence[Tensor],
    shifts: Sequence[Tensor] | None,
    dim: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """The transpose of :func:`join`; see :func:`settle_back`."""
    pieces = list(grad.split(list(sizes), dim))
    grads = [_times(piece, powers, shifts, i) for i, piece in enumerate(pieces)]
    return [grad.sum()], grads


def sum_up(
    values: Sequence[Tensor], scales: Sequence[Tensor | None], zeros: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The sum of all entries in float64: mantissa, exponent, and what each value is shifted by.

    ``zeros`` is as in :func:`settle`.
    """
    sums = [value.sum(dtype=torch.float64) for value in values]
    exponents = [None if scale is None else scale.double() for scale in scales]
    tops = [_plus(_exponent(s, zeros), e) for s, e in zip(sums, exponents, strict=True)]
    common, shifts = _common(tops, exponents, [True] * len(sums))
    terms = [s * torch.exp2(shift) for s, shift in zip(sums, shifts, strict=True)]
    return functools.reduce(torch.add, terms), common, shifts


def seed(mantissa: Tensor, shift: Tensor, dtype: torch.dtype, raised: int) -> Tensor:
    """The gradient of log ||Phi||, times ``2 ** raised``, in each entry of an output; 0-d."""
    share = torch.where(mantissa == 0, 0.0, 2.0**raised / mantissa)
    share = share * torch.exp2(shift.clamp(min=-NEAR)) * torch.exp2((shift + NEAR).clamp(max=0))
    return share.to(dtype)


def spread(value: Tensor, shape: Sequence[int]) -> Tensor:
    """One number everywhere."""
    return value.expand(list(shape))


def kept(value: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a conversion to ``dtype`` stays within its normal range.

    Returns:
        What :func:`settle` says as the smallest entry, so that it passes for sufficient only if no
        entry that is not 0 loses digits; 0-d.
    """
    sizes = value.abs().reshape(-1)
    if not len(sizes):
        return value.new_full((), math.inf, dtype=dtype)
    least = torch.where(sizes == 0, math.inf, sizes).min()
    return (least * (SMALLEST[dtype] / torch.finfo(dtype).tiny)).to(dtype)


def least(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """The smallest of some 0-d tensors, inf for none; NaN if there is one."""
    return functools.reduce(torch.minimum, values, torch.full_like(like, math.inf)).double()


def most(values: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """The largest of some 0-d tensors, 0 for none; NaN if there is one."""
    flat = [value for each in values for value in each]
    return functools.reduce(torch.maximum, flat, torch.zeros_like(like)).double()


def beside(vector: Tensor, x: Tensor) -> Tensor:
    """A 1-d tensor shaped to broadcast along axis 1 of ``x``."""
    return vector.reshape([-1 if axis == 1 else 1 for axis in range(x.dim())])


def _common(
    tops: Sequence[Tensor], scales: Sequence[Tensor | None], measured: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """The largest exponent, and those of the powers of two that lead there.

    Where such a power is above the number format, so is what it is multiplied with: the mantissa of
    the norm is no number then.
    """
    common = _largest(tops).clamp(min=VOID)
    shifts = []
    for top, scale, known in zip(tops, scales, measured, strict=True):
        shift = -common if scale is None else scale - common
        if known:
            # Zeros are not multiplied: their exponent may be beyond all others.
            shift = torch.where(top == -math.inf, shift.clamp(max=0), shift)
        shifts.append(shift)
    return common, shifts


def _times(
    value: Tensor, powers: Sequence[Tensor], shifts: Sequence[Tensor] | None, index: int
) -> Tensor:
    """A value times a power of two, in two steps if the power alone may be below float64."""
    if shifts is None:
        return value * powers[index]
    near = shifts[index].clamp(min=-NEAR)
    return value * torch.exp2(near) * torch.exp2(shifts[index] - near)


def _top(
    value: Tensor,
    scale: Tensor | None,
    measured: bool,
    zeros: bool,
    factor: Tensor | None = None,
) -> Tensor:
    """Exponent of the largest entry, minus infinity for zeros if they do not keep theirs."""
    if not value.numel():
        return value.new_full((), -math.inf)
    if not measured:
        return value.new_zeros(()) if scale is None else scale
    if factor is not None:
        # Before any scaling: a large entry often meets a small factor.
        value = value.amax([d for d in range(value.dim()) if d != 1]) * factor
    return _plus(_exponent(value.max(), zeros), scale)


def _exponent(largest: Tensor, zeros: bool) -> Tensor:
    exponent = largest.log2().floor()
    return torch.where(largest == 0, 0.0, exponent) if zeros else exponent


def _plus(exponent: Tensor, scale: Tensor | None) -> Tensor:
    return exponent if scale is None else exponent + scale


def _smallest(value: Tensor, bounds: Sequence[Tensor]) -> Tensor:
    if not value.numel():
        return torch.full_like(bounds[0], math.inf)
    return value.min() / _largest(bounds).clamp(min=1)


def _largest(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.maximum, values)


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    """Sum over what was broadcast from ``like``."""
    return value.sum_to_size(like.shape) if value.shape != like.shape else value
