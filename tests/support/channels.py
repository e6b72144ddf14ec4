"""Networks whose channels are removed, and the check of a removal."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from tests.support.nets import randomize

Shape = tuple[int, ...]


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    """A float64 model in eval mode with random statistics and biases."""
    randomize(model, seed)
    return model.double().eval()


def run(model: nn.Module, shape: Shape) -> Tensor:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def zeroed(model: nn.Module, plan: fxpath.Plan) -> nn.Module:
    """The model with zeros wherever the plan cuts, made from the plan's plain data."""
    masked = copy.deepcopy(model)
    named = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, cut in plan.to_dict()["tensors"].items():
            tensor = named[name]
            for axis, positions in cut["remove"].items():
                tensor.movedim(int(axis), 0)[positions] = 0
            parts = cut.get("within", [])
            for i, positions in enumerate(parts):
                each = len(tensor) // len(parts)
                tensor[i * each : (i + 1) * each, positions] = 0
    return masked


def check(model: nn.Module, shape: Shape, result: fxpath.PrunedChannels) -> None:
    """One function with the zeroed model, and a certificate that path-norms confirm."""
    masked = zeroed(model, result.plan)
    torch.testing.assert_close(run(result.model, shape), run(masked, shape), rtol=1e-9, atol=1e-12)
    assert result.certificate.exact
    left = fxpath.path_norm(result.model, shape, dtype=torch.float64)
    lost = result.certificate.path_norm - left
    if any(isinstance(m, (nn.ReLU6, Gains)) for m in model.modules()):
        # The bounds of a clamp are neurons of their own, which stay in the masked model.
        assert 0 < (result.certificate.value or 0) <= lost * (1 + 1e-12)
    else:
        assert result.certificate.value == pytest.approx(lost, rel=1e-8)
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, result.model)]
    assert result.parameters == tuple(counts)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.norm(self.conv(x))))


class Gains(nn.Module):
    """Parameters and buffers of no module, with an axis for the channels."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.list = nn.ParameterList([nn.Parameter(torch.rand(8))])
        self.register_buffer("mask", torch.rand(8) + 0.5)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x) * self.gain + self.offset) * self.mask[None, :, None, None]
        return self.head(F.hardtanh(x, -0.5, 2.0) * self.list[0][:, None, None])


class Wide(nn.Linear):
    """A type of its own."""


def small() -> nn.Module:
    """Layers `down.0`, `low.0`, `up` (of another type) and `head`."""
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = nn.Sequential()
    model.add_module("down", body)
    model.add_module("low", nn.Sequential(nn.Linear(8, 8), nn.PReLU(8)))
    model.add_module("up", Wide(8, 6))
    model.add_module("head", nn.Linear(6, 2))
    return made(model)
