"""Masks for `benchmarks.pruning_accuracy`, many of one network at little cost.

`fxpath.prune` captures the network and certifies each mask, which takes longer than to train with
it where networks are this small.  Here the network is captured once, its scores are sorted once,
and the mask of each amount is a beginning of that order.  The experiment compares with
`fxpath.prune`, which ranks in another way; and unlike it, makes masks that cut off outputs: what
becomes of such networks is what the paper's Table 4 shows of magnitude after rescaling.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxpath
from fxpath import criteria
from fxpath.program.program import PathProgram, build

__all__ = ["METHODS", "Masks", "Method", "Pruner"]

Masks = Mapping[str, Tensor]

STEPS = 10
#: One estimate of OBD's Hessian is noise for the most part.
ESTIMATES = 4
#: Two scores of which rounding may turn the order, relative to each other.
TIE = 1e-5


@dataclass(frozen=True)
class Method:
    """A way to choose what is pruned.

    Attributes:
        title: for tables and plots.
        criterion: what scores the weights.
        layer_adaptive: whether scores are relative to what remains of their layer.
        steps: between which they are computed anew.
    """

    title: str
    criterion: str
    layer_adaptive: bool = False
    steps: int = 1

    @property
    def invariant(self) -> bool:
        """Whether the mask must not change with a rescaling; random scores never look."""
        return self.criterion in ("path_magnitude", "canonical_magnitude", "random")


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude", "magnitude"),
    "lamp": Method("magnitude / layer (LAMP)", "magnitude", layer_adaptive=True),
    "path-mag": Method("Path-Mag", "path_magnitude"),
    "path-mag-layer": Method("Path-Mag / layer", "path_magnitude", layer_adaptive=True),
    "path-mag-steps": Method(f"Path-Mag, {STEPS} steps", "path_magnitude", steps=STEPS),
    "path-mag-steps-layer": Method(
        f"Path-Mag / layer, {STEPS} steps", "path_magnitude", layer_adaptive=True, steps=STEPS
    ),
    "canonical": Method("canonical magnitude", "canonical_magnitude"),
    "canonical-layer": Method(
        "canonical magnitude / layer", "canonical_magnitude", layer_adaptive=True
    ),
    "obd": Method("OBD", "obd"),
    "random": Method("random", "random"),
}


class Pruner:
    """One trained network.

    Attributes:
        network: it is not changed.
    """

    def __init__(self, network: nn.Module, examples: tuple[Tensor, Tensor], seed: int) -> None:
        """Capture it once.

        Args:
            network: in eval mode.
            examples: inputs and classes, for OBD; of the inputs' shape everything is.
            seed: of random scores.
        """
        self.network = network
        self._examples, self._seed = examples, seed
        self._shape = tuple(examples[0].shape[1:])
        self._zeroed = copy.deepcopy(network)
        self._program: PathProgram = build(self._zeroed, self._shape)
        self._names = sorted(criteria.magnitude(network))
        self._scores: dict[str, dict[str, Tensor]] = {}

    def masks(self, method: Method, amounts: Sequence[float]) -> list[Masks]:
        """What is kept at each amount: True = kept."""
        if method.steps == 1:
            scores = self.scores(method)
            return [self._lowest(scores, self._count(amount)) for amount in amounts]
        found = []
        for amount in amounts:
            count = self._count(amount)
            kept: Masks = {n: torch.ones_like(s, dtype=torch.bool) for n, s in self.sizes.items()}
            for step in range(1, method.steps + 1):
                self._zero(kept)
                shares = self._program.scores()
                scores = _ranked(method, {name: shares[name] for name in self._names})
                scores = {n: s.masked_fill(~kept[n], -math.inf) for n, s in scores.items()}
                kept = self._lowest(scores, round(count * (step / method.steps)))
            found.append(kept)
        return found

    @property
    def sizes(self) -> dict[str, Tensor]:
        """Absolute values of the weights that may be pruned."""
        return criteria.magnitude(self.network)

    def scores(self, method: Method) -> dict[str, Tensor]:
        """What a method ranks by, of the dense network; computed once."""
        if method.criterion not in self._scores:
            self._scores[method.criterion] = self._scored(method.criterion)
        return _ranked(method, self._scores[method.criterion])

    def _scored(self, criterion: str) -> dict[str, Tensor]:
        if criterion == "path_magnitude":
            scores = criteria.path_shares(self.network, self._shape)
        elif criterion == "canonical_magnitude":
            scores = criteria.canonical_magnitude(self.network, self._shape)
        elif criterion == "obd":
            scores = self._obd()
        elif criterion == "random":
            generator = torch.Generator().manual_seed(self._seed)
            shapes = {name: size.shape for name, size in self.sizes.items()}
            scores = {n: torch.rand(shape, generator=generator) for n, shape in shapes.items()}
        else:
            scores = self.sizes
        return {name: scores[name] for name in self._names}

    def _obd(self) -> dict[str, Tensor]:
        # Curvature is not negative where training has ended: that is noise, on weights that matter.
        estimates = [
            criteria.obd(self.network, cross_entropy, self._examples, seed=seed)
            for seed in range(ESTIMATES)
        ]
        return {n: torch.stack([e[n] for e in estimates]).mean(0).abs() for n in self._names}

    def _count(self, amount: float) -> int:
        return round(amount * sum(size.numel() for size in self.sizes.values()))

    def _lowest(self, scores: Mapping[str, Tensor], count: int) -> Masks:
        """All but so many of the lowest scores; ties by name, then place."""
        flat = torch.cat([scores[name].flatten().double() for name in self._names])
        kept = torch.ones(len(flat), dtype=torch.bool)
        kept[flat.argsort(stable=True)[:count]] = False
        parts = kept.split([scores[name].numel() for name in self._names])
        return {n: p.view_as(scores[n]) for n, p in zip(self._names, parts, strict=True)}

    def _zero(self, mask: Masks) -> None:
        for name, kept in mask.items():
            weight = self.network.get_parameter(name).detach()
            self._zeroed.get_parameter(name).data.copy_(weight.masked_fill(~kept, 0))

    def lost(self, masks: Sequence[Masks]) -> list[float]:
        """The path-metric to the dense network, as a share of its path-norm.

        Zeros alone only take paths away, so that by (7) the metric is what the path-norm loses.
        """
        norms = []
        for mask in [{}, *masks]:
            self._zeroed.load_state_dict(self.network.state_dict())
            self._zero(mask)
            norms.append(self._program.path_norm())
        return [1 - norm / norms[0] for norm in norms[1:]]

    def compare(self, method: Method, amount: float) -> str:
        """Whether `fxpath.prune` chooses the same.

        Returns:
            "same", or "refused" for a mask that leaves an output without a path.

        Raises:
            RuntimeError: if it chooses otherwise.
        """
        named = method.criterion in ("magnitude", "path_magnitude", "canonical_magnitude")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* cut altogether", UserWarning)
            try:
                masks = fxpath.prune(
                    self.network,
                    amount,
                    self._shape,
                    criterion=method.criterion if named else self._scores[method.criterion],
                    layer_adaptive=method.layer_adaptive,
                    steps=method.steps,
                ).masks
            except ValueError as error:
                if "no path from an input would reach" not in str(error):
                    raise
                return "refused"
        (own,) = self.masks(method, [amount])
        self.differing(method, own, masks, "fxpath.prune chooses otherwise than sorting does")
        return "same"

    def differing(self, method: Method, first: Masks, second: Masks, fault: str) -> int:
        """Number of entries in which masks differ, all within rounding of the threshold.

        Raises:
            RuntimeError: if one is not, beginning with the ``fault``.
        """
        parts = {name: mask != second[name] for name, mask in first.items()}
        count = sum(int(part.sum()) for part in parts.values())
        if not count:
            return 0
        scores = self.scores(method)
        threshold = max(float(scores[n][~m].max()) for n, m in first.items() if not m.all())
        off = torch.cat([(scores[n][part] / threshold - 1).abs() for n, part in parts.items()])
        # Scores between the steps are not known, and each step's choice bears on the next.
        if method.steps > 1 or float(off.max()) > TIE:
            raise RuntimeError(
                f"{fault}: {method.title} differs in {count} entries, whose scores are up to "
                f"{float(off.max()):.1g} (relative) off the threshold"
            )
        return count


def _ranked(method: Method, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return criteria.relative_to_layer(scores) if method.layer_adaptive else scores
