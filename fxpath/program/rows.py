"""Layers as rows of data."""

from __future__ import annotations

from typing import TypedDict

from fxpath.program.evaluation import Evaluation
from fxpath.program.layers import Layer
from fxpath.program.spread import Spread
from fxpath.sharding import whole

QUANTILES = (0.1, 0.5, 0.9)


class Crossed(TypedDict):
    """What one evaluation says of a layer, see :class:`LayerRow`."""

    name: str
    operation: str
    shape: tuple[int, ...]
    parameters: int
    sparsity: float
    share: float


class LayerRow(Crossed):
    """One layer as data.

    ``share`` is the part of all path mass that crosses the layer (its weights and bias), in [0, 1]
    unless it is used twice on a path; ``sparsity`` the part of its effective weights that is zero;
    ``quantiles`` those of its weights' shares at 10, 50 and 90 percent; ``effective`` the number of
    weights over which its mass is spread, ``exp`` of the entropy of their shares, between 1 and
    their number (0 where no path crosses); ``channels`` the number of its output channels, of which
    ``dead_channels`` lie on no path through it (counted for convolutions and linear maps).
    """

    quantiles: dict[str, float]
    effective: float
    channels: int
    dead_channels: int


def crossed(layer: Layer, found: Evaluation) -> Crossed:
    """What an evaluation with scores and details says of a layer."""
    names = [name for name in (layer.weight, layer.bias) if name is not None]
    return Crossed(
        name=layer.name,
        operation=layer.operation,
        shape=layer.shape,
        parameters=sum(found.shares[name].numel() for name in names),
        sparsity=found.sparsity[names[0]],
        share=sum(float(whole(found.shares[name]).double().sum()) for name in names),
    )


def layer_row(
    layer: Layer, found: Evaluation, spread: Spread, *, channels: int, dead: int
) -> LayerRow:
    """One row.

    Args:
        layer: the layer.
        found: an evaluation with scores and details.
        spread: of its weights' shares.
        channels: number of its output channels.
        dead: number of those that lie on no path.
    """
    return LayerRow(
        **crossed(layer, found),
        quantiles={f"{q:.0%}": spread.quantile(q) for q in QUANTILES},
        effective=spread.effective,
        channels=channels,
        dead_channels=dead,
    )
