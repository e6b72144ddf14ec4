"""A network to prune, and what a mask cuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxpath
from tests.support.nets import randomize

SHAPE = (3, 9, 9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return randomize(model, 0)


def cut_entries(pruned: fxpath.Pruned) -> set[tuple[str, int]]:
    return entries_of(pruned.masks)


def entries_of(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {
        (name, place)
        for name, mask in masks.items()
        for place in (~mask).flatten().nonzero()[:, 0].tolist()
    }
