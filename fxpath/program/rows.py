"""Layers as rows of data."""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor

from fxpath.program.evaluation import Evaluation
from fxpath.program.layers import Layer

QUANTILES = (0.1, 0.5, 0.9)
SAMPLE = 1 << 16


class LayerRow(TypedDict):
    """One layer as data.

    ``share`` is the part of all path mass that crosses the layer (its weights and bias), in [0, 1]
    unless it is used twice on a path; ``sparsity`` the part of its effective weights that is zero;
    ``quantiles`` those of its weights' shares at 10, 50 and 90 percent.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    parameters: int
    sparsity: float
    share: float
    quantiles: dict[str, float]


def layer_row(layer: Layer, found: Evaluation) -> LayerRow:
    """What an evaluation with scores and details says of a layer."""
    names = [name for name in (layer.weight, layer.bias) if name is not None]
    share = sum(float(found.shares[name].double().sum()) for name in names)
    return LayerRow(
        name=layer.name,
        operation=layer.operation,
        shape=layer.shape,
        parameters=sum(found.shares[name].numel() for name in names),
        sparsity=found.sparsity[names[0]],
        share=share,
        quantiles=_quantiles(found.shares[names[0]]),
    )


def _quantiles(shares: Tensor) -> dict[str, float]:
    """Exact quantiles (lower of the two neighbours), for tensors of any size."""
    flat = shares.flatten()
    if not flat.numel():
        return {f"{q:.0%}": math.nan for q in QUANTILES}
    ranks = {q: max(1, math.ceil(q * flat.numel())) for q in QUANTILES}
    return {f"{q:.0%}": _smallest(flat, rank) for q, rank in ranks.items()}


def _smallest(flat: Tensor, rank: int) -> float:
    """The entry of a given rank (from 1), exactly; sorting only the part of it that matters."""
    if flat.numel() > SAMPLE * 16:
        sample = flat[:: flat.numel() // SAMPLE].sort().values
        guess = rank * sample.numel() // flat.numel()
        margin = sample.numel() // 64
        lo, hi = sample[max(0, guess - margin)], sample[min(sample.numel() - 1, guess + margin)]
        before = int((flat < lo).sum())
        near = flat[(flat >= lo) & (flat <= hi)]
        # The sample is only a guess at where to look; where it misleads, all entries are searched.
        if before < rank <= before + near.numel():
            return float(near.kthvalue(rank - before).values)
    return float(flat.kthvalue(rank).values)
