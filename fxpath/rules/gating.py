"""How products of activations are written, one of which is a gate."""

from __future__ import annotations

from torch import fx

from fxpath.graph import ops
from fxpath.graph.aten import EXPAND
from fxpath.graph.builder import Builder
from fxpath.graph.gating import Chosen
from fxpath.graph.refusal import Refusal
from fxpath.rules.common import summed
from fxpath.rules.refused import PRODUCT

UNBOUNDED = (
    "it multiplies two activations with each other, neither of which is bounded whatever the "
    "parameters, so that it is no gate",
    PRODUCT[1],
)


def gated(build: Builder, node: fx.Node) -> fx.Node:
    """The product of a signal with a gate, entry by entry."""
    chosen = _chosen(build, node)
    x = build.expand(build.node(chosen.signal), tuple(node.meta["val"].shape))
    factor = None if chosen.factor in build.unfollowed else build.node(chosen.factor)
    return by_gate(build, x, factor, chosen.size)


def by_gate(build: Builder, x: fx.Node, factor: fx.Node | None, size: float) -> fx.Node:
    """``x factor``, the factor at most ``size``; it broadcasts to ``x``."""
    return build.emit(ops.gate, build.times(x, size), factor, size)


def averaged(build: Builder, node: fx.Node) -> fx.Node:
    """Rows of a softmax times values: each result is a sum over all that it averages."""
    chosen = _chosen(build, node)
    x, shape = build.node(chosen.signal), tuple(node.meta["val"].shape)
    sizes = build.shape(x)
    if len(sizes) < 2 or len(shape) < 2:
        raise Refusal(*UNBOUNDED)
    total = summed(build, x, [len(sizes) - 2], (*sizes[:-2], 1, sizes[-1]))
    return build.emit(ops.gate, build.emit(EXPAND, total, list(shape)), None, 1.0)


def _chosen(build: Builder, node: fx.Node) -> Chosen:
    if build.gating is None:
        raise Refusal(*PRODUCT)
    found = build.gating.chosen.get(node)
    if found is None:
        raise Refusal(*UNBOUNDED)
    return found
