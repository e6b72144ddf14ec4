"""Exact arithmetic on whole arrays: numbering of equal rows, sums of rational coefficients.

Which positions are equal is decided here, so nothing is hashed to a number and nothing is rounded:
columns of integers are packed into one without loss, and coefficients are added as integers over
their common denominator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

#: Coefficients are exact: integers, and fractions where they must be.
Coefficient = int | Fraction

#: Packed columns stay below this, and fit int64.
_LIMIT = 1 << 62

#: Sums are formed in pieces of so many bits: 2 ** 31 of them can be added.
_BITS = 31


def numbered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Number equal keys.

    Args:
        keys: int64 ``[n]``.

    Returns:
        The number of each key, ``[n]``, counted in the order in which they appear; the place where
        each number appears first, ``[numbers]``.
    """
    heads = torch.ones(len(keys), dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=heads[1:])
    at = heads.nonzero()[:, 0]  # only where runs of equal keys begin is anything to compare
    values, inverse = torch.unique(keys[at], return_inverse=True)
    first = torch.full((len(values),), len(keys))
    first.scatter_reduce_(0, inverse, at, "amin")
    first, order = first.sort()
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order))
    return number[inverse][heads.cumsum(0) - 1], first


class Rows:
    """Rows of integers, told apart by one key for each; they are given column by column."""

    def __init__(self, size: int) -> None:
        """Rows without a column: all are equal."""
        self.keys = torch.zeros(size, dtype=torch.int64)
        self._count = 1

    def add(self, column: Tensor, count: int, at: Tensor | None = None) -> None:
        """Append a column.

        Args:
            column: entries in ``[0, count)``; ``[size]``, or as long as ``at``.
            count: how many values there are.
            at: the rows that have an entry, rising; by default all have.
        """
        if at is not None and len(at) < len(self.keys):
            if not bool(self.keys[at].any()):
                # Rows that had no entry so far: pieces side by side cost what they are long.
                if self._count + count >= _LIMIT:
                    self._pack()
                self.keys[at] = self._count + column
                self._count += count
                return
            column = torch.zeros_like(self.keys).index_put_((at,), column + 1)
            count += 1
        if count > 1:
            if self._count * count >= _LIMIT:
                self._pack()
            self.keys = self.keys * count + column
            self._count *= count

    def _pack(self) -> None:
        self.keys, first = numbered(self.keys)
        self._count = len(first)


def exact_sums(
    keys: Tensor, codes: Tensor, table: Sequence[Coefficient]
) -> tuple[Tensor, Tensor, tuple[Coefficient, ...]]:
    """Add up coefficients that stand at one place; sums of zero are dropped.

    Args:
        keys: where each coefficient stands, int64 ``[n]``.
        codes: which coefficient it is, int64 ``[n]``.
        table: the coefficients, all different.

    Returns:
        Places in rising order, all different; the codes of their sums; the table of sums, all
        different.
    """
    places, inverse = torch.unique(keys, return_inverse=True)
    if len(places) == len(keys):
        placed = torch.empty_like(codes)
        placed[inverse] = codes
        return _without_zeros(places, placed, tuple(table))
    whole = math.lcm(*(c.denominator for c in table))
    numerators = [int(c * whole) for c in table]
    pieces = 1 + max(n.bit_length() for n in numerators) // _BITS
    sums, carry, columns = Rows(len(places)), torch.zeros_like(places), []
    for piece in range(pieces):
        shifted = [n >> _BITS * piece for n in numerators]
        if piece < pieces - 1:  # the last one keeps the sign
            shifted = [n % (1 << _BITS) for n in shifted]
        column = carry.index_add(0, inverse, torch.tensor(shifted)[codes])
        if piece < pieces - 1:
            carry, column = column >> _BITS, column % (1 << _BITS)
        columns.append(column)
        number, first = numbered(column)
        sums.add(number, len(first))
    found, first = numbered(sums.keys)
    values = zip(*(column[first].tolist() for column in columns), strict=True)
    totals = [sum(v << _BITS * i for i, v in enumerate(value)) for value in values]
    return _without_zeros(places, found, tuple(_simple(Fraction(n, whole)) for n in totals))


def _without_zeros(
    places: Tensor, codes: Tensor, table: tuple[Coefficient, ...]
) -> tuple[Tensor, Tensor, tuple[Coefficient, ...]]:
    if 0 in table:
        kept = codes != table.index(0)
        places, codes = places[kept], codes[kept]
    return places, codes, table


def _simple(value: Fraction) -> Coefficient:
    return value.numerator if value.denominator == 1 else value
