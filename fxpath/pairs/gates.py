"""How far gates can be apart, for the bounds that go from neuron to neuron.

An activation with a Lipschitz constant L is at most L times as far apart as its inputs, and no
farther than its range is wide.  A product of a signal x with a factor g of size at most c:

    |x g - x' g'| <= |g| |x - x'| + |x'| |g - g'| <= c |x - x'| + h' |g - g'|,

and the same with h in place of h', whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxpath.graph.squashes import Squash, squash_of
from fxpath.pairs.difference import Difference, Excess


class Gated(Difference):
    """Carries sizes of values, and how far they are apart, through gates.

    What path-norms are made of knows nothing of gates: a gate's value depends on the weights, so
    that no path-metric bounds how it changes.
    """

    def squash(self, x: Excess, name: str, numbers: Sequence[float], size: float) -> Excess:
        """Values of ``sigma(x / size)``."""
        found = squash_of(name, tuple(numbers))
        assert found is not None
        first = _largest(found, x.first)
        second = first if x.second is x.first else _largest(found, x.second)
        steep = found.lipschitz / size
        return Excess(
            first, second, _apart(found, x.excess, steep), _apart(found, x.other_excess, steep)
        )

    def gate(self, x: Excess, factor: Excess | None, size: float) -> Excess:
        """Values of ``x factor / size``."""
        assert factor is not None, "gates that are not followed are refused before"
        return Excess(
            x.first,
            x.second,
            _moved(x.excess, factor.excess, before(x.first, size)),
            _moved(x.other_excess, factor.other_excess, before(x.second, size)),
        )


def before(value: Tensor, size: float) -> Tensor:
    """Of a signal that was multiplied by the size of its gate; all is 0 behind a gate of size 0."""
    return value / size if size else value


def _largest(found: Squash, value: Tensor) -> Tensor:
    """Bound of an activation, from one of its input."""
    top = max(abs(found.low), abs(found.high))
    return value.clamp(max=top) if found.size is not None else torch.full_like(value, top)


def _apart(found: Squash, gap: Tensor | None, steep: float) -> Tensor | None:
    if gap is None:
        return None
    if found.axis is not None:
        gap = gap.amax(found.axis, keepdim=True).expand_as(gap)
    # Where nothing differs, nothing does behind an activation that jumps.
    return torch.where(gap == 0, 0.0, gap * steep).clamp(max=found.high - found.low)


def _moved(gap: Tensor | None, turned: Tensor | None, value: Tensor) -> Tensor | None:
    if turned is None:
        return gap
    more = value * turned
    return more if gap is None else gap + more
