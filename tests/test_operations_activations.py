"""Activations: ReLU and its kin, slopes, clamps, identities in eval mode, extrema of tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import Call, affine, clamp, homogeneous, maximum, minimum

SHAPE = (3, 4)
BRIEF = ("spatial",)
_BOUNDS = torch.linspace(-2.0, 1.0, 12, dtype=torch.float64).reshape(SHAPE)

HOMOGENEOUS = {
    "relu": nn.ReLU(),
    "abs": torch.abs,
    "leaky": nn.LeakyReLU(),
    "leaky-steep": nn.LeakyReLU(2.6),
    "leaky-negative": nn.LeakyReLU(-0.5),
    "leaky-negative-steep": nn.LeakyReLU(-3.1),
    "prelu-one-slope": nn.PReLU(),
    "prelu-per-channel": nn.PReLU(3),
    "prelu-constant": Call(functional.prelu, weight=torch.tensor([2.0, -3.0, 0.1]).double()),
    "rrelu": nn.RReLU(),
    "rrelu-steep": nn.RReLU(1.0, 3.3),
    "dropout": nn.Dropout(0.9),
    "there-and-back": lambda x: x.float().double(),
}
# Other ways to write the same.
HOMOGENEOUS_SPELLINGS = {
    "relu-module-inplace": nn.ReLU(inplace=True),
    "relu-functional": functional.relu,
    "relu-functional-inplace": lambda x: functional.relu(x, inplace=True),
    "relu-torch": torch.relu,
    "relu-method": lambda x: x.relu(),
    "relu-method-inplace": lambda x: x.relu_(),
    "abs-builtin": abs,
    "abs-inplace": lambda x: x.abs_(),
    "leaky-zero": nn.LeakyReLU(0.0),
    "leaky-one": nn.LeakyReLU(1.0),
    "leaky-inplace": nn.LeakyReLU(1.6, inplace=True),
    "leaky-functional": lambda x: functional.leaky_relu(x, 4.1),
    "leaky-functional-inplace": lambda x: functional.leaky_relu_(x, -2.3),
    "prelu-functional": Call(functional.prelu, weight=(3,)),
    "rrelu-inplace": nn.RReLU(1.5, 2.0, inplace=True),
    "rrelu-functional": lambda x: functional.rrelu(x, 0.5, 4.0),
    "identity": nn.Identity(),
    "dropout-inplace": nn.Dropout(0.9, inplace=True),
    "dropout1d": nn.Dropout1d(0.9),
    "alpha-dropout": nn.AlphaDropout(0.9),
    "feature-alpha-dropout": nn.FeatureAlphaDropout(0.9),
    "dropout-functional": lambda x: functional.dropout(x, 0.5, training=False),
    "contiguous": lambda x: x.contiguous(),
    "clone": torch.clone,
    "detach": lambda x: x.detach(),
    "to-same-dtype": lambda x: x.to(torch.float64),
    "to-same-device": lambda x: x.to("cpu"),
    "double": lambda x: x.double(),
    "type-as": lambda x: x.type_as(x),
    "positive": lambda x: +x,
    "mul-one": lambda x: x * 1,
}
CLAMPS = {
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "hardtanh-bounds": nn.Hardtanh(-2.1, 0.3),
    "clamp": lambda x: torch.clamp(x, -2.3, 3.1),
    "clamp-relu": lambda x: x.clamp(min=0),
    "clamp-lower": lambda x: x.clamp(min=-1.6),
    "clamp-upper": lambda x: x.clamp(max=2.6),
    "clamp-negative": lambda x: x.clamp(-3.0, -1.0),
    "clamp-infinite-lower": lambda x: x.clamp(float("-inf"), 2.0),
    "clamp-infinite-upper": lambda x: x.clamp(-2.0, float("inf")),
    "clamp-tensor": lambda x: torch.clamp(x, _BOUNDS, _BOUNDS + 2.0),
    "clamp-tensor-lower": lambda x: torch.clamp(x, min=_BOUNDS[:, :1]),
    "maximum-buffer": Call(torch.maximum, other=_BOUNDS),
    "minimum-buffer": Call(torch.minimum, other=_BOUNDS),
    "maximum-broadcast": lambda x: torch.maximum(x, _BOUNDS[:, :1]),
    "maximum-zero": lambda x: torch.maximum(x, torch.zeros((), dtype=torch.float64)),
}
CLAMP_SPELLINGS = {
    "relu6-inplace": nn.ReLU6(inplace=True),
    "relu6-functional": functional.relu6,
    "hardtanh-positive": nn.Hardtanh(1.0, 3.0),
    "hardtanh-inplace": nn.Hardtanh(-1.5, 4.0, inplace=True),
    "hardtanh-functional": lambda x: functional.hardtanh(x, -0.7, 2.1),
    "hardtanh-functional-inplace": lambda x: functional.hardtanh_(x, -0.5, 2.0),
    "clamp-integers": lambda x: x.clamp(-2, 3),
    "clamp-inplace": lambda x: x.clamp_(-1.0, 2.0),
    "clamp-min": lambda x: torch.clamp_min(x, -1.7),
    "clamp-max": lambda x: torch.clamp_max(x, 1.5),
    "clamp-min-inplace": lambda x: x.clamp_min_(0.5),
    "clamp-max-inplace": lambda x: x.clamp_max_(0.5),
    "clip": lambda x: torch.clip(x, -0.3, 1.2),
    "max-buffer": Call(torch.max, other=_BOUNDS),
    "maximum-left": lambda x: torch.maximum(_BOUNDS, x),
    "maximum-tensor": lambda x: torch.maximum(x, torch.tensor(-2.2, dtype=torch.float64)),
    "minimum-zeros-like": lambda x: torch.minimum(x, torch.zeros_like(x)),
}
_TWO = [SHAPE, SHAPE]
EXTREMA = [
    case("maximum", _TWO, maximum(torch.maximum)),
    case("minimum", _TWO, minimum(torch.minimum)),
    case("max-of-two", _TWO, maximum(torch.max)),
    case("min-of-two", _TWO, minimum(torch.min)),
    case("max-method", _TWO, maximum(lambda x, y: x.max(y))),
    case("clamp-by-an-activation", _TWO, minimum(lambda x, y: x.clamp(max=y))),
    case("fmax", _TWO, maximum(torch.fmax)),
    case("maximum-broadcast", [SHAPE, (3, 1)], maximum(torch.maximum)),
    case("maximum-broadcast-both", [(3, 1), (1, 4)], maximum(torch.maximum)),
    case("minimum-broadcast", [(4,), SHAPE], minimum(lambda x, y: torch.minimum(x[:, None], y))),
    case("maximum-of-three", [SHAPE] * 3, maximum(lambda x, y, z: x.maximum(y).maximum(z))),
    # Paths are counted, not values: the maximum of x and x has two.
    case("maximum-itself", SHAPE, maximum(torch.maximum, reads=(0, 0))),
    case(
        "maxout", SHAPE, affine(nn.Linear(4, 6)), maximum(lambda x: x.unflatten(2, (3, 2)).amax(3))
    ),
]
MORE = [
    *(case(name, SHAPE, homogeneous(op)) for name, op in HOMOGENEOUS.items()),
    case("threshold-zero", SHAPE, homogeneous(nn.Threshold(0.0, 0.0))),
    *(case(name, SHAPE, clamp(op)) for name, op in CLAMPS.items()),
    *(
        case(name, SHAPE, homogeneous(op), layouts=BRIEF)
        for name, op in HOMOGENEOUS_SPELLINGS.items()
    ),
    *(case(name, SHAPE, clamp(op), layouts=BRIEF) for name, op in CLAMP_SPELLINGS.items()),
    case("relu-flat", (5,), homogeneous(nn.ReLU())),
    case("relu-3d", (2, 3, 2, 2), homogeneous(nn.ReLU())),
    case("prelu-flat", (5,), homogeneous(nn.PReLU(5))),
    case("prelu-2d", (2, 3, 4), homogeneous(nn.PReLU(2))),
    case("prelu-3d", (2, 2, 3, 2), homogeneous(nn.PReLU(2))),
    case("relu6-3d", (2, 2, 3, 2), clamp(nn.ReLU6())),
    case("dropout2d", (2, 3, 4), homogeneous(nn.Dropout2d(0.9))),
    case("dropout3d", (2, 2, 3, 2), homogeneous(nn.Dropout3d(0.9))),
    case("relu6-twice", SHAPE, clamp(nn.ReLU6()), clamp(nn.ReLU6())),
    case("relu6-at-the-input", SHAPE, clamp(nn.ReLU6()), layouts=("bare",)),
    case("relu-at-the-input", SHAPE, homogeneous(nn.ReLU()), layouts=("bare",)),
    case("leaky-at-the-input", SHAPE, homogeneous(nn.LeakyReLU(3.0)), layouts=("bare",)),
    case("maximum-at-the-input", _TWO, maximum(torch.maximum), layouts=("bare",)),
]


@pytest.mark.parametrize(("item", "layout"), parameters(MORE))
def test_activations(item: Case, layout: str) -> None:
    check(item, layout)


@pytest.mark.parametrize(("item", "layout"), parameters(EXTREMA))
def test_extrema_of_tensors(item: Case, layout: str) -> None:
    check(item, layout)
