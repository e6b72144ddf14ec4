"""Sweeps over a large matrix that meets a single vector, in code that Inductor generates.

Nothing else in a program is worth it: such a layer moves each weight once for a single product, and
a sweep that lifts, multiplies and sums in registers spares the memory all steps between.  The code
serves all sizes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fxpath.kernels.operator import Kernel

__all__ = ["applies", "column_sums", "dot", "scores_into"]

#: Entries from which on a sweep through generated code repays its compilation.
LARGE = 1 << 21

#: Rows that are summed at a time: columns of many rows are not read in the order of memory.
GROUP = 8


def applies(weight: Tensor, columns: Tensor, q: float) -> bool:
    """Whether there is generated code for ``|weight| ** q @ columns``."""
    return (
        (columns.shape[1] == 1 and q == 1 and weight.dtype == columns.dtype)
        and (weight.is_contiguous() and weight.numel() >= LARGE)
        and len(weight) % GROUP == 0
    )


@functools.cache
def _generated(sweep: Kernel) -> Kernel:
    return torch.compile(sweep, dynamic=True, fullgraph=True)


def _dot(weight: Tensor, x: Tensor) -> Tensor:
    return (weight.abs() * x).sum(-1)


def dot(weight: Tensor, x: Tensor) -> Tensor:
    """``|weight| @ x``."""
    found: Tensor = _generated(_dot)(weight, x)
    return found


def _group_sums(weight: Tensor, grad: Tensor) -> Tensor:
    return (weight.abs() * grad).sum(1)


def column_sums(weight: Tensor, grad: Tensor) -> Tensor:
    """``grad @ |weight|``."""
    groups = len(grad) // GROUP
    # Shaped out here: inside, the generated code would divide for each index.
    grouped = weight.view(groups, GROUP, weight.shape[1]), grad.reshape(groups, GROUP, 1)
    sums: Tensor = _generated(_group_sums)(*grouped)
    return sums.sum(0)


def _scores_into(out: Tensor, weight: Tensor, grad: Tensor, x: Tensor) -> None:
    out.copy_(weight.abs() * grad * x)


def scores_into(out: Tensor, weight: Tensor, grad: Tensor, x: Tensor) -> None:
    """Write ``|weight[i, j]| * grad[i] * x[j]`` into ``out``."""
    _generated(_scores_into)(out, weight, grad[:, None], x)
