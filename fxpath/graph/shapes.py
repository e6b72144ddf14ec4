"""Steps of a derived graph that move entries, and transposes of those that sum them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxpath.graph.ops import DENSE_LIMIT


def filled(shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number everywhere."""
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


def channels_first(grad: Tensor) -> Tensor:
    """``[batch, channels, ...]`` as ``[channels, batch * positions]``."""
    turned = grad.transpose(0, 1)
    return turned.reshape(len(turned), math.prod(turned.shape[1:]))


def batch_first(made: Tensor, batch: int, extents: Sequence[int]) -> Tensor:
    """``[channels, batch * positions]`` as ``[batch, channels, *extents]``."""
    return made.reshape(len(made), batch, *extents).transpose(0, 1)


def last_first(x: Tensor) -> Tensor:
    """``[..., last]`` as ``[last, ...]``, the other axes in one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).t()


def last_last(made: Tensor, shape: Sequence[int]) -> Tensor:
    """The way back, to a given shape."""
    return made.t().reshape(list(shape))


def sum_to(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum over what was broadcast from a shape."""
    return grad.sum_to_size(tuple(shape))


def positions(shape: Sequence[int], device: torch.device) -> Tensor:
    """The number of each entry."""
    return torch.arange(math.prod(shape), device=device).reshape(tuple(shape))


def put_back(grad: Tensor, picked: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of picking entries by their numbers: what was picked twice adds up."""
    zeros = grad.new_zeros(math.prod(shape))
    return zeros.index_add(0, picked.reshape(-1), grad.reshape(-1)).reshape(tuple(shape))


def along_back(grad: Tensor, dim: int, index: Tensor, weight: Tensor, size: int) -> Tensor:
    """The transpose of :func:`fxpath.graph.ops.along`, to ``size`` positions."""
    out, taps = index.shape
    moved = grad.movedim(dim, -1)
    if out * size <= DENSE_LIMIT:
        matrix = weight.new_zeros(out, size).scatter_add(1, index, weight)
        return torch.matmul(moved, matrix).movedim(-1, dim)
    summed = moved.new_zeros(*moved.shape[:-1], size)
    for tap in range(taps):
        summed = summed.index_add(-1, index[:, tap], moved * weight[:, tap])
    return summed.movedim(-1, dim)


def contract_back(
    grad: Tensor, other: Tensor, out: str, theirs: str, own: str, shape: Sequence[int]
) -> Tensor:
    """Gradient of one argument of a contraction, from that of its result and the other argument.

    Args:
        grad: of the result, whose letters are ``out``.
        other: the other argument, whose letters are ``theirs``.
        out: see ``grad``.
        theirs: see ``other``.
        own: letters of the argument itself.
        shape: of that.
    """
    sizes = dict(zip(own, shape, strict=True))
    # Letters that it sums over alone: every entry counts the same.
    shared = [c for c in sizes if c in out or c in theirs]
    made = torch.einsum(f"{out},{theirs}->{''.join(shared)}", grad, other)
    # Of length 1: it was broadcast, or the other argument was.
    ends = zip(shared, made.shape, strict=True)
    made = made.sum_to_size([1 if sizes[c] == 1 else n for c, n in ends])
    made = made.expand([sizes[c] for c in shared])
    alone = [c for c in sizes if c not in shared]
    made = made.reshape([*made.shape, *[1] * len(alone)])
    made = made.expand([*made.shape[: len(shared)], *(sizes[c] for c in alone)])
    made = made.permute([[*shared, *alone].index(c) for c in sizes])
    return _diagonal(made, list(sizes), own)


def _diagonal(made: Tensor, letters: list[str], own: str) -> Tensor:
    """Entries where a letter that stands several times has equal indices; zeros elsewhere."""
    names, spare = list(letters), iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unused = (c for c in spare if c not in own)
    order: list[str] = []
    for c in own:
        if c not in order:
            order.append(c)
            continue
        new = next(unused)
        eye = torch.eye(made.shape[names.index(c)], dtype=made.dtype, device=made.device)
        terms = "".join(names)
        made = torch.einsum(f"{terms},{c}{new}->{terms}{new}", made, eye)
        names.append(new)
        order.append(new)
    return made.permute([names.index(c) for c in order])
