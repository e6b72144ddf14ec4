"""The vocabulary of the lifted network.

Every supported ATen operation is rewritten into the few functions below, so that whatever
interprets a lifted graph (the path-norm, its reduction, a metric between two sets of weights) has
these to understand and no others.  Called as they are, they compute the l^1 path-norm without any
care for range: a source of ones, entries of theta in absolute value, sums instead of maxima.

The graph that the rules write says more than path mass depends on: ReLU, absolute value and sign,
which bound, and which rank of a window, so that two networks can be told apart and values can be
computed.  Path mass ignores all of that: see ``fxpath.graph.links.seen_through``.

Operations that only move entries (``aten.reshape``, ``aten.permute``, ``aten.cat``) appear in a
lifted graph under their own name: they do the same to every kind of value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxpath.graph.aten import CONVOLUTION
from fxpath.graph.equations import letters
from fxpath.graph.products import grouped

__all__ = [
    "absolute",
    "add",
    "along",
    "clamp",
    "coefficient",
    "constant",
    "contract",
    "conv",
    "coordinate",
    "factored",
    "folded_bias",
    "folded_weight",
    "gate",
    "maximum",
    "minimum",
    "mix",
    "negative",
    "normalizer",
    "pool",
    "relu",
    "scale",
    "shift",
    "slope",
    "source",
    "squash",
    "total",
    "window",
]


# -- where a value begins -------------------------------------------------------------------------


def source(shape: Sequence[int]) -> Tensor:
    """Input neurons: the empty product of Def. A.5, one for every entry."""
    return torch.ones(tuple(shape))


def coordinate(value: Tensor, name: str) -> Tensor:
    """Entries of the effective parameter vector theta, scored under ``name``."""
    return value.abs()


def coefficient(value: Tensor) -> Tensor:
    """Fixed edge weights of the architecture: they count on a path, but carry no score.

    What is read keeps its sign, which belongs to the architecture too.
    """
    return value.abs()


def constant(bias: Tensor) -> Tensor:
    """Neurons without antecedents other than their bias."""
    return bias


# -- effective parameters (evaluated before the absolute value) ------------------------------------


def normalizer(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """Gamma / sigma of a frozen batch norm, in float64; shape ``[channels]``."""
    inverse = (var.double() + eps).rsqrt()
    return inverse if gamma is None else gamma.double() * inverse


def folded_weight(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """Weight of a map followed by a frozen batch norm: ``factor`` along its output channels.

    In float64, like the factor: a large one often meets a small weight, whose product is no zero.
    ``axis`` is the output axis of ``weight``; a transposed convolution (axis 1) lists the output
    channels of each of its ``groups`` apart, in blocks along axis 0.
    """
    weight = weight.to(factor.dtype)
    if axis == 0:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    per_block = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (blocks * per_block).reshape(weight.shape)


def folded_bias(bias: Tensor | None, factor: Tensor, beta: Tensor | None, mean: Tensor) -> Tensor:
    """Bias beta + factor * (bias - mean), in float64: the one place where something can cancel."""
    centre = -mean.double() if bias is None else bias.double() - mean.double()
    folded = factor * centre
    return folded if beta is None else folded + beta.double()


def factored(weight: Tensor, factor: Tensor) -> Tensor:
    """A weight, and a factor for each of its output channels, which lie along its first axis."""
    return weight * beside(factor, weight, 0)


# -- weighted sums ---------------------------------------------------------------------------------
# Of activations and weights, and a bias (``None``: none) that broadcasts to the result.


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution, in ``aten.convolution``'s convention but for the bias."""
    y = CONVOLUTION(
        x, weight.to(x.dtype), None, stride, padding, dilation, transposed, output_padding, groups
    )
    return _biased(y, bias)


def contract(x: Tensor, weight: Tensor, bias: Tensor | None, equation: str) -> Tensor:
    """Sums over shared axes: see :mod:`fxpath.graph.equations`."""
    weight = weight.to(x.dtype)
    if letters(equation).dense:
        return _biased(torch.nn.functional.linear(x, weight), bias)
    return _biased(torch.einsum(equation, x, weight), bias)


