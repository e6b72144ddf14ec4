"""The entries with the lowest scores, exactly as many as asked for, without sorting them.

The bits of a floating-point number, read as an integer, are in the order of the numbers.  So the
score at a given rank is found digit by digit, in base 2^16: a histogram of the first digit tells in
which bin the rank lies, one of the next digit where in that bin.  Each is one pass over the scores,
block by block; nothing is concatenated and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpath.sharding import placed, whole

#: Entries that are looked at at once.
_BLOCK = 1 << 20

_DIGIT = 16
_BINS = 1 << _DIGIT


@dataclass(frozen=True)
class Cut:
    """The lowest entries of several tensors.

    Entries are ordered by (score, name, flat index), so that ties are settled in one way.

    Attributes:
        threshold: the highest score that is cut; -inf where none is.
        tied: name -> how many of the entries with exactly that score are cut, the first ones;
            ``None`` for all of them.
    """

    threshold: float
    tied: Mapping[str, int] | None

    def kept(self, name: str, scores: Tensor) -> Tensor:
        """The mask of one tensor, of its shape: True where an entry is kept."""
        entries = whole(scores)
        mask = _above(entries, self.threshold)
        ties = None if self.tied is None else _at(entries, self.threshold)
        if self.tied is not None and ties is not None:
            # Of the ties, the last ones stay.
            mask.view(-1)[ties.flatten().nonzero()[self.tied[name] :, 0]] = True
        return placed(mask, scores)


def count_of(amount: object, entries: int) -> int:
    """How many entries a share (a float in [0, 1]) or a count (an int) asks for.

    Raises:
        TypeError: for anything but an int or a float.
        ValueError: for a share outside of [0, 1], or a count outside of [0, entries].
    """
    if isinstance(amount, float):
        if not 0 <= amount <= 1:
            raise ValueError(f"amount={amount}: a share is between 0.0 and 1.0")
        return round(amount * entries)
    if isinstance(amount, bool) or not isinstance(amount, int):
        raise TypeError(f"amount={amount!r}: a share (float) or a number of entries (int)")
    if not 0 <= amount <= entries:
        raise ValueError(f"amount={amount}: there are {entries} entries to choose from")
    return amount


def cut(scores: Mapping[str, Tensor], count: int) -> Cut:
    """Find the ``count`` lowest entries of all tensors together.

    Args:
        scores: name -> tensor without NaN, of any floating-point format.
        count: between 0 and the number of entries.
    """
    if count == 0:
        return Cut(-math.inf, dict.fromkeys(scores, 0))
    wide = any(tensor.dtype == torch.float64 for tensor in scores.values())
    digits = (64 if wide else 32) // _DIGIT
    # Of what is searched, all keys lie in [start, start + 2^shift) at each level.
    start, shift, rest = -(1 << (digits * _DIGIT - 1)), digits * _DIGIT, count
    for level in range(digits):
        shift -= _DIGIT
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for tensor in scores.values():
            for keys in _keys(tensor, wide):
                if level:
                    within = keys[(keys >> (shift + _DIGIT)) == (start >> (shift + _DIGIT))]
                    _count(histogram, (within >> shift) - (start >> shift), 0)
                elif bool(keys.amin() < 0):
                    _count(histogram, (keys >> shift) + _BINS // 2, 0)
                else:
                    _count(histogram, keys >> shift, _BINS // 2)
        below = histogram.cumsum(0)
        digit = int(torch.searchsorted(below, rest))
        rest -= int(below[digit - 1]) if digit else 0
        start += digit << shift
    threshold = _number(start, wide)
    if rest == int(histogram[digit]):
        return Cut(threshold, None)
    tied = {}
    for name in sorted(scores):
        ties = _at(whole(scores[name]), threshold)
        tied[name] = 0 if ties is None else min(rest, int(ties.count_nonzero()))
        rest -= tied[name]
    return Cut(threshold, tied)


def _count(histogram: Tensor, digits: Tensor, first: int) -> None:
    """Add to the bins from ``first`` on how often each digit occurs."""
    histogram[first:] += torch.bincount(digits, minlength=_BINS - first).to(histogram.device)


def cut_capped(scores: Mapping[str, Tensor], count: int, caps: Mapping[str, int]) -> dict[str, Cut]:
    """The same where no tensor loses more than its cap: one cut for each tensor.

    Tensors at their cap leave the common pool, and the others fill up: that is what taking the
    lowest entry again and again comes to.

    Raises:
        ValueError: if the caps do not leave ``count`` entries.
    """
    room = sum(caps[name] for name in scores)
    if count > room:
        raise ValueError(
            f"max_layer_sparsity leaves {room:,} entries to prune, and {count:,} are asked for"
        )
    found: dict[str, Cut] = {}
    pool = dict(scores)
    while True:
        common = cut(pool, count)
        full = [
            name for name, tensor in pool.items() if _cut_off(common, name, tensor) > caps[name]
        ]
        if not full:
            return {**found, **dict.fromkeys(pool, common)}
        for name in full:
            count -= caps[name]
            found[name] = cut({name: pool.pop(name)}, caps[name])


def _cut_off(found: Cut, name: str, scores: Tensor) -> int:
    return scores.numel() - int(whole(found.kept(name, scores)).count_nonzero())


def _above(scores: Tensor, threshold: float) -> Tensor:
    """Where a score is above a number that its own format may not hold."""
    nearest = _nearest(scores, threshold)
    return scores >= nearest if nearest > threshold else scores > nearest


def _at(scores: Tensor, threshold: float) -> Tensor | None:
    """Where a score is a number; ``None`` if its format does not hold that."""
    return scores == threshold if _nearest(scores, threshold) == threshold else None


def _nearest(scores: Tensor, threshold: float) -> float:
    return torch.tensor(threshold, dtype=torch.float64).to(scores.dtype).item()


def _keys(scores: Tensor, wide: bool) -> Iterator[Tensor]:
    """Integers in the order of the scores, block by block; equal for equal scores."""
    dtype, integer, sign = _format(wide)
    blocks = whole(scores).detach().reshape(-1).split(_BLOCK) if scores.numel() else ()
    for block in blocks:
        bits = block.to(dtype).view(integer)
        if bool(bits.amin() < 0):
            # Of negative numbers the larger bits are lower; 0 and -0 are one number.
            bits = torch.where(bits < 0, -(1 << sign) - bits, bits)
        yield bits


def _number(key: int, wide: bool) -> float:
    """The score whose key it is."""
    dtype, integer, sign = _format(wide)
    bits = -(1 << sign) - key if key < 0 else key
    return torch.tensor(bits, dtype=integer).view(dtype).item()


def _format(wide: bool) -> tuple[torch.dtype, torch.dtype, int]:
    """What scores are read in, the integers of its bits, and which bit is the sign."""
    return (torch.float64, torch.int64, 63) if wide else (torch.float32, torch.int32, 31)
