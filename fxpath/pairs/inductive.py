"""The inductive bound: how far the values of each neuron can be apart, layer by layer.

With h_v >= |v(theta, x)|, h'_v likewise for theta', and gap_v >= |v(theta, x) - v(theta', x)|,

    gap_v = sum_u (|theta_uv| - |m_uv|) h_u + (|theta'_uv| - |m_uv|) h'_u + |m_uv| gap_u,

which is the recursion of :mod:`fxpath.pairs.difference`.  But bounds on values of neurons, unlike
sums over paths, let pooling take the largest entry of a window, and a clamp cut off.  They also
cover other slopes and coefficients, and gates (:mod:`fxpath.pairs.gates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fxpath.graph.schema import arguments
from fxpath.pairs.difference import Excess
from fxpath.pairs.gates import Gated, before
from fxpath.pairs.pair import Pair, Weights


class Inductive(Gated):
    """Bounds values and their difference; at full resolution, fed with |x| or its largest size."""

    def __init__(self, module: fx.GraphModule, pair: Pair, inputs: Sequence[Tensor]) -> None:
        """See :class:`~fxpath.pairs.difference.Difference`."""
        super().__init__(module, pair, inputs)

    def coefficient(self, value: Tensor) -> Weights:
        return Weights.of(*self.other(self.node))

    def _nonlinear(
        self, x: Excess, bound: Callable[[Tensor], Tensor], gap: Callable[[Tensor], Tensor]
    ) -> Excess:
        first = bound(x.first)
        second = first if x.second is x.first else bound(x.second)
        return Excess(first, second, gap(x.gap()))

    def slope(self, x: Excess, a: Tensor | float) -> Excess:
        node = arguments(self.node)[1]
        if not isinstance(node, fx.Node):
            return super().slope(x, a)
        ours, theirs = self.other(node)
        if torch.equal(ours, theirs):
            return super().slope(x, ours)
        between = (ours - theirs).abs()
        one, two = ours.abs().clamp(min=1), theirs.abs().clamp(min=1)
        # The slope changes at the value of the one network, or at that of the other.
        gap = torch.minimum(one * x.gap() + between * x.second, two * x.gap() + between * x.first)
        return Excess(x.first * one, x.second * two, gap)

    def pool(
        self, x: Excess, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]
    ) -> Excess:
        used = (weight > 0).flatten()

        def largest(value: Tensor) -> Tensor:
            picked = value.movedim(dim, -1).index_select(-1, index.flatten()) * used
            return picked.unflatten(-1, tuple(index.shape)).amax(-1).movedim(-1, dim)

        return self._nonlinear(x, largest, largest)

    def maximum(self, x: Excess, y: Excess) -> Excess:
        first = torch.maximum(x.first, y.first)
        alike = x.second is x.first and y.second is y.first
        second = first if alike else torch.maximum(x.second, y.second)
        return Excess(first, second, torch.maximum(x.gap(), y.gap()))

    def squash(self, x: Excess, name: str, numbers: Sequence[float], size: float) -> Excess:
        return super().squash(Excess(x.first, x.second, x.gap()), name, numbers, size)

    def gate(self, x: Excess, factor: Excess | None, size: float) -> Excess:
        assert factor is not None
        # Either network's signal may stand beside the difference of the gates.
        smaller = torch.minimum(x.first, x.second)
        return Excess(x.first, x.second, x.gap() + before(smaller, size) * factor.gap())

    def clamp(self, x: Excess, lo: float | None, hi: float | None) -> Excess:
        if lo is not None and hi is not None:
            lo = min(lo, hi)  # where the bounds cross, torch returns the upper one
            nearest, farthest = max(lo, -hi, 0.0), max(abs(lo), abs(hi))
            width = hi - lo
        else:
            nearest = max(lo or 0.0, -(hi or 0.0), 0.0)
            farthest = width = math.inf
        return self._nonlinear(
            x,
            lambda value: value.clamp(min=nearest, max=farthest),
            lambda value: value.clamp(max=width),
        )
