"""Programs that tests export, and what their results have to be."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxpath
from tests.support.changes import lenet
from tests.support.nets import randomize


class Convolutions(nn.Module):
    """Strides, groups, dilation and transposed ones, and a matrix that two things read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.apart = nn.Conv2d(4, 4, (2, 3), groups=2, dilation=(1, 2), padding=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.slope, self.head = nn.PReLU(2), nn.Linear(2, 2)
        self.register_buffer("steps", torch.ones(2))  # a name that the program could want itself

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.apart(self.norm(self.first(x)).relu()).relu())
        y = nn.functional.avg_pool2d(self.slope(y), 2) * self.steps.reshape(2, 1, 1)
        return self.head(self.head(y.mean((2, 3))).relu())


def small() -> nn.Sequential:
    """Biases of three and of two numbers, and what is folded."""
    body = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 2))


class Joined(nn.Module):
    """Channels that are joined and taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        first, second, _ = y.split([2, 2, 1], 1)
        return self.head((first + second).amax((2, 3)))


class Picked(nn.Module):
    """A weight whose entries are read by a list of positions, some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("index", torch.tensor([2, 0, 2, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[:, self.index])


NETS: dict[str, Any] = {
    "picked": (Picked, (4,), True),
    "joined": (Joined, (2, 4, 4), True),
    "small": (small, (1, 6, 6), True),
    "lenet": (lenet, (1, 14, 14), True),
    "convolutions": (Convolutions, (2, 8, 7), False),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, fxpath.PathProgram]:
    make, shape, reduced = NETS[name]
    model = randomize(make(), weights=True).eval().to(dtype)
    return model, fxpath.compile(model, shape, backend="eager", reduce=reduced)


@functools.cache
def shared(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, fxpath.PathProgram, ExportedProgram]:
    """A model that nothing changes, its program, and that exported."""
    model, program = made(name, dtype)
    return model, program, program.exported()


def agrees(found: Any, program: fxpath.PathProgram, near: float = 1e-5) -> None:
    """Norm and scores are those of the program."""
    expected = program.evaluate(scores=True)
    assert expected.path_norm > 0
    norm = math.ldexp(float(found["mantissa"]), int(found["exponent"]))
    assert norm == pytest.approx(expected.path_norm, rel=near)
    assert found.keys() == {"mantissa", "exponent", "mass", "scores"}
    assert found["scores"].keys() == expected.shares.keys()
    for name, share in expected.shares.items():
        got = torch.as_tensor(found["scores"][name])
        assert got.dtype == share.dtype
        torch.testing.assert_close(got, share, rtol=0, atol=near * float(share.max()))
