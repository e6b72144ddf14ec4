"""Stencils: what a spatial operation does along one axis.

Output position ``o`` reads input positions ``p(o, k)`` with coefficients ``c(o, k)`` of any
sign.  Pooling,
padding, slicing, flipping, upsampling and means are all a product of such maps, one per axis.
Coefficients are kept as exact rationals, since equality of coefficients decides which positions
are equal.

A stencil is a sparse matrix: its entries are arrays of integers, so that half a million samples of
sound cost no more than reading them a few times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fxpath.graph.exact import Coefficient, exact_sums

#: The coefficient of a plain selection or sum.
ONE = 1


@dataclass(frozen=True, eq=False)
class Stencil:
    """A map along an axis of length ``size`` to one of length ``out``, as its non-zero entries.

    Taps that read the same position are added up (bilinear upsampling at a border), so no two
    entries have the same row and position.

    Attributes:
        size: length of the axis before.
        out: length of the axis afterwards.
        row: output position of each entry, rising; int64 ``[entries]``.
        position: input position of each entry, rising within a row; int64 ``[entries]``.
        code: place of each entry's coefficient in ``table``; int64 ``[entries]``.
        table: the coefficients, all different and exact.

    Example:
        >>> Stencil.of(3, [[(0, ONE), (0, ONE)], [(2, ONE)]]).rows
        (((0, 2),), ((2, 1),))
    """

    size: int
    out: int
    row: Tensor
    position: Tensor
    code: Tensor
    table: tuple[Coefficient, ...]

    @classmethod
    def of(cls, size: int, rows: Iterable[Iterable[tuple[int, Coefficient]]]) -> Stencil:
        """Build from rows that may repeat a position or hold zero coefficients."""
        codes: dict[Coefficient, int] = {}
        row, position, code, out = [], [], [], 0
        for out, taps in enumerate(rows, 1):
            for p, c in taps:
                row.append(out - 1)
                position.append(p)
                code.append(codes.setdefault(c, len(codes)))
        entries = [torch.tensor(e, dtype=torch.int64) for e in (row, position, code)]
        return cls.sparse(size, out, entries[0], entries[1], entries[2], tuple(codes))

    @classmethod
    def sparse(
        cls,
        size: int,
        out: int,
        row: Tensor,
        position: Tensor,
        code: Tensor,
        table: tuple[Coefficient, ...],
    ) -> Stencil:
        """Build from entries in any order that may share a place or be zero."""
        places, code, table = exact_sums(row * size + position, code, table)
        return cls(size, out, places // max(size, 1), places % max(size, 1), code, table)

    @classmethod
    def select(cls, size: int, positions: Iterable[int | None]) -> Stencil:
        """Pick positions; ``None`` is a position that reads nothing."""
        picked = [-1 if p is None else p for p in positions]
        return _picked(size, torch.tensor(picked, dtype=torch.int64))

    @classmethod
    def plain(cls, size: int, out: int, row: Tensor, position: Tensor) -> Stencil:
        """Sums of positions: all coefficients are one."""
        return cls(size, out, row, position, row.new_zeros(1).expand(len(row)), (ONE,))

    @functools.cached_property
    def rows(self) -> tuple[tuple[tuple[int, Coefficient], ...], ...]:
        """For each output position the ``(position, coefficient)`` pairs that it reads."""
        rows: list[list[tuple[int, Coefficient]]] = [[] for _ in range(self.out)]
        entries = zip(self.row.tolist(), self.position.tolist(), self.code.tolist(), strict=True)
        for o, p, code in entries:
            rows[o].append((p, self.table[code]))
        return tuple(map(tuple, rows))

    @functools.cached_property
    def reads(self) -> Tensor:
        """How many positions each output position reads; int64 ``[out]``."""
        return torch.bincount(self.row, minlength=self.out)

    @functools.cached_property
    def is_selection(self) -> bool:
        """Whether each output position picks one position, or none."""
        if not bool((self.row[1:] > self.row[:-1]).all()):
            return False
        return len(self.row) == 0 or (
            ONE in self.table and bool((self.code == self.table.index(ONE)).all())
        )

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether nothing happens."""
        return (
            self.out == self.size == len(self.row)
            and self.is_selection
            and torch.equal(self.row, self.position)
        )

    @property
    def picks(self) -> tuple[int | None, ...] | None:
        """The position that each row picks, ``None`` for nothing; no tuple if it does more."""
        if not self.is_selection:
            return None
        picked: list[int | None] = [None] * self.out
        for o, p in zip(self.row.tolist(), self.position.tolist(), strict=True):
            picked[o] = p
        return tuple(picked)

    def after(self, first: Stencil) -> Stencil:
        """The composition: ``first``, then this one."""
        # Each entry (o, m) of this one meets all entries (m, p) of the first one's row m.
        lengths = first.reads[self.position]
        mine = torch.arange(len(self.row)).repeat_interleave(lengths)
        within = torch.arange(len(mine)) - (lengths.cumsum(0) - lengths)[mine]
        theirs = (first.reads.cumsum(0) - first.reads)[self.position[mine]] + within
        table: dict[Coefficient, int] = {}
        products = [table.setdefault(c * d, len(table)) for c in self.table for d in first.table]
        code = self.code[mine] * len(first.table) + first.code[theirs]
        codes = torch.tensor(products, dtype=torch.int64)[code]
        row, position = self.row[mine], first.position[theirs]
        return Stencil.sparse(first.size, self.out, row, position, codes, tuple(table))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Positions (int64) and coefficients (float64), both ``[out, taps]``, padded with zeros."""
        taps = max(1, int(self.reads.max())) if self.out else 1
        index = torch.zeros(self.out, taps, dtype=torch.int64)
        weight = torch.zeros(self.out, taps, dtype=torch.float64)
        tap = torch.arange(len(self.row)) - (self.reads.cumsum(0) - self.reads)[self.row]
        index[self.row, tap] = self.position
        weight[self.row, tap] = self.values()
        return index, weight

    def values(self) -> Tensor:
        """Coefficients of the entries, float64 ``[entries]``."""
        return floats(self.table)[self.code]


def floats(table: Sequence[Coefficient]) -> Tensor:
    """Coefficients rounded to float64."""
    return torch.tensor([float(c) for c in table], dtype=torch.float64)


def _windows(size: int, first: Tensor, count: Tensor, step: int, divisor: Tensor) -> Stencil:
    """Row ``o``: ``count[o]`` positions from ``first[o]`` on, each with ``1 / divisor[o]``."""
    row = torch.arange(len(first)).repeat_interleave(count)
    within = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    kinds, code = torch.unique(divisor, return_inverse=True)
    table = tuple(ONE if d == 1 else Fraction(1, d) for d in kinds.tolist())
    return Stencil(size, len(first), row, first[row] + step * within, code[row], table)


def _pool(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pooling window starts, its first position inside, and how many there are."""
    span = dilation * (kernel - 1) + 1
    room = size + 2 * padding - span
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window must start inside the input or its left padding
    start = torch.arange(count) * stride - padding
    # Taps before the input are skipped, and so are those behind it.
    skipped = (-start).clamp(min=0).add(dilation - 1) // dilation
    end = (-(-(size - start) // dilation)).clamp(max=kernel)
    return start, start + skipped * dilation, (end - skipped).clamp(min=0)


def max_pool(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> Stencil:
    """Sum over each window; padding is no edge."""
    _, first, count = _pool(size, kernel, stride, padding, dilation, ceil_mode)
    return _windows(size, first, count, dilation, torch.ones_like(first))


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
    start, first, count = _pool(size, kernel, stride, padding, 1, ceil_mode)
    covered = (start + kernel).clamp(max=size + padding) - start
    divisor = covered if include_padding else count.clamp(min=1)
    return _windows(size, first, count, 1, divisor if divide else torch.ones_like(count))


def adaptive_pool(size: int, out: int, mean: bool) -> Stencil:
    """Windows from floor(o * size / out) to ceil((o + 1) * size / out)."""
    o = torch.arange(out)
    first = o * size // max(out, 1)
    count = -(-(o + 1) * size // max(out, 1)) - first
    return _windows(size, first, count, 1, count.clamp(min=1) if mean else torch.ones_like(count))


def whole(size: int, coefficient: Coefficient) -> Stencil:
    """One output position that sums the axis with one coefficient."""
    position = torch.arange(size)
    zeros = torch.zeros(1, dtype=torch.int64).expand(size)
    return Stencil(size, 1, zeros, position, zeros, (coefficient,))


def pad(size: int, before: int, after: int, mode: str) -> Stencil:
    """Padding (negative: cropping) by constant, reflect, replicate or circular."""
    if mode == "circular":
        # Cropped first: what wraps around comes from the part that is left.
        left = torch.arange(max(-before, 0), size - max(-after, 0))
        around = torch.arange(-max(before, 0), len(left) + max(after, 0))
        return _picked(size, left[around % len(left)])
    position = torch.arange(-before, size + after)
    if mode == "constant":
        return _picked(size, torch.where((position >= 0) & (position < size), position, -1))
    if mode == "replicate":
        return _picked(size, position.clamp(0, size - 1))
    reflected = torch.where(position < size, position, 2 * (size - 1) - position)
    return _picked(size, torch.where(position < 0, -position, reflected))


def _picked(size: int, positions: Tensor) -> Stencil:
    """One position for each row, -1 for none."""
    row = (positions >= 0).nonzero()[:, 0]
    return Stencil.plain(size, len(positions), row, positions[row])


def resample(size: int, run: Callable[[Tensor], Tensor]) -> Stencil:
    """Taps of an upsampling operation, read off the operation itself.

    ``run`` maps ``[1, n, size]`` to ``[1, n, out]`` with coefficients that add up to one: fed with
    few vectors it shows its own matrix, with PyTorch's rounding of source positions.  Coefficients
    are multiples of simple fractions; the nearest one within 1e-12 is taken, so that equal
    coefficients compare equal.
    """
    position = torch.arange(size)
    # A straight line comes out as the place around which each output position reads.
    place = run(position.double()[None, None])[0, 0]
    period = min(size, 16 + 8 * -(-size // max(len(place), 1)))
    # So far apart only one position of a comb is read, the one next to that place.
    combs = (position % period == torch.arange(period)[:, None]).double()
    taps = run(combs[None])[0].T
    row, tooth = taps.nonzero().unbind(1)
    nearest = ((place[row] - tooth) / period).round().long()
    read = tooth + period * nearest.clamp(min=0).minimum((size - 1 - tooth) // period)
    values, code = taps[row, tooth].unique(return_inverse=True)
    table: dict[Coefficient, int] = {}
    codes = [table.setdefault(rational(value), len(table)) for value in values.tolist()]
    code = torch.tensor(codes, dtype=torch.int64)[code]
    return Stencil.sparse(size, len(place), row, read, code, tuple(table))


def rational(value: float) -> Fraction:
    """The simple fraction next to a coefficient, if one is within its rounding."""
    near = Fraction(value).limit_denominator(1 << 20)
    return near if math.isclose(near, value, rel_tol=1e-12, abs_tol=1e-14) else Fraction(value)


def per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """PyTorch's convention for kernel sizes: one number for all axes, or one for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values
