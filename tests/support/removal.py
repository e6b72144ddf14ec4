"""Dead channels that are put into a network, and the check of their removal."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from tests.support.channels import Shape, run


def zero(tensor: Tensor, places: Sequence[int], axis: int = 0) -> None:
    tensor.data.movedim(axis, 0)[list(places)] = 0


def check(model: nn.Module, shape: Shape, removed: int) -> fxpath.PrunedChannels:
    """So many output channels are gone, and no output tells."""
    before = copy.deepcopy(model.state_dict())
    expected = run(model, shape)
    result = fxpath.remove_dead(model, shape)
    torch.testing.assert_close(run(result.model, shape), expected, rtol=1e-9, atol=1e-12)
    assert result.certificate.value == 0
    assert result.channels[0] == removed
    assert sum(row["before"] - row["after"] for row in result.layers) == removed
    assert result.channels[1] == removed + sum(row["channels"] for row in result.kept)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    replayed = fxpath.apply_plan(model, fxpath.Plan.from_json(result.plan.to_json()))
    for name, value in replayed.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])
    return result


def left(result: fxpath.PrunedChannels) -> dict[str, int]:
    return {row["name"]: row["after"] for row in result.layers}


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


class Depthwise(nn.Module):
    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=padding, groups=6, bias=False)
        self.norm2, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm1(self.first(x)))
        return self.last(F.relu6(self.norm2(self.deep(x))))


class Cat(nn.Module):
    """Batch norms before the ReLU, over concatenated channels."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 3, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return self.conv2(F.relu(self.norm2(x)))
