"""Operators that multiply: maps along axes, and layers that stream their weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpath.graph import ops
from fxpath.graph.power import power_into
from fxpath.program.kernels import generated as sweeps
from fxpath.program.kernels.operator import operator
from fxpath.program.kernels.scales import sum_to

__all__: list[str] = []

#: Entries of a weight that are lifted and used at once: 4 MB of float32 stay in the cache.
BLOCK = 1 << 20

#: Columns below which a product is taken with its operands transposed, which BLAS does faster.
NARROW = 16


# -- maps along axes -------------------------------------------------------------------------------


def _fake_mix(x: Tensor, dim: int, matrix: Tensor, transposed: bool) -> Tensor:
    shape = list(x.shape)
    shape[dim] = matrix.shape[int(transposed)]
    return x.new_empty(shape)


@operator("mix(Tensor x, int dim, Tensor matrix, bool transposed) -> Tensor", _fake_mix)
def mix(x: Tensor, dim: int, matrix: Tensor, transposed: bool) -> Tensor:
    """See :func:`fxpath.graph.ops.mix`."""
    return ops.mix(x, dim, matrix.T if transposed else matrix).contiguous()


@operator(
    "scaled(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: x.new_empty(torch.broadcast_shapes(x.shape, weight.shape)),
)
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """``x * weight`` with broadcasting."""
    return (x * weight).contiguous()


@operator(
    "scaled_backward(Tensor grad, Tensor x, Tensor other) -> Tensor",
    lambda grad, x, other: x.new_empty(x.shape),
)
def scaled_backward(grad: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Gradient of either factor of :func:`scaled`, the first one here."""
    return sum_to(grad * other, x).contiguous()


# -- weighted sums ---------------------------------------------------------------------------------


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Blocks of rows that stay in the cache of a CPU; elsewhere all at once."""
    rows, columns = weight.shape
    step = max(1, BLOCK // max(1, columns)) if weight.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


class _Workspace(threading.local):
    """Memory for one block, kept by each thread: fresh pages cost as much as the product itself."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, Tensor] = {}

    def __call__(self, weight: Tensor, like: Tensor) -> Tensor:
        """Memory for the largest block of a weight, in the number format of ``like``."""
        size = max(
            ((rows.stop - rows.start) * weight.shape[1] for rows in _blocks(weight)), default=0
        )
        if like.device.type != "cpu":
            return like.new_empty(size)  # torch keeps the memory itself there
        kept = self._kept.get(like.dtype)
        if kept is None or len(kept) < size:
            kept = self._kept[like.dtype] = like.new_empty(size)
        return kept


_scratch = _Workspace()


def _forward(weight: Tensor, columns: Tensor, q: float, generated: bool) -> Tensor:
    """``|weight| ** q @ columns``, block by block or by generated code.

    Shapes ``[outputs, inputs]`` and ``[inputs, positions]``.
    """
    if generated and sweeps.applies(weight, columns, q):
        return sweeps.dot(weight, columns[:, 0])[:, None]
    y = columns.new_empty(weight.shape[0], columns.shape[1])
    scratch = _scratch(weight, columns)
    narrow = columns.T.contiguous() if columns.shape[1] < NARROW else None
    for rows in _blocks(weight):
        part = weight[rows]
        block = power_into(scratch[: part.numel()].view(part.shape), part, q)
        if narrow is None:
            torch.mm(block, columns, out=y[rows])
        elif len(narrow) == 1:
            torch.mv(block, narrow[0], out=y[rows, 0])
        else:
            y[rows] = torch.mm(narrow, block.T).T
    return y


