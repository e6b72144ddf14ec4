"""Many sets of weights for one network, each evaluated once and compared pair by pair at low cost.

With m the smaller of two entries where their signs agree and 0 elsewhere, (7) gives

    ||Phi(theta) - Phi(theta')||_1 <= ||Phi(theta)|| + ||Phi(theta')|| - 2 ||Phi(m)||,

the upper bound ``"m"`` of :class:`fxpath.PathMetric`.  Each set of weights needs its own norm once,
each pair of them one more: that of m.  The difference cancels where two networks are very close;
how far it may be off is known, and the difference is carried then, which takes longer.

All norms are taken in float64 and rounded outwards (:mod:`fxpath.pairs.rounding`): ``|theta|`` up,
``|m|`` down.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated
from fxpath.graph.writer import Writer
from fxpath.model import Captured
from fxpath.modes import plain_mode
from fxpath.pairs.bounds import Bound
from fxpath.pairs.matching import side_of
from fxpath.pairs.metric import PathMetric
from fxpath.pairs.pair import Pair
from fxpath.pairs.rounding import FOLDED, bias_error, relative
from fxpath.passes import Rewritten, Setting
from fxpath.passes.lower import lower
from fxpath.program.program import PathProgram

#: Entries that are compared at once: three copies of them stay in the cache.
BLOCK = 1 << 16

#: Part of a bound that rounding may hide; beyond it the difference is carried.
HIDDEN = 1e-4


@dataclass(frozen=True)
class Effective:
    """Effective parameters of one set of weights, and their path-norm.

    Attributes:
        tensors: what they were computed from, by placeholder.
        values: with signs in float64, one for each coordinate array.
        errors: what the rounding of a folded bias may hide, by its position; nothing for others.
        fixed: numbers of the architecture that are read from the model's tensors.
        mantissa: ``||Phi(theta)||_1 = mantissa * 2 ** exponent``, rounded up with the biases.
        exponent: of two.
    """

    tensors: Mapping[str, Tensor]
    values: list[Tensor]
    errors: dict[int, Tensor]
    fixed: list[Tensor]
    mantissa: float
    exponent: int

    @functools.cached_property
    def sums(self) -> list[float]:
        """The l^1 norm of each array."""
        return _numbers([torch.linalg.vector_norm(value, 1) for value in self.values])

    @property
    def log10_path_norm(self) -> float:
        """Decimal logarithm of the path-norm; -inf if it is 0."""
        if self.mantissa == 0:
            return -math.inf
        return math.log10(self.mantissa) + self.exponent * math.log10(2)


@dataclass(frozen=True)
class Apart:
    """How far two sets of weights are apart.

    Attributes:
        metric: ``||Phi(theta) - Phi(theta')||_1``, or an upper bound of it; ``None`` where slopes
            or other parts of the architecture differ, inf only beyond float64.
        relative: the same over the path-norm of the first one.
        relative_lower: what it is at least, by (6): the difference of both path-norms.
        exact: whether it is the metric itself, by (7).
        bound: of the l^1 distance of the outputs for inputs within the radius (Theorem 3.1).
        changes: for each coordinate array its l^1 distance, as a part of the larger of both l^1
            norms, from 0 to 2; empty if it was not asked for.
    """

    metric: float | None
    relative: float | None
    relative_lower: float
    exact: bool
    bound: float
    changes: dict[str, float]


class CommonPart:
    """Evaluates sets of weights for one captured network, and compares two of them.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> common = CommonPart(fxpath.compile(model, backend="eager"))
        >>> before = common.evaluate()
        >>> _ = torch.nn.init.constant_(model.weight, -1.0)
        >>> round(common.apart(before, common.evaluate()).metric, 9)
        4.0
    """

    def __init__(self, program: PathProgram) -> None:
        """For the network of a program, whose own exponent and format do not matter."""
        self.captured, self.lifted = program.captured, program.lifted
        self._side = side_of(self.captured, self.lifted)
        leaves = self._side.nodes
        self._leaves = [i for i, node in enumerate(leaves) if not node.meta["fixed"]]
        self._fixed = [node for node in leaves if node.meta["fixed"]]
        self.names = [str(arguments(leaves[leaf])[1]) for leaf in self._leaves]
        read = [arguments(leaves[leaf])[0] for leaf in self._leaves]
        self._read: list[fx.Node] = read
        reduced = _on_coordinates(program.reduced)
        given = {_placeholder(leaf): n for leaf, n in zip(self._leaves, self.names, strict=True)}
        own = vars(self.captured)
        captured = _OnCoordinates(**{**own, "tensors": {**self.captured.tensors, **given}})
        graphs = Rewritten(self.lifted, reduced, lower(reduced, Setting(captured)))
        self._program = PathProgram(captured, graphs, torch.float64, 1.0, given=program.given)
        formed = sum(node.target in _FORMED for node in read)
        self._rounding = relative(reduced) + 2 * FOLDED * formed
        self._memory: list[Tensor] = []

    def trained(self) -> list[str]:
        """Parameters with a gradient that are no part of theta, by name: slopes and clamp bounds.

        Training changes them, and with them what two sets of weights have to have in common.
        """
        live, side = self.captured.live(), self._side
        pair, names = Pair(side.module, side, side), self.captured.tensors
        learnt = {names[key] for key, tensor in live.items() if tensor.requires_grad}
        fixed = [name for node in side.nodes if node.meta["fixed"] for name in pair.names(node)]
        return [name for name in dict.fromkeys(fixed) if name in learnt]

    # -- one set of weights -----------------------------------------------------------------------

    @plain_mode()
    def evaluate(
        self, tensors: Mapping[str, Tensor] | None = None, memory: Effective | None = None
    ) -> Effective:
        """Effective parameters and path-norm of a set of weights.

        Args:
            tensors: by placeholder, as ``captured.live()`` returns them, which is the default: the
                model's own as they are now.
            memory: one that is no longer needed; its arrays are written over.

        Raises:
            ValueError: for a NaN or infinite parameter, by name.
            FloatingPointError: if float64 does not suffice.
        """
        live = self.captured.live() if tensors is None else tensors
        with torch.no_grad():
            values = [] if memory is None else memory.values
            errors: dict[int, Tensor] = {}
            for i, found, error in self._found(live, values):
                values[i : i + 1] = [found]
                if error is not None:
                    errors[i] = error
            sizes = [v.abs() + errors[i] if i in errors else v for i, v in enumerate(values)]
            run = self._program.evaluate(scores=False, tensors={**live, **self._named(sizes)})
            fixed = [v.detach().clone() for _, v in evaluated(self.lifted, live, self._fixed)]
        return Effective(live, values, errors, fixed, run.mantissa, run.exponent)

    def _named(self, values: list[Tensor]) -> dict[str, Tensor]:
        return {_placeholder(leaf): value for leaf, value in zip(self._leaves, values, strict=True)}

    def _found(
        self, live: Mapping[str, Tensor], memory: list[Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Effective parameters in float64, in given memory, and errors of folded biases."""
        factors = {
            a
            for node in self._read
            if node.target in (ops.folded_weight, ops.folded_bias)
            for a in node.all_input_nodes
        }
        plain = {node for node in self._read if node.target is not ops.folded_weight}
        known = dict(evaluated(self.lifted, live, list(factors | plain)))
        for i, node in enumerate(self._read):
            out = memory[i] if i < len(memory) else None
            if node.target is ops.folded_weight:
                weight, factor, axis, groups = (
                    known[a] if isinstance(a, fx.Node) else a for a in arguments(node)
                )
                if axis == 0:
                    if out is None:
                        out = torch.empty_like(weight, dtype=torch.float64)
                    beside = factor.reshape(-1, *[1] * (weight.dim() - 1))
                    yield i, torch.mul(weight, beside, out=out), None
                else:
                    yield i, _kept(ops.folded_weight(weight, factor, axis, groups), out), None
            elif node.target is ops.folded_bias:
                terms = (
                    known[a].double() if isinstance(a, fx.Node) else a for a in arguments(node)
                )
                yield i, _kept(known[node], out), bias_error(*terms)
            else:
                yield i, _kept(known[node], out), None

    # -- two of them ------------------------------------------------------------------------------

    @plain_mode()
    def apart(
        self, first: Effective, second: Effective, radius: float = 1.0, changes: bool = False
    ) -> Apart:
        """How far two of them are apart.

        Exact where signs agree and one dominates, as :func:`fxpath.path_metric` finds it (which
        takes longer than the bound); else the bound through m.

        Args:
            first: over whose path-norm the relative metric is taken.
            second: the other one.
            radius: inputs are bounded by ``||x||_inf <= radius``.
            changes: whether to measure the change of each array.
        """
        if any(not torch.equal(a, b) for a, b in zip(first.fixed, second.fixed, strict=True)):
            return self._architectures(first, second, radius)
        with torch.no_grad():
            low, agree, sums = self._common(first, second, changes)
            run = self._program.flat.norm({**first.tensors, **self._named(low)}, torch.float64)
        # In units of the larger one, so that nothing overflows before the end.
        unit = max(first.exponent, second.exponent)
        a, b = (math.ldexp(e.mantissa, e.exponent - unit) for e in (first, second))
        common = math.ldexp(run.mantissa, run.exponent - unit) if run.mantissa else 0.0
        hidden = self._rounding * (a + b + 2 * common)
        upper = max(0.0, a + b - 2 * common) + hidden
        changed: dict[str, float] = {}
        if changes:
            each = zip(self.names, first.sums, second.sums, sums, strict=True)
            for name, p, q, s in each:
                # Of a weight that is used twice, the use that changed more.
                change = _over(max(0.0, p + q - 2 * s), max(p, q))
                changed[name] = max(change, changed.get(name, 0.0))
        metric, exact = _ldexp(upper, unit), False
        share = _over(upper, a)
        if agree or hidden > HIDDEN * upper:
            metric, exact = self._carried(first, second, metric)
            share = _over(metric, _ldexp(a, unit)) if math.isfinite(metric) else share
        lower = max(0.0, abs(a - b) - hidden)
        least = _over(lower, a) if lower else 0.0
        return Apart(metric, share, least, exact, max(radius, 1.0) * metric, changed)

    def _pair(self, first: Effective, second: Effective) -> Pair:
        ours, theirs = (replace(self._side, tensors=each.tensors) for each in (first, second))
        return Pair(self.lifted, ours, theirs).remember()

    def _carried(self, first: Effective, second: Effective, upper: float) -> tuple[float, bool]:
        """The metric where it is exact, or a bound that rounding hides less of."""
        try:
            found = PathMetric(self._pair(first, second))
            if found.value is not None:
                return found.value, True
            return min(upper, found.bound("m")), False
        except FloatingPointError:
            # Float64 cannot carry the difference: the bound that is known holds all the same.
            return upper, False

    def _architectures(self, first: Effective, second: Effective, radius: float) -> Apart:
        """Learned slopes differ: there is no metric, but a bound."""
        with torch.no_grad():
            found = Bound(self._pair(first, second), None, radius, 1.0)
        return Apart(None, None, 0.0, False, found.value, {})

    def _common(
        self, first: Effective, second: Effective, summed: bool
    ) -> tuple[list[Tensor], bool, list[float]]:
        """``|m|`` rounded down, whether all signs agree, and if asked for the l^1 norms of it."""
        if not self._memory:
            self._memory = [torch.empty_like(value) for value in first.values]
        agree = True
        sums: list[Tensor] = []
        for i, (a, b, out) in enumerate(
            zip(first.values, second.values, self._memory, strict=True)
        ):
            total = out.new_zeros(())
            for x, y, m in zip(*(_blocks(t) for t in (a, b, out)), strict=True):
                torch.minimum(x, y, out=m)
                torch.maximum(m, torch.maximum(x, y).neg_(), out=m).clamp_(min=0)
                if agree:
                    agree = not bool(((m == 0) & (x != 0) & (y != 0)).any())
                if summed:
                    total += m.sum()
            sums.append(total)
            for each in (first, second):
                if i in each.errors:
                    size = each.values[i].abs() - each.errors[i]
                    torch.minimum(out, size.clamp_(min=0), out=out)
        return self._memory, agree, _numbers(sums)


class _OnCoordinates(Captured):
    """A captured model whose graph also reads effective parameters, which are no tensors of it."""

    def live(self) -> dict[str, Tensor]:
        """The model's own tensors."""
        own = {key: n for key, n in self.tensors.items() if not key.startswith(_PREFIX)}
        return Captured(**{**vars(self), "tensors": own}).live()


_PREFIX = "theta_"

_FORMED: tuple[Any, ...] = (ops.folded_weight, ops.folded_bias, ops.normalizer)


def _placeholder(leaf: int) -> str:
    return f"{_PREFIX}{leaf}"


def _on_coordinates(module: fx.GraphModule) -> fx.GraphModule:
    """A lifted graph that reads effective parameters instead of what they are computed from."""
    writer = Writer()
    writer.copy(module)
    start = next(iter(writer.graph.nodes))
    given: dict[int, fx.Node] = {}
    for node in list(writer.graph.nodes):
        if node.target is not ops.coordinate:
            continue
        leaf = node.meta["leaf"]
        if leaf not in given:
            with writer.graph.inserting_before(start):
                given[leaf] = writer.graph.placeholder(_placeholder(leaf))
            given[leaf].meta["val"] = node.meta["val"]
        node.args = (given[leaf], *node.args[1:])
    return writer.finish()


def _kept(value: Tensor, out: Tensor | None) -> Tensor:
    """A value in float64, in given memory or in a copy that no one else holds."""
    if out is not None:
        return out.copy_(value)
    return value.detach().to(torch.float64, copy=True).contiguous()


def _blocks(value: Tensor) -> tuple[Tensor, ...]:
    """A few entries at a time, in the cache of a CPU; elsewhere all at once."""
    flat = value.reshape(-1)
    size = BLOCK if value.device.type == "cpu" else max(1, flat.numel())
    return flat.split(size) if flat.numel() else ()


def _numbers(values: list[Tensor]) -> list[float]:
    """Read from the device at once."""
    found: list[float] = torch.stack(values).tolist() if values else []
    return found


def _over(distance: float, norm: float) -> float:
    if norm:
        return distance / norm
    return math.inf if distance else 0.0


def _ldexp(mantissa: float, exponent: int) -> float:
    try:
        return math.ldexp(mantissa, exponent)
    except OverflowError:
        return math.inf
