"""A batch norm is folded through identities, and through nothing else; values worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxpath

Between = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """y = BN(between(w x + b)) with w = 1, b = 2 and mean 2.5: as folded, the bias is -0.5."""

    def __init__(self, between: Between, read_twice: bool = False) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.25)
        nn.init.ones_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 2.0)
        nn.init.constant_(self.norm.get_buffer("running_mean"), 2.5)
        nn.init.constant_(self.norm.get_buffer("running_var"), 0.75)
        self.between, self.read_twice = between, read_twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.linear(x))
        return torch.cat([self.norm(x), x], 1) if self.read_twice else self.norm(x)


FOLDED = 1.0 + 0.5  # |w| + |b - mean|
APART = 1.0 + 2.0 + 2.5  # |w| + |b| + |mean|


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x,
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        nn.Identity(),
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.view(-1, 1),
        lambda x: x.to(x.dtype, copy=True),
        lambda x: nn.functional.dropout(x.clone(), 0.3, False).reshape(1, 1).clone(),
        lambda x: nn.functional.dropout(x, 0.0, True),
    ],
)
def test_identities_are_transparent(between: Between) -> None:
    assert fxpath.path_norm(Net(between), (1,), dtype=torch.float64) == pytest.approx(FOLDED)


@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), torch.neg, lambda x: x * 1.0, lambda x: x.flip(0), lambda x: x + 0],
)
def test_what_is_no_identity_is_not_folded(between: Between) -> None:
    assert fxpath.path_norm(Net(between), (1,), dtype=torch.float64) == pytest.approx(APART)


@pytest.mark.parametrize("between", [lambda x: x, nn.Dropout(0.5)])
def test_what_something_else_reads_is_not_folded(between: Between) -> None:
    norm = fxpath.path_norm(Net(between, read_twice=True), (1,), dtype=torch.float64)
    assert norm == pytest.approx(APART + 1.0 + 2.0)


def test_a_reshape_that_moves_the_channels_is_not_folded() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(2, 4), nn.BatchNorm1d(2, eps=0.25)
            nn.init.constant_(self.norm.get_buffer("running_mean"), 0.5)
            nn.init.constant_(self.norm.get_buffer("running_var"), 0.75)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x).view(-1, 2, 2))

    model = Turned()
    weight, bias = model.linear.weight.detach(), model.linear.bias.detach()
    expected = float(weight.abs().sum() + bias.abs().sum()) + 4 * 0.5
    assert fxpath.path_norm(model, (2,)) == pytest.approx(expected)


def test_hard_coded_dropout_is_still_refused() -> None:
    report = fxpath.check(Net(lambda x: nn.functional.dropout(x, 0.5, True)), (1,))
    assert [problem.operation for problem in report.problems] == ["aten.dropout.default"]


class Late(nn.Module):
    """A norm whose gamma is computed behind the map that it is folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.root = nn.Linear(1, 1), nn.Parameter(torch.tensor([3.0]))
        self.register_buffer("mean", torch.tensor([2.5]))
        self.register_buffer("var", torch.tensor([1.875]))
        nn.init.ones_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return nn.functional.batch_norm(x, self.mean, self.var * 2, self.root**2, None, eps=0.25)


def test_a_factor_that_is_computed_behind_the_map_is_folded() -> None:
    # 9 / 2 (x + 2 - 2.5)
    assert fxpath.path_norm(Late().eval(), (1,)) == pytest.approx(4.5 * FOLDED)