def _backward(
    grad: Tensor,
    columns: Tensor,
    weight: Tensor,
    out: Tensor,
    q: float,
    generated: bool,
    needed: bool,
) -> Tensor:
    """Gradient of the columns (zeros unless needed), and in ``out`` the scores of the weight.

    Shapes ``[outputs, positions]``, ``[inputs, positions]`` and twice ``[outputs, inputs]``.
    """
    if generated and sweeps.applies(weight, columns, q):
        sweeps.scores_into(out, weight, grad[:, 0], columns[:, 0])
        sums = sweeps.column_sums(weight, grad[:, 0]) if needed else torch.zeros_like(columns)
        return sums.reshape(columns.shape)
    narrow = columns.shape[1] < NARROW
    result = columns.new_zeros(columns.T.shape if narrow else columns.shape)
    scratch = _scratch(weight, columns)
    for rows in _blocks(weight):
        beta = int(rows.start > 0)  # nothing to add to before the first block
        g, block = grad[rows], power_into(out[rows], weight[rows], q)
        if not needed:
            pass
        elif len(result) == 1 and narrow:
            result[0].addmv_(block.T, g[:, 0], beta=beta)
        else:
            result.addmm_(*((g.T, block) if narrow else (block.T, g)), beta=beta)
        if columns.shape[1] == 1:
            block.mul_(g).mul_(columns[:, 0])
        else:
            product = scratch[: block.numel()].view(block.shape)
            block.mul_(torch.mm(g, columns.T, out=product))
    return result.T.contiguous() if narrow else result


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _fake_dense(x: Tensor, weight: Tensor, q: float, generated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("dense(Tensor x, Tensor weight, float q, bool generated) -> Tensor", _fake_dense)
def dense(x: Tensor, weight: Tensor, q: float, generated: bool) -> Tensor:
    """``x @ (|weight| ** q).T``; shapes ``[..., in]`` and ``[out, in]``."""
    y = _forward(weight, _rows(x).T, q, generated)
    return y.T.reshape(*x.shape[:-1], weight.shape[0]).contiguous()


@operator(
    "dense_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!) out, float q, bool generated,"
    " bool needed) -> Tensor",
    lambda grad, x, *_: x.new_empty(x.shape),
)
def dense_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    q: float,
    generated: bool,
    needed: bool,
) -> Tensor:
    """Gradient of ``x``; the scores of ``weight`` go to ``out``."""
    found = _backward(_rows(grad).T, _rows(x).T, weight, out, q, generated, needed)
    return found.T.reshape(x.shape).contiguous()


def _fake_window(
    x: Tensor,
    weight: Tensor,
    matrices: Sequence[Tensor | None],
    extents: Sequence[int],
    groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    reads = x.shape[1] * math.prod(weight.shape[2:])
    columns = x.new_empty(reads, x.shape[0] * math.prod(extents))
    return x.new_empty(x.shape[0], weight.shape[0], *extents), columns


@operator(
    "window(Tensor x, Tensor weight, Tensor?[] matrices, int[] extents, int groups, float q,"
    " bool generated) -> (Tensor, Tensor)",
    _fake_window,
)
def window(
    x: Tensor,
    weight: Tensor,
    matrices: Sequence[Tensor | None],
    extents: Sequence[int],
    groups: int,
    q: float,
    generated: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`ops.window`, with ``|weight| ** q`` for the weight; and the columns."""
    columns = ops.columns(x, matrices)
    if all(matrix is None for matrix in matrices):
        columns = columns.clone()  # an operator must not return its argument
    flat = weight.reshape(weight.shape[0], -1)
    if groups == 1:
        y = _forward(flat, columns, q, generated)
    else:
        lifted = power_into(columns.new_empty(flat.shape), flat, q)
        y = ops.grouped(lifted, columns, groups)
    return y.reshape(len(weight), len(x), *extents).transpose(0, 1).contiguous(), columns


@operator(
    "window_backward(Tensor grad, Tensor columns, Tensor weight, Tensor(a!) out,"
    " Tensor?[] matrices, int[] shape, int groups, float q, bool generated, bool needed) -> Tensor",
    lambda grad, columns, weight, out, matrices, shape, *_: grad.new_empty(shape),
)
def window_backward(
    grad: Tensor,
    columns: Tensor,
    weight: Tensor,
    out: Tensor,
    matrices: Sequence[Tensor | None],
    shape: Sequence[int],
    groups: int,
    q: float,
    generated: bool,
    needed: bool,
) -> Tensor:
    """Gradient of the argument, of the given shape; the scores of ``weight`` go to ``out``."""
    g = grad.transpose(0, 1).reshape(grad.shape[1], -1)
    flat, scores = weight.reshape(len(weight), -1), out.view(len(weight), -1)
    if groups == 1:
        gradient = _backward(g, columns, flat, scores, q, generated, needed)
    else:
        split = g.reshape(groups, -1, g.shape[1])
        lifted = power_into(scores, flat, q).view(groups, -1, flat.shape[1])
        gradient = torch.bmm(lifted.transpose(1, 2), split).reshape(columns.shape)
        lifted.mul_(torch.bmm(split, columns.reshape(groups, -1, g.shape[1]).transpose(1, 2)))
    if not needed:
        return grad.new_zeros(shape)
    return ops.uncolumns(gradient, shape, matrices).contiguous()
