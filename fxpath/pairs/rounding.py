"""What float64 can hide, so that a certificate never rests on it.

Everything that is certified is a sum of products of non-negative numbers, carried in float64.  One
rule holds for all of it: with u = 2^-53,

1. sums and products are off by a relative :func:`relative` at most, n u with n the number of terms
   that meet on any path through the network; upper bounds are enlarged by it, lower ones lowered;
2. effective parameters of a batch norm (gamma W / sigma, beta + gamma (b - mu) / sigma) are not
   what float64 makes of them.  Where both networks compute an entry from the same numbers, both
   have the same; elsewhere :class:`Doubt` carries how far each network's path-lifting may be from
   the one of its rounded parameters, and the triangle inequality adds it;
3. where a difference of two rounded products is formed (normalized weights, weights rescaled by the
   ratios of domination), a few u of the path mass are added for each edge of a path.

Parameters that a model uses as they are, in whatever format, are exact in float64, and so is the
order of two of them: networks that differ by one digit never get a certificate of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.costs import multiply_adds
from fxpath.graph.interpret import Weighing
from fxpath.graph.links import static
from fxpath.graph.schema import arguments
from fxpath.pairs.difference import Excess
from fxpath.pairs.gates import Gated
from fxpath.pairs.pair import Pair, Side, Weights

#: Unit roundoff of float64.
UNIT = 2.0**-53

#: Relative errors of a folded parameter, in units: variance, root, two products, and to spare.
FOLDED = 8 * UNIT


def relative(module: fx.GraphModule) -> float:
    """By how much sums over paths of a lifted graph may be off, as a factor: at most n u."""
    terms = 16
    for node in module.graph.nodes:
        if node.op == "call_function" and not static(node):
            terms += _terms(node)
    return 2 * terms * UNIT


def _terms(node: fx.Node) -> int:
    """How many numbers are added up for one entry of a result, and what is rounded beside."""
    if node.target is ops.total:
        return sum(math.prod(n.meta["val"].shape) for n in arguments(node)[0])
    if node.target in (ops.along, ops.pool):
        return 2 + int(arguments(node)[2].meta["val"].shape[1])
    return 4 + multiply_adds(node, ())


# -- effective parameters --------------------------------------------------------------------------


def doubt(pair: Pair) -> bool:
    """Whether rounding of effective parameters can hide a part of the difference."""
    return any(
        _errors(pair, leaf) is not None
        for leaf, node in enumerate(pair.ours.nodes)
        if _is_formed(node) or _is_formed(pair.theirs.nodes[leaf])
    )


def erased_doubt(pair: Pair) -> float:
    """The same for a pair whose second network is the first with weights set to zero, as a factor.

    A path is then lost whole or not at all.  What is computed from the same numbers is the same in
    both networks, and of a lost path's weights each is off by a relative FOLDED at most.
    """
    return FOLDED * sum(_is_formed(node) for node in pair.ours.nodes)


def _read(leaf: fx.Node) -> fx.Node:
    found: fx.Node = arguments(leaf)[0]
    return found


def _is_formed(leaf: fx.Node) -> bool:
    """Whether a leaf reads an effective parameter that is formed in float64."""
    return _read(leaf).target in (ops.folded_weight, ops.folded_bias, ops.normalizer)


def _errors(pair: Pair, leaf: int) -> tuple[Tensor, Tensor] | None:
    """How far the effective parameters of both networks can be from exact ones; ``None``: 0."""
    sides = pair.ours, pair.theirs
    reads = [_read(side.nodes[leaf]) for side in sides]
    errors = [_error(side, read) for side, read in zip(sides, reads, strict=True)]
    if reads[0].target is reads[1].target and reads[0].target in _APART:
        apart = _APART[reads[0].target](sides, reads)
        if not bool(apart.any()):
            return None
        errors = [error * apart for error in errors]
    return errors[0], errors[1]


def _error(side: Side, read: fx.Node) -> Tensor:
    """Largest error of one network's effective parameters, entry by entry."""
    if read.target is ops.folded_bias:
        return bias_error(*(_number(side, a) for a in arguments(read)))
    value: Tensor = side.evaluate(read)
    if read.target in (ops.folded_weight, ops.normalizer):
        return FOLDED * value.double().abs()
    return torch.zeros_like(value, dtype=torch.float64)


