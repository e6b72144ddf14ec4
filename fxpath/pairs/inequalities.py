"""The inequalities that bound ``|R_theta(x) - R_theta'(x)|``, output by output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxpath.graph import ops
from fxpath.graph.costs import multiply_adds
from fxpath.graph.links import static
from fxpath.pairs.comparison import Comparison
from fxpath.pairs.difference import Difference, Excess
from fxpath.pairs.inductive import Inductive
from fxpath.pairs.pair import Pair
from fxpath.pairs.rounding import UNIT, Doubt, doubt, relative
from fxpath.pairs.unrolled import Network, Part
from fxpath.passes.followed import gated

#: Bounds by name, and whether they stay the same when either network is rescaled.
INEQUALITIES = {
    "theorem_b1": True,
    "any_pair": False,
    "any_pair_normalized": True,
    "inductive": False,
}

#: Multiply-adds at full resolution up to which a batch is fed itself to what runs edge by edge.
EDGES = 1 << 29


def inputs_of(pair: Pair) -> list[Any]:
    """The sources of a pair's lifted graph, in their order."""
    return [n for n in pair.lifted.graph.nodes if n.target is ops.source]


def all_bounds(
    pair: Pair, samples: list[list[Tensor]] | None, radius: float
) -> dict[str, list[Tensor]]:
    """For each inequality that holds, and each sample, bounds of the output neurons in a row."""
    device = next((t.device for t in pair.ours.tensors.values()), torch.device("cpu"))
    full = [
        torch.full(tuple(n.meta["val"].shape), radius, dtype=torch.float64, device=device)
        for n in inputs_of(pair)
    ]
    fed = [full] if samples is None else samples
    rounded = 1 + relative(pair.lifted) + 2 * UNIT * sum(x.numel() for x in full)
    hidden = _hidden(pair, fed)

    def outwards(values: Sequence[Tensor]) -> list[Tensor]:
        if hidden is None:
            return [value * rounded for value in values]
        return [(value + more) * rounded for value, more in zip(values, hidden, strict=True)]

    found = {"inductive": outwards([_row(Inductive(pair.lifted, pair, x).outcome()) for x in fed])}
    if pair.architecture or gated(pair.lifted):
        return found
    outcome = [Difference(pair.lifted, pair, x, biases=False).outcome() for x in fed]
    nothing = [torch.zeros_like(x) for x in full]
    biases = Difference(pair.lifted, pair, nothing)
    constant = biases.outcome()
    found["any_pair"] = outwards([_row(y) + _row(constant) for y in outcome])
    # All paths were seen, those from inputs and those from biases.
    ends = [y for each in (*outcome, constant) for y in each]
    walk = functools.cache(lambda: _parts(pair, samples, radius))
    compared = Comparison(pair, ends, biases.signs_agree, rounded, lambda: walk()[:2])
    if compared.signs_agree and compared.entrywise:
        # Both norms are exact, so that the bound through m is Theorem B.1 and no other m is better.
        found["theorem_b1"] = found["any_pair"]
    elif compared.signs_agree and compared.domination.holds:
        found["theorem_b1"] = outwards(walk()[2](compared.domination.bounds))
    else:
        found["any_pair_normalized"] = outwards(walk()[2](compared.distance.common))
    return found


def _hidden(pair: Pair, fed: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """For each sample what rounding of effective parameters hides; ``None``: nothing."""
    if not doubt(pair):
        return None
    found = []
    for x in fed:
        outputs = Doubt(pair.lifted, pair, x).outcome()
        found.append(torch.cat([y.gap().flatten() for y in outputs]))
    return found


def _row(outputs: list[Excess]) -> Tensor:
    return torch.cat([y.gap().flatten() for y in outputs])


def _parts(
    pair: Pair, samples: list[list[Tensor]] | None, radius: float
) -> tuple[Network, list[Part], Callable[[list[Tensor]], list[Tensor]]]:
    """Which paths to tell apart edge by edge, on which graph, and how they add up to bounds."""
    nothing = [
        torch.zeros(tuple(n.meta["val"].shape), dtype=torch.float64) for n in inputs_of(pair)
    ]
    if samples is not None and _edges(pair) <= EDGES:
        parts = [Part(sample, biases=False) for sample in samples]
        network = Network.whole(pair.lifted)
        return (
            network,
            [*parts, Part(nothing)],
            lambda found: [part + found[-1] for part in found[:-1]],
        )
    network = Network.by_value(pair.lifted, pair.setting)
    few = [
        torch.zeros(tuple(n.meta["val"].shape), dtype=torch.float64)
        for n in network.module.graph.nodes
        if n.target is ops.source
    ]
    sizes = (
        [radius]
        if samples is None
        else [max(t.abs().amax().item() for t in sample) for sample in samples]
    )
    return (
        network,
        [Part(biases=False), Part(few)],
        lambda found: [size * found[0] + found[1] for size in sizes],
    )


def _edges(pair: Pair) -> int:
    """Multiply-adds of a sample at full resolution."""
    active = [n for n in pair.lifted.graph.nodes if n.op == "call_function" and not static(n)]
    return sum(multiply_adds(node) for node in active if node.target is not ops.total)
