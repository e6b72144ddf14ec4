"""Steps of a derived graph that multiply: weights with what they read, and both transposes.

Shapes: a weight ``[outputs, ...]`` whose other axes are read as one, ``[outputs, inputs]``;
columns ``[inputs, positions]``; gradients ``[outputs, positions]``.

A sweep does the same to a weight that is not lifted yet, block by block of rows: |W| is formed,
used, and turned into scores while it is in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpath.graph.power import power, power_into

#: Entries of a weight that are lifted and used at once: 4 MB of float32 stay in the cache.
BLOCK = 1 << 20

#: Columns below which a product is taken with its operands transposed, which BLAS does faster.
NARROW = 16

#: Rows that are summed at a time where one vector is read: columns of many rows are not read in the
#: order of memory.
GROUP = 8


def lift(value: Tensor, dtype: torch.dtype, q: float) -> Tensor:
    """``|value| ** q``."""
    return power(value.to(dtype), q)


def product(weight: Tensor, columns: Tensor) -> Tensor:
    """``weight @ columns``."""
    flat = _flat(weight)
    if columns.shape[1] == 1:
        # Code that is generated lifts, multiplies and sums in one sweep.
        return (flat * columns[:, 0]).sum(1, keepdim=True)
    return flat @ columns


def product_back(weight: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the columns: ``weight.T @ grad``."""
    flat = _flat(weight)
    if grad.shape[1] != 1:
        return flat.T @ grad
    if len(flat) % GROUP:
        return (flat * grad).sum(0)[:, None]
    groups = len(flat) // GROUP
    grouped = flat.reshape(groups, GROUP, flat.shape[1]) * grad.reshape(groups, GROUP, 1)
    return grouped.sum(1).sum(0)[:, None]


