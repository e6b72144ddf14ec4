"""Convolutions, linear maps, and products and sums with parameters and constants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import Call, affine, quotient

CONV = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
BRIEF = ("spatial",)
SIZES = [(9,), (6, 5), (4, 3, 4)]

# Some positions are read through several taps in the modes that are not zeros: the taps are paths
# of their own, which a Jacobian would have added up.
CONV_FLAGS: dict[str, dict[str, object]] = {
    "plain": {"kernel_size": 2},
    "no-bias": {"kernel_size": 3, "bias": False},
    "stride": {"kernel_size": 2, "stride": 2},
    "padding": {"kernel_size": 3, "padding": 1},
    "wide-padding": {"kernel_size": 2, "padding": 2},
    "stride-padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "stride-beyond-kernel": {"kernel_size": 1, "stride": 2},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "everything": {"kernel_size": 2, "stride": 2, "padding": 2, "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "same": {"kernel_size": 3, "padding": "same"},
    "same-even": {"kernel_size": 2, "padding": "same"},
    "same-dilation": {"kernel_size": 2, "padding": "same", "dilation": 2},
    "same-circular": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "circular-stride": {"kernel_size": 2, "padding": 2, "stride": 2, "padding_mode": "circular"},
    "replicate-wide": {"kernel_size": 2, "padding": 2, "padding_mode": "replicate"},
    "groups": {"kernel_size": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "bias": False},
}
# One number per axis; the last ones are used where there are fewer axes.
CONV_MIXED: list[dict[str, object]] = [
    {"kernel_size": (1, 3, 2), "stride": (2, 1, 2), "padding": (0, 1, 0), "dilation": (1, 1, 2)},
    {"kernel_size": (2, 1, 3), "padding": (1, 0, 2), "padding_mode": "circular"},
]
TRANSPOSED_FLAGS: dict[str, dict[str, object]] = {
    "plain": {"kernel_size": 2},
    "no-bias": {"kernel_size": 2, "bias": False},
    "stride": {"kernel_size": 2, "stride": 2},
    "overlap": {"kernel_size": 3, "stride": 2},
    "gaps": {"kernel_size": 1, "stride": 2},
    "padding": {"kernel_size": 3, "padding": 1},
    "output-padding": {"kernel_size": 2, "stride": 2, "padding": 1, "output_padding": 1},
    "output-padding-3": {"kernel_size": 3, "stride": 3, "output_padding": 2},
    "dilation": {"kernel_size": 2, "dilation": 2, "stride": 2, "padding": 1},
    "dilation-output-padding": {"kernel_size": 2, "dilation": 3, "output_padding": 2},
    "groups": {"kernel_size": 2, "groups": 2, "stride": 2},
}
# What runs in every number of dimensions; the axes are treated alike.
CONV_ALWAYS = {"plain", "stride-padding", "everything", "same-even", "reflect", "circular-stride"}
CONV_ALWAYS |= {"replicate", "circular", "groups", "mixed-0", "mixed-1"}
TRANSPOSED_ALWAYS = {"plain", "stride", "overlap", "output-padding", "groups"}


def _flags(flags: dict[str, object], dim: int) -> dict[str, object]:
    return {key: x[-dim:] if isinstance(x, tuple) else x for key, x in flags.items()}


def convolutions() -> Iterator[Case]:
    for dim, (make, size) in enumerate(zip(CONV, SIZES, strict=True), start=1):
        mixed = {f"mixed-{k}": flags for k, flags in enumerate(CONV_MIXED)}
        for name, flags in {**CONV_FLAGS, **mixed}.items():
            if dim != 2 and name not in CONV_ALWAYS:
                continue
            groups = flags.get("groups", 1)
            channels = (2, 2) if groups == 1 else (4, 4)
            if dim == 3 and flags["kernel_size"] == 3:
                channels = channels if groups != 1 else (1, 2)
            kernel = make(*channels, **_flags(flags, dim))
            yield case(f"conv{dim}d-{name}", (channels[0], *size), affine(kernel))
        for name, flags in TRANSPOSED_FLAGS.items():
            if dim != 2 and name not in TRANSPOSED_ALWAYS:
                continue
            groups = flags.get("groups", 1)
            channels = (1, 2) if groups == 1 else (2, 4)
            kernel = make_transposed(dim, channels, flags)
            sizes = tuple(min(n, 4) for n in size)
            yield case(f"transposed{dim}d-{name}", (channels[0], *sizes), affine(kernel))
        call = [functional.conv1d, functional.conv2d, functional.conv3d][dim - 1]
        raw = Call(
            lambda x, kernel, call=call: call(x, kernel, None, 2, 1), kernel=(2, 2, *[2] * dim)
        )
        yield case(f"conv{dim}d-raw-kernel", (2, *size), affine(raw))
        fixed = torch.linspace(-1.05, 2, 4 * 2**dim, dtype=torch.float64).reshape(2, 2, *[2] * dim)
        buffer = Call(lambda x, kernel, call=call: call(x, kernel, padding=1), kernel=fixed)
        yield case(f"conv{dim}d-constant-kernel", (2, *size), affine(buffer))


def make_transposed(dim: int, channels: tuple[int, int], flags: dict[str, object]) -> nn.Module:
    return TRANSPOSED[dim - 1](*channels, **flags)


class OutputSize(nn.ConvTranspose2d):
    """A transposed convolution that is told the size of its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, output_size=[10, 7])


