"""A network whose forward pass does something unusual, and its path-norm by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath


class Net(nn.Module):
    """Two layers, and a function in between."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] | None = None, **buffers: Tensor):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.between = between
        self.kept: dict[str, Tensor] = {}
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        return self.b(hidden if self.between is None else self.between(self, hidden))


def norm(scale: float = 1.0) -> float:
    """The path-norm of the network, its hidden layer scaled: by hand."""
    net = Net().double()
    with torch.no_grad():
        hidden = net.a.weight.abs().sum(1) + net.a.bias.abs()
        return float((net.b.weight.abs() @ (scale * hidden) + net.b.bias.abs()).sum())


def refused(model: nn.Module, **options: Any) -> fxpath.Problem:
    with pytest.raises(fxpath.UnsupportedModelError) as caught:
        fxpath.path_norm(model, (3,), **options)
    assert not fxpath.check(model, (3,), **options)
    return caught.value.report.problems[0]


@functools.cache
def _traces_quantiles() -> bool:
    """Whether this torch.export follows torch.quantile, which older ones do not."""

    class Quantile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.quantile(0.5, 0)

    try:
        torch.export.export(Quantile(), (torch.ones(3),))
    except RuntimeError:
        return False
    return True


def skip_what_torch_cannot_trace(name: str) -> None:
    """Skip a test of quantiles, by name, where torch itself is what is in the way."""
    if name.startswith("quantile") and not _traces_quantiles():
        pytest.skip("torch.export of this release cannot trace torch.quantile")
