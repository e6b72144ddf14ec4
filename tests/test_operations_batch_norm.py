"""Batch norm: folded into the map that it alone reads, an identity neuron everywhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracles.blackbox import Case, case, check, parameters
from tests.oracles.steps import Step, affine, batch_norm, homogeneous

CONV = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
NORM = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
SIZES = [(6,), (4, 5), (3, 3, 4)]


def folded(linear_map: nn.Module, norm: nn.Module, reads: tuple[int, ...] | None = None) -> Step:
    """One affine step: only the weight is a parameter, the norm's bias owns the constant."""
    step = nn.Sequential(linear_map, norm)
    return affine(step, reads, names=("0.weight",), folded_bias="1.bias")


class FunctionalNorm(nn.Module):
    """Frozen batch norm by a function call, with or without scale and shift."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return functional.batch_norm(x, *statistics, self.weight, self.bias, eps=0.1)


def per_dimension() -> Iterator[Case]:
    """The same for sequences, images and volumes; the less usual for images only."""
    rare = ("-eps", "-groups", "-plain", "-circular", "-functional", "-depthwise", "-no-bias")
    for item in all_dimensions():
        if "2d" in item.id or not item.id.endswith(rare):
            yield item


def all_dimensions() -> Iterator[Case]:
    for dim, size in enumerate(SIZES, start=1):
        make, transposed, norm = CONV[dim - 1], TRANSPOSED[dim - 1], NORM[dim - 1]
        shape = (2, *size)
        yield case(f"conv{dim}d", shape, folded(make(2, 3, 2), norm(3)))
        yield case(f"conv{dim}d-no-bias", shape, folded(make(2, 3, 2, bias=False), norm(3)))
        yield case(f"conv{dim}d-not-affine", shape, folded(make(2, 3, 2), norm(3, affine=False)))
        yield case(f"conv{dim}d-eps", shape, folded(make(2, 3, 2), norm(3, eps=0.5)))
        yield case(
            f"conv{dim}d-strided-padded",
            shape,
            folded(make(2, 2, 2, stride=2, padding=1), norm(2)),
        )
        yield case(f"conv{dim}d-depthwise", shape, folded(make(2, 4, 2, groups=2), norm(4)))
        yield case(
            f"conv{dim}d-circular",
            shape,
            folded(make(2, 2, 2, padding=1, padding_mode="circular"), norm(2)),
        )
        yield case(
            f"transposed{dim}d", shape, folded(transposed(2, 3, 2, stride=2, padding=1), norm(3))
        )
        yield case(
            f"transposed{dim}d-groups", shape, folded(transposed(2, 4, 2, groups=2), norm(4))
        )
        yield case(f"conv{dim}d-functional", shape, folded(make(2, 3, 2), FunctionalNorm(3, True)))
        yield case(
            f"conv{dim}d-functional-plain", shape, folded(make(2, 3, 2), FunctionalNorm(3, False))
        )
        yield case(f"after-relu-{dim}d", shape, homogeneous(nn.ReLU()), batch_norm(norm(2)))
        yield case(
            f"after-relu-not-affine-{dim}d",
            shape,
            homogeneous(nn.ReLU()),
            batch_norm(norm(2, affine=False)),
        )
        yield case(
            f"between-relus-{dim}d",
            shape,
            homogeneous(nn.ReLU()),
            batch_norm(norm(2)),
            homogeneous(nn.ReLU()),
        )
        yield case(f"at-the-input-{dim}d", shape, batch_norm(norm(2)), layouts=("bare",))
        yield case(
            f"before-conv-{dim}d",
            shape,
            homogeneous(nn.ReLU()),
            batch_norm(norm(2)),
            affine(make(2, 3, 2, padding=1)),
        )


_SHARED = nn.Conv2d(2, 3, 3, padding=1)
_SHARED_NORM = nn.BatchNorm2d(2)
SPECIAL = [
    case("linear", (5,), folded(nn.Linear(5, 4), nn.BatchNorm1d(4))),
    case("linear-no-bias", (5,), folded(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4))),
    case("linear-not-affine", (5,), folded(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False))),
    # The norm's channels are axis 1, the map's outputs the last axis: nothing to fold, also where
    # the sizes happen to agree.
    case("linear-other-axis", (3, 5), affine(nn.Linear(5, 4)), batch_norm(nn.BatchNorm1d(3))),
    case("linear-equal-sizes", (4, 5), affine(nn.Linear(5, 4)), batch_norm(nn.BatchNorm1d(4))),
    # Somebody else reads the convolution, too.
    case(
        "read-twice",
        (2, 4, 5),
        affine(nn.Conv2d(2, 3, 2), reads=(0,)),
        batch_norm(nn.BatchNorm2d(3), reads=(1,)),
        affine(torch.add, reads=(2, 1)),
    ),
    case(
        "read-by-two-norms",
        (2, 4, 5),
        affine(nn.Conv2d(2, 3, 2), reads=(0,)),
        batch_norm(nn.BatchNorm2d(3), reads=(1,)),
        batch_norm(nn.BatchNorm2d(3), reads=(1,)),
        affine(torch.add, reads=(2, 3)),
    ),
    case(
        "also-an-output",
        (2, 4, 5),
        affine(nn.Conv2d(2, 3, 2), reads=(0,)),
        batch_norm(nn.BatchNorm2d(3), reads=(1,)),
        affine(lambda x, y: (x, y), reads=(1, 2)),
    ),
    # One weight, two batch norms: two effective weights, and the sum of both shares.
    case(
        "conv-with-two-norms",
        [(2, 4, 5), (2, 4, 5)],
        folded(_SHARED, nn.BatchNorm2d(3), reads=(0,)),
        folded(_SHARED, nn.BatchNorm2d(3), reads=(1,)),
        affine(torch.add, reads=(2, 3)),
    ),
    case(
        "conv-with-two-norms-same-input",
        (2, 4, 5),
        folded(_SHARED, nn.BatchNorm2d(3), reads=(0,)),
        folded(_SHARED, nn.BatchNorm2d(3), reads=(0,)),
        affine(torch.add, reads=(1, 2)),
    ),
    case(
        "conv-once-with-norm-once-without",
        [(2, 4, 5), (2, 4, 5)],
        folded(_SHARED, nn.BatchNorm2d(3), reads=(0,)),
        affine(_SHARED, reads=(1,)),
        affine(torch.add, reads=(2, 3)),
    ),
    case(
        "norm-shared-by-two-convs",
        (2, 4, 5),
        folded(nn.Conv2d(2, 2, 3, padding=1), _SHARED_NORM),
        homogeneous(nn.ReLU()),
        folded(nn.Conv2d(2, 2, 3, padding=1), _SHARED_NORM),
    ),
    # A permutation between the two: the norm does not read the convolution's output.
    case(
        "permuted-channels",
        (2, 4, 5),
        affine(nn.Conv2d(2, 4, 1)),
        affine(lambda x: x.transpose(1, 2)),
        batch_norm(nn.BatchNorm2d(4)),
    ),
    case(
        "sum-before-norm",
        [(2, 4, 5), (2, 4, 5)],
        affine(nn.Conv2d(2, 3, 2), reads=(0,)),
        affine(nn.Conv2d(2, 3, 2), reads=(1,)),
        affine(torch.add, reads=(2, 3)),
        batch_norm(nn.BatchNorm2d(3)),
    ),
]


@pytest.mark.parametrize(("item", "layout"), parameters([*per_dimension(), *SPECIAL]))
def test_batch_norm(item: Case, layout: str) -> None:
    check(item, layout)
