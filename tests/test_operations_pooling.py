"""Pooling of every kind, extrema, means and sums over axes, and upsampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import affine, maximum, minimum

SIZES = [(11,), (7, 6), (4, 5, 4)]
SMALL = [(5,), (4, 3), (3, 2, 3)]

MAX_POOL: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 2},
    "stride-one": {"kernel_size": 3, "stride": 1},
    "overlap": {"kernel_size": 3, "stride": 2},
    "gaps": {"kernel_size": 2, "stride": 3},
    "padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "padding-stride-one": {"kernel_size": 3, "stride": 1, "padding": 1},
    "dilation": {"kernel_size": 2, "stride": 1, "dilation": 2},
    "ceil": {"kernel_size": 2, "ceil_mode": True},
    "ceil-overlap": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    # The last window would start in the right padding: it is dropped.
    "ceil-dropped": {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    "ceil-padding": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "ceil-dilation": {"kernel_size": 2, "stride": 2, "dilation": 3, "ceil_mode": True},
    "everything": {
        "kernel_size": 2,
        "stride": 2,
        "padding": 1,
        "dilation": 2,
        "ceil_mode": True,
    },
    "mixed": {"kernel_size": (2, 1, 3), "stride": (1, 2, 2), "padding": (1, 0, 1)},
}
AVG_POOL: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 2},
    "stride-one": {"kernel_size": 3, "stride": 1},
    "overlap": {"kernel_size": 3, "stride": 2},
    "padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "padding-excluded": {
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "count_include_pad": False,
    },
    "ceil": {"kernel_size": 2, "ceil_mode": True},
    # A window beyond the right border is divided by what lies inside the padded input.
    "ceil-overlap": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "ceil-padding": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "ceil-dropped": {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    "ceil-padding-excluded": {
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "ceil_mode": True,
        "count_include_pad": False,
    },
    "mixed": {"kernel_size": (2, 1, 3), "stride": (1, 2, 2), "padding": (1, 0, 1)},
}
DIVISOR: dict[str, dict[str, Any]] = {
    "divisor": {"kernel_size": 2, "divisor_override": 3},
    "divisor-one": {"kernel_size": 2, "stride": 1, "divisor_override": 1},
    "divisor-ceil-padding": {
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "ceil_mode": True,
        "count_include_pad": False,
        "divisor_override": 7,
    },
}
# What runs in every number of dimensions; the axes are treated alike.
POOL_ALWAYS = {"padding", "dilation", "ceil-dropped", "ceil-padding", "everything", "mixed"}
POOL_ALWAYS |= {"padding-excluded", "ceil-padding-excluded", "divisor-ceil-padding"}


def _flags(flags: dict[str, Any], dim: int) -> dict[str, Any]:
    return {key: x[-dim:] if isinstance(x, tuple) else x for key, x in flags.items()}


def _functions(*names: str) -> list[Callable[..., Tensor]]:
    return [getattr(functional, name) for name in names]


def pools() -> Iterator[Case]:
    max_pools = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]
    avg_pools = [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d]
    adaptive_max = [nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d]
    adaptive_avg = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d]
    calls = _functions("max_pool1d", "max_pool2d", "max_pool3d")
    for dim, size in enumerate(SIZES, start=1):
        shape = (2, *size)
        for name, flags in MAX_POOL.items():
            if dim != 2 and name not in POOL_ALWAYS:
                continue
            pool = max_pools[dim - 1](**_flags(flags, dim))
            yield case(f"max{dim}d-{name}", shape, maximum(pool))
        for name, flags in {**AVG_POOL, **(DIVISOR if dim > 1 else {})}.items():
            if dim != 2 and name not in POOL_ALWAYS:
                continue
            pool = avg_pools[dim - 1](**_flags(flags, dim))
            yield case(f"avg{dim}d-{name}", shape, affine(pool))
        call = calls[dim - 1]
        yield case(f"max{dim}d-functional", shape, maximum(lambda x, call=call: call(x, 2)))
        yield case(f"max{dim}d-at-the-input", shape, maximum(max_pools[dim - 1](3, 2, 1)), **BARE)
        yield case(f"avg{dim}d-at-the-input", shape, affine(avg_pools[dim - 1](3, 2, 1)), **BARE)
        # Global, divisors of the size, non-divisors, and more outputs than inputs.
        targets: dict[str, Any] = {"global": 1, "same": size, "wide": tuple(n + 2 for n in size)}
        targets |= {"three": 3, "mixed": (2, None, 3)[-dim:] if dim > 1 else 4}
        for name, target in targets.items():
            if dim != 2 and name in ("same", "three"):
                continue
            yield case(f"adaptive-max{dim}d-{name}", shape, maximum(adaptive_max[dim - 1](target)))
            yield case(f"adaptive-avg{dim}d-{name}", shape, affine(adaptive_avg[dim - 1](target)))


def _indices_unused(x: Tensor) -> Tensor:
    values, _ = functional.max_pool2d(x, 2, return_indices=True)
    return values


BARE: dict[str, Any] = {"layouts": ("bare",)}
SHAPE = (3, 4, 5)
EXTREMA = {
    "amax-last": lambda x: x.amax(-1),
    "amax-keepdim": lambda x: torch.amax(x, 2, keepdim=True),
    "amax-channel": lambda x: x.amax(1),
    "amax-spatial": lambda x: x.amax((2, 3)),
    "amax-spatial-keepdim": lambda x: x.amax((-1, -2), keepdim=True),
    "amax-all": lambda x: x.amax((1, 2, 3), keepdim=True),
    "max-dim": lambda x: x.max(2).values,
    "max-dim-keepdim": lambda x: torch.max(x, dim=-1, keepdim=True)[0],
    "max-channel": lambda x: x.max(1)[0],
}
# The same axes for the minimum, by other functions.
MINIMA = {
    "amin-last": lambda x: x.amin(-1),
    "amin-spatial-keepdim": lambda x: torch.amin(x, (2, 3), keepdim=True),
    "amin-channel": lambda x: x.amin(1),
    "min-dim": lambda x: x.min(2).values,
    "min-dim-keepdim": lambda x: torch.min(x, dim=-1, keepdim=True)[0],
}
LINEAR = {
    "mean-last": lambda x: x.mean(-1),
    "mean-keepdim": lambda x: x.mean(2, keepdim=True),
    "mean-channel": lambda x: torch.mean(x, 1),
    "mean-spatial": lambda x: x.mean((2, 3)),
    "mean-spatial-keepdim": lambda x: x.mean([-2, -1], keepdim=True),
    "mean-all": lambda x: x.mean((1, 2, 3), keepdim=True),
    "sum-last": lambda x: x.sum(-1),
    "sum-keepdim": lambda x: torch.sum(x, 2, keepdim=True),
    "sum-channel": lambda x: x.sum(1),
    "sum-spatial": lambda x: x.sum((2, 3)),
    "sum-all": lambda x: x.sum((1, 2, 3), keepdim=True),
}
REDUCTIONS = [
    *(case(name, SHAPE, maximum(op)) for name, op in EXTREMA.items()),
    *(case(name, SHAPE, minimum(op)) for name, op in MINIMA.items()),
    *(case(name, SHAPE, affine(op)) for name, op in LINEAR.items()),
    case("mean-flat", (5,), affine(lambda x: x.mean(1, keepdim=True))),
    case("amax-flat", (5,), maximum(lambda x: x.amax(1, keepdim=True))),
    case("amax-3d", (2, 3, 2, 3), maximum(lambda x: x.amax((2, 4)))),
    case("mean-3d", (2, 3, 2, 3), affine(lambda x: x.mean((2, 4)))),
    case("mean-twice", SHAPE, affine(lambda x: x.mean(3)), affine(lambda x: x.mean(2))),
    case("min-pool", SHAPE, minimum(lambda x: -functional.max_pool2d(-x, 3, 1, 1))),
    case("max-pool-twice", SHAPE, *[maximum(nn.MaxPool2d(3, 1, 1))] * 2),
    case(
        "max-then-average",
        SHAPE,
        maximum(nn.MaxPool2d(3, 1, 1)),
        affine(nn.AvgPool2d(2, ceil_mode=True)),
    ),
    case("max-indices-unused", SHAPE, maximum(_indices_unused)),
    case(
        "adaptive-max-indices-unused",
        SHAPE,
        maximum(lambda x: functional.adaptive_max_pool2d(x, 2, return_indices=True)[0]),
    ),
]


# Where positions fall between others: modes and alignments differ.
FRACTIONS = ("uneven", "mixed", "size")


def upsamplings() -> Iterator[Case]:
    linear_modes = ["linear", "bilinear", "trilinear"]
    for dim, size in enumerate(SMALL, start=1):
        shape = (2, *size)
        targets: dict[str, dict[str, Any]] = {
            "double": {"scale_factor": 2},
            "uneven": {"scale_factor": 2.6},
            "shrink": {"scale_factor": 0.6},
            "mixed": {"scale_factor": (1.5, 1.0, 2.0)[-dim:]},
            "size": {"size": tuple(n + 2 for n in size)},
            "smaller": {"size": tuple(max(1, n - 2) for n in size)},
            "one": {"size": 1},
        }
        for name, target in targets.items():
            if dim != 2 and name not in FRACTIONS:
                continue
            exact = ("nearest-exact",) if name in FRACTIONS else ()
            for mode in ("nearest", *exact):
                op = nn.Upsample(**target, mode=mode)
                yield case(f"{mode}{dim}d-{name}", shape, affine(op))
            for align in (False, True) if name in FRACTIONS else (False,):
                corner = "-corners" if align else ""
                op = nn.Upsample(**target, mode=linear_modes[dim - 1], align_corners=align)
                yield case(f"linear{dim}d{corner}-{name}", shape, affine(op))
        if dim != 2:
            continue
        yield case(
            f"linear{dim}d-recomputed",
            shape,
            affine(
                lambda x, mode=linear_modes[dim - 1]: functional.interpolate(
                    x, scale_factor=1.7, mode=mode, recompute_scale_factor=True
                )
            ),
        )
        yield case(
            f"nearest{dim}d-recomputed",
            shape,
            affine(
                lambda x: functional.interpolate(
                    x, scale_factor=1.7, mode="nearest", recompute_scale_factor=True
                )
            ),
        )
        yield case(
            f"area{dim}d",
            shape,
            affine(lambda x: functional.interpolate(x, scale_factor=1.5, mode="area")),
        )


MORE_UPSAMPLING = [
    # At a border both taps read the same position: added before the power.
    case("bilinear-33-to-7", (1, 3, 3), affine(nn.UpsamplingBilinear2d(size=(7, 5)))),
    case("nearest-module", (2, 3, 2), affine(nn.UpsamplingNearest2d(scale_factor=3))),
    case(
        "size-of-another",
        [(2, 3, 2), (2, 5, 4)],
        affine(
            lambda x, y: functional.interpolate(x, size=y.shape[-2:], mode="bilinear") + 0 * y,
        ),
    ),
    case(
        "bilinear-antialias",
        (1, 4, 4),
        affine(
            lambda x: functional.interpolate(x, size=(3, 2), mode="bilinear", antialias=True),
        ),
    ),
    case("bilinear-at-the-input", (1, 3, 3), affine(nn.UpsamplingBilinear2d(size=7)), **BARE),
]


@pytest.mark.parametrize(("item", "layout"), parameters(pools()))
def test_pooling(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(REDUCTIONS))
def test_reductions_over_axes(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters([*upsamplings(), *MORE_UPSAMPLING]))
def test_upsampling(item: Case, layout: str) -> None:
    check(item, layout)
