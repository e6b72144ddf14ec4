"""The power ``|x| ** q`` with 0 ** 0 = 0, so that for q = 0 paths that are not zero are counted."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from fxpath.graph.exact import Coefficient


def power(value: Tensor, q: float) -> Tensor:
    """The power of each entry, to be differentiated."""
    if q == 1:
        return value.abs()
    if q == 0:
        return value * 0 + (value != 0)  # NaN stays NaN
    if q > 1:
        return value.abs().pow(q)
    # The derivative at 0 is infinite: no gradient there, as for the absolute value itself.
    empty = value == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, value).abs().pow(q))


def power_into(out: Tensor, value: Tensor, q: float) -> Tensor:
    """The same written into ``out``, in its number format."""
    if q == 0:
        # 0 for each number, but NaN for what is none.
        return out.copy_(value).mul_(0).add_(value != 0)
    if value.dtype == out.dtype:
        torch.abs(value, out=out)
    else:
        out.copy_(value).abs_()
    return out if q == 1 else out.pow_(q)


def power_of_number(number: Coefficient, q: float) -> Coefficient:
    """The power of a number of the architecture, exactly where q is an integer."""
    if q == 0:
        return int(number != 0)
    if not float(q).is_integer():
        return Fraction(math.pow(number if number > 0 else -number, q))
    return (number if number > 0 else -number) ** int(q)