class Tied(nn.Module):
    """One weight for two layers in a row, the second time transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight)


_TIED = Tied()
_TWICE = nn.Conv2d(2, 2, 3, padding=1)
LINEAR = [
    case("linear", (5,), affine(nn.Linear(5, 4))),
    case("linear-no-bias", (5,), affine(nn.Linear(5, 4, bias=False))),
    case("linear-2d", (3, 5), affine(nn.Linear(5, 4))),
    case("linear-3d", (2, 3, 5), affine(nn.Linear(5, 4))),
    case("linear-used-twice", (4,), affine(_TIED), affine(_TIED)),
    case("conv-used-twice", (2, 5, 4), affine(_TWICE), affine(_TWICE)),
    case(
        "siamese",
        [(2, 5, 4), (2, 5, 4)],
        affine(_TWICE, reads=(0,)),
        affine(_TWICE, reads=(1,)),
        affine(torch.add, reads=(2, 3)),
    ),
    case("functional", (4,), affine(Call(functional.linear, weight=(3, 4), bias=(3,)))),
    case("matmul", (3, 4), affine(Call(torch.matmul, other=(4, 5)))),
    case("matmul-operator", (3, 4), affine(Call(lambda x, w: x @ w, w=(4, 5)))),
    case("matmul-left", (3, 4), affine(Call(lambda x, w: w @ x, w=(2, 3)))),
    case("matmul-left-per-channel", (2, 3, 4), affine(Call(lambda x, w: w @ x, w=(2, 5, 3)))),
    case("matmul-vector", (3, 4), affine(Call(lambda x, w: x @ w, w=(4,)))),
    case("matmul-transposed", (4,), affine(Call(lambda x, weight: x @ weight.t(), weight=(3, 4)))),
    case("mm", (4,), affine(Call(torch.mm, mat2=(4, 3)))),
    case("bmm", (3, 4), affine(Call(torch.bmm, mat2=(1, 4, 2)), single=True)),
    case("addmm", (4,), affine(Call(lambda x, b, w: torch.addmm(b, x, w), b=(3,), w=(4, 3)))),
    case(
        "addmm-alpha-beta",
        (4,),
        affine(
            Call(lambda x, b, w: torch.addmm(b, x, w, beta=2.2, alpha=-0.3), b=(3,), w=(4, 3)),
        ),
    ),
    case(
        "addmm-input-is-added",
        [(3,), (4,)],
        affine(Call(lambda x, y, w: torch.addmm(x, y, w, beta=-2.7, alpha=0.4), w=(4, 3))),
    ),
    case(
        "baddbmm",
        (3, 4),
        affine(Call(lambda x, b, w: torch.baddbmm(b, x, w), b=(1, 3, 2), w=(1, 4, 2)), single=True),
    ),
    case("matmul-constant", (3, 4), affine(Call(torch.matmul, other=torch.eye(4).double() - 0.5))),
]

_RAMP = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(3, 4)
_BOOL = _RAMP > 0.3
PRODUCTS = [
    case("mul-scalar", (3, 4), affine(lambda x: x * -2.6)),
    case("mul-left", (3, 4), affine(lambda x: 3 * x), layouts=BRIEF),
    case("mul-zero", (3, 4), affine(lambda x: x * 0.0)),
    case("mul-method", (3, 4), affine(lambda x: x.mul(0.3)), layouts=BRIEF),
    case("mul-inplace", (3, 4), affine(lambda x: x.mul_(-0.7)), layouts=BRIEF),
    case("div-scalar", (3, 4), affine(lambda x: x / -7)),
    case("div-inplace", (3, 4), affine(lambda x: x.div_(3.0)), layouts=BRIEF),
    case("mul-buffer", (3, 4), affine(Call(torch.mul, other=_RAMP))),
    case(
        "mul-buffer-channel",
        (3, 4),
        affine(Call(torch.mul, other=_RAMP[:, :1].clone())),
        layouts=BRIEF,
    ),
    case("mul-closure", (3, 4), affine(lambda x: x * _RAMP), layouts=BRIEF),
    case("div-buffer", (3, 4), affine(Call(torch.div, other=_RAMP - 0.1))),
    case("mul-bool", (3, 4), affine(Call(torch.mul, other=_BOOL)), layouts=BRIEF),
    case("mul-int", (3, 4), affine(Call(torch.mul, other=_BOOL.long() * 3 - 1))),
    case("masked-fill", (3, 4), affine(lambda x: x.masked_fill(_BOOL, -2.3))),
    case("where", (3, 4), affine(lambda x: torch.where(_BOOL, x, 1.7))),
    case("mul-parameter-scalar", (3, 4), affine(Call(torch.mul, other=()))),
    case("mul-parameter-one", (3, 4), affine(Call(torch.mul, other=(1,))), layouts=BRIEF),
    case("mul-parameter-channel", (3, 4), affine(Call(torch.mul, other=(3, 1)))),
    case(
        "mul-parameter-channel-4d",
        (2, 3, 3),
        affine(Call(torch.mul, other=(1, 2, 1, 1))),
        layouts=BRIEF,
    ),
    case("mul-parameter-position", (3, 4), affine(Call(torch.mul, other=(4,))), layouts=BRIEF),
    case("mul-parameter-full", (3, 4), affine(Call(torch.mul, other=(3, 4)))),
    case("mul-parameter-left", (3, 4), affine(Call(lambda x, w: w * x, w=(3, 4))), layouts=BRIEF),
    case(
        "mul-parameter-inplace",
        (3, 4),
        affine(Call(lambda x, w: x.mul_(w), w=(3, 4))),
        layouts=BRIEF,
    ),
    case("mul-parameter-outer", (3, 1), affine(Call(lambda x, w: x * w, w=(1, 4)))),
    case("div-parameter", (3, 4), quotient(Call(lambda x, weight: x / weight, weight=(3, 1)))),
]
SUMS = [
    case("add-scalar", (3, 4), affine(lambda x: x + 1.1)),
    case("add-zero", (3, 4), affine(lambda x: x + 0), layouts=BRIEF),
    case("sub-scalar", (3, 4), affine(lambda x: x - 0.3), layouts=BRIEF),
    case("rsub-scalar", (3, 4), affine(lambda x: 1 - x)),
    case("rsub-alpha", (3, 4), affine(lambda x: torch.rsub(x, 2.3, alpha=0.1))),
    case("add-scalar-alpha", (3, 4), affine(lambda x: torch.add(x, 2.1, alpha=-3))),
    case("neg", (3, 4), affine(torch.neg)),
    case("neg-operator", (3, 4), affine(lambda x: -x), layouts=BRIEF),
    case("add-inplace", (3, 4), affine(lambda x: x.add_(-1.9)), layouts=BRIEF),
    case("sub-inplace", (3, 4), affine(lambda x: x.sub_(1.0)), layouts=BRIEF),
    case("neg-inplace", (3, 4), affine(lambda x: x.neg_()), layouts=BRIEF),
    case("add-buffer", (3, 4), affine(Call(torch.add, other=_RAMP))),
    case("add-closure", (3, 4), affine(lambda x: _RAMP + x), layouts=BRIEF),
    case(
        "add-buffer-channel",
        (3, 4),
        affine(Call(torch.add, other=_RAMP[:, :1].clone())),
        layouts=BRIEF,
    ),
    case("add-int", (3, 4), affine(Call(torch.add, other=_BOOL.long() * 2)), layouts=BRIEF),
    case("sub-buffer-alpha", (3, 4), affine(lambda x: torch.sub(x, _RAMP, alpha=2))),
    case("add-buffer-grows", (3, 1), affine(Call(torch.add, other=_RAMP)), layouts=BRIEF),
    case("add-parameter", (3, 4), affine(Call(torch.add, other=(3, 4)))),
    case("add-parameter-scalar", (3, 4), affine(Call(torch.add, other=())), layouts=BRIEF),
    case("add-parameter-channel", (3, 4, 3), affine(Call(torch.add, other=(3, 1, 1)))),
    case("add-parameter-position", (3, 4), affine(Call(torch.add, other=(1, 1, 4)))),
    case("add-parameter-left", (3, 4), affine(Call(lambda x, b: b + x, b=(3, 4))), layouts=BRIEF),
    case("add-parameter-grows", (1, 4), affine(Call(lambda x, b: x + b, b=(3, 1)))),
    case(
        "add-parameter-inplace",
        (3, 4),
        affine(Call(lambda x, b: x.add_(b), b=(3, 4))),
        layouts=BRIEF,
    ),
    case("sub-parameter", (3, 4), affine(Call(lambda x, b: x - b, b=(3, 4)))),
    case("rsub-parameter", (3, 4), affine(Call(lambda x, b: b - x, b=(3, 4)))),
    case(
        "add-parameter-alpha",
        (3, 4),
        affine(Call(lambda x, b: torch.add(x, b, alpha=-0.2), b=(3, 4))),
    ),
    case(
        "parameter-add-alpha",
        (3, 4),
        affine(Call(lambda x, b: torch.add(b, x, alpha=3), b=(3, 4))),
    ),
    case(
        "scale-and-shift",
        (3, 4),
        affine(Call(lambda x, a, b: x * a + b, a=(3, 1), b=(3, 1))),
    ),
    case("add", [(3, 4), (3, 4)], affine(torch.add)),
    case("add-broadcast", [(3, 4), (3, 1)], affine(torch.add)),
    case("add-broadcast-both", [(3, 1), (1, 4)], affine(torch.add)),
    case("add-alpha", [(3, 4), (3, 4)], affine(lambda x, y: torch.add(x, y, alpha=-0.6))),
    case("sub", [(3, 4), (3, 4)], affine(torch.sub)),
    case("sub-alpha", [(3, 4), (3, 4)], affine(lambda x, y: torch.sub(x, y, alpha=2))),
    case("rsub", [(3, 4), (3, 4)], affine(lambda x, y: torch.rsub(x, y, alpha=2))),
    case("add-inplace-two", [(3, 4), (3, 4)], affine(lambda x, y: x.add_(y, alpha=0.9))),
    case("sum-of-three", [(3, 4)] * 3, affine(lambda x, y, z: x + y - z)),
    # x + x are two paths, also x - x: what cancels in the function does not in the path-lifting.
    case("add-itself", (3, 4), affine(torch.add, reads=(0, 0))),
    case("sub-itself", (3, 4), affine(torch.sub, reads=(0, 0))),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("item", "layout"), parameters(convolutions()))
def test_convolutions(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(
    ("item", "layout"),
    parameters(
        [*LINEAR, case("transposed2d-output-size", (1, 4, 3), affine(OutputSize(1, 2, 3, 2)))]
    ),
)
def test_linear_maps(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(PRODUCTS))
def test_products_with_constants_and_parameters(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(SUMS))
def test_sums(item: Case, layout: str) -> None:
    check(item, layout)


def test_a_path_norm_of_zero_has_shares_of_zero() -> None:
    cut = case("nothing", (2, 4), affine(lambda x: x * 0), affine(nn.Conv1d(2, 2, 1, bias=False)))
    check(cut, "bare")
