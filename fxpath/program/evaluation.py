"""What one run of a program found, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpath.sharding import placed, whole

#: Exponents q below it, but for 0, are refused: float64 holds |w|^q to 1e-16, and its q-th root
#: would lose all digits.
LEAST_EXPONENT = 1e-6

#: Exponent of two by which shares are raised that float64 would make zeros of.
RAISED = 900

#: Exponents up to which the q-th root of the mantissa is taken as it is, which is the most exact.
SMALL = 1 / 64


@dataclass(frozen=True)
class Evaluation:
    """What one run found.

    ``||Phi||_q^q = mantissa * 2 ** exponent``; ``shares`` and the ``sparsity`` of each coordinate
    array are keyed by name.  ``raised`` has 2^RAISED times the shares, where some are below
    float64.
    """

    mantissa: float
    exponent: int
    shares: dict[str, Tensor]
    sparsity: dict[str, float]
    raised: dict[str, Tensor]
    q: float

    @property
    def mass(self) -> float:
        """``||Phi||_q^q``; inf beyond float64."""
        return _ldexp(self.mantissa, self.exponent)

    @property
    def log10_mass(self) -> float:
        """Decimal logarithm of ``||Phi||_q^q``."""
        if self.mantissa == 0:
            return -math.inf
        return math.log10(self.mantissa) + self.exponent * math.log10(2)

    @property
    def path_norm(self) -> float:
        """``||Phi||_q``; inf beyond float64."""
        if self.q in (0, 1):
            return self.mass
        if self.mantissa == 0:
            return 0.0
        if self.q < SMALL:
            # The root of the mantissa alone may be beyond float64: only that of the whole counts.
            root = (math.log2(self.mantissa) + self.exponent) / self.q
            whole = math.floor(root)
            return _ldexp(2.0 ** (root - whole), whole)
        # Part of the exponent is a multiple of q, so that the root fits where the mass does not.
        whole = math.floor(self.exponent / self.q)
        rest = self.exponent - whole * self.q
        return _ldexp((self.mantissa * 2.0**rest) ** (1 / self.q), whole)

    @property
    def log10_path_norm(self) -> float:
        """Decimal logarithm of ``||Phi||_q``."""
        return self.log10_mass / (self.q or 1)

    def absolute(self, name: str) -> Tensor:
        """Path-Mag: a share times the norm, in float64 where its own format has no digits for it.

        Raises:
            OverflowError: if an entry is too large for the share's format, or too small for
                float64.
        """
        spread = self.shares[name]
        share = whole(spread)
        value = _times(share.double() * self.mantissa, self.exponent)
        if name in self.raised:
            raised = _times(whole(self.raised[name]) * self.mantissa, self.exponent - RAISED)
            value = torch.where(share == 0, raised, value)
            share = share.double()
        info = torch.finfo(share.dtype)
        if bool((value > info.max).any()) or bool(((value == 0) & (share > 0)).any()):
            raise OverflowError
        small = (value > 0) & (value < info.tiny)
        return placed(value if bool(small.any()) else value.to(share.dtype), spread)


def _ldexp(mantissa: float, exponent: int) -> float:
    try:
        return math.ldexp(mantissa, exponent)
    except OverflowError:
        return math.inf


def fitted(share: Tensor, dtype: torch.dtype) -> Tensor:
    """Shares in the format of a program; float64 where that would make zeros of small ones."""
    if share.dtype == dtype:
        return share
    full = whole(share)
    small = (full > 0) & (full < torch.finfo(dtype).tiny)
    return share if bool(small.any()) else share.to(dtype)


def _times(value: Tensor, exponent: int) -> Tensor:
    """``value * 2 ** exponent``, in steps: the power may be beyond float64 where this is not."""
    while exponent:
        step = max(-1000, min(1000, exponent))
        value, exponent = value * 2.0**step, exponent - step
    return value
