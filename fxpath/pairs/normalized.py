"""N(theta) and N(theta'), read off one lifted pass, and what bounds their distance.

Algorithm 1 of Gonon et al. (2024) rescales neurons until the incoming weights of each hidden one,
bias included, have l^1 norm 1.  With h_v the lifted value of neuron v, the normalized weight of an
edge u -> v is theta_uv h_u / h_v, and b_v / h_v the bias (0 / 0 = 0): the part of the path mass of
v that comes in there.  Output neurons keep theta_uv h_u and b_v.  Both networks are normalized, so
nothing here changes when either is rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxpath.graph import ops
from fxpath.pairs.difference import check_range
from fxpath.pairs.edges import Unrolled
from fxpath.pairs.pair import Pair, agreement
from fxpath.pairs.rounding import UNIT
from fxpath.pairs.unrolled import Map, Network, Neurons, Part, Pending, Signed, Values

#: Bias paths are told apart by a part of their own; this one has all of them.
ALL = (Part(),)


@dataclass(frozen=True)
class State(Values):
    """Activations of :class:`Normalized`, all of one shape but for the numbers at the end.

    Attributes:
        first: h_v of theta.
        second: h_v of theta'; the same object as long as nothing differs.
        mass: for each part, the path mass of theta that it has at v.
        other_mass: the same for theta'.
        excess: for each part, the mass by which N(theta) and N(theta') exceed their common part m,
            added up; at hidden neurons relative to h_v and h'_v.
        change: largest sum over the hidden neurons of a path that ends at v of the l^1 distance of
            their normalized incoming weights, see (23).
        distance: at output neurons, l^1 distance of their incoming weights.
        final: whether these are output neurons.
        depth: number of edges of the longest path.
    """

    first: Tensor
    second: Tensor
    mass: list[Tensor]
    other_mass: list[Tensor]
    excess: list[Tensor]
    change: Tensor
    distance: Tensor
    final: bool
    depth: int

    @property
    def clean(self) -> bool:
        """Whether both networks are the same up to here."""
        return self.second is self.first


@dataclass(frozen=True)
class Distance:
    """What :class:`Normalized` found.

    Attributes:
        norms: ||Phi(theta)||_1 and ||Phi(theta')||_1.
        common: for each part and each output neuron, flattened: bound of the change of all paths,
            through m on the normalized parameters.
        distance: sum over output neurons of the l^1 distance of their incoming weights (23).
        change: maximum over paths in (23).
        largest: ||N(theta) - N(theta')||_inf.
        rounding: what rounding of products may hide, as a part of the path mass; 0 where nothing
            differs.
        depth: L of Lemma F.3, one less than the length of the longest path.
        width: W, with the bias counted: the larger of the number of outputs and
            max_v |ant(v)| + 1.
    """

    norms: tuple[float, float]
    common: list[Tensor]
    distance: float
    change: float
    largest: float
    rounding: float
    depth: int
    width: int

    @property
    def through_common(self) -> float:
        """||Phi(theta) - Phi(theta')||_1 through m on the normalized parameters."""
        return float(sum(part.sum() for part in self.common))

    @property
    def theorem_f2(self) -> float:
        """Right-hand side of (23), Theorem F.2, with q = 1."""
        hidden = self.rounding * sum(self.norms)
        return self.distance + min(self.norms) * self.change + hidden

    @property
    def lemma_3_3(self) -> float:
        """Right-hand side of (8), Lemma 3.3, with W large enough for neurons with a bias."""
        w, lw = self.width**2, self.depth * self.width
        return (w + min(self.norms) * lw) * (self.largest + self.rounding * max(1.0, *self.norms))


class Normalized(Neurons[State]):
    """Compares N(theta) with N(theta') neuron by neuron."""

    def __init__(self, network: Network, pair: Pair, parts: Sequence[Part] = ALL) -> None:
        """See :class:`~fxpath.pairs.unrolled.Neurons`."""
        super().__init__(network, pair, parts)
        self.largest = 0.0
        self.width = 0

    # -- neurons ----------------------------------------------------------------------------------

    def begin(self, values: list[Tensor], ones: Tensor) -> State:
        zeros = torch.zeros_like(ones)
        nothing = [zeros] * len(values)
        return State(ones, ones, values, values, nothing, zeros, zeros, False, 0)

    def settle(self, pending: Pending[State], bias: Signed | None, final: bool) -> State:
        sources = [x for _, x, _ in pending.terms]
        weights = [w for _, _, w in pending.terms if w is not None]
        alike = all(x.clean for x in sources) and all(
            w.second is w.first or torch.equal(w.first, w.second)
            for w in (*weights, *([] if bias is None else [bias]))
        )

        def summed(values: list[Tensor], side: int, biases: bool = True) -> Tensor:
            total = pending.run(values, side)
            if bias is not None and biases:
                total = total + (bias.first, bias.second)[side].abs()
            return total

        first = summed([x.first for x in sources], 0)
        second = first if alike else summed([x.second for x in sources], 1)
        check_range(first, second)

        def masses(values: list[list[Tensor]], norm: Tensor, side: int) -> list[Tensor]:
            return [
                norm if part == Part() else summed([v[k] for v in values], side, part.biases)
                for k, part in enumerate(self.parts)
            ]

        mass = masses([x.mass for x in sources], first, 0)
        other_mass = mass if alike else masses([x.other_mass for x in sources], second, 1)
        self._count(pending, bias)
        found = _Sums(first, second, final, self.parts)
        for unrolled, x, weight in pending.terms:
            found.passes(unrolled, x)
            if not alike:
                found.edges(unrolled, x, weight)
        if bias is not None and not alike:
            found.bias(bias)
        self.largest = max(self.largest, found.largest)
        zeros = torch.zeros_like(first)
        return State(
            first,
            second,
            mass,
            other_mass,
            found.excess,
            found.change if final else found.change + found.distance,
            found.distance if final else zeros,
            final,
            1 + max((x.depth for x in sources), default=0),
        )

    def _count(self, pending: Pending[State], bias: Signed | None) -> None:
        antecedents = sum(unrolled.fan_in for unrolled, _, _ in pending.terms)
        # A clamp's two bounds are neurons of their own.
        constants = 2 if bias is not None and bias.fixed else 0
        self.width = max(self.width, antecedents + constants + 1)

    def through(self, x: State, function: Map, scaled: Map) -> State:
        lists = (x.mass, x.other_mass)
        mass, other_mass = ([scaled(v) for v in values] for values in lists)
        inner = scaled if x.final else function
        first = scaled(x.first)
        return State(
            first,
            first if x.clean else scaled(x.second),
            mass,
            other_mass,
            [inner(v) for v in x.excess],
            function(x.change),
            inner(x.distance),
            x.final,
            x.depth,
        )

    def gather(self, x: State, matrix: Tensor, dim: int) -> State:
        x = self._finished(x)
        pattern = (matrix != 0).to(self.dtype)

        def summed(value: Tensor) -> Tensor:
            return ops.mix(value, dim, matrix)

        # A path through any of the summed neurons counts: the largest, entry by entry of a row.
        spread = x.change.movedim(dim, -1)[..., None, :] * pattern
        moved = self.through(x, summed, summed)
        return replace(moved, change=spread.amax(-1).movedim(-1, dim))

    def joined(self, pieces: list[State], function: Callable[[list[Tensor]], Tensor]) -> State:
        if any(p.final for p in pieces):
            pieces = [self._finished(p) for p in pieces]
        parts = range(len(self.parts))

        def lists(get: Callable[[State], list[Tensor]]) -> list[Tensor]:
            return [function([get(p)[k] for p in pieces]) for k in parts]

        first = function([p.first for p in pieces])
        return State(
            first,
            first if all(p.clean for p in pieces) else function([p.second for p in pieces]),
            lists(lambda p: p.mass),
            lists(lambda p: p.other_mass),
            lists(lambda p: p.excess),
            function([p.change for p in pieces]),
            function([p.distance for p in pieces]),
            pieces[0].final,
            max(p.depth for p in pieces),
        )

    # -- outputs ----------------------------------------------------------------------------------

    def _finished(self, x: State) -> State:
        """Output neurons; a hidden neuron that is one, too, is copied by an identity neuron."""
        if x.final:
            return x
        low = torch.minimum(x.first, x.second)
        over, under = x.first - low, x.second - low
        distance = over + under
        if distance.numel():
            self.largest = max(self.largest, distance.amax().item())
        shares, others = _shares(x.first, x.mass), _shares(x.second, x.other_mass)
        return State(
            x.first,
            x.second,
            x.mass,
            x.other_mass,
            [
                over * s + under * t + low * e
                for s, t, e in zip(shares, others, x.excess, strict=True)
            ],
            x.change,
            distance,
            True,
            x.depth + 1,
        )

    def total(self, outputs: list[State]) -> Distance:
        finished = [self._finished(x) for x in outputs]
        depth = max(x.depth for x in finished)
        # A product of an edge has five factors at most, each of them rounded, in either network.
        rounding = [0.0 if x.clean else 16 * (depth + 1) * UNIT for x in finished]
        common = [
            self._flatten(
                [
                    x.excess[k] + hidden * (x.mass[k] + x.other_mass[k])
                    for x, hidden in zip(finished, rounding, strict=True)
                ]
            ).nan_to_num(nan=math.inf)
            for k in range(len(self.parts))
        ]
        return Distance(
            (
                self._flatten([x.first for x in finished]).sum().item(),
                self._flatten([x.second for x in finished]).sum().item(),
            ),
            common,
            self._flatten([x.distance for x in finished]).sum().item(),
            max((x.change.amax().item() for x in finished if x.change.numel()), default=0.0),
            self.largest,
            max(rounding),
            depth - 1,
            max(self.width, *[part.numel() for part in common]),
        )


def _inverse(value: Tensor) -> Tensor:
    """1 / value, with 1 / 0 = 0."""
    return torch.where(value > 0, 1 / value, 0.0)


def _shares(norm: Tensor, mass: list[Tensor]) -> list[Tensor]:
    inverse = _inverse(norm)
    return [m * inverse for m in mass]


class _Sums:
    """Sums over the edges that end at each of some neurons."""

    def __init__(self, first: Tensor, second: Tensor, final: bool, parts: Sequence[Part]) -> None:
        self.parts = parts
        # Everything is summed in units of theta's own path mass at v (or, where that is 0, of
        # theta'), into which path mass of theta' has to be brought.
        one, dead = torch.ones_like(first), first == 0
        inverse, other = (one, one) if final else (_inverse(first), _inverse(second))
        self.inverse = torch.where(dead, other, inverse)
        self.exchange = one if final else torch.where(dead, 1.0, first * other)
        self.excess = [torch.zeros_like(first) for _ in parts]
        self.distance = torch.zeros_like(first)
        self.change = torch.zeros_like(first)
        self.largest = 0.0

    def passes(self, unrolled: Unrolled, x: State) -> None:
        """Paths that come in through a weighted sum."""
        change = unrolled.split(self.change).clone()
        for read, _ in unrolled.pieces:
            into = read(x.change, 0.0)
            if into.shape[2]:
                change = torch.maximum(change, into.amax(2))
        self.change = unrolled.join(change.expand(unrolled.shape))

    def edges(self, unrolled: Unrolled, x: State, weight: Signed | None) -> None:
        """Add the edges of one weighted sum."""
        one = torch.ones(1, dtype=x.first.dtype, device=x.first.device)
        a, b = (one, one) if weight is None else (weight.first, weight.second)
        inverse, exchange = unrolled.split(self.inverse), unrolled.split(self.exchange)
        distance = torch.zeros(unrolled.shape, dtype=one.dtype, device=one.device)
        excess = [torch.zeros_like(distance) for _ in self.parts]
        shares, others = _shares(x.first, x.mass), _shares(x.second, x.other_mass)
        for block in unrolled.blocks():
            out = block.out
            own, other = block.weigh(a), block.weigh(b)
            over = own.abs() * block.read(x.first, 0.0)
            under = other.abs() * block.read(x.second, 0.0)
            under = under.mul_(exchange[:, out, None])
            low = torch.minimum(over, under)
            apart = ~agreement(own, other)
            if bool(apart.any()):
                low.masked_fill_(apart, 0.0)
            over, under = over.sub_(low), under.sub_(low)
            gap = over + under
            distance[:, out] += gap.sum(2)
            if gap.numel():
                largest = (gap.amax(2) * inverse[:, out]).amax().item()
                self.largest = max(self.largest, largest)
            for k, part in enumerate(self.parts):
                if part != Part():  # the part of all paths has everything that comes in
                    gap = torch.addcmul(
                        over * block.read(shares[k], 0.0), under, block.read(others[k], 0.0)
                    )
                    excess[k][:, out] += gap.sum(2)
                if not x.clean:
                    excess[k][:, out] += (low * block.read(x.excess[k], 0.0)).sum(2)
        self.distance = self.distance + unrolled.join(distance * inverse)
        for k, part in enumerate(self.parts):
            total = excess[k] + distance if part == Part() else excess[k]
            self.excess[k] = self.excess[k] + unrolled.join(total * inverse)

    def bias(self, bias: Signed) -> None:
        """Add the biases."""
        over, under = bias.first.abs(), bias.second.abs() * self.exchange
        low = torch.minimum(over, under) * agreement(bias.first, bias.second)
        gap = ((over - low) + (under - low)) * self.inverse
        if gap.numel():
            self.largest = max(self.largest, gap.amax().item())
        self.distance = self.distance + gap
        for k, part in enumerate(self.parts):
            if part.biases:
                self.excess[k] = self.excess[k] + gap
