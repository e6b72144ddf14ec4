"""A function as a module, and the comparison of two results of the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.oracles.reference import Reference


class Wrapped(nn.Module):
    """A function of activations between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def close(actual: Reference, expected: Reference, rtol: float = 1e-12) -> None:
    assert actual.path_norm == pytest.approx(expected.path_norm, rel=rtol)
    assert actual.scores.keys() == expected.scores.keys()
    for name, share in expected.scores.items():
        torch.testing.assert_close(actual.scores[name], share, rtol=rtol, atol=rtol)
