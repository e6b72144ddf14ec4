"""Sweeps over a large matrix that meets a single vector, in code that Inductor generates.

Nothing else in a program is worth it: such a layer moves each weight once for a single product, and
a sweep that lifts, multiplies and sums in registers spares the memory all steps between.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
from torch import Tensor, fx

from fxpath.program.kernels.operator import Kernel

#: Entries from which on a sweep through generated code repays its compilation, of some seconds.
LARGE = 1 << 22

#: Rows that are summed at a time: columns of many rows are not read in the order of memory.
GROUP = 8


def applies(weight: Tensor, columns: Tensor, q: float) -> bool:
    """Whether there is generated code for ``|weight| ** q @ columns``."""
    return (
        (columns.shape[1] == 1 and q == 1 and weight.dtype == columns.dtype)
        and (weight.is_contiguous() and weight.numel() >= LARGE)
        and len(weight) % GROUP == 0
    )


def _run(sweep: Kernel, *tensors: Tensor) -> Tensor:
    found: Tensor = _generated(sweep, tuple(map(_form, tensors)))(*tensors)
    return found


@functools.cache
def _generated(sweep: Kernel, form: tuple[Hashable, ...]) -> Kernel:
    """Compiled apart for each form of its arguments.

    Dynamo gives up on a function after eight forms, and sooner or later a process has seen more:
    so that each gets a function, and code, of its own.
    """
    return torch.compile(fx.symbolic_trace(sweep), dynamic=False, fullgraph=True)


def _form(tensor: Tensor) -> Hashable:
    """All that Dynamo compiles a tensor for, down to what it is a view of."""
    base = tensor._base
    viewed = None if base is None else (base.shape, base.stride())
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.device,
        viewed,
    )


def _dot(weight: Tensor, x: Tensor) -> Tensor:
    return (weight.abs() * x).sum(-1)


def dot(weight: Tensor, x: Tensor) -> Tensor:
    """``|weight| @ x``."""
    return _run(_dot, weight, x)


def _group_sums(weight: Tensor, grad: Tensor) -> Tensor:
    return (weight.abs() * grad).sum(1)


def column_sums(weight: Tensor, grad: Tensor) -> Tensor:
    """``grad @ |weight|``."""
    groups = len(grad) // GROUP
    # Shaped out here: inside, generated code may divide for each index.
    grouped = weight.view(groups, GROUP, weight.shape[1]), grad.reshape(groups, GROUP, 1)
    return _run(_group_sums, *grouped).sum(0)


def _scores_into(out: Tensor, weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return out.copy_(weight.abs() * grad * x)


def scores_into(out: Tensor, weight: Tensor, grad: Tensor, x: Tensor) -> None:
    """Write ``|weight[i, j]| * grad[i] * x[j]`` into ``out``."""
    _run(_scores_into, out, weight, grad[:, None], x)
