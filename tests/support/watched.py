"""A small network in training, and what a callback should have said of it, from saved weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.plugins.monitor import LOWER, NORM, UPPER

SHAPE = (3, 6, 6)

State = Mapping[str, Tensor]


class Watched(nn.Module):
    """Batch norm and dropout, which tell whether anybody touched modes or random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def examples() -> tuple[Tensor, Tensor]:
    """Eight images with their classes."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, *SHAPE, generator=generator), torch.arange(8) % 2


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_said(found: Mapping[str, float], now: State, reference: State) -> None:
    """Numbers are those of the verbs, for copies of the weights."""
    model, other = Watched(), Watched()
    model.load_state_dict(reference)
    other.load_state_dict(now)
    metric = fxpath.path_metric(model, now, SHAPE)
    before, after = metric.path_norm, metric.other_path_norm
    assert found[NORM] == fxpath.analyze(other, SHAPE).log10_path_norm
    assert found[NORM] == pytest.approx(math.log10(after), abs=1e-5)
    assert found[LOWER] == pytest.approx(abs(after / before - 1), rel=1e-6, abs=1e-12)
    assert found[UPPER] == pytest.approx(metric.bound("m") / before)
    assert found[LOWER] <= metric.relative_upper and metric.relative_lower <= found[UPPER]
