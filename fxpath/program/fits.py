"""Which scores a number format does not hold, although the norm fits."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, fx

from fxpath.graph.products import BLOCK
from fxpath.program.flat import Run
from fxpath.program.theta import coordinates

#: Shares all below this, times their format's smallest number and the largest entry that they are
#: shares of, are not trusted: their gradients, that much smaller, lose digits first.
FAINT = 2.0**14


def doubtful(
    lifted: fx.GraphModule, shares: Mapping[str, Tensor], run: Run, live: Mapping[str, Tensor]
) -> set[str]:
    """Scores with entries below their number format, or made of gradients that may be.

    Args:
        lifted: the lifted graph.
        shares: scores by name, in one number format.
        run: what found them.
        live: the model's tensors by placeholder.
    """
    tiny = max((torch.finfo(share.dtype).tiny for share in shares.values()), default=0.0)
    every = zip(shares, run.lows, run.highs, strict=True)
    faint = {
        name: tiny * FAINT * high for name, low, high in every if low < tiny * (1 + FAINT * high)
    }
    short = short_of(lifted, shares, faint, live, tiny)
    # What is lifted may have lost digits when it was converted.
    coarse = {n for n, high in zip(shares, run.highs, strict=True) if 0 < high < tiny * FAINT}
    dim = {name for name, bound in faint.items() if _all_below(shares[name], bound)}
    return short | coarse | dim


def short_of(
    lifted: fx.GraphModule,
    shares: Mapping[str, Tensor],
    names: Container[str],
    live: Mapping[str, Tensor],
    tiny: float,
) -> set[str]:
    """Of some scores, those with an entry below ``tiny`` although theta is not 0 there.

    Most of them belong to dead neurons; which ones do not, a wider range tells.
    """
    found = coordinates(lifted, live, names)
    return {name for name, theta in found if _any_below(shares[name], theta, tiny)}


def _any_below(shares: Tensor, theta: Tensor, tiny: float) -> bool:
    """Whether a share is below a number that its own format may not hold, where theta is not 0."""
    # In blocks that stay in the cache.
    for part, own in zip(shares.flatten().split(BLOCK), theta.flatten().split(BLOCK), strict=True):
        small = part < tiny if tiny >= torch.finfo(part.dtype).tiny else part == 0
        if bool(small.any()) and bool(own[small].any()):
            return True
    return False


def _all_below(shares: Tensor, bound: float) -> bool:
    """Whether all shares are below a number, but not all are 0."""
    # Mostly the first block says that they are not.
    most = 0.0
    for part in shares.flatten().split(BLOCK):
        most = max(most, float(part.amax()) if len(part) else 0.0)
        if most >= bound:
            return False
    return most > 0