def outer(grad: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight: ``grad @ columns.T``."""
    if columns.shape[1] == 1:
        return (grad * columns[:, 0]).reshape(weight.shape)
    return (grad @ columns.T).reshape(weight.shape)


def outer_sum(grad: Tensor, columns: Tensor) -> Tensor:
    """The sum of all entries of :func:`outer`."""
    return (grad.sum(0) * columns.sum(0)).sum()


def score(weight: Tensor, grad: Tensor, columns: Tensor) -> Tensor:
    """Shares (14) of a lifted weight: itself times its gradient."""
    return weight * outer(grad, columns, weight)


def grouped(weight: Tensor, columns: Tensor, groups: int) -> Tensor:
    """:func:`product` for each group of output channels and its input channels."""
    made = torch.bmm(_split(_flat(weight), groups), _split(columns, groups))
    return made.reshape(len(weight), columns.shape[1])


def grouped_back(weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    """:func:`product_back` for each group."""
    made = torch.bmm(_split(_flat(weight), groups).transpose(1, 2), _split(grad, groups))
    return made.reshape(groups * made.shape[1], grad.shape[1])


def grouped_outer(grad: Tensor, columns: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """:func:`outer` for each group, in the weight's shape."""
    made = torch.bmm(_split(grad, groups), _split(columns, groups).transpose(1, 2))
    return made.reshape(shape)


def _split(x: Tensor, groups: int) -> Tensor:
    return x.reshape(groups, len(x) // groups, x.shape[1])


def steepness(a: Tensor, dtype: torch.dtype, q: float) -> Tensor:
    """The factor of a slope: ``max(1, |a|) ** q``."""
    steep = a.to(dtype).abs().clamp(min=1)
    return steep if q == 1 else steep.pow(q)


def high(weight: Tensor) -> Tensor:
    """The largest entry of a lifted weight, 0-d; 0 for none."""
    if not weight.numel():
        return weight.new_zeros(())
    # By rows: code that is generated looks for it while it multiplies them.
    return (_flat(weight).amax(1) if weight.dim() > 1 else weight).max()


def low(scores: Tensor) -> Tensor:
    """The smallest of some scores, ``[1]``, or of each row, ``[rows]``; inf for none."""
    if not scores.numel():
        return scores.new_full((1,), math.inf)
    return _flat(scores).amin(1) if scores.dim() > 1 else scores.min().reshape(1)


def parts(shape: Sequence[int], count: int, device: torch.device) -> list[Any]:
    """Where in some scores the smallest one was looked for: everywhere, in each block or row."""
    if count == 1:
        return [...]
    return [*range(count)] if count == shape[0] else list(_blocks(_rows(shape), device))


# -- sweeps ----------------------------------------------------------------------------------------


def scratch(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for blocks, once for all sweeps of a run: fresh pages cost as much as a product."""
    return torch.empty(size, dtype=dtype, device=device)


def block_size(shape: Sequence[int], device: torch.device) -> int:
    """Entries of the largest block of a weight."""
    flat = _rows(shape)
    return max(((r.stop - r.start) * flat[1] for r in _blocks(flat, device)), default=0)


def sweep(
    weight: Tensor, columns: Tensor, q: float, memory: Tensor
) -> tuple[Tensor, Tensor | None]:
    """:func:`product` of a weight that is lifted on the way.

    ``memory`` is for one block, or has the weight's shape: then the lifted weight stays there, and
    :func:`high` is returned as well.
    """
    flat = _flat(weight)
    kept = _flat(memory) if memory.shape == weight.shape else None
    y = columns.new_empty(flat.shape[0], columns.shape[1])
    narrow = columns.T.contiguous() if columns.shape[1] < NARROW else None
    most = None if kept is None else flat.new_zeros((), dtype=memory.dtype)
    for rows in _blocks(flat.shape, flat.device):
        part = flat[rows]
        block = memory[: part.numel()].view(part.shape) if kept is None else kept[rows]
        power_into(block, part, q)
        if narrow is None:
            torch.mm(block, columns, out=y[rows])
        elif len(narrow) == 1:
            torch.mv(block, narrow[0], out=y[rows, 0])
        else:
            y[rows] = torch.mm(narrow, block.T).T
        if most is not None and block.numel():
            most = torch.maximum(most, block.max())
    return y, most


def sweep_back(
    out: Tensor, grad: Tensor, columns: Tensor, memory: Tensor, gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """:func:`product_back` if ``gradient``, and ``out``, the lifted weight, becomes its scores.

    Returns:
        That gradient, and the smallest score of each block.
    """
    flat, narrow = _flat(out), columns.shape[1] < NARROW
    # Nothing is added to what stands there before the first block.
    made = columns.new_empty if len(flat) else columns.new_zeros
    result = made(columns.T.shape if narrow else columns.shape) if gradient else None
    lows = []
    for rows in _blocks(flat.shape, flat.device):
        beta, g, block = int(rows.start > 0), grad[rows], flat[rows]
        if result is None:
            pass
        elif len(result) == 1 and narrow:
            result[0].addmv_(block.T, g[:, 0], beta=beta)
        else:
            result.addmm_(*((g.T, block) if narrow else (block.T, g)), beta=beta)
        if columns.shape[1] == 1:
            block.mul_(g).mul_(columns[:, 0])
        else:
            product = memory[: block.numel()].view(block.shape)
            block.mul_(torch.mm(g, columns.T, out=product))
        lows.append(block.min() if block.numel() else flat.new_full((), math.inf))
    least = torch.stack(lows) if lows else low(flat)
    return result.T if result is not None and narrow else result, least


def swept(weight: Tensor, columns: Tensor, q: float) -> tuple[Tensor, Tensor | None]:
    """:func:`sweep` and :func:`high`; the lifted weight is dropped."""
    return sweep(weight, columns, q, columns.new_empty(weight.shape))


def swept_back(
    weight: Tensor, q: float, grad: Tensor, columns: Tensor, memory: Tensor, gradient: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """:func:`sweep_back` of a weight that is lifted anew, and its scores."""
    scores = power_into(columns.new_empty(weight.shape), weight, q)
    return *sweep_back(scores, grad, columns, memory, gradient), scores


def lift_into(out: Tensor, value: Tensor, q: float) -> Tensor:
    """:func:`lift` where the scores will stand."""
    return power_into(out, value, q)


def times_into(out: Tensor, grad: Tensor) -> Tensor:
    """Scores where the lifted weight stands."""
    return out.mul_(grad)


def copy_into(out: Tensor, scores: Tensor) -> Tensor:
    """Scores that were computed elsewhere."""
    return out.copy_(scores)


def _flat(weight: Tensor) -> Tensor:
    return weight.reshape(_rows(weight.shape))


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _blocks(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Blocks of rows that stay in the cache of a CPU; elsewhere all at once."""
    rows, columns = shape
    step = max(1, BLOCK // max(1, columns)) if device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
