"""The carried difference: path-norms of two networks, and how far both exceed their common part.

With m the entry of smaller size where signs agree and 0 elsewhere, |Phi(theta)| >= |Phi(m)| on
every path, with equal signs, so that by (7) the path-norm of theta exceeds that of m by exactly
``||Phi(theta) - Phi(m)||_1``.  The excess is carried from neuron to neuron instead of being
subtracted at the end (no cancellation; all terms are non-negative):

    excess_v = sum_u (|theta_uv| - |m_uv|) h_u + |m_uv| excess_u,    h_v = sum_u |theta_uv| h_u.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.equations import letters
from fxpath.graph.interpret import Weighing
from fxpath.graph.schema import arguments
from fxpath.pairs.pair import ROWS, Pair, PairInterpretation, Weights

Map = Callable[[Tensor], Tensor]

#: Lifted values outside of this range are refused: float64 ends not far beyond.
SMALLEST, LARGEST = 1e-270, 1e300


@dataclass(frozen=True)
class Rows:
    """A matrix that the linear map which reads it compares a few rows at a time."""

    leaf: int


@dataclass(frozen=True)
class Excess:
    """Activations of :class:`Difference`: lifted values of theta and theta', and their excess.

    The same object where both networks are alike; ``None`` for an excess that is zero everywhere.
    """

    first: Tensor
    second: Tensor
    excess: Tensor | None = None
    other_excess: Tensor | None = None

    def map(self, function: Map) -> Excess:
        """Apply a linear map with non-negative coefficients, the same for both networks."""
        first = function(self.first)
        return Excess(
            first,
            first if self.second is self.first else function(self.second),
            None if self.excess is None else function(self.excess),
            None if self.other_excess is None else function(self.other_excess),
        )

    def gap(self) -> Tensor:
        """Upper bound of |Phi(theta) - Phi(theta')|, summed over the paths that end at a neuron."""
        return _plus(self.excess, self.other_excess, self.first)


def _plus(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None:
        return torch.zeros_like(like) if b is None else b
    return a if b is None else a + b


def _sum(*terms: Tensor | None) -> Tensor | None:
    found = [term for term in terms if term is not None]
    return sum(found[1:], found[0]) if found else None


class Difference(PairInterpretation):
    """Carries :class:`Excess` through a lifted graph, or through its reduction."""

    activation = Excess
    weight = Weights

    def __init__(
        self,
        module: fx.GraphModule,
        pair: Pair,
        inputs: Sequence[Tensor] | None = None,
        biases: bool = True,
    ) -> None:
        """Interpret ``module``.

        Args:
            module: the lifted graph of the pair, or its reduction.
            pair: the two networks.
            inputs: what the sources hold, in their order; ones if not given.
            biases: whether paths that start at a bias (Phi^H) count.

        After a run, ``signs_agree`` tells whether theta * theta' >= 0 at every leaf.
        """
        super().__init__(module, pair)
        self.inputs = None if inputs is None else iter(inputs)
        self.biases = biases
        self.signs_agree = True

    # -- weights ----------------------------------------------------------------------------------

    def coordinate(self, value: Tensor, name: str) -> Weights | Rows:
        if self.read_by_rows():
            return Rows(self.node.meta["leaf"])
        return self._compared(*self.other(self.node))

    def read_by_rows(self) -> bool:
        """Whether the current coordinates are a large matrix that one linear map reads."""
        users = list(self.node.users)
        if len(users) != 1 or users[0].target is not ops.contract:
            return False
        dense = letters(arguments(users[0])[3]).dense
        return dense and math.prod(self.node.meta["val"].shape) > ROWS

    def _compared(self, first: Tensor, second: Tensor) -> Weights:
        if self.pair.erased and first is not second:
            return Weights.erased(first, second)
        weights = Weights.of(first, second)
        self.signs_agree = self.signs_agree and weights.signs_agree
        return weights

    def known(self, value: Tensor) -> Weights:
        return Weights.equal(value)

    def times(self, weight: Weights, factor: Weights) -> Weights:
        return weight.times(factor)

    # -- activations ------------------------------------------------------------------------------

    def source(self, shape: Sequence[int]) -> Excess:
        if self.inputs is not None:
            given = next(self.inputs).to(self.dtype).abs()
            return Excess(given, given)
        ones = self.filled(shape, 1.0)
        return Excess(ones, ones)

    def constant(self, bias: Weights) -> Excess:
        if self.biases:
            return Excess(bias.first, bias.second, bias.excess, bias.other_excess)
        zeros = torch.zeros_like(bias.first)
        return Excess(zeros, zeros)

    def weigh(
        self, x: Excess, weight: Weights | Rows, bias: Weights | None, run: Weighing
    ) -> Excess:
        if isinstance(weight, Rows):
            y = self.join([self.product(x, w, run) for w in self.rows(weight)], -1)
        else:
            y = self.product(x, weight, run)
        return y if bias is None else self.shift(y, bias)

    def rows(self, weight: Rows) -> Iterator[Weights]:
        """A large matrix, a few rows at a time."""
        return itertools.starmap(self._compared, self.pair.rows(weight.leaf))

    def product(self, x: Excess, w: Weights, run: Weighing) -> Excess:
        """One weighted sum."""

        def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            if a is None or b is None:
                return None
            y = run(a, b)
            check_range(y)
            check_underflow(y, a, b, run)
            return y

        first = product(x.first, w.first)
        alike = x.second is x.first and w.second is w.first
        second = first if alike else product(x.second, w.second)
        assert first is not None and second is not None
        return Excess(
            first,
            second,
            _sum(product(x.excess, w.common), product(x.first, w.excess)),
            _sum(product(x.other_excess, w.common), product(x.second, w.other_excess)),
        )

    def add(self, x: Excess, y: Excess) -> Excess:
        first = x.first + y.first
        alike = x.second is x.first and y.second is y.first
        return Excess(
            first,
            first if alike else x.second + y.second,
            _broadcast(_sum(x.excess, y.excess), first),
            _broadcast(_sum(x.other_excess, y.other_excess), first),
        )

    def join(self, pieces: list[Excess], dim: int) -> Excess:
        def joined(part: Callable[[Excess], Tensor | None]) -> Tensor | None:
            parts = [part(piece) for piece in pieces]
            if all(p is None for p in parts):
                return None
            filled = [
                torch.zeros_like(piece.first) if p is None else p
                for p, piece in zip(parts, pieces, strict=True)
            ]
            return torch.cat(filled, dim)

        first = torch.cat([piece.first for piece in pieces], dim)
        alike = all(piece.second is piece.first for piece in pieces)
        second = first if alike else torch.cat([piece.second for piece in pieces], dim)
        return Excess(first, second, joined(lambda p: p.excess), joined(lambda p: p.other_excess))

    def total(self, outputs: list[Excess]) -> list[Excess]:
        """The output neurons."""
        for y in outputs:
            check_range(y.first, y.second)
        return outputs


def _broadcast(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.expand_as(like)


def check_range(*values: Tensor) -> None:
    """Refuse lifted values that float64 can't hold well.

    Raises:
        FloatingPointError: if an entry is not 0 and not within 1e-270 ... 1e300.
    """
    for value in values:
        if not value.numel():
            continue
        largest = value.amax().item()
        if not largest <= LARGEST or _smallest(value) < SMALLEST:
            raise _out_of_range()


def check_underflow(
    y: Tensor, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Refuse products that became 0 without a factor that is.

    Raises:
        FloatingPointError: if ``y = run(a, b)`` lost an entry whole.
    """
    zero = y == 0
    # Counting paths takes as long as the product itself; mostly the smallest factors settle it.
    if not bool(zero.any()) or _smallest(a) * _smallest(b) >= SMALLEST:
        return
    if bool((zero & (run((a > 0).to(a.dtype), (b > 0).to(b.dtype)) > 0)).any()):
        raise _out_of_range()


def _smallest(value: Tensor) -> float:
    """The smallest entry that is not 0."""
    return torch.where(value > 0, value, math.inf).amin().item() if value.numel() else math.inf


def _out_of_range() -> FloatingPointError:
    return FloatingPointError(
        "a neuron's path-norm, or its change, lies outside of 1e-270 ... 1e300, so that float64 "
        "does not hold the distance of the two networks: rescale their neurons, which changes "
        "neither function"
    )