def scale(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One edge per entry: ``x * weight`` with broadcasting."""
    return _biased(x * weight.to(x.dtype), bias)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else shift(y, bias)


def window(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    matrices: Sequence[Tensor | None],
    extents: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution whose taps read ``x`` through matrices ``[taps, out, in]``.

    There is one for each spatial axis, or one for all positions together; ``extents`` are those of
    the result.  The matrices hold fixed coefficients, already raised to the exponent q.  ``None``
    reads an axis as it is, with one tap.  Where each tap reads one position alone, or none,
    ``[taps, out]`` integers say which in place of a matrix, counted over all axes; the number of
    positions stands for none.
    """
    y = grouped(weight.to(x.dtype), columns(x, matrices), groups)
    return _biased(y.reshape(len(weight), len(x), *extents).transpose(0, 1), bias)


def columns(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """What each tap reads at each output position: ``[channels * taps, batch * positions]``.

    Entries are ordered as in a kernel: channel, then taps axis by axis.
    """
    batch, channels, *_ = x.shape
    picked = _picked(matrices)
    if picked is not None:
        count, out = picked.shape
        flat = x.transpose(0, 1).reshape(channels, batch, math.prod(x.shape[2:]))
        read = torch.nn.functional.pad(flat, (0, 1)).index_select(-1, picked.flatten())
        split = read.reshape(channels, batch, count, out).transpose(1, 2)
        return split.reshape(channels * count, batch * out)
    sizes = _positions(x.shape, matrices)
    matrix = matrices[0] if batch == 1 and len(matrices) == 1 else None
    if matrix is not None:  # for all positions together: nothing has to be permuted
        read = x.reshape(channels, -1) @ matrix.flatten(0, 1).to(x.dtype).T
        return read.reshape(-1, matrix.shape[1])
    y = x.transpose(0, 1).reshape(batch * channels, *sizes)
    shapes = [_tapped(n, m) for n, m in zip(sizes, matrices, strict=True)]
    for axis in reversed(range(len(sizes))):
        matrix = matrices[axis]
        if matrix is not None:
            y = mix(y, 1 + axis, matrix.reshape(-1, sizes[axis]).to(x.dtype))
    split = y.reshape(channels, batch, *(n for shape in shapes for n in shape))
    taps, positions = _interleaved(len(sizes))
    merged = split.permute(0, *taps, 1, *positions)
    count = math.prod(k for k, _ in shapes)
    return merged.reshape(channels * count, -1)


def uncolumns(grad: Tensor, shape: Sequence[int], matrices: Sequence[Tensor | None]) -> Tensor:
    """The transpose of :func:`columns`: from its result's shape back to ``shape``."""
    batch, channels, *extents = shape
    picked = _picked(matrices)
    if picked is not None:
        taps, out = picked.shape
        split = grad.reshape(channels, taps, batch, out).transpose(1, 2)
        zeros = grad.new_zeros(channels, batch, math.prod(extents) + 1)
        read = zeros.index_add(-1, picked.flatten(), split.reshape(channels, batch, taps * out))
        return read[..., :-1].reshape(channels, batch, *extents).transpose(0, 1)
    sizes = _positions(shape, matrices)
    matrix = matrices[0] if batch == 1 and len(matrices) == 1 else None
    if matrix is not None:
        read = grad.reshape(channels, -1) @ matrix.flatten(0, 1).to(grad.dtype)
        return read.reshape(tuple(shape))
    shapes = [_tapped(n, m) for n, m in zip(sizes, matrices, strict=True)]
    split = grad.reshape(channels, *(k for k, _ in shapes), batch, *(o for _, o in shapes))
    order = [1 + len(sizes)]
    for axis in range(len(sizes)):
        order += [1 + axis, 2 + len(sizes) + axis]
    y = split.permute(0, *order).reshape(channels * batch, *(k * o for k, o in shapes))
    for axis in range(len(sizes)):
        matrix = matrices[axis]
        if matrix is not None:
            y = mix(y, 1 + axis, matrix.reshape(-1, sizes[axis]).to(grad.dtype).T)
    return y.reshape(channels, batch, *extents).transpose(0, 1)


def _picked(matrices: Sequence[Tensor | None]) -> Tensor | None:
    """Which position each tap reads, if it reads one."""
    first = matrices[0] if matrices else None
    return None if first is None or first.is_floating_point() else first


def _positions(shape: Sequence[int], matrices: Sequence[Tensor | None]) -> list[int]:
    """Spatial extents, all in one where one matrix reads all positions."""
    return list(shape[2:]) if len(matrices) == len(shape) - 2 else [math.prod(shape[2:])]


def _tapped(size: int, matrix: Tensor | None) -> tuple[int, int]:
    """Taps and output positions of one axis."""
    return (1, size) if matrix is None else (matrix.shape[0], matrix.shape[1])


def _interleaved(axes: int) -> tuple[list[int], list[int]]:
    """Where taps and positions stand in ``[channels, batch, taps, positions, taps, ...]``."""
    return [2 + 2 * axis for axis in range(axes)], [3 + 2 * axis for axis in range(axes)]


def shift(x: Tensor, bias: Tensor) -> Tensor:
    """Biases: ``x + bias`` with broadcasting."""
    return x + bias.to(x.dtype)


def beside(weight: Tensor, x: Tensor, axis: int) -> Tensor:
    """A 1-d weight shaped to broadcast along one axis of ``x``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return weight.reshape(shape)


def slope(x: Tensor, a: Tensor | float) -> Tensor:
    """Activation with values in {1, a} on a path: factor max(1, |a|), architecture."""
    return x * steepness(a, x.dtype)


def steepness(a: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """``max(1, |a|)``."""
    return a.to(dtype).abs().clamp(min=1) if isinstance(a, Tensor) else max(1.0, abs(a))


# -- fixed sums ------------------------------------------------------------------------------------


def along(x: Tensor, dim: int, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of positions along one axis: a linear map with fixed coefficients >= 0.

    Output position ``o`` is ``sum_k weight[o, k] * x[index[o, k]]``; both of shape ``[out, taps]``.
    Unused taps have weight 0.
    """
    out, taps = index.shape
    size = x.shape[dim]
    moved = x.movedim(dim, -1)
    if taps == 1:
        summed = moved.index_select(-1, index[:, 0]) * weight[:, 0].to(x.dtype)
    elif out * size <= DENSE_LIMIT:
        matrix = weight.new_zeros(out, size).scatter_add(1, index, weight).to(x.dtype)
        summed = torch.matmul(moved, matrix.T)
    else:
        # A long axis (audio): a dense matrix would not fit, one gather per tap does.
        summed = moved.new_zeros(*moved.shape[:-1], out)
        for tap in range(taps):
            picked = moved.index_select(-1, index[:, tap])
            summed = summed + picked * weight[:, tap].to(x.dtype)
    return summed.movedim(-1, dim)


def pool(x: Tensor, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """k-max-pooling windows along one axis, lifted: the sum over the window (edges of weight 1).

    ``ranks`` are the k of each output position, or one for all: 1 is the largest entry, -1 the
    smallest.  Path mass does not depend on them.
    """
    return along(x, dim, index, weight)


def mix(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """A fixed map along one axis as a matrix ``[out, in]``, already raised to the exponent q."""
    if not 0 <= dim < x.dim():
        raise IndexError(f"axis {dim} of a tensor with {x.dim()}")
    shape = (*x.shape[:dim], matrix.shape[0], *x.shape[dim + 1 :])
    matrix = matrix.to(x.dtype)
    size = x.shape[dim]
    before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    if after == 1:
        return (x.reshape(before, size) @ matrix.T).reshape(shape)
    if before == 1:
        return (matrix @ x.reshape(size, after)).reshape(shape)
    return torch.bmm(matrix.expand(before, -1, -1), x.reshape(before, size, after)).reshape(shape)


#: Entries up to which a map along an axis is applied as a dense matrix.
DENSE_LIMIT = 1 << 22


def add(x: Tensor, y: Tensor) -> Tensor:
    """Identity neurons with two antecedents."""
    return x + y


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """2-max-pooling neurons, lifted: the sum."""
    return x + y


def clamp(x: Tensor, lo: float | None, hi: float | None) -> Tensor:
    """2-max-pooling against constant neurons ``lo`` and ``hi``: ``x + |lo| + |hi|``.

    ``None`` leaves a side open.
    """
    return x + sum(bound_sizes(lo, hi))


def bound_sizes(lo: float | None, hi: float | None) -> tuple[float, float]:
    """Sizes of the bounds of a clamp; 0, which adds no path mass, for a side that is open."""
    return abs(lo or 0.0), abs(hi or 0.0)


# -- words that path mass ignores ------------------------------------------------------------------


def relu(x: Tensor) -> Tensor:
    """ReLU neurons: activations 0 or 1."""
    return x


def absolute(x: Tensor) -> Tensor:
    """Absolute values: activations -1 or 1."""
    return x


def negative(x: Tensor) -> Tensor:
    """An edge of weight -1, of an activation or of a weight."""
    return x


def minimum(x: Tensor, y: Tensor) -> Tensor:
    """The smaller one of two: 2-max-pooling like :func:`maximum`, of the other rank."""
    return x + y


def squash(x: Tensor, name: str, numbers: Sequence[float], size: float) -> Tensor:
    """A gate of itself, ``sigma(x / size)``: activations in [-1, 1], see ``fxpath.graph.squashes``.

    ``x`` was multiplied by the size before.  Inside a gate it may be any function of the table.
    """
    return x


def gate(x: Tensor, factor: Tensor | None, size: float) -> Tensor:
    """``x factor / size`` with ``|factor| <= size``, whatever the parameters: values in [-1, 1].

    ``x`` was multiplied by the size before.  ``None`` stands for a factor that is not followed.
    """
    return x


#: Words between an activation and what reads it that path mass ignores.
IGNORED = (relu, absolute, negative, squash, gate)


def total(outputs: Sequence[Tensor]) -> Tensor:
    """Sum over all output neurons: the path-norm."""
    return torch.stack([output.sum() for output in outputs]).sum()
