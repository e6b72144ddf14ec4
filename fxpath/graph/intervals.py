"""Bounds of activations that hold whatever the parameters are, read off a captured graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph.schema import bind
from fxpath.graph.squashes import SQUASHES, squash_of
from fxpath.private import OpOverload, schema

aten = torch.ops.aten

#: Lowest and highest value, without rounding.
Interval = tuple[Fraction, Fraction]
#: The same, where one of them may be infinite.
Bounds = tuple[Fraction | float, Fraction | float]
Known = Mapping[fx.Node, Bounds]

#: Operations that only move entries, or leave them out.
_MOVING = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute"),
    *("transpose", "t", "movedim", "expand", "expand_as", "repeat", "slice", "select", "narrow"),
    *("clone", "contiguous", "alias", "detach", "to", "_to_copy", "flip", "roll", "view_as"),
    *("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "pixel_shuffle"),
    *("index_select", "gather", "repeat_interleave", "channel_shuffle", "upsample_nearest1d"),
    *("upsample_nearest2d", "upsample_nearest3d", "unsafe_split", "unsafe_chunk", "swapaxes"),
}
#: Operations that average entries, or take one of them.
_AVERAGING = {
    *("mean", "amax", "amin", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d"),
}
#: Squashes by the names that ATen has for them.
_CALLED = {name: name for name in SQUASHES} | {
    **{"_softmax": "softmax", "arctan": "atan", "arcsinh": "asinh"},
    **{"special_erf": "erf", "special_expit": "sigmoid"},
}


def intervals(graph: fx.Graph, active: Callable[[Any], bool]) -> dict[fx.Node, Interval]:
    """Bounds of the activations of a captured graph; those without any are left out.

    Args:
        graph: a functional ATen graph.
        active: whether a value depends on the network's inputs.
    """
    known: dict[fx.Node, Bounds] = {}
    for node in graph.nodes:
        if node.op == "call_function" and active(node):
            found = _interval(node, known, active)
            if found is not None:
                known[node] = found
    every = {node: _finite(found) for node, found in known.items()}
    return {node: found for node, found in every.items() if found}


def _interval(node: fx.Node, known: Known, active: Callable[[Any], bool]) -> Bounds | None:
    if node.target is operator.getitem:  # one of several results
        return known.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, OpOverload):
        return None
    name = schema(node.target).name.split("::")[1]
    args = bind(node)
    if not _of_numbers(node, args):
        return None
    if (written_out(node) or ("",))[0] == "softsign":
        return Fraction(-1), Fraction(1)
    first: Any = args.get("self", args.get("input"))
    if name in _MOVING or name in _AVERAGING:
        return known.get(first)
    if name == "dropout":
        return None if args["train"] and args["p"] else known.get(first)
    if name in ("cat", "concat", "stack"):
        parts = [known.get(each) for each in args["tensors"]]
        there = [part for part in parts if part is not None]
        return _hull(*there) if there and len(there) == len(parts) else None
    if name in _CALLED:
        return _squashed(node, name, args, known)
    if name in _CLAMPS:
        bounds = _CLAMPS[name]
        given = [args["self"], *(args.get(b) if isinstance(b, str) else b for b in bounds)]
        low, high = (_operand(each, known, active) for each in given[1:])
        return _clamp(known.get(given[0]), low, high, (given[1] is None, given[2] is None))
    rule = _ARITHMETIC.get(name)
    if rule is None:
        return None
    return rule(*(_operand(args.get(key), known, active) for key in _OPERANDS[name]))


def _of_numbers(node: fx.Node, args: Mapping[str, Any]) -> bool:
    """Whether a result is made of numbers as they are: neither rounded nor read as other bytes."""
    made = node.meta.get("val")
    each = made if isinstance(made, (list, tuple)) else [made]
    overload: Any = node.target
    return (
        all(isinstance(x, Tensor) and x.dtype.is_floating_point for x in each)
        and not (schema(overload).overload_name == "dtype" and "view" in schema(overload).name)
        and args.get("rounding_mode") is None
    )


def _squashed(node: fx.Node, name: str, args: dict[str, Any], known: Known) -> Interval | None:
    numbers = numbers_of(name, args, node)
    found = None if numbers is None else squash_of(squash_name(name, args), numbers)
    if found is None:
        return None
    inner = _finite(known.get(args["self"]))
    far = math.inf
    if found.size is not None and inner is not None:
        far = above(Fraction(found.size) * max(map(abs, inner)))
    low, high = max(found.low, -far), min(found.high, far)
    return (Fraction(low), Fraction(high)) if math.isfinite(high - low) else None


def squash_name(name: str, args: Mapping[str, Any]) -> str:
    """What the table calls an operation of ATen."""
    if name == "gelu" and args["approximate"] == "tanh":
        return "gelu_tanh"
    return _CALLED[name]


def written_out(node: fx.Node) -> tuple[str, fx.Node] | None:
    """The squash that torch writes as several operations, and what it is applied to."""
    if node.target not in _ENDS:
        return None
    name, args = _ENDS[node.target], bind(node)
    x, other = args["self"], args["other"]
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
        return None
    if name == "softsign" and args.get("rounding_mode") is None:  # x / (|x| + 1)
        one = bind(other) if other.target is aten.add.Tensor else {}
        size = one.get("self")
        matches = (one.get("other"), one.get("alpha")) == (1, 1) and _is(size, "abs", x)
        return (name, x) if matches else None
    matches = args.get("alpha") == 1 and _is(other, "tanh", x)  # x - tanh(x)
    return (name, x) if matches else None


def _is(node: Any, name: str, x: fx.Node) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is getattr(aten, name).default
        and node.args[0] is x
    )


#: The last operation of each.
_ENDS: dict[Any, str] = {aten.div.Tensor: "softsign", aten.sub.Tensor: "tanhshrink"}


def numbers_of(name: str, args: Mapping[str, Any], node: fx.Node) -> tuple[float, ...] | None:
    """What a squash of ATen takes besides its input; ``None`` if it is no number."""
    keys = {
        "elu": ("alpha", "scale", "input_scale"),
        "celu": ("alpha",),
        "softshrink": ("lambd",),
        "hardshrink": ("lambd",),
        "softmax": ("dim",),
        "_softmax": ("dim",),
    }
    found = [args[key] for key in keys.get(name, ())]
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in found):
        return None
    if name in ("softmax", "_softmax"):  # counted from the front, whatever reads it
        found = [found[0] % max(1, len(node.meta["val"].shape))]
    return tuple(map(float, found))


def above(value: Fraction) -> float:
    """The nearest number of float64 that is not below; inf where there is none."""
    try:
        found = float(value)
    except OverflowError:
        return math.inf
    return found if Fraction(found) >= value else math.nextafter(found, math.inf)


# -- arithmetic ------------------------------------------------------------------------------------


def _operand(value: Any, known: Known, active: Callable[[Any], bool]) -> Interval | None:
    """Of an activation, or a number; parameters have none."""
    if isinstance(value, fx.Node):
        return _finite(known.get(value)) if active(value) else None
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return Fraction(value), Fraction(value)


def _finite(x: Bounds | None) -> Interval | None:
    if x is None or isinstance(x[0], float) or isinstance(x[1], float):
        return None
    return x[0], x[1]


def _hull(*parts: Bounds) -> Bounds:
    return min(low for low, _ in parts), max(high for _, high in parts)


def _product(a: Interval | None, b: Interval | None) -> Interval | None:
    if a is None or b is None:
        return None
    every = [x * y for x in a for y in b]
    return min(every), max(every)


def _sum(a: Interval | None, b: Interval | None, alpha: Interval | None) -> Interval | None:
    b = _product(b, alpha)
    return None if a is None or b is None else (a[0] + b[0], a[1] + b[1])


def _difference(a: Interval | None, b: Interval | None, alpha: Interval | None) -> Interval | None:
    return _sum(a, _negative(b), alpha)


def _negative(x: Interval | None) -> Interval | None:
    return None if x is None else (-x[1], -x[0])


def _quotient(a: Interval | None, b: Interval | None) -> Interval | None:
    if b is None or b[0] <= 0 <= b[1]:
        return None
    return _product(a, (1 / b[1], 1 / b[0]))


def _clamp(
    x: Bounds | None, low: Interval | None, high: Interval | None, absent: tuple[bool, bool]
) -> Bounds | None:
    """Not less than ``low``, and then not more than ``high``; a bound may be absent, or unknown.

    Where the bounds cross torch returns the upper one, as here.
    """
    bottom, top = x or (-math.inf, math.inf)
    for bound, missing, chosen in ((low, absent[0], max), (high, absent[1], min)):
        if not missing:
            least, most = bound or (-math.inf, math.inf)
            bottom, top = chosen(bottom, least), chosen(top, most)
    nothing = isinstance(bottom, float) and isinstance(top, float)
    return None if nothing else (bottom, top)


_ZERO = Fraction(0)


#: The bounds of operations that clamp: arguments, or numbers.
_CLAMPS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("clamp", "clip"), ("min", "max")),
    "hardtanh": ("min_val", "max_val"),
    "clamp_min": ("min", None),
    "clamp_max": (None, "max"),
    "relu": (0, None),
    "relu6": (0, 6),
}
_ARITHMETIC: dict[str, Callable[..., Interval | None]] = {
    **dict.fromkeys(("mul", "multiply"), _product),
    "add": _sum,
    **dict.fromkeys(("sub", "subtract"), _difference),
    "rsub": lambda a, b, alpha: _difference(b, a, alpha),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    "hardsigmoid": lambda x: (_ZERO, Fraction(1)),
    "neg": _negative,
    "abs": lambda x: None if x is None else (_ZERO, max(map(abs, x))),
}
_OPERANDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide"), ("self", "other")),
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), ("self", "other", "alpha")),
    **dict.fromkeys(("hardsigmoid", "neg", "abs"), ("self",)),
}
