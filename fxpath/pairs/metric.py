"""The l^1 path-metric ||Phi(theta) - Phi(theta')||_1: exact, or between two bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from fxpath.model import Given, Model, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.comparison import NEGLIGIBLE, Comparison
from fxpath.pairs.difference import Difference
from fxpath.pairs.matching import Other, make_pair
from fxpath.pairs.pair import Pair
from fxpath.pairs.rounding import UNIT, Doubt, doubt, erased_doubt, relative
from fxpath.pairs.snapshot import Snapshot
from fxpath.pairs.unrolled import Network, Part
from fxpath.passes import rewrite
from fxpath.passes.reduce import reduce
from fxpath.program.analysis import Analysis
from fxpath.program.program import PathProgram
from fxpath.report.table import Column, Table, Tabular

#: Upper bounds by name, and whether they stay the same when either network is rescaled.
UPPER_BOUNDS = {"m": False, "m_normalized": True, "theorem_f2": True, "lemma_3_3": True}

#: Columns of every table of a metric.
COLUMNS = (
    Column("quantity", "quantity", "text", "``lower``, ``upper``, or one of the upper bounds"),
    Column("value", "value", "number", "in the scale of the path-norm", digits=6),
    Column("relative", "of the path-norm", "part", "as a part of the model's path-norm"),
    Column("invariant", "invariant", "text", "whether rescaling leaves it as it is"),
)


class PathMetric(Snapshot, Tabular):
    """The distance ``||Phi(theta) - Phi(theta')||_1`` of two sets of weights.

    Numbers are float64.  ``lower``, ``upper`` and all bounds hold for exact arithmetic on the
    networks' parameters: each is rounded outwards by what float64 may have lost
    (:mod:`fxpath.pairs.rounding`).  ``value``, the metric where it is known, is what was carried,
    between the two.

    A metric reads both networks' tensors where something is evaluated for the first time, and
    raises a ``RuntimeError`` if they have changed since.  Pickled, it is plain numbers.

    Attributes:
        path_norm: ``||Phi(theta)||_1`` of the model.
        other_path_norm: ``||Phi(theta')||_1`` of the other one.
        signs_agree: whether ``theta_i * theta'_i >= 0`` for all effective parameters.
    """

    _networks = ("_pair", "_network")
    _numbers = ("path_magnitude_sum",)

    def __init__(self, pair: Pair, reduced: fx.GraphModule | None = None) -> None:
        """Metrics are made by :func:`fxpath.path_metric`."""
        self._pair = pair
        reduced = reduced or reduce(pair.lifted, pair.setting)
        difference = Difference(reduced, pair)
        outputs = difference.outcome()
        self.signs_agree = difference.signs_agree
        self.path_norm = _total([y.first for y in outputs])
        self.other_path_norm = _total([y.second for y in outputs])
        self._excess = _total([y.excess for y in outputs])
        self._other_excess = _total([y.other_excess for y in outputs])
        self._relative = relative(reduced)
        self._comparison = Comparison(
            pair, outputs, self.signs_agree, 1 + self._relative, self._walk
        )
        self._doubt = 0.0
        if pair.erased:
            self._doubt = erased_doubt(pair) * self._excess
        elif doubt(pair):
            parts = Doubt(reduced, pair).outcome()
            self._doubt = _total([e for y in parts for e in (y.excess, y.other_excess)])

    @functools.cached_property
    @plain_mode()
    def _network(self) -> Network:
        return Network.by_value(self._pair.lifted, self._pair.setting)

    def _walk(self) -> tuple[Network, list[Part]]:
        self._pair.check_unchanged()
        return self._network, [Part()]

    # -- what holds -------------------------------------------------------------------------------

    @property
    def dominated(self) -> bool:
        """Whether ``|Phi(theta)| >= |Phi(theta')|`` on every path, or the other way round.

        True at once where ``|theta| >= |theta'|`` entry by entry; otherwise a max-plus pass over
        all edges decides, so that rescaling either network changes nothing.  After a rescaling by
        other factors than powers of two, which is rounded itself, paths may exceed by rounding: by
        1e-9 of the difference at most, else it is not dominated.
        """
        return self._comparison.dominated

    @property
    def exact(self) -> bool:
        """Whether signs agree and one dominates, so that the metric is known by (7).

        Never where rounding may hide more than 1e-9 of the metric: ``lower`` and ``upper`` tell
        how much.
        """
        return self._carried is not None and self._doubt <= NEGLIGIBLE * self._carried

    @property
    def _carried(self) -> float | None:
        """Both sides of (7), where it holds for the parameters as float64 has them."""
        if not (self.signs_agree and self.dominated):
            return None
        compared = self._comparison
        return self._excess_sum if compared.entrywise else compared.domination.total

    @property
    def _slack(self) -> float:
        """What has to be added to it for an upper bound."""
        compared = self._comparison
        return 0.0 if compared.entrywise else compared.domination.total_slack

    @property
    def value(self) -> float | None:
        """The metric by (7), where it is exact, carried without cancellation; else ``None``."""
        return self._carried if self.exact else None

    # -- bounds -----------------------------------------------------------------------------------

    @property
    def lower(self) -> float:
        """The lower bound (6), ``| ||Phi|| - ||Phi'|| |``: the metric itself where it is exact."""
        if self.value is not None:
            return max(0.0, self.value * (1 - self._relative) - self._doubt - self._slack)
        # Both excesses are rounded, which their difference must not take for a distance.
        hidden = self._relative * self._excess_sum + self._doubt
        return max(0.0, (abs(self._excess - self._other_excess) - hidden) * (1 - 4 * UNIT))

    @property
    def upper(self) -> float:
        """The metric where it is exact, else the smallest upper bound that no rescaling changes."""
        if self._carried is not None:
            return self._outwards(self._carried + self._slack)
        return min(self.bound(name) for name, invariant in UPPER_BOUNDS.items() if invariant)

    def bound(self, name: str) -> float:
        """One of the upper bounds, valid for any signs.

        Args:
            name: ``"m"`` or ``"m_normalized"``: through the common part m, which has the smaller of
                two entries where their signs agree and 0 elsewhere, as
                ``(||Phi|| - ||Phi(m)||) + (||Phi'|| - ||Phi(m)||)``, on the effective parameters as
                they are (changes when a network is rescaled) or on N(theta) and N(theta');
                ``"theorem_f2"``: (23); ``"lemma_3_3"``: (8), with neurons' biases counted in W.

        Raises:
            KeyError: for another name.
            RuntimeError: if a network changed before this was evaluated.
        """
        if name not in UPPER_BOUNDS:
            raise KeyError(f"{name!r} is no upper bound; there are {', '.join(UPPER_BOUNDS)}")
        if name == "m":
            return self._outwards(self._excess_sum)
        found = self._comparison.distance
        if name == "m_normalized":
            return self._outwards(found.through_common)
        return self._outwards(found.theorem_f2 if name == "theorem_f2" else found.lemma_3_3)

    @property
    def bounds(self) -> dict[str, float]:
        """All upper bounds by name, see :meth:`bound`."""
        return {name: self.bound(name) for name in UPPER_BOUNDS}

    @property
    def _excess_sum(self) -> float:
        return self._excess + self._other_excess

    def _outwards(self, bound: float) -> float:
        """An upper bound with all that rounding may have taken from it; 0 stays 0."""
        return (bound + self._doubt) * (1 + self._relative)

    @property
    def relative(self) -> float:
        """``upper`` over the model's path-norm, see :attr:`relative_upper`."""
        return self.relative_upper

    @property
    def relative_upper(self) -> float:
        """``upper`` over the model's path-norm; the metric's own share where it is exact.

        Above 1 where the change is larger than the model: up to 2 where both have one path-norm.
        """
        return self._over_norm(self.upper)

    @property
    def relative_lower(self) -> float:
        """``lower`` over the model's path-norm; above 1 where the other is more than twice that."""
        return self._over_norm(self.lower)

    def _over_norm(self, distance: float) -> float:
        if self.path_norm:
            return distance / self.path_norm
        return math.inf if distance else 0.0

    @property
    def log10_value(self) -> float | None:
        """Decimal logarithm of ``value``; -inf if it is 0."""
        return None if self.value is None else _log10(self.value)

    @property
    def log10_lower(self) -> float:
        """Decimal logarithm of ``lower``; -inf if it is 0."""
        return _log10(self.lower)

    @property
    def log10_upper(self) -> float:
        """Decimal logarithm of ``upper``; -inf if it is 0."""
        return _log10(self.upper)

    @functools.cached_property
    @plain_mode()
    def path_magnitude_sum(self) -> float | None:
        """Sum of Path-Mag (10) over the entries that became zero, an upper bound by (13).

        ``None`` unless the other network is the model with some effective parameters set to zero.
        """
        self._pair.check_unchanged()
        masks: dict[str, Tensor] = {}
        for leaf, name in self._pair.coordinates():
            first, second = self._pair.values(leaf)
            if not bool(((second == 0) | (second == first)).all()):
                return None
            pruned = (second == 0) & (first != 0)
            masks[name] = masks[name] | pruned if name in masks else pruned
        graphs = rewrite(self._pair.lifted, self._pair.setting)
        program = PathProgram(self._pair.ours.captured, graphs, torch.float64, 1.0)
        analysis = Analysis.of(program)
        return float(sum(analysis.path_magnitude(name)[mask].sum() for name, mask in masks.items()))

    # -- reports ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; this evaluates all bounds."""
        return {
            "path_norm": self.path_norm,
            "other_path_norm": self.other_path_norm,
            "signs_agree": self.signs_agree,
            "dominated": self.dominated,
            "exact": self.exact,
            "value": self.value,
            "lower": self.lower,
            "upper": self.upper,
            "relative": self.relative,
            "relative_lower": self.relative_lower,
            "relative_upper": self.relative_upper,
            "path_magnitude_sum": self.path_magnitude_sum,
            "bounds": self.bounds,
        }

    def table(self) -> Table:
        """All that bounds the metric, with fixed columns; this evaluates all bounds.

        Example:
            >>> import fxpath
            >>> metric = fxpath.path_metric(torch.nn.Linear(2, 1), torch.nn.Linear(2, 1))
            >>> [row["quantity"] for row in metric.table().rows][:2]
            ['lower', 'upper']
        """
        found = [("lower", self.lower, True), ("upper", self.upper, True)]
        found += [(name, self.bound(name), UPPER_BOUNDS[name]) for name in UPPER_BOUNDS]
        rows = tuple(
            {
                "quantity": name,
                "value": value,
                "relative": self._over_norm(value),
                "invariant": "yes" if invariant else "no",
            }
            for name, value, invariant in found
        )
        return Table("path-metric", COLUMNS, rows)

    def _table(self, **options: Any) -> Table:
        return self.table(**options)

    def __repr__(self) -> str:
        if self.value is not None:
            return f"<PathMetric: {self.value:.6g}, {self.relative:.3%} of the path-norm, exact>"
        return (
            f"<PathMetric: between {self.lower:.6g} and {self.upper:.6g}, "
            f"{self.relative_lower:.3%} to {self.relative_upper:.3%} of the path-norm>"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, Any]] = [
            ("path-norm", self.path_norm),
            ("path-norm of the other", self.other_path_norm),
            ("signs agree", self.signs_agree),
            ("one dominates the other on all paths", self.dominated),
        ]
        if self.value is not None:
            rows.append(("path-metric, exact (7)", self.value))
            rows.append(("relative to the path-norm", self._over_norm(self.value)))
        else:
            rows += [
                ("path-metric, at least (6)", self.lower),
                ("path-metric, at most", self.upper),
            ]
            rows.append(("relative to the path-norm, at least", self.relative_lower))
            rows.append(("relative to the path-norm, at most", self.relative_upper))
        return tabulate([[name, str(v) if isinstance(v, bool) else v] for name, v in rows])


@plain_mode()
def path_metric(
    model: Model,
    other: Other,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> PathMetric:
    """The l^1 path-metric between a model and other weights for it.

    ``||Phi(theta) - Phi(theta')||_1`` does not change when neurons of either network are rescaled,
    and bounds how far the two functions are apart (Theorem 3.1).  It is exact where one network's
    paths dominate the other's with agreeing signs (pruning, rounding towards zero; (7)), otherwise
    it lies between ``lower`` and ``upper``.

    Args:
        model: as for :func:`analyze`.
        other: a model of the same architecture, or a state dict with the model's own names.  A
            model's weights may be held in another way (pruned, parametrized, batch norms fused).
        input_shape: as for :func:`analyze`.
        example_inputs: as for :func:`analyze`.
        example_kwargs: as for :func:`analyze`.
        batch_dim: as for :func:`analyze`.
        until: as for :func:`analyze`.
        outputs: as for :func:`analyze`.

    Returns:
        A :class:`~fxpath.PathMetric`.

    Raises:
        UnsupportedModelError: as :func:`analyze`.
        TypeError: if ``other`` is neither a model nor a state dict.
        ValueError: for another architecture (slopes and clamp bounds are part of it), missing or
            unknown keys, other shapes, NaN.
        FloatingPointError: if a neuron's path-norm is not within 1e-270 ... 1e300.

    What is compared are functions in exact arithmetic: how activations are rounded is no part of
    it, so that a model and its float64 copy have distance 0.

    Example:
        >>> import copy, torch, fxpath
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> pruned = copy.deepcopy(model)
        >>> pruned[0].weight.data[0, 0] = 0
        >>> metric = fxpath.path_metric(model, pruned)
        >>> magnitude = fxpath.path_magnitude(model)["0.weight"][0, 0]
        >>> metric.exact, abs(metric.value - magnitude.item()) < 1e-6
        (True, True)
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    pair = make_pair(model, other, given)
    pair.check_architecture()
    return PathMetric(pair)


def _total(parts: list[Tensor | None]) -> float:
    return float(sum(part.sum() for part in parts if part is not None))


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
