"""Rules: products with parameters and constants, matrix products and einsum, and sums.

Factors and summands that depend on parameters alone are multiplied or added up first: they are one
effective weight, or one effective bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxpath.graph import ops
from fxpath.graph.builder import Builder
from fxpath.graph.equations import product, spelled
from fxpath.graph.intervals import written_out
from fxpath.graph.refusal import Refusal
from fxpath.graph.schema import target
from fxpath.rules.affine import bias_along
from fxpath.rules.assignment import written_through
from fxpath.rules.common import Args, summed
from fxpath.rules.gating import averaged, gated, squashed
from fxpath.rules.refused import PRODUCT
from fxpath.rules.registry import rule

aten = torch.ops.aten

ZERO_DIVISOR = ("it divides by zero", "divide by a number that is not zero")
ROUNDING = ("rounding is not continuous", "divide without rounding")


# -- matrix products -------------------------------------------------------------------------------


def _product(build: Builder, node: fx.Node, a: Any, b: Any) -> fx.Node:
    """``a @ b`` with one active factor, or averages of ``b`` by a softmax."""
    if build.is_active(a) and build.is_active(b):
        return averaged(build, node)
    if build.is_active(a):
        return _multiplied(build, build.node(a), build.weight(b, node), weight_first=False)
    return _multiplied(build, build.node(b), build.weight(a, node), weight_first=True)


def _multiplied(build: Builder, x: fx.Node, weight: fx.Node, weight_first: bool) -> fx.Node:
    equation = product(len(build.shape(x)), len(build.shape(weight)), weight_first)
    return build.emit(ops.contract, x, weight, None, equation)


@rule(
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.vdot.default,
    aten._sparse_mm.default,
)
def _matmul(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    a, b = list(args.values())[:2]
    return _product(build, node, a, b)


@rule(
    aten.addmm.default,
    aten.baddbmm.default,
    aten.addmv.default,
    aten.addbmm.default,
    aten.addr.default,
    aten._sparse_addmm.default,
)
def _addmm(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """``beta * start + alpha * (a @ b)``."""
    start, a, b = list(args.values())[:3]
    shape = tuple(node.meta["val"].shape)
    outer = node.target is aten.addr.default
    batches = node.target is aten.addbmm.default
    if not build.is_active(a) and not build.is_active(b):
        # Both factors are parameters or constants: their product is one effective bias.
        multiply = aten.outer.default if outer else aten.matmul.default
        constant = build.compute(multiply, a, b)
        if batches:
            constant = build.compute(aten.sum.dim_IntList, constant, [0])
        x = build.times(build.node(start), args["beta"])
        bias = build.times(build.weight(constant, node, "bias"), args["alpha"])
        return build.expand(build.emit(ops.shift, x, bias), shape)
    if outer:
        product = _einsum_of(build, node, [a, b], ["i", "j"], "ij")
    else:
        product = _product(build, node, a, b)
        if batches:
            product = summed(build, product, 0, build.shape(product)[1:])
    product = build.times(product, args["alpha"])
    if args["beta"] == 0:
        return product
    if build.is_active(start):
        x = build.times(build.node(start), args["beta"])
        return build.emit(ops.add, build.expand(x, shape), product)
    bias = build.times(build.weight(start, node, "bias"), args["beta"])
    return build.emit(ops.shift, product, bias)


@rule(aten.linalg_multi_dot.default, aten.chain_matmul.default)
def _multi_dot(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    (factors,) = args.values()
    live = [i for i, factor in enumerate(factors) if build.is_active(factor)]
    if len(live) != 1:
        raise Refusal(*PRODUCT)
    x = build.node(factors[live[0]])
    before, after = factors[: live[0]], factors[live[0] + 1 :]
    for side, first in ((before, True), (after, False)):
        if side:
            weight = side[0] if len(side) == 1 else build.compute(target(node), list(side))
            x = _multiplied(build, x, build.weight(weight, node), first)
    return x


# -- einsum ----------------------------------------------------------------------------------------


@rule(aten.einsum.default)
def _einsum(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    inputs, arrow, output = args["equation"].replace(" ", "").partition("->")
    if not arrow:  # einsum's implicit output: letters that occur once, in alphabetical order
        output = "".join(sorted(c for c in set(inputs) if inputs.count(c) == 1 and c.isalpha()))
        output = "..." * ("..." in inputs) + output
    return _einsum_of(build, node, args["tensors"], inputs.split(","), output)


def _einsum_of(
    build: Builder, node: fx.Node, operands: Sequence[fx.Node], letters: list[str], output: str
) -> fx.Node:
    """A contraction with one active operand; the others make one effective weight."""
    live = [i for i, operand in enumerate(operands) if build.is_active(operand)]
    if len(live) != 1:
        raise Refusal(*PRODUCT)
    own = letters[live[0]]
    x = build.node(operands[live[0]])
    rest = [i for i in range(len(operands)) if i != live[0]]
    if not rest:
        one = build.weight(1.0, node)
        return _contracted(build, x, one, f"{own},->{output}")
    weight, seen = operands[rest[0]], letters[rest[0]]
    if len(rest) > 1:
        given = [letters[i] for i in rest]
        if any("..." in each for each in given):
            raise Refusal(
                "an einsum of several weights with an ellipsis has no single effective weight here",
                "name all axes, or multiply the weights first",
            )
        seen = "".join(dict.fromkeys(c for c in "".join(given) if c in own + output))
        equation = f"{','.join(given)}->{seen}"
        weight = build.compute(aten.einsum.default, equation, [operands[i] for i in rest])
    return _contracted(build, x, build.weight(weight, node), f"{own},{seen}->{output}")


def _contracted(build: Builder, x: fx.Node, weight: fx.Node, equation: str) -> fx.Node:
    equation = spelled(equation, len(build.shape(x)), len(build.shape(weight)))
    return build.emit(ops.contract, x, weight, None, equation)


@rule(aten.tensordot.default)
def _tensordot(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    operands = [args["self"], args["other"]]
    ranks = [operand.meta["val"].dim() for operand in operands]
    first = [chr(ord("a") + i) for i in range(ranks[0])]
    second = [chr(ord("A") + i) for i in range(ranks[1])]
    for a, b in zip(args["dims_self"], args["dims_other"], strict=True):
        second[b % ranks[1]] = first[a % ranks[0]]
    output = [c for c in first if c not in second] + [c for c in second if c not in first]
    return _einsum_of(build, node, operands, ["".join(first), "".join(second)], "".join(output))


@rule(aten.outer.default, aten.ger.default)
def _outer(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _einsum_of(build, node, list(args.values())[:2], ["i", "j"], "ij")


@rule(aten.inner.default)
def _inner(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    operands = [args["self"], args["other"]]
    ranks = [operand.meta["val"].dim() for operand in operands]
    if 0 in ranks:
        return _scaled(build, node, *operands)
    first = "".join(chr(ord("a") + i) for i in range(ranks[0] - 1))
    second = "".join(chr(ord("A") + i) for i in range(ranks[1] - 1))
    return _einsum_of(build, node, operands, [f"{first}z", f"{second}z"], first + second)


@rule(aten.kron.default)
def _kron(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    operands = [args["self"], args["other"]]
    ranks = [operand.meta["val"].dim() for operand in operands]
    if ranks[0] != ranks[1]:
        raise Refusal(
            "a Kronecker product of tensors of two ranks has no rule", "give both the same rank"
        )
    first = [chr(ord("a") + i) for i in range(ranks[0])]
    second = [chr(ord("A") + i) for i in range(ranks[1])]
    both = "".join(a + b for a, b in zip(first, second, strict=True))
    y = _einsum_of(build, node, operands, ["".join(first), "".join(second)], both)
    return build.reshape(y, tuple(node.meta["val"].shape))


@rule(aten.linalg_vecdot.default)
def _vecdot(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    both = _scaled(build, node, args["x"], args["y"])
    return summed(build, both, args["dim"], tuple(node.meta["val"].shape))


@rule(aten.bilinear.default)
def _bilinear(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    operands = [args["input1"], args["weight"], args["input2"]]
    live = [build.is_active(operand) for operand in operands]
    if sum(live) != 1 or build.is_active(args["bias"]):
        raise Refusal(*PRODUCT)
    if live[1]:
        raise Refusal("its weight depends on activations", "keep the weight constant")
    known, letters = (operands[2], "j") if live[0] else (operands[0], "i")
    axis = "i" if live[0] else "j"
    equation = f"oij,...{letters}->...o{axis}"
    weight = build.compute(aten.einsum.default, equation, [operands[1], known])
    x = build.node(operands[0] if live[0] else operands[2])
    equation = f"...{axis},...o{axis}->...o"
    y = _contracted(build, x, build.weight(weight, node), equation)
    return bias_along(build, y, args["bias"], node, -1)


# -- elementwise products --------------------------------------------------------------------------


@rule(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar)
def _mul(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return _scaled(build, node, args["self"], args["other"])


def _scaled(build: Builder, node: fx.Node, a: Any, b: Any) -> fx.Node:
    """``a * b`` with one active factor, or with a gate."""
    if build.is_active(a) and build.is_active(b):
        return gated(build, node)
    x, weight = (a, b) if build.is_active(a) else (b, a)
    return build.emit(ops.scale, build.node(x), build.weight(weight, node))


@rule(
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.true_divide.Tensor,
    aten.true_divide.Scalar,
)
def _div(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    x, divisor = args["self"], args["other"]
    if build.is_active(divisor):
        squash = build.gating and written_out(node)
        if squash:
            return squashed(build, build.node(squash[1]), squash[0])
        raise Refusal(*QUOTIENT)
    if args.get("rounding_mode") is not None:
        raise Refusal(*ROUNDING)
    return build.emit(ops.scale, build.node(x), build.weight(_inverse(build, divisor), node))


QUOTIENT = (
    "it divides by activations, which is not piecewise linear in them",
    'divide by a constant, or analyse the network up to the module before it with until="..."',
)


def _inverse(build: Builder, divisor: Any) -> Any:
    """What a division multiplies with."""
    if not isinstance(divisor, fx.Node):
        if divisor == 0:
            raise Refusal(*ZERO_DIVISOR)
        return 1.0 / divisor
    known = build.constant(divisor)
    if known is not None and not bool(known.all()):
        raise Refusal(*ZERO_DIVISOR)
    return build.compute(aten.reciprocal.default, divisor)


@rule(aten.pow.Tensor_Scalar)
def _pow(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    if args["exponent"] == 1:
        return build.node(args["self"])
    if args["exponent"] == 0:
        one = build.emit(ops.constant, build.number(1.0))
        return build.expand(one, tuple(node.meta["val"].shape))
    if float(args["exponent"]).is_integer() and args["exponent"] > 1:
        raise Refusal(*PRODUCT)
    raise Refusal(
        f"the power {args['exponent']} of an activation is not piecewise linear in it",
        "use ReLU, maxima, or absolute values instead",
    )


# -- sums ------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    written = written_through(build, node)
    if written is not None:
        return written
    return combined(build, node, args["self"], args["other"], 1, args["alpha"])


@rule(aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar)
def _sub(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    squash = build.gating and written_out(node)
    if squash and build.is_active(squash[1]):
        return squashed(build, build.node(squash[1]), squash[0])
    return combined(build, node, args["self"], args["other"], 1, -args["alpha"])


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    return combined(build, node, args["self"], args["other"], -args["alpha"], 1)


def combined(build: Builder, node: fx.Node, a: Any, b: Any, alpha: Any, beta: Any) -> fx.Node:
    """``alpha * a + beta * b``, at least one of them an activation."""
    terms = [(a, alpha), (b, beta)]
    active = [(build.node(v), c) for v, c in terms if build.is_active(v)]
    if len(active) == 2:
        (x, c), (y, d) = active
        return build.emit(ops.add, build.times(x, c), build.times(y, d))
    x, c = active[0]
    constant, d = next((v, d) for v, d in terms if not build.is_active(v))
    bias = build.times(build.weight(constant, node, "bias"), d)
    return build.emit(ops.shift, build.times(x, c), bias)


@rule(aten.addcmul.default, aten.addcdiv.default)
def _addcmul(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """``self + value * tensor1 * tensor2``, or with a quotient."""
    start, a, b = args["self"], args["tensor1"], args["tensor2"]
    if build.is_active(b) and node.target is aten.addcdiv.default:
        raise Refusal(*QUOTIENT)
    if not build.is_active(a) and not build.is_active(b):
        divide = node.target is aten.addcdiv.default
        both = build.compute(aten.div.Tensor if divide else aten.mul.Tensor, a, b)
        return combined(build, node, start, both, 1, args["value"])
    if node.target is aten.addcdiv.default:
        b = _inverse(build, b)
    product = build.times(_scaled(build, node, a, b), args["value"])
    if build.is_active(start):
        return build.emit(ops.add, build.node(start), product)
    return build.emit(ops.shift, product, build.weight(start, node, "bias"))


@rule(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(build: Builder, node: fx.Node, args: Args) -> fx.Node:
    """``(1 - weight) * self + weight * end``: a linear map of both."""
    weight = args["weight"]
    if build.is_active(weight):
        raise Refusal(*PRODUCT)
    if isinstance(weight, fx.Node):
        factors = [build.compute(aten.rsub.Scalar, weight, 1), weight]
    else:
        factors = [1 - weight, weight]
    terms, biases = [], []
    for value, factor in zip((args["self"], args["end"]), factors, strict=True):
        if build.is_active(value):
            terms.append(build.emit(ops.scale, build.node(value), build.weight(factor, node)))
        else:
            biases.append(build.compute(aten.mul.Tensor, value, factor))
    y = build.add(terms, tuple(node.meta["val"].shape))
    for bias in biases:
        y = build.emit(ops.shift, y, build.weight(bias, node, "bias"))
    return y
