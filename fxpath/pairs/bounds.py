"""Certified bounds of ||R_theta(x) - R_theta'(x)|| for two sets of weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxpath.graph.realization import realization
from fxpath.model import Given, Model, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.attack import Progress, difference_at, largest_difference
from fxpath.pairs.difference import Difference
from fxpath.pairs.inequalities import INEQUALITIES, all_bounds, inputs_of
from fxpath.pairs.matching import Other, make_pair
from fxpath.pairs.pair import Pair
from fxpath.pairs.rivals import Layered, find_layered
from fxpath.pairs.rounding import Doubt, doubt, relative
from fxpath.pairs.snapshot import Snapshot
from fxpath.passes.followed import check_bounded, gated
from fxpath.passes.reduce import reduce
from fxpath.report import plots
from fxpath.report.table import Column, Table, Tabular

if TYPE_CHECKING:
    from fxpath.report.plots import Axes


#: Columns of every table of a bound.
COLUMNS = (
    Column("inequality", "inequality", "text", "see lipschitz_bound; numbers are the paper's"),
    Column("invariant", "invariant", "text", "whether rescaling leaves it as it is"),
    Column("bound", "bound", "number", "in the norm that was asked for", digits=6),
    Column("over_found", "bound / found", "number", "over the largest difference that was found"),
)

#: Said under every table: what such a number is good for.
WHY = (
    "Why so large? It holds for every input within the radius and every sign pattern of the ReLUs, "
    "so absolute values add up along all paths, and each layer multiplies them. It grows with the "
    "radius (where biases do not matter, in proportion) and with the number of outputs in the l^1 "
    "norm: pass the radius of your inputs, norm=math.inf for the largest output alone, or x=batch "
    "for given inputs. Compare it with the same bound for other weights; search() says how large "
    "differences get in fact."
)


class Bound(Snapshot, Tabular):
    """A bound of ``||R_theta(x) - R_theta'(x)||``, with what it was chosen from.

    Numbers are float64, and hold for the two functions in exact arithmetic: each is rounded
    outwards by what float64 may have lost (:mod:`fxpath.pairs.rounding`).  How the networks' own
    formats round activations is no part of it; compare with outputs in float64.

    What is evaluated after the bound itself reads both networks' tensors, and raises a
    ``RuntimeError`` if they have changed since.  Pickled, a bound is plain numbers: search before.

    Attributes:
        norm: exponent of the norm of the output, 1, 2 or inf.
        radius: inputs are bounded by ``||x||_inf <= radius``; for a given batch, its largest entry.
        bounds: all bounds that hold for this pair, by name, in the given norm; see
            :func:`lipschitz_bound`.
        inequality: name of the smallest.
        value: the smallest itself.
        per_output: its bound for each output neuron, 1-d, in the order of the outputs; for a given
            batch the largest over the samples, entry by entry, while ``value`` is the largest norm.
        invariant: whether the chosen inequality gives the same when either network is rescaled.
    """

    _networks = ("_pair", "_samples")
    _numbers = ("lipschitz_in_x", "_layered")

    def __init__(self, pair: Pair, samples: list[list[Tensor]] | None, radius: float, norm: float):
        """Bounds are made by :func:`fxpath.lipschitz_bound`."""
        self._pair: Pair | None = pair
        self._samples = samples
        self.norm = norm
        self.radius = radius
        found = all_bounds(pair, samples, radius)
        values = {
            name: [torch.linalg.vector_norm(y, norm) for y in per] for name, per in found.items()
        }
        self.bounds = {name: max(v.item() for v in per) for name, per in values.items()}
        # Where two are equal up to rounding, the one that no rescaling changes is named.
        least = min(self.bounds.values()) * (1 + 1e-12)
        self.inequality = min(
            (name for name, value in self.bounds.items() if value <= least),
            key=lambda name: not INEQUALITIES[name],
        )
        self.value = self.bounds[self.inequality]
        self.per_output = torch.stack(found[self.inequality]).amax(0)
        self.invariant = INEQUALITIES[self.inequality]

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"Bound({self.value:.6g}, inequality={self.inequality!r}, norm={self.norm:g})"

    @property
    def log10(self) -> float:
        """Decimal logarithm of ``value``; -inf if it is 0."""
        return math.log10(self.value) if self.value > 0 else -math.inf

    def _unchanged(self) -> Pair:
        if "_pair" not in vars(self) or self._pair is None:
            raise RuntimeError(
                "a bound that was stored holds its numbers, and no networks to search: call "
                "search() before, or fxpath.lipschitz_bound again"
            )
        self._pair.check_unchanged()
        return self._pair

    @functools.cached_property
    @plain_mode()
    def lipschitz_in_x(self) -> float:
        """``||Phi^I(theta)||_1`` of the model: ``x -> R_theta(x)`` is so Lipschitz, l^inf to l^1.

        Paths that start at a bias do not count.

        Raises:
            ValueError: for a network with gates, which change with x.
        """
        pair = self._unchanged()
        if gated(pair.lifted):
            raise ValueError(
                "the network has gates, which change with x: no path-norm is a Lipschitz constant"
            )
        graph = reduce(pair.lifted, pair.setting)
        outputs = Difference(graph, pair, biases=False).outcome()
        found = float(sum(y.first.sum() for y in outputs))
        if doubt(pair):
            parts = Doubt(graph, pair, biases=False).outcome()
            found += float(sum(y.excess.sum() for y in parts if y.excess is not None))
        return found * (1 + relative(graph))

    @functools.cached_property
    @plain_mode()
    def _layered(self) -> Layered | None:
        pair = self._unchanged()
        return None if gated(pair.lifted) else find_layered(pair)

    @plain_mode()
    def search(
        self, seconds: float = 60.0, progress: Callable[[Progress], None] | None = None
    ) -> float:
        """The largest difference that a search finds, in the given norm: what no bound is below.

        Random inputs of the given radius and projected gradient ascent from them, the same in every
        call that has time enough; for a given batch the largest difference on it.  Functions are
        evaluated in float64, which may round a difference of 0 up.

        Args:
            seconds: when to stop, at the latest after the evaluation that is under way then.
            progress: called after each evaluation.

        Raises:
            RuntimeError: if a network has changed since the bound was made.
        """
        pair = self._unchanged()
        ours, theirs = (realization(each.module, each.tensors) for each in (pair.ours, pair.theirs))
        if self._samples is not None:
            return difference_at(ours, theirs, self._samples, self.norm, seconds, progress)
        shapes = [tuple(n.meta["val"].shape) for n in inputs_of(pair)]
        device = next((t.device for t in pair.ours.tensors.values()), None)
        return largest_difference(
            *(ours, theirs, shapes, self.radius, self.norm),
            seconds=seconds,
            progress=progress,
            device=device,
        )

    @functools.cached_property
    def largest_difference(self) -> float:
        """What :meth:`search` finds in a minute at most."""
        return self.search()

    def table(
        self, search: float | None = None, progress: Callable[[Progress], None] | None = None
    ) -> Table:
        """All bounds beside each other, the non-invariant ones (2), (9), (29) where they apply.

        (2), (9) and (29) bound the l^1 norm of the output, and so any other.

        Args:
            search: seconds to search for a large difference, which is the last row, and over which
                each bound is then set; see :meth:`search`.
            progress: called after each evaluation of the search.
        """
        found = None if search is None else self.search(search, progress)
        values = sorted(self.bounds.items(), key=lambda item: item[1])
        pairs: list[tuple[str, str | None, float]]
        pairs = [(name, "yes" if INEQUALITIES[name] else "no", value) for name, value in values]
        if self._layered is not None:
            layered = self._layered.bounds(self.radius).items()
            pairs += [(name, "no", value) for name, value in layered]
        if found is not None:
            pairs.append(("largest difference found", None, found))
        rows = tuple(
            {
                "inequality": name,
                "invariant": invariant,
                "bound": value,
                "over_found": None if found is None else _ratio(value, found),
            }
            for name, invariant, value in pairs
        )
        *columns, over = COLUMNS
        over = dataclasses.replace(over, shown=found is not None)
        return Table(self._headline(), (*columns, over), rows)

    def _table(self, **options: Any) -> Table:
        return self.table(**options)

    def to_dict(self) -> dict[str, Any]:
        """The bound, what it was chosen from, and for which inputs it holds, as plain data."""
        return {
            "value": self.value,
            "inequality": self.inequality,
            "invariant": self.invariant,
            "norm": str(self.norm) if math.isinf(self.norm) else self.norm,
            "radius": self.radius,
            "bounds": dict(self.bounds),
            "per_output": self.per_output.tolist(),
        }

    def plot(self, search: float | None = None, *, dark: bool = False) -> list[Axes]:
        """Draw all bounds beside each other, on a logarithmic scale.

        Args:
            search: seconds to search for a large difference, which is drawn as well.
            dark: light lines on a dark ground.

        Returns:
            The matplotlib axes, one.

        Raises:
            ImportError: if matplotlib is not installed; the extra ``report`` brings it.
        """
        return plots.bounds(self.table(search).rows, self._headline(), dark)

    def __str__(self) -> str:
        return f"{self._headline()}\n\n{self.table()}\n\n{textwrap.fill(WHY, 100)}"

    def _headline(self) -> str:
        return (
            f"outputs differ by at most {self.value:.6g} in the l^{self.norm:g} norm, for inputs "
            f"with entries in [-{self.radius:g}, {self.radius:g}] ({self.inequality})"
        )


def _ratio(value: float, found: float) -> float:
    if found:
        return value / found
    return math.inf if value else math.nan


@plain_mode()
def lipschitz_bound(
    model: Model,
    other: Other,
    input_shape: Shapes = None,
    *,
    x: Tensor | Sequence[Tensor] | None = None,
    radius: float = 1.0,
    norm: float = 1,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> Bound:
    """How far the functions of two sets of weights can be apart, certified.

    Bounds ``||R_theta(x) - R_theta'(x)||`` for every input with ``||x||_inf <= radius``, or for a
    given batch, by the smallest of

    - ``"theorem_b1"``: ``||x||_inf ||dPhi^I||_1 + ||dPhi^H||_1`` for each output, with paths from
      inputs and paths from biases apart; where signs agree and one network dominates the other on
      all paths, so that both norms are exact (7);
    - ``"any_pair"``, ``"any_pair_normalized"``: the same through the common part m of both networks
      (the smaller entry where signs agree, else 0), for any signs, on the effective parameters as
      they are, or on N(theta) and N(theta');
    - ``"inductive"``: from neuron to neuron, with max-pooling as a maximum instead of a sum; also
      for networks that differ in learned slopes, clamp bounds and coefficients.

    The second and the last change when one network is rescaled.

    Args:
        model: as for :func:`analyze`.
        other: a model of the same architecture, or a state dict with the model's own names.
        input_shape: as for :func:`analyze`.
        x: a batch of inputs (a list of tensors for several inputs): bounds the difference on these
            inputs instead of a ball, and gives the input shape where nothing else does.  ``|x|``
            itself is fed then (Lemma B.3), where one sample takes no more than 2^29 multiply-adds;
            beyond, ``"any_pair_normalized"`` and a ``"theorem_b1"`` that holds after rescaling take
            the largest entry of ``|x|``.
        radius: bound of ``||x||_inf`` otherwise.
        norm: of the outputs: 1, 2 or ``math.inf``.
        example_inputs: as for :func:`analyze`.
        example_kwargs: as for :func:`analyze`.
        batch_dim: as for :func:`analyze`.
        until: as for :func:`analyze`.
        outputs: as for :func:`analyze`.
        gates: take gates in, as for :func:`analyze`: for such networks only ``"inductive"`` holds,
            with the Lipschitz constants of activations.

    Returns:
        A :class:`~fxpath.Bound`; ``float(bound)`` is the bound.

    Raises:
        UnsupportedModelError: as :func:`analyze`.
        TypeError: if ``other`` is neither a model nor a state dict.
        ValueError: for another architecture, missing or unknown keys, other shapes, NaN, a
            ``radius`` below 0, another ``norm``, or an ``x`` of another shape.
        FloatingPointError: if a neuron's path-norm is not within 1e-270 ... 1e300.

    Example:
        >>> import torch, fxpath
        >>> model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> bound = fxpath.lipschitz_bound(model, other, radius=3.0)
        >>> x = torch.rand(100, 2) * 6 - 3
        >>> bool(((model(x) - other(x)).abs() <= float(bound) * (1 + 1e-5)).all())
        True
    """
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius}: the bound of |x| must be a finite number >= 0")
    if norm not in (1, 2, math.inf):
        raise ValueError(f"norm={norm}: pass 1, 2 or math.inf")
    told = input_shape is not None or example_inputs is not None or example_kwargs is not None
    if x is not None and not told and isinstance(model, nn.Module):
        input_shape = _shape_of(x)
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    pair = make_pair(model, other, given)
    check_bounded(pair.ours.captured, pair.lifted)
    samples = None if x is None else _samples(pair, x)
    if samples is not None:
        radius = max((t.abs().amax().item() for s in samples for t in s if t.numel()), default=0.0)
    with torch.no_grad():
        return Bound(pair, samples, float(radius), float(norm))


def _shape_of(x: Tensor | Sequence[Tensor]) -> Any:
    """Shapes of one sample of a batch; ``None``, to be inferred, where there is no batch axis."""
    given = [x] if isinstance(x, Tensor) else list(x)
    if any(t.dim() < 2 for t in given):
        return None
    shapes = [tuple(t.shape[1:]) for t in given]
    return shapes[0] if len(shapes) == 1 else shapes


def _samples(pair: Pair, x: Tensor | Sequence[Tensor]) -> list[list[Tensor]]:
    """One list of inputs, in the shape that was captured, for each sample of a batch."""
    given = [x] if isinstance(x, Tensor) else list(x)
    shapes = [tuple(node.meta["val"].shape) for node in inputs_of(pair)]
    if len(given) != len(shapes):
        raise ValueError(f"x has {len(given)} tensors, the model reads {len(shapes)} inputs")
    found = [t.detach().to(torch.float64) for t in given]
    if not all(bool(torch.isfinite(t).all()) for t in found):
        raise ValueError("x has NaN or infinite entries")
    if all(tuple(t.shape) == shape for t, shape in zip(found, shapes, strict=True)):
        return [found]
    batch = {t.shape[0] if t.dim() else 0 for t in found}
    batched = all(
        shape[:1] == (1,) and tuple(t.shape[1:]) == shape[1:]
        for t, shape in zip(found, shapes, strict=True)
    )
    if not batched or len(batch) != 1 or batch == {0}:
        expected = ", ".join(f"(batch, {', '.join(map(str, shape[1:]))})" for shape in shapes)
        raise ValueError(
            f"x has shapes {[tuple(t.shape) for t in found]}; the model reads {expected}"
        )
    return [[t[i : i + 1] for t in found] for i in range(batch.pop())]
