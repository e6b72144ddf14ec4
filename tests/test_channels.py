"""Channels are removed for real: the smaller model is the one whose weights are zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from fxpath.model import Given
from fxpath.pruning.importance import channel_importance
from fxpath.pruning.removal import Network
from fxpath.pruning.units import find_units
from tests.support.channels import Gains, Residual, Shape, check, made


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(10, 4, 3, padding=1), nn.PReLU(4), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.last(torch.cat([self.up(self.low(F.max_pool2d(x, 2))), x], 1))


class Dense(nn.Module):
    """Batch norms before the ReLU, over concatenated channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return self.conv2(F.relu(self.norm2(x)))


class Grouped(nn.Module):
    """A grouped convolution in a residual stream, read by one with another number of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 1, groups=2)
        self.mid = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.up(F.relu(x + self.mid(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.first(x))))))
        return F.linear(x, self.first.weight.t(), self.bias)


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8))
        self.w = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.v + self.b) @ self.w


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "residual": (Residual, (3, 6, 6)),
    "gains": (Gains, (3, 5, 5)),
    "unet": (UNet, (3, 4, 4)),
    "dense": (Dense, (3, 4, 4)),
    "grouped": (Grouped, (4, 4, 4)),
    "tied": (Tied, (4,)),
    "matrices": (Matrices, (5,)),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, 12, 3, groups=6),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 6, 1, groups=6),
            nn.Conv2d(6, 2, 1),
        ),
        (3, 5, 5),
    ),
    "1-d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3),
            nn.PReLU(6),
            nn.ConvTranspose1d(6, 4, 3),
            nn.ReLU(),
            nn.Conv1d(4, 1, 1),
        ),
        (2, 7),
    ),
    "3-d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 6, 3),
            nn.BatchNorm3d(6),
            nn.LeakyReLU(),
            nn.MaxPool3d(2),
            nn.Flatten(),
            nn.Linear(48, 4),
            nn.PReLU(4),
            nn.Linear(4, 2),
        ),
        (1, 6, 6, 6),
    ),
    "pixels": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 3)
        ),
        (3, 5, 5),
    ),
    "no scales": (
        lambda: nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 2)
        ),
        (3,),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_smaller_is_the_zeroed_model(name: str) -> None:
    make, shape = NETS[name]
    model = made(make())
    before = copy.deepcopy(model.state_dict())
    result = fxpath.prune_channels(model, 0.5, shape)
    removed, removable = result.channels
    assert 0.25 * removable < removed <= round(0.5 * removable)
    assert removed == sum(row["before"] - row["after"] for row in result.layers)
    assert result.parameters[1] < result.parameters[0] and result.macs[1] < result.macs[0]
    check(model, shape, result)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What modules say about themselves is what they are: a new one of that form holds the tensors.
    for module in result.model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            again = copy.deepcopy(module)
            again.reset_parameters()
            kernel = (
                (module.out_features, module.in_features)
                if isinstance(module, nn.Linear)
                else (module.out_channels, module.in_channels // module.groups)
                if isinstance(module, nn.Conv2d)
                else (module.in_channels, module.out_channels // module.groups)
            )
            assert again.weight.shape[:2] == kernel


@pytest.mark.parametrize("name", ["residual", "dense", "grouped", "depthwise", "tied"])
def test_importance_bounds_what_is_lost(name: str) -> None:
    make, shape = NETS[name]
    model = made(make())
    network = Network(model, Given(shape))
    importance = channel_importance(network.found, network.program.scores())
    units, _ = find_units(network.found, importance, network.found.kept)
    assert len(units) > 3
    for unit in units[:: len(units) // 2]:
        metric = network.metric(unit.channels)
        assert metric.exact
        assert metric.relative_upper <= unit.importance * (1 + 1e-9)
        assert network.lost(unit.channels) == pytest.approx(metric.relative, rel=1e-6)


def test_importance_is_what_is_lost_where_nothing_comes_back() -> None:
    model = made(
        nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 6, 3, groups=3),
            nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1, groups=3), nn.Conv2d(3, 2, 1),
        )
    )  # fmt: skip
    network = Network(model, Given((3, 3, 3)))
    importance = channel_importance(network.found, network.program.scores())
    units, _ = find_units(network.found, importance, network.found.kept)
    assert len(units) == 3
    for unit in units:
        lost = network.metric(unit.channels).relative
        assert lost == pytest.approx(unit.importance, rel=1e-8)


def test_grouped_convolutions_lose_as_much_in_each_group() -> None:
    model = made(Grouped())
    result = fxpath.prune_channels(model, 0.5, (4, 4, 4))
    mid = result.model.get_submodule("mid")
    assert isinstance(mid, nn.Conv2d)
    assert mid.groups == 4 and mid.out_channels == mid.in_channels and mid.out_channels % 4 == 0
    # Within each group the least important go.
    network = Network(model, Given((4, 4, 4)))
    importance = channel_importance(network.found, network.program.scores())
    gone = result.plan.tensors["up.weight"].within
    for outputs, positions in zip(network.found.grouped["up.weight"][0].outputs, gone, strict=True):
        lowest = importance[outputs].argsort()[: len(positions)]
        assert sorted(lowest.tolist()) == list(positions)
