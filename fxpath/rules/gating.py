"""How products of activations are written, one of which is a gate."""

from __future__ import annotations

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.builder import Builder
from fxpath.graph.gating import ATTENTION, MATRIX_PRODUCTS, PRODUCTS, Chosen
from fxpath.graph.refusal import Refusal
from fxpath.graph.squashes import squash_of
from fxpath.rules.common import summed
from fxpath.rules.refused import CUT, PRODUCT

UNBOUNDED = (
    "it multiplies two activations with each other, neither of which is bounded whatever the "
    "parameters, so that it is no gate",
    PRODUCT[1],
)
NO_AVERAGES = (
    "it multiplies two matrices of activations, and neither is a softmax along the axis that is "
    "summed, which would average the other",
    PRODUCT[1],
)
KEPT_OR_DROPPED = (
    "it averages values that depend on no input, or drops some of its weights at random",
    "average activations, and pass dropout_p=0.0 in eval mode",
)
GROUPED = (
    "several heads of queries share one of values (enable_gqa)",
    "repeat the heads of values before (repeat_interleave)",
)
OTHERWISE = (
    "it multiplies activations with each other, and gates are looked for in plain products alone",
    f"write it with * or @, one factor of which is bounded, or {CUT}",
)


GROWING = (
    "with these arguments it grows faster than its input",
    "give arguments with which it does not",
)


def squashed(build: Builder, x: fx.Node, name: str, numbers: tuple[float, ...] = ()) -> fx.Node:
    """An activation of the table; one that is no gate of itself has no size to count."""
    found = squash_of(name, numbers)
    if found is None:
        raise Refusal(*GROWING)
    size = 1.0 if found.size is None else found.size
    return build.emit(ops.squash, build.times(x, size), name, list(numbers), size)


def gated(build: Builder, node: fx.Node) -> fx.Node:
    """The product of a signal with a gate, entry by entry."""
    chosen = _chosen(build, node)
    x = build.expand(build.node(chosen.signal), tuple(node.meta["val"].shape))
    why = build.unfollowed.get(chosen.factor)
    if why is not None:
        return _unfollowed(build, build.times(x, chosen.size), chosen.size, why.reason)
    return by_gate(build, x, build.node(chosen.factor), chosen.size)


def by_gate(build: Builder, x: fx.Node, factor: fx.Node, size: float) -> fx.Node:
    """``x factor``, the factor at most ``size``; it broadcasts to ``x``."""
    # A factor that is 0 leaves 0, whatever the gate is then.
    return build.emit(ops.gate, build.times(x, size), factor, size or 1.0)


def _unfollowed(build: Builder, x: fx.Node, size: float, why: str) -> fx.Node:
    """The same by a factor whose values are not known; ``x`` was multiplied by the size."""
    made = build.emit(ops.gate, x, None, size)
    made.meta["unfollowed"] = f"inside this gate there is something without a rule: {why}"
    return made


def averaged(build: Builder, node: fx.Node) -> fx.Node:
    """Values times a softmax: each result is a sum over all that it averages."""
    chosen = _chosen(build, node)
    x, shape = build.node(chosen.signal), tuple(node.meta["val"].shape)
    sizes = build.shape(x)
    if len(sizes) < 2 or len(shape) < 2:
        raise Refusal(*NO_AVERAGES)
    # Values stand behind rows of weights, or in front of columns.
    before = node.target in MATRIX_PRODUCTS and chosen.signal is node.args[0]
    kept = (*sizes[:-1], 1) if before else (*sizes[:-2], 1, sizes[-1])
    total = summed(build, x, [len(sizes) - (1 if before else 2)], kept)
    fits = torch.broadcast_shapes(kept, shape) == shape
    if not fits:
        raise Refusal(*GROUPED)
    spread = build.expand(total, shape)
    return _unfollowed(build, spread, 1.0, "weights of a softmax that multiply as a matrix")


def _chosen(build: Builder, node: fx.Node) -> Chosen:
    if build.gating is None:
        raise Refusal(*PRODUCT)
    found = build.gating.chosen.get(node)
    if found is not None:
        return found
    if node.target is ATTENTION:
        raise Refusal(*KEPT_OR_DROPPED)
    if node.target in MATRIX_PRODUCTS:
        raise Refusal(*NO_AVERAGES)
    raise Refusal(*(UNBOUNDED if node.target in PRODUCTS else OTHERWISE))
