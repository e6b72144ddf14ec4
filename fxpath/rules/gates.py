"""Rules of the generalised path-norm: activations that are gates, of themselves or of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpath.graph.aten import SLICE
from fxpath.graph.builder import Builder
from fxpath.graph.intervals import numbers_of, squash_name
from fxpath.graph.refusal import Refusal
from fxpath.graph.squashes import squash_of
from fxpath.private import schema
from fxpath.rules.gating import GROWING, averaged, by_gate, squashed
from fxpath.rules.refused import CUT
from fxpath.rules.registry import rule

aten = torch.ops.aten
Args = dict[str, Any]

NOT_ZERO = (
    "it is not 0 at 0, so it is no gate of its input, and here it is not the factor of a product",
    f"multiply something by it, or {CUT}",
)
MIXING = (
    "it is taken over the batch axis, so that samples depend on each other",
    "pass batch_dim=None with inputs of the batch size that counts, or take it over another axis",
)


@rule(
    *(aten.silu.default, aten.gelu.default, aten.hardswish.default, aten.mish.default),
    *(aten.tanh.default, aten.softshrink.default, aten.hardshrink.default),
    *(aten.elu.default, aten.selu.default, aten.celu.default, aten.sin.default),
    *(aten.atan.default, aten.arctan.default, aten.asinh.default, aten.arcsinh.default),
    *(aten.erf.default, aten.special_erf.default, aten.sigmoid.default, aten.cos.default),
    *(aten.softmax.int, aten._softmax.default, aten.special_expit.default),
    gated=True,
)
def _squash(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    called: Any = node.target
    name = schema(called).name.split("::")[1]
    numbers = numbers_of(name, args, node)
    if numbers is None:
        raise Refusal(*GROWING)
    name = squash_name(name, args)
    found = squash_of(name, numbers)
    if found is not None and found.size is None and build.is_signal(node):
        raise Refusal(*NOT_ZERO)
    batch = build.captured.inputs.batch_dim
    if found is not None and found.axis is not None and batch is not None:
        shape = node.meta["val"].shape
        if found.axis == batch % len(shape) and shape[found.axis] == 1:
            raise Refusal(*MIXING)
    return squashed(build, build.node(args["self"]), name, numbers)


@rule(aten.glu.default, gated=True)
def _glu(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """The first half times the sigmoid of the second."""
    x = build.node(args["self"])
    dim = args["dim"] % len(build.shape(x))
    half = build.shape(x)[dim] // 2
    signal, factor = (build.emit(SLICE, x, dim, start, start + half) for start in (0, half))
    return by_gate(build, signal, squashed(build, factor, "sigmoid"), 1.0)


@rule(aten.scaled_dot_product_attention.default, gated=True)
def _attention(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """Averages of the values."""
    return averaged(build, node)
