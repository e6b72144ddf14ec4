"""Bounds that rescaling changes: (2), (9) and (29).

They know layered fully connected networks only,
``R_theta(x) = M_L ReLU(M_{L-1} ... ReLU(M_1 x))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxpath.graph import ops
from fxpath.graph.aten import RESHAPE
from fxpath.graph.equations import letters
from fxpath.graph.links import static
from fxpath.graph.schema import arguments
from fxpath.pairs.pair import Pair, agreement

#: What a fully connected network consists of.
LAYERED = {ops.source, ops.contract, ops.shift, ops.relu, RESHAPE, ops.total}


@dataclass(frozen=True)
class Layered:
    """A pair of layered fully connected networks.

    Attributes:
        layers: number of matrices, L.
        width: largest number of neurons in a layer, inputs and outputs included, W.
        norm: R: at least 1, and the largest l^1 norm of a row of a matrix (and size of a bias) in
            either network.
        distance: ``||theta - theta'||_inf``.
        biases: whether there are any.
        signs_agree: whether ``theta_i * theta'_i >= 0``.
    """

    layers: int
    width: int
    norm: float
    distance: float
    biases: bool
    signs_agree: bool

    def bounds(self, radius: float) -> dict[str, float]:
        """The bounds of ``||R_theta(x) - R_theta'(x)||_1`` that apply, for ``||x||_inf <= radius``.

        ``(2)``; with biases it is meant for ``||x||_inf >= 1``, and 1 is taken where the radius is
        smaller.  Without biases ``(5) with (9)``, which is (29) and needs signs that agree, or
        ``Corollary G.1``, which does not, with 2 L in the place of L.
        """
        common = self.norm ** (self.layers - 1) * self.distance
        reach = max(radius, 1.0) if self.biases else radius
        found = {"(2)": (self.width * reach + 1) * self.width * self.layers**2 * common}
        if not self.biases:
            metric = self.layers * self.width**2 * common
            if self.signs_agree:
                found["(5) with (9), (29)"] = max(radius, 1.0) * metric
            else:
                found["Corollary G.1"] = max(radius, 1.0) * 2 * metric
        return found

    @property
    def metric(self) -> float | None:
        """The bound (9) of the path-metric; ``None`` with biases."""
        if self.biases:
            return None
        return self.layers * self.width**2 * self.norm ** (self.layers - 1) * self.distance


def find_layered(pair: Pair) -> Layered | None:
    """Whether a pair of networks is layered and fully connected."""
    active = [n for n in pair.ours.module.graph.nodes if n.op == "call_function" and not static(n)]
    layers = [n for n in active if n.target is ops.contract]
    if not all(n.target in LAYERED for n in active) or not _alternating(active):
        return None
    if not all(len(n.users) <= 1 for n in active):
        return None
    if any(math.prod(n.meta["val"].shape[:-1]) != 1 for n in layers):
        return None
    if not all(letters(arguments(n)[3]).dense for n in layers):
        return None
    norm, distance, biases, agree = 1.0, 0.0, False, True
    for leaf, node in enumerate(pair.ours.nodes):
        if node.target is not ops.coordinate:
            return None
        first, second = pair.values(leaf)
        distance = max(distance, (first - second).abs().amax().item())
        agree = agree and bool(agreement(first, second).all())
        biases = biases or first.dim() == 1
        for value in (first.abs(), second.abs()):
            norm = max(norm, (value.sum(1) if value.dim() > 1 else value).amax().item())
    widths = [n for node in layers for n in arguments(node)[1].meta["val"].shape]
    return Layered(len(layers), max(widths), norm, distance, biases, agree)


def _alternating(active: Sequence[fx.Node]) -> bool:
    """Whether a ReLU stands between any two linear maps, and none after the last."""
    kinds = [n.target for n in active if n.target in (ops.contract, ops.relu)]
    return kinds == [ops.contract, ops.relu] * (len(kinds) // 2) + [ops.contract]
