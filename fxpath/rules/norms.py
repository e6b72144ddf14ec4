"""Rules: 1-norms, maximum norms, and the distances that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.builder import Builder
from fxpath.graph.refusal import Refusal
from fxpath.rules.common import LARGEST, SMALLEST, Args, pooled, summed
from fxpath.rules.products import combined
from fxpath.rules.registry import rule

aten = torch.ops.aten


def _sum_of_sizes(build: Builder, x: fx.Node, dims: Any, shape: Sequence[int]) -> fx.Node:
    return summed(build, build.emit(ops.absolute, x), dims, shape)


@rule(aten.dist.default)
def _dist(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if args["p"] != 1:
        raise Refusal(*euclidean(args["p"]))
    difference = combined(build, node, args["self"], args["other"], 1, -1)
    return _sum_of_sizes(build, difference, None, ())


@rule(aten.pairwise_distance.default)
def _pairwise_distance(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if args["p"] != 1:
        raise Refusal(*euclidean(args["p"]))
    difference = combined(build, node, args["x1"], args["x2"], 1, -1)
    x = build.emit(ops.shift, difference, build.weight(args["eps"], node))
    return _sum_of_sizes(build, x, -1, tuple(node.meta["val"].shape))


def euclidean(order: Any) -> tuple[str, str]:
    """Why a norm of another order than 1 and infinity is refused."""
    return (
        f"a norm of order {order} is not piecewise linear",
        "use the 1-norm or the maximum norm, which are",
    )


@rule(aten.linalg_norm.default, aten.linalg_matrix_norm.default)
def _matrix_norm(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """Of a matrix the largest or smallest 1-norm of its columns or rows; of a vector its norm."""
    order = args["ord"]
    shape = list(args["self"].meta["val"].shape)
    dims = args["dim"]
    if dims is None and (order is None or len(shape) == 1):
        dims = range(len(shape))
    dims = [d % len(shape) for d in (range(len(shape)) if dims is None else dims)]
    if len(dims) < 2 or order is None:
        return _vector_norm(build, node, args["self"], order, dims)
    if order not in (1, -1, math.inf, -math.inf):
        raise Refusal(*euclidean(order))
    inner = dims[0] if abs(order) == 1 else dims[1]
    shape[inner] = 1
    x = _sum_of_sizes(build, build.node(args["self"]), inner, shape)
    ranks = LARGEST if order > 0 else SMALLEST
    return pooled(build, x, dims, tuple(node.meta["val"].shape), ranks)


@rule(aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim)
def _norm(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _vector_norm(build, node, args["self"], args.get("ord", args.get("p")), args.get("dim"))


def _vector_norm(build: Builder, node: fx.Node, value: fx.Node, order: Any, dims: Any) -> fx.Node:
    x, shape = build.node(value), tuple(node.meta["val"].shape)
    if order == 1:
        return _sum_of_sizes(build, x, dims, shape)
    if order is not None and abs(order) == math.inf:
        ranks = LARGEST if order > 0 else SMALLEST
        return pooled(build, build.emit(ops.absolute, x), dims, shape, ranks)
    if order == 0:
        raise Refusal("it counts the entries that are not zero, which jumps", "use the 1-norm")
    raise Refusal(*euclidean(2 if order is None else order))
