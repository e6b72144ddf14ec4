"""Activations that are gates of themselves, and functions that are bounded: one table.

A *self-gate* is an activation with ``sigma(x) = x g(x)`` and ``|g(x)| <= size`` for all x: on a
path it takes a value in [-size, size], where ReLU takes 0 or 1.  A bounded function that is not 0
at 0 (the sigmoid) is none, but may be the gate of something else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Arguments of an activation besides its input.
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Squash:
    """What is known of an activation.

    Attributes:
        function: itself.
        proof: why ``size`` and ``lipschitz`` hold.
        size: the least c with ``|sigma(x)| <= c |x|`` for all x, if there is one.
        lipschitz: a constant L with ``|sigma(a) - sigma(b)| <= L |a - b|``; inf where it jumps.  Of
            a softmax: ``<= L max_j |a_j - b_j|`` over its axis.
        low: its infimum.
        high: its supremum.
        axis: of a softmax the axis, else ``None``: entry by entry.
    """

    function: Callable[[Tensor], Tensor]
    proof: str
    size: float | None
    lipschitz: float
    low: float = -math.inf
    high: float = math.inf
    axis: int | None = None


def _elu(alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Squash | None:
    if inner < 0:
        return None  # exponential growth
    steep = abs(scale) * max(1.0, abs(alpha * inner))
    # Between 0 and what it tends to on the left; unbounded on the right, up or down.
    left = -alpha * scale if inner else 0.0
    low, high = (min(left, 0.0), math.inf) if scale > 0 else (-math.inf, max(left, 0.0))
    return Squash(
        lambda x: scale * torch.where(x > 0, x, alpha * torch.expm1(inner * x.clamp(max=0))),
        "its derivative is scale above 0 and scale alpha inner exp(inner x) below; at 0 it is 0",
        steep,
        steep,
        *((low, high) if scale else (0.0, 0.0)),
    )


def _celu(alpha: float = 1.0) -> Squash | None:
    if alpha <= 0:
        return None
    return Squash(
        lambda x: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0) / alpha)),
        "its derivative is 1 above 0 and exp(x / alpha) below; at 0 it is 0",
        1.0,
        1.0,
        low=-alpha,
    )


#: Of torch's SELU.
_ALPHA, _SCALE = 1.6732632423543772, 1.0507009873554805


def _softshrink(lambd: float = 0.5) -> Squash:
    return Squash(
        lambda x: F.softshrink(x, lambd),
        "it takes lambd off the size, or all of it; its slopes are 0 and 1",
        1.0,
        1.0,
    )


def _hardshrink(lambd: float = 0.5) -> Squash:
    return Squash(
        lambda x: torch.where(x.abs() > lambd, x, 0.0),
        "it is x or 0; it jumps at lambd",
        1.0,
        math.inf if lambd else 1.0,
    )


def _softmax(axis: float) -> Squash:
    return Squash(
        lambda x: x.softmax(int(axis)),
        "entries are parts of 1; row i of its Jacobian sums to 2 p_i (1 - p_i) <= 1/2 in size",
        None,
        0.5,
        low=0.0,
        high=1.0,
        axis=int(axis),
    )


def _fixed(
    function: Callable[[Tensor], Tensor],
    proof: str,
    size: float | None,
    lipschitz: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> Callable[[], Squash]:
    return lambda: Squash(function, proof, size, lipschitz, low, high)


#: Name -> what is known of it, for its arguments; ``None`` where they make it unbounded.
SQUASHES: dict[str, Callable[..., Squash | None]] = {
    "silu": _fixed(
        F.silu,
        "x sigmoid(x), and the sigmoid is below 1; the derivative is largest at 2.3994",
        1.0,
        1.09984,
        low=-0.27847,
    ),
    "gelu": _fixed(
        F.gelu,
        "x times the normal distribution function; the derivative is largest at sqrt(2)",
        1.0,
        1.12891,
        low=-0.16998,
    ),
    "gelu_tanh": _fixed(
        lambda x: F.gelu(x, approximate="tanh"),
        "x (1 + tanh) / 2; the derivative is largest near 1.42",
        1.0,
        1.12902,
        low=-0.17005,
    ),
    "hardswish": _fixed(
        F.hardswish,
        "x times a number in [0, 1]; the derivative (2 x + 3) / 6 is largest at 3",
        1.0,
        1.5,
        low=-0.375,
    ),
    "mish": _fixed(
        F.mish,
        "x tanh(softplus(x)), and the tanh is below 1; the derivative is largest near 1.4907",
        1.0,
        1.08850,
        low=-0.30885,
    ),
    "tanh": _fixed(torch.tanh, "its derivative is in (0, 1]; at 0 it is 0", 1.0, 1.0, -1.0, 1.0),
    "softsign": _fixed(F.softsign, "x / (1 + |x|)", 1.0, 1.0, -1.0, 1.0),
    "softshrink": _softshrink,
    "hardshrink": _hardshrink,
    "tanhshrink": _fixed(F.tanhshrink, "its derivative tanh^2 is in [0, 1)", 1.0, 1.0),
    "elu": _elu,
    "selu": lambda: _elu(_ALPHA, _SCALE),
    "celu": _celu,
    "sin": _fixed(torch.sin, "|sin x| <= |x|, and its derivative is a cosine", 1.0, 1.0, -1.0, 1.0),
    "atan": _fixed(
        torch.atan,
        "its derivative 1 / (1 + x^2) is in (0, 1]; at 0 it is 0",
        1.0,
        1.0,
        -math.pi / 2 - 1e-15,
        math.pi / 2 + 1e-15,
    ),
    "asinh": _fixed(torch.asinh, "its derivative is in (0, 1]; at 0 it is 0", 1.0, 1.0),
    "erf": _fixed(
        torch.erf,
        "its derivative 2 / sqrt(pi) exp(-x^2) is largest at 0, where it is 0 itself",
        1.1283791670955127,
        1.1283791670955127,
        -1.0,
        1.0,
    ),
    "sigmoid": _fixed(torch.sigmoid, "s (1 - s) <= 1/4", None, 0.25, 0.0, 1.0),
    "cos": _fixed(torch.cos, "its derivative is a sine", None, 1.0, -1.0, 1.0),
    "softmax": _softmax,
}


@functools.lru_cache(maxsize=256)
def squash_of(name: str, numbers: Numbers = ()) -> Squash | None:
    """What is known of an activation with some arguments."""
    return SQUASHES[name](*numbers)