def bias_error(bias: Tensor | None, factor: Tensor, beta: Tensor | None, mean: Tensor) -> Tensor:
    """Largest error of a folded bias ``beta + factor * (bias - mean)``, which may cancel."""
    size = mean.abs() if bias is None else bias.abs() + mean.abs()
    size = factor.abs() * size
    return FOLDED * (size if beta is None else size + beta.abs())


def _number(side: Side, argument: Any) -> Any:
    return side.evaluate(argument).double() if isinstance(argument, fx.Node) else argument


def _differ(sides: Sequence[Side], arguments_: Sequence[Any]) -> Tensor:
    """Where the two networks read different numbers for one argument."""
    a, b = (_number(side, x) for side, x in zip(sides, arguments_, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a != b
    return torch.tensor(a is not b if a is None or b is None else bool(a != b))


def _apart_normalizer(sides: Sequence[Side], reads: Sequence[fx.Node]) -> Tensor:
    """Channels whose gamma / sigma comes from other numbers."""
    ours, theirs = (arguments(read) for read in reads)
    found = [_differ(sides, pair) for pair in zip(ours, theirs, strict=True)]
    return found[0].to(found[1].device) | found[1] | found[2].to(found[1].device)


def _apart_bias(sides: Sequence[Side], reads: Sequence[fx.Node]) -> Tensor:
    ours, theirs = (arguments(read) for read in reads)
    apart = _apart_normalizer(sides, [ours[1], theirs[1]])
    for position in (0, 2, 3):
        here = _differ(sides, [ours[position], theirs[position]])
        apart = apart | here.to(apart.device)
    return apart


def _apart_weight(sides: Sequence[Side], reads: Sequence[fx.Node]) -> Tensor:
    ours, theirs = (arguments(read) for read in reads)
    channels = _apart_normalizer(sides, [ours[1], theirs[1]])
    entries = _differ(sides, [ours[0], theirs[0]])
    ones = torch.ones(entries.shape, dtype=torch.float64, device=entries.device)
    return entries | (ops.folded_weight(ones, channels.double(), *ours[2:]) > 0)


_APART: dict[Any, Callable[[Sequence[Side], Sequence[fx.Node]], Tensor]] = {
    ops.normalizer: _apart_normalizer,
    ops.folded_bias: _apart_bias,
    ops.folded_weight: _apart_weight,
}


class Doubt(Gated):
    """Carries how far each network is from the one with its effective parameters rounded.

    ``||Phi(theta) - Phi(rounded theta)||_1`` for each output, likewise for theta'; fed with |x| it
    bounds the change of the functions as well.
    """

    def coordinate(self, value: Tensor, name: str) -> Weights:
        """Sizes of both, with their errors in the place of an excess."""
        leaf = self.node.meta["leaf"]
        first, second = (side.value(leaf).abs() for side in (self.pair.ours, self.pair.theirs))
        formed = _is_formed(self.pair.ours.nodes[leaf]) or _is_formed(self.pair.theirs.nodes[leaf])
        errors = _errors(self.pair, leaf) if formed else None
        return Weights(first, second, first, *(errors or (None, None)))

    def coefficient(self, value: Tensor) -> Weights:
        """Sizes of both, which are exact."""
        if "leaf" not in self.node.meta:  # a number that the reduction wrote, the bound of a clamp
            return super().coefficient(value)
        first, second = self.other(self.node)
        return Weights(first.abs(), second.abs(), first.abs())

    def slope(self, x: Excess, a: Tensor | float) -> Excess:
        """The steeper one of both."""
        node = arguments(self.node)[1]
        if not isinstance(node, fx.Node):
            return super().slope(x, a)
        ours, theirs = self.other(node)
        return x.map(lambda value: ops.slope(value, torch.maximum(ours.abs(), theirs.abs())))

    def product(self, x: Excess, w: Weights, run: Weighing) -> Excess:
        """Errors of the factors, each times the size of the other one."""

        def carried(h: Tensor, error: Tensor | None, size: Tensor, own: Tensor | None) -> Any:
            terms = [
                run(a, b) for a, b in ((error, size), (h, own)) if a is not None and b is not None
            ]
            return sum(terms[1:], terms[0]) if terms else None

        return Excess(
            run(x.first, w.first),
            run(x.second, w.second),
            carried(x.first, x.excess, w.first, w.excess),
            carried(x.second, x.other_excess, w.second, w.other_excess),
        )
