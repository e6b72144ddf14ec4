"""ReLU networks along a sequence: the same as written out step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from tests.support.nets import randomize

SHAPE = (4, 3)  # steps and features of one sample


class Recurrent(nn.Module):
    """nn.RNN, or the same network written out; an initial state may be a parameter."""

    def __init__(self, written_out: bool, start: bool, final: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 2, nonlinearity="relu", **options)
        self.head = nn.Linear(2 if final else 2 * (1 + self.rnn.bidirectional), 2)
        states = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        self.start = nn.Parameter(torch.zeros(states, 1, 2)) if start else None
        self.written_out, self.final = written_out, final

    def forward(self, x: Tensor) -> Tensor:
        """Features at all steps, or the final states."""
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        y, h = self._steps(x) if self.written_out else self.rnn(x, self.start)
        return self.head(h if self.final else y)

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rnn = self.rnn
        seen = list(x.unbind(1 if rnn.batch_first else 0))
        finals = []
        for layer in range(rnn.num_layers):
            directions = []
            for direction in range(1 + rnn.bidirectional):
                ending = f"l{layer}" + "_reverse" * direction
                state = None if self.start is None else self.start[len(finals)]
                states = []
                for value in reversed(seen) if direction else seen:
                    bias = getattr(rnn, f"bias_ih_{ending}", None)
                    new = nn.functional.linear(value, getattr(rnn, f"weight_ih_{ending}"), bias)
                    if state is not None:
                        new = new + state @ getattr(rnn, f"weight_hh_{ending}").T
                    if rnn.bias:
                        new = new + getattr(rnn, f"bias_hh_{ending}")
                    state = new.relu()
                    states.append(state)
                finals.append(state)
                directions.append(states[::-1] if direction else states)
            seen = [torch.cat(pair, 1) for pair in zip(*directions, strict=True)]
        return torch.stack(seen, 1 if rnn.batch_first else 0), torch.stack(finals)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "two-layers-both-ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("start", [False, True])
def test_rnn_is_its_unrolled_network(name: str, start: bool) -> None:
    for final in (False, True):
        pair = [Recurrent(written, start, final, **OPTIONS[name]) for written in (False, True)]
        for model in pair:
            randomize(model.double(), weights=True)
        x = torch.randn(1, *SHAPE, dtype=torch.float64)
        torch.testing.assert_close(pair[0](x), pair[1](x))
        found, wanted = (fxpath.analyze(model, SHAPE) for model in pair)
        assert found.path_norm == pytest.approx(wanted.path_norm, rel=1e-12)
        names = dict(pair[0].named_parameters())
        for key in names:  # W_hh h_0 is one weight for each state: named apart, after h_0
            torch.testing.assert_close(found.scores.get(key), wanted.scores.get(key))
        assert {key.partition(":")[0] for key in found.scores} <= names.keys()
    two = [fxpath.path_norm(model, SHAPE, q=2, reduce=False) for model in pair]
    assert two[0] == pytest.approx(two[1], rel=1e-12)


class Cells(nn.Module):
    """Three steps of a cell, from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 2, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The last state."""
        state = None
        for value in x.unbind(1):
            state = self.cell(value, state)
        return state


def test_cells_are_an_rnn() -> None:
    cells, rnn = Cells().double(), Recurrent(False, False, True, batch_first=True).double()
    randomize(cells, weights=True)
    with torch.no_grad():
        for name, parameter in cells.cell.named_parameters():
            getattr(rnn.rnn, f"{name}_l0").copy_(parameter)
        rnn.head.weight.copy_(torch.eye(2))
        rnn.head.bias.zero_()
    assert fxpath.path_norm(cells, SHAPE) == pytest.approx(fxpath.path_norm(rnn, SHAPE), rel=1e-12)
    assert set(fxpath.analyze(cells, SHAPE).scores) == {
        f"cell.{name}" for name, _ in cells.cell.named_parameters()
    }


@pytest.mark.parametrize(
    "kind", [lambda: nn.RNN(3, 2), lambda: nn.LSTM(3, 2), lambda: nn.GRU(3, 2)]
)
def test_gates_are_refused_by_name(kind: Any) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    with pytest.raises(fxpath.UnsupportedModelError, match="not piecewise linear") as refused:
        fxpath.path_norm(First(), SHAPE)
    (problem,) = refused.value.report.problems
    assert problem.module_path == "rnn" and problem.operation.startswith("aten.")
