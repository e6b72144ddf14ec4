"""Models compiled with fxpath as the backend, for the tests of what it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break

import fxpath
from fxpath.toolchain.backend import Part
from fxpath_backend import fxpath as backend


class Block(nn.Module):
    def __init__(self, channels: int, breaks: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.breaks:
            graph_break()
        return F.relu(self.norm(x))


class Net(nn.Module):
    """Two graph breaks if ``breaks``: one in a block, deep inside, one before the head."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(2, False), Block(4, breaks))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.body(x).mean((2, 3)))
        if self.breaks:
            graph_break()
        return self.head(x)


SHAPE = (3, 2, 5, 5)


def seen(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, list[Part]]:
    """What a model compiled with fxpath gives, and the parts that it was compiled in."""
    parts: list[Part] = []
    options = {"inner": "eager", "callback": parts.append, **options}
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, options=options)
    return compiled(*args), parts


def analysed(part: Part) -> fxpath.Analysis:
    assert part.analysis is not None, part
    return part.analysis


def whole(model: nn.Module, *inputs: Tensor) -> fxpath.Analysis:
    return fxpath.analyze(model, example_inputs=inputs, batch_dim=None)
