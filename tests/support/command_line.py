"""A module of small nets for the command line, and a command that must fail."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fxpath_command import main

NETS = """
import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def with_head():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(1), nn.Sigmoid())


def huge():
    layers = [nn.Linear(4, 4) for _ in range(24)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1e30)
    return nn.Sequential(*layers)


def branching():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    return Branching(4, 4)


def two_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    return Two()


def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x, *, y):
            return self.a(x) + self.b(y)

    return Two()


def pooled():
    return nn.Sequential(
        nn.Conv2d(3, 2, 7, stride=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )


def pooled_head():
    return nn.Sequential(*pooled(), nn.Sigmoid())


def shapeless():
    return nn.Conv2d(3, 4, 3)


def broken():
    raise OSError("no such data set\\nanywhere")


number = 3
instance = mlp()
"""


def seeded_mlp(nets: Path) -> nn.Module:
    """The net that `fxpath analyze some_nets:mlp` builds."""
    import some_nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    return some_nets.mlp()


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on standard error of a command that must fail."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"fxpath: error: [^\n]+\n", err), err
    return err
