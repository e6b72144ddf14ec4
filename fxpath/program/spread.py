"""How scores are spread over the entries of tensors, exactly, without sorting all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxpath.sharding import whole

#: Entries that are looked at together: in a processor's cache, and too few to share out among
#: threads, which would wait for each other at each of many small operations; or by a GPU.
CHUNK, CHUNK_AWAY = 1 << 15, 1 << 24

#: Sixteen bins for each power of two, by the leading bits of a float64.
SHIFT = 48
BINS = 1 << (63 - SHIFT)


class Spread:
    """The entries of tensors of scores, all >= 0, as one multiset.

    One pass counts them in narrow bins; where the answer lies within a bin, the entries of that bin
    alone are sorted.

    Attributes:
        tensors: whose entries are meant.
        entries: how many there are.

    Example:
        >>> spread = Spread([torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0])])
        >>> spread.entries, spread.total, spread.zeros, spread.carrying(0.5)
        (4, 4.0, 1, 1)
        >>> round(spread.effective, 4), spread.quantile(0.5)
        (2.8284, 1.0)
    """

    def __init__(self, tensors: Sequence[Tensor], parts: Sequence[Spread] = ()) -> None:
        """The entries of these tensors; ``parts`` of which it is the union spare another pass."""
        self.tensors = list(tensors)
        self.entries = sum(tensor.numel() for tensor in self.tensors)
        self._parts = parts

    @classmethod
    def union(cls, parts: Sequence[Spread]) -> Spread:
        """The entries of several spreads together."""
        return cls([tensor for part in parts for tensor in part.tensors], parts)

    # -- one pass ---------------------------------------------------------------------------------

    @functools.cached_property
    def _read(self) -> tuple[Tensor, Tensor, Tensor, float, int]:
        """Bins that are not empty, their counts and sums; the sum of -s log(s); how many are 0."""
        counts = torch.zeros(BINS, dtype=torch.int64)
        sums = torch.zeros(BINS, dtype=torch.float64)
        entropic, zeros = 0.0, 0
        for part in self._parts:
            codes, count, mass, more, none = part._read
            counts[codes] += count
            sums[codes] += mass
            entropic, zeros = entropic + more, zeros + none
        for chunk in () if self._parts else self._chunks():
            wide, codes = chunk.double(), codes_of(chunk)
            least, most = int(codes.min()), int(codes.max())
            found, width = codes - least, most - least + 1
            mass = torch.zeros(width, dtype=torch.float64, device=chunk.device)
            counts[least : most + 1] += torch.bincount(found, minlength=width).cpu()
            sums[least : most + 1] += mass.index_add_(0, found, wide).cpu()
            entropic += float(torch.special.entr(wide).sum())
            zeros += int((chunk == 0).sum())
        held = counts.nonzero().flatten()
        return held, counts[held], sums[held], entropic, zeros

    @property
    def total(self) -> float:
        """Their sum, in float64."""
        return float(self._read[2].sum())

    @property
    def zeros(self) -> int:
        """How many are 0."""
        return self._read[4]

    @property
    def effective(self) -> float:
        """Over how many entries the scores are spread: ``exp`` of the entropy of ``s / total``.

        Between 1 (one entry has all) and ``entries`` (all are alike); 0 where all are 0.
        """
        total, entropic = self.total, self._read[3]
        return math.exp(math.log(total) + entropic / total) if total > 0 else 0.0

    # -- exact, by a second look at one bin -------------------------------------------------------

    def quantile(self, part: float) -> float:
        """The smallest entry that at least this part of them does not exceed; NaN of none."""
        if not self.entries:
            return math.nan
        rank = max(1, math.ceil(part * self.entries))
        codes, counts, *_ = self._read
        before = counts.cumsum(0)
        place = int(torch.searchsorted(before, rank))
        below = int(before[place]) - int(counts[place])
        return float(self._of_bin(int(codes[place])).kthvalue(rank - below).values)

    def carrying(self, part: float) -> int:
        """How many of the largest entries it takes for this part of the total."""
        needed = part * self.total
        if needed <= 0:
            return 0
        codes, counts, sums = (found.flip(0) for found in self._read[:3])
        mass = sums.cumsum(0)
        place = min(int(torch.searchsorted(mass, needed)), len(mass) - 1)
        above = float(mass[place] - sums[place])
        inside = self._of_bin(int(codes[place])).sort(descending=True).values.cumsum(0)
        taken = min(len(inside), int(torch.searchsorted(inside, needed - above)) + 1)
        return int(counts[:place].sum()) + taken

    def at_most(self, limits: Sequence[float]) -> list[int]:
        """How many entries are no larger than each limit."""
        found = [0] * len(limits)
        for chunk in self._chunks():
            for i, limit in enumerate(limits):
                found[i] += int((chunk <= limit).sum())
        return found

    @functools.cached_property
    def largest(self) -> float:
        """The largest entry; 0 of none."""
        return max((float(whole(t).max()) for t in self.tensors if t.numel()), default=0.0)

    # -- the shape of it --------------------------------------------------------------------------

    def histogram(self, width: int) -> tuple[list[float], list[int]]:
        """Counts of the entries that are not 0, in steps of ``width`` bins.

        Returns:
            Decimal logarithms of the edges, and one count fewer; nothing where all are 0.
        """
        codes, counts, _, _, zeros = self._read
        counts = torch.where(codes == 0, counts - zeros, counts)
        codes, counts = codes[counts > 0] // width, counts[counts > 0]
        if not len(codes):
            return [], []
        first, last = int(codes[0]), int(codes[-1]) + 1
        steps = torch.bincount(codes - first, counts.double()).long()
        # The first bin begins with 0, and with the smallest number that is not.
        edges = [math.log10(edge(code * width) or 5e-324) for code in range(first, last + 1)]
        return edges, steps.tolist()

    def curve(self) -> Iterator[tuple[float, float]]:
        """For the limits between bins, the parts of the entries and of the total below."""
        _, counts, sums, *_ = self._read
        total = self.total or 1.0
        for count, mass in zip(counts.cumsum(0).tolist(), sums.cumsum(0).tolist(), strict=True):
            yield count / self.entries, mass / total

    def _chunks(self) -> Iterator[Tensor]:
        for tensor in self.tensors:
            flat = whole(tensor).detach().reshape(-1)
            size = CHUNK if flat.device.type == "cpu" else CHUNK_AWAY
            yield from (flat.split(size) if flat.numel() else ())

    def _of_bin(self, code: int) -> Tensor:
        """The entries of one bin, in float64."""
        low, high = edge(code), edge(code + 1)
        found = []
        for chunk in self._chunks():
            # Below the normal numbers of a format, its limits are no numbers of that format.
            exact = low >= torch.finfo(chunk.dtype).tiny
            inside = (chunk >= low) & (chunk < high) if exact else codes_of(chunk) == code
            found.append(chunk[inside].double().cpu())
        return torch.cat(found)


def codes_of(scores: Tensor) -> Tensor:
    """The bin of each score, int64: sign (never set), exponent and four bits of a float64."""
    return scores.double().contiguous().view(torch.int64) >> SHIFT


def edge(code: int) -> float:
    """Where a bin begins."""
    return float(torch.tensor(code << SHIFT, dtype=torch.int64).view(torch.float64))
