"""Which of three ways leads to the difference of two path-liftings.

Where signs agree and |theta| >= |theta'| entry by entry, or the other way round, (7) gives it; else
where one network dominates on every path, after a rescaling; and else both are compared with their
common part m, on normalized parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from fxpath.modes import plain_mode
from fxpath.pairs.difference import Excess
from fxpath.pairs.domination import Dominated, find_domination
from fxpath.pairs.normalized import Distance, Normalized
from fxpath.pairs.pair import Pair
from fxpath.pairs.snapshot import Snapshot
from fxpath.pairs.unrolled import Network, Part

#: Part of the metric up to which what rounding may hide is no reason against calling it exact.
NEGLIGIBLE = 1e-9


class Comparison(Snapshot):
    """What is known of a pair; evaluated when it is asked for.

    Attributes:
        signs_agree: whether ``theta_i * theta'_i >= 0`` for all effective parameters.
        entrywise: whether one of the networks has no larger entry than the other.
    """

    _networks = ("_pair", "_walk")
    _numbers = ("dominated", "distance")

    def __init__(
        self,
        pair: Pair,
        ends: Sequence[Excess],
        signs_agree: bool,
        rounded: float,
        walk: Callable[[], tuple[Network, Sequence[Part]]],
    ) -> None:
        """Compare two networks.

        Args:
            pair: the two networks.
            ends: their outputs, with all paths of interest.
            signs_agree: see above.
            rounded: by how much path mass may be off, as a factor.
            walk: the graph to walk edge by edge, and the paths to tell apart there.
        """
        self._pair, self._walk = pair, walk
        self.signs_agree = signs_agree
        sides = [y.excess for y in ends], [y.other_excess for y in ends]
        self.entrywise = any(all(part is None for part in parts) for parts in sides)
        # Where an output's path-norm is larger in the one network, the other does not dominate.
        both = [(y.first, y.second) for y in ends]
        self._excluded = [
            any(bool((a > b * (2 * rounded - 1)).any()) for a, b in pairs)
            for pairs in ([(b, a) for a, b in both], both)
        ]

    @functools.cached_property
    @plain_mode()
    def domination(self) -> Dominated:
        """Whether one network dominates on every path, and by how much."""
        network, parts = self._walk()
        return find_domination(network, self._pair, parts, self._excluded)

    @functools.cached_property
    def dominated(self) -> bool:
        """The same, but for what rounding may hide of the difference."""
        if self.entrywise:
            return True
        found = self.domination
        return found.holds and found.total_slack <= NEGLIGIBLE * found.total

    @functools.cached_property
    @plain_mode()
    def distance(self) -> Distance:
        """How far N(theta) and N(theta') are apart."""
        network, parts = self._walk()
        found: Distance = Normalized(network, self._pair, parts).outcome()
        return found
