"""Whether |Phi(theta)| >= |Phi(theta')| on every path, decided invariantly by one max-plus pass.

    mu_v = max(max_u mu_u + log2 |theta'_uv / theta_uv|, log2 |b'_v / b_v|),    mu = 0 at inputs,

is the largest ratio of the two path-liftings over the paths that end at v (-inf where theta' has
none, +inf where theta has none and theta' one).  theta dominates if mu <= 0 at every output.  2^mu
is then also a rescaling of theta' after which |theta| >= |theta'| edge by edge, so that the
difference (7) can be carried without cancellation.

Logarithms are first rounded up to whole numbers, by comparison of the entries' digits: then nothing
is rounded off, 2^mu are powers of two, and what holds is proven.  That settles pairs that differ by
powers of two and entries that shrink.  Else mu is computed in float64.  Any numbers mu whatsoever
are a rescaling of theta' that changes neither Phi(theta') nor the bound through the common part; so
what rounding in mu lets exceed, (2^mu - 1) times the path mass at outputs where mu > 0 and a few u
of it for each edge of a path, is carried as slack and counted: at most about 1e-12 of the mass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.pairs.pair import Pair
from fxpath.pairs.rounding import UNIT
from fxpath.pairs.unrolled import Map, Network, Neurons, Part, Pending, Signed, Values


@dataclass(frozen=True)
class State(Values):
    """Activations of :class:`Domination`.

    Attributes:
        ratio: mu.
        mass: for each part, path mass of theta.
        excess: for each part, its excess over theta', which is rescaled by 2^mu unless ``final``.
        depth: number of edges of the longest path.
        final: whether theta' is back in its own scale, for outputs.
    """

    ratio: Tensor
    mass: list[Tensor]
    excess: list[Tensor]
    depth: int
    final: bool = False


@dataclass(frozen=True)
class Dominated:
    """What :class:`Domination` found.

    Attributes:
        holds: whether theta dominates, but for what rounding in mu may have hidden.
        gap: if it does, and signs agree, ||Phi(theta) - Phi(theta')||_1 for each part and each
            output neuron, flattened; up to ``slack``.
        slack: what has to be added for an upper bound; zeros where nothing was rounded.
    """

    holds: bool
    gap: list[Tensor]
    slack: list[Tensor]

    @property
    def bounds(self) -> list[Tensor]:
        """Upper bounds of the difference, for each part and each output neuron."""
        return [gap + slack for gap, slack in zip(self.gap, self.slack, strict=True)]

    @property
    def total(self) -> float:
        """The difference of all parts and outputs together, up to ``total_slack``."""
        return float(sum(gap.sum() for gap in self.gap))

    @property
    def total_slack(self) -> float:
        """What has to be added to ``total`` for an upper bound."""
        return float(sum(slack.sum() for slack in self.slack))


class Domination(Neurons[State]):
    """The max-plus pass, and with ``parts`` the carried difference."""

    def __init__(
        self,
        network: Network,
        pair: Pair,
        parts: Sequence[Part] = (),
        swap: bool = False,
        whole: bool = False,
    ) -> None:
        """Walk ``network``.

        Args:
            network: the graph to walk.
            pair: the two networks.
            parts: the paths to tell apart; none to decide only.
            swap: whether to ask if theta' dominates theta.
            whole: whether to round logarithms up to whole numbers.
        """
        super().__init__(network, pair, parts)
        self.swap = swap
        self.whole = whole
        self.largest = 0.0

    def other(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        first, second = super().other(node)
        return (second, first) if self.swap else (first, second)

    def begin(self, values: list[Tensor], ones: Tensor) -> State:
        zeros = torch.zeros_like(ones)
        return State(zeros, values, [zeros] * len(values), 0)

    def settle(self, pending: Pending[State], bias: Signed | None, final: bool) -> State:
        like = torch.zeros(pending.shape, dtype=self.dtype, device=self.device)
        ratio = like - math.inf
        for unrolled, x, weight in pending.terms:
            logs = None if weight is None else _log_ratio(weight, self.whole)
            endless = logs is not None and bool(
                (logs == math.inf).any() | (x.ratio == math.inf).any()
            )
            best = unrolled.split(ratio).clone()
            for block in unrolled.blocks():
                ratios = block.read(x.ratio, -math.inf)
                if logs is not None:
                    steps = block.weigh(logs)
                    if endless:
                        # No path of theta' comes through: whatever theta is, nothing exceeds it.
                        none = (ratios == -math.inf) | (steps == -math.inf)
                        ratios = torch.where(none, -math.inf, ratios + steps)
                    else:
                        ratios = ratios + steps
                best[:, block.out] = torch.maximum(best[:, block.out], ratios.amax(2))
            ratio = unrolled.join(best)
        if bias is not None:
            ratio = torch.maximum(ratio, _log_ratio(bias, self.whole))
        if not self.whole and ratio.numel():
            self.largest = max(self.largest, _finite(ratio, 0.0).abs().amax().item())
        sources = [x for _, x, _ in pending.terms]
        depth = 1 + max((x.depth for x in sources), default=0)
        if not self.parts:
            return State(ratio, [], [], depth)
        return State(ratio, *self._carry(pending, bias, ratio, sources), depth)

    def _carry(
        self, pending: Pending[State], bias: Signed | None, ratio: Tensor, sources: list[State]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Path mass of theta and its excess over theta' rescaled by 2^mu."""
        parts = range(len(self.parts))
        mass = [pending.run([x.mass[k] for x in sources], 0) for k in parts]
        excess = [torch.zeros_like(m) for m in mass]
        for unrolled, x, weight in pending.terms:
            one = torch.ones(1, dtype=self.dtype, device=self.device)
            a, b = (one, one) if weight is None else (weight.first.abs(), weight.second.abs())
            here = unrolled.split(_finite(ratio, math.inf))
            sums = [torch.zeros(unrolled.shape, dtype=a.dtype, device=a.device) for _ in parts]
            source = _finite(x.ratio, -math.inf)
            for block in unrolled.blocks():
                step = block.read(source, -math.inf) - here[:, block.out, None]
                own = block.weigh(a)
                low = torch.minimum(own, block.weigh(b) * torch.exp2(step.clamp(max=1000)))
                for k in parts:
                    fresh = ((own - low) * block.read(x.mass[k], 0.0)).sum(2)
                    sums[k][:, block.out] += fresh + (low * block.read(x.excess[k], 0.0)).sum(2)
            excess = [e + unrolled.join(s) for e, s in zip(excess, sums, strict=True)]
        if bias is not None:
            own = bias.first.abs()
            low = torch.minimum(own, bias.second.abs() * torch.exp2(-_finite(ratio, math.inf)))
            for k, part in enumerate(self.parts):
                if part.biases:
                    mass[k] = mass[k] + own
                    excess[k] = excess[k] + own - low
        return mass, excess

    def through(self, x: State, function: Map, scaled: Map) -> State:
        # Positions that read nothing (padding) have no paths: select before taking logarithms.
        reached = function(torch.ones_like(x.ratio)) > 0
        finite = torch.nan_to_num(x.ratio, posinf=_HUGE, neginf=-_HUGE)
        moved = function(finite)
        ratio = torch.where(
            moved >= _HUGE, math.inf, torch.where(moved <= -_HUGE, -math.inf, moved)
        )
        return State(
            torch.where(reached, ratio, -math.inf),
            [scaled(m) for m in x.mass],
            [scaled(e) for e in x.excess],
            x.depth,
            x.final,
        )

    def gather(self, x: State, matrix: Tensor, dim: int) -> State:
        pattern = matrix != 0
        spread = torch.where(pattern, x.ratio.movedim(dim, -1)[..., None, :], -math.inf)
        at_outputs = spread.amax(-1).movedim(-1, dim)
        outputs = self._at_outputs(x)
        return State(
            at_outputs,
            [ops.mix(m, dim, matrix) for m in outputs.mass],
            [ops.mix(e, dim, matrix) for e in outputs.excess],
            x.depth,
            True,
        )

    def joined(self, pieces: list[State], function: Callable[[list[Tensor]], Tensor]) -> State:
        if any(p.final for p in pieces):
            pieces = [self._at_outputs(p) for p in pieces]
        parts = range(len(self.parts))
        return State(
            function([p.ratio for p in pieces]),
            [function([p.mass[k] for p in pieces]) for k in parts],
            [function([p.excess[k] for p in pieces]) for k in parts],
            max(p.depth for p in pieces),
            pieces[0].final,
        )

    def _at_outputs(self, x: State) -> State:
        """Undo the rescaling by 2^mu: what is left of theta' is 2^mu times what was common."""
        if x.final:
            return x
        low = torch.exp2(_finite(x.ratio, -math.inf)).clamp(max=1)
        excess = [(1 - low) * m + low * e for m, e in zip(x.mass, x.excess, strict=True)]
        return State(x.ratio, x.mass, excess, x.depth, True)

    def total(self, outputs: list[State]) -> Dominated:
        # Of a logarithm, of the sums of them, and of the power of two that comes back.
        unit = 0.0 if self.whole else UNIT * (8 * self.largest + 16)
        holds = all(bool((x.ratio <= unit * (x.depth + 1)).all()) for x in outputs)
        parts = range(len(self.parts)) if holds else range(0)
        ends = [self._at_outputs(x) for x in outputs] if holds else []
        above = [torch.expm1(x.ratio.clamp(min=0) * math.log(2)) for x in ends]
        slack = [up + 3 * unit * (x.depth + 1) for up, x in zip(above, ends, strict=True)]
        return Dominated(
            holds,
            [self._flatten([x.excess[k] for x in ends]) for k in parts],
            [
                self._flatten([s * x.mass[k] for s, x in zip(slack, ends, strict=True)])
                for k in parts
            ],
        )


def find_domination(
    network: Network, pair: Pair, parts: Sequence[Part], excluded: Sequence[bool]
) -> Dominated:
    """Whether either network dominates the other, and by how much.

    Args:
        network: the graph to walk.
        pair: the two networks.
        parts: the paths to tell apart.
        excluded: for theta and for theta', whether it is known not to dominate.
    """
    for swap, whole in itertools.product((False, True), (True, False)):
        if not excluded[swap]:
            if Domination(network, pair, (), swap, whole).outcome().holds:
                found: Dominated = Domination(network, pair, parts, swap, whole).outcome()
                return found
    return Dominated(False, [], [])


_HUGE = 1e100


def _finite(ratio: Tensor, instead: float) -> Tensor:
    """Ratios, where a neuron without a path of theta' (or none of theta) has ``instead``."""
    return torch.where(torch.isfinite(ratio), ratio, instead)


def _log_ratio(weight: Signed, whole: bool) -> Tensor:
    """log2 |theta' / theta|: -inf where theta' = 0, +inf where theta = 0 alone.

    ``whole`` rounds up to a whole number, exactly.
    """
    a, b = weight.first.abs(), weight.second.abs()
    ratio = torch.where(b == 0, -math.inf, torch.where(a == 0, math.inf, 0.0))
    both = (a > 0) & (b > 0)
    if whole:
        (digits, exponent), (other_digits, other_exponent) = torch.frexp(a), torch.frexp(b)
        log = (other_exponent - exponent + (other_digits > digits)).to(ratio.dtype)
    else:
        log = torch.log2(torch.where(both, b / a, 1.0))
    return torch.where(both, log, ratio)
