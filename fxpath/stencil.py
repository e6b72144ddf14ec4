"""Stencils: what a spatial operation does along one axis.

Output position ``o`` reads input positions ``p(o, k)`` with coefficients ``c(o, k)`` of any sign.
Pooling, padding, slicing, flipping, upsampling and means are all a product of such maps, one per
axis. Coefficients are kept as exact rationals, since equality of coefficients decides which
positions are equal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

#: Coefficients are exact: integers, and fractions where they must be.
Coefficient = int | Fraction
ONE = 1


@dataclass(frozen=True)
class Stencil:
    """A map along one axis of length ``size``; ``rows[o]`` lists ``(position, coefficient)``.

    Taps that read the same position are added up (bilinear upsampling at a border), so positions in
    a row are distinct.

    >>> Stencil.of(3, [[(0, ONE), (0, ONE)], [(2, ONE)]]).rows
    (((0, 2),), ((2, 1),))
    """

    size: int
    rows: tuple[tuple[tuple[int, Coefficient], ...], ...]

    @classmethod
    def of(cls, size: int, rows: Iterable[Iterable[tuple[int, Coefficient]]]) -> Stencil:
        """Build from rows that may repeat a position or hold zero coefficients."""
        merged = []
        for row in rows:
            taps: dict[int, Coefficient] = {}
            for position, c in row:
                taps[position] = taps.get(position, 0) + c
            merged.append(tuple(sorted((p, c) for p, c in taps.items() if c)))
        return cls(size, tuple(merged))

    @classmethod
    def select(cls, size: int, positions: Iterable[int | None]) -> Stencil:
        """Pick positions; ``None`` is a position that reads nothing."""
        return cls(size, tuple(() if p is None else ((p, ONE),) for p in positions))

    @property
    def out(self) -> int:
        """Length of the axis afterwards."""
        return len(self.rows)

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether nothing happens."""
        return self.out == self.size and all(
            len(row) == 1 and row[0] == (o, ONE) for o, row in enumerate(self.rows)
        )

    @functools.cached_property
    def picks(self) -> tuple[int | None, ...] | None:
        """The position that each row picks, ``None`` for nothing; no tuple if it does more."""
        if any(len(row) > 1 or (row and row[0][1] != ONE) for row in self.rows):
            return None
        return tuple(row[0][0] if row else None for row in self.rows)

    def after(self, first: Stencil) -> Stencil:
        """The composition: ``first``, then this one."""
        return Stencil.of(
            first.size,
            ([(p, c * d) for m, d in row for p, c in first.rows[m]] for row in self.rows),
        )

    def unsigned(self) -> Stencil:
        """The same map with the sizes of its coefficients."""
        if all(c >= 0 for row in self.rows for _, c in row):
            return self
        return Stencil.of(
            self.size, ([(p, c if c > 0 else -c) for p, c in row] for row in self.rows)
        )

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Positions (int64) and coefficients (float64), both ``[out, taps]``, padded with zeros."""
        taps = max((len(row) for row in self.rows), default=0) or 1
        index = torch.zeros(self.out, taps, dtype=torch.int64)
        weight = torch.zeros(self.out, taps, dtype=torch.float64)
        for o, row in enumerate(self.rows):
            for k, (p, c) in enumerate(row):
                index[o, k] = p
                weight[o, k] = float(c)
        return index, weight


def windows(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> list[list[int]]:
    """Positions inside the input that each pooling window covers."""
    span = dilation * (kernel - 1) + 1
    room = size + 2 * padding - span
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window must start inside the input or its left padding
    return [
        [
            p
            for p in range(o * stride - padding, o * stride - padding + span, dilation)
            if 0 <= p < size
        ]
        for o in range(count)
    ]


def max_pool(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> Stencil:
    """Sum over each window; padding is no edge."""
    rows = windows(size, kernel, stride, padding, dilation, ceil_mode)
    return Stencil(size, tuple(tuple((p, ONE) for p in row) for row in rows))


def avg_pool(
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    ceil_mode: bool,
    include_padding: bool,
    divide: bool = True,
) -> Stencil:
    """Mean over each window, with PyTorch's divisor for windows that leave the input."""
    rows = []
    for o, row in enumerate(windows(size, kernel, stride, padding, 1, ceil_mode)):
        start = o * stride - padding
        covered = min(start + kernel, size + padding) - start
        divisor = covered if include_padding else len(row)
        rows.append(tuple((p, Fraction(1, divisor) if divide else ONE) for p in row))
    return Stencil(size, tuple(rows))


def adaptive_pool(size: int, out: int, mean: bool) -> Stencil:
    """Windows from floor(o * size / out) to ceil((o + 1) * size / out)."""
    rows = []
    for o in range(out):
        window = range(o * size // out, -(-(o + 1) * size // out))
        rows.append(tuple((p, Fraction(1, len(window)) if mean else ONE) for p in window))
    return Stencil(size, tuple(rows))


def whole(size: int, coefficient: Coefficient) -> Stencil:
    """One output position that sums the axis with one coefficient."""
    return Stencil(size, (tuple((p, coefficient) for p in range(size)),))


def pad(size: int, before: int, after: int, mode: str) -> Stencil:
    """Padding (negative: cropping) by constant, reflect, replicate or circular."""
    positions: list[int | None] = []
    if mode == "circular":
        # Cropped first: what wraps around comes from the part that is left.
        left = range(max(-before, 0), size - max(-after, 0))
        around = range(-max(before, 0), len(left) + max(after, 0))
        return Stencil.select(size, [left[p % len(left)] for p in around])
    for p in range(-before, size + after):
        if 0 <= p < size:
            positions.append(p)
        elif mode == "constant":
            positions.append(None)
        elif mode == "replicate":
            positions.append(min(max(p, 0), size - 1))
        else:
            positions.append(-p if p < 0 else 2 * (size - 1) - p)
    return Stencil.select(size, positions)


def resample(size: int, run: Callable[[Tensor], Tensor]) -> Stencil:
    """Taps of an upsampling operation, read off the operation itself.

    ``run`` maps ``[1, size, size]`` to ``[1, size, out]``: fed with the identity it returns its own
    matrix, with PyTorch's rounding of source positions.  Coefficients are multiples of simple
    fractions; the nearest one within 1e-12 is taken, so that equal coefficients compare equal.
    """
    matrix = run(torch.eye(size, dtype=torch.float64)[None])[0].T
    rows: list[list[tuple[int, Coefficient]]] = [[] for _ in range(matrix.shape[0])]
    for o, p in matrix.nonzero().tolist():
        rows[o].append((p, rational(matrix[o, p].item())))
    return Stencil.of(size, rows)


def rational(value: float) -> Fraction:
    """The simple fraction next to a coefficient, if one is within its rounding."""
    near = Fraction(value).limit_denominator(1 << 20)
    return near if math.isclose(near, value, rel_tol=1e-12, abs_tol=1e-14) else Fraction(value)


def per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """PyTorch's convention for kernel sizes: one number for all axes, or one for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values
