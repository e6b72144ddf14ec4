"""Which scores a number format does not hold, although the norm fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import products
from fxpath.program.flat import Run
from fxpath.program.theta import coordinates
from fxpath.sharding import whole

#: Shares all below this, times their format's smallest number and the largest entry that they are
#: shares of, are not trusted: their gradients, that much smaller, lose digits first.
FAINT = 2.0**14

#: Parts of a score up to which each is looked at by itself.
FEW = 32


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
    faint, where = dict[str, float](), dict[str, list[Any]]()
    for (name, share), lows, high in zip(shares.items(), run.lows, run.highs, strict=True):
        # Where all of theta is 0, so are its shares.
        if high and min(lows) < tiny * (1 + FAINT * high):
            faint[name] = tiny * FAINT * high
            each = products.parts(share.shape, len(lows), share.device)
            found = [part for part, low in zip(each, lows, strict=True) if low < tiny]
            where[name] = found if len(found) <= FEW else [...]
    short = short_of(lifted, shares, where, live, tiny)
    # What is lifted may have lost digits when it was converted.
    coarse = {n for n, high in zip(shares, run.highs, strict=True) if 0 < high < tiny * FAINT}
    dim = {name for name, bound in faint.items() if _all_below(shares[name], bound)}
    return short | coarse | dim


def short_of(
    lifted: fx.GraphModule,
    shares: Mapping[str, Tensor],
    where: Mapping[str, Iterable[Any]],
    live: Mapping[str, Tensor],
    tiny: float,
) -> set[str]:
    """Of some scores, those with an entry below ``tiny`` although theta is not 0 there.

    Most of them belong to dead neurons; which ones do not, a wider range tells.

    Args:
        lifted: as for :func:`doubtful`.
        shares: as there.
        where: parts of those to look at, as indices, by name.
        live: as there.
        tiny: what an entry is below.
    """
    return {
        name
        for name, theta in coordinates(lifted, live, where)
        for share in [whole(shares[name])]
        if any(_any_below(share[part], theta[part], tiny) for part in where[name])
    }


def _any_below(shares: Tensor, theta: Tensor, tiny: float) -> bool:
    """Whether a share is below a number that its own format may not hold, where theta is not 0."""
    # In blocks that stay in the cache.
    flat = shares.flatten().split(products.BLOCK), theta.flatten().split(products.BLOCK)
    for part, own in zip(*flat, strict=True):
        small = part < tiny if tiny >= torch.finfo(part.dtype).tiny else part == 0
        if bool(small.any()) and bool(own[small].any()):
            return True
    return False


def _all_below(shares: Tensor, bound: float) -> bool:
    """Whether all shares are below a number, but not all are 0."""
    # Mostly the first block says that they are not.
    most = 0.0
    for part in whole(shares).flatten().split(products.BLOCK):
        most = max(most, float(part.amax()) if len(part) else 0.0)
        if most >= bound:
            return False
    return most > 0
