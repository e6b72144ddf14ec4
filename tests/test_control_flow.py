"""Control flow that depends on the data is refused."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import fxpath


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.kind == "if":
            return y if y.sum() > 0 else -2 * y
        if self.kind == "while":
            while y.abs().max() > 1:
                y = y / 2
            return y
        if self.kind == "item":
            return y * float(y.max())
        if self.kind == "mask":
            return y[y > 0]
        return y[: int(y.sum().abs()) + 1]


@pytest.mark.parametrize("kind", ["if", "while", "item", "mask", "slice"])
def test_data_dependent_control_flow(kind: str) -> None:
    model = Branching(kind)
    report = fxpath.check(model, (3,))
    assert not report
    assert report.problems and all(p.reason and p.remedy for p in report.problems)
    with pytest.raises(fxpath.UnsupportedModelError):
        fxpath.analyze(model, (3,))
