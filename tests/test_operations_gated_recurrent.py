"""LSTM, GRU and tanh networks along a sequence, against path mass and values written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.graph.realization import realization
from fxpath.model import Given
from fxpath.passes import take_in
from tests.support.nets import randomize

SHAPE = (3, 3)  # steps and features of one sample


class Recurrent(nn.Module):
    """A recurrent network, a linear map of all its states; the first states may be parameters."""

    def __init__(self, kind: Any, start: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 2, **options)
        directions = 1 + self.rnn.bidirectional
        width = self.rnn.proj_size or 2
        self.steps, self.last = nn.Linear(width * directions, 2), nn.Linear(width, 1)
        states = self.rnn.num_layers * directions
        self.start = nn.Parameter(torch.empty(states, 1, width)) if start else None
        memory = start and kind is nn.LSTM
        self.memory = nn.Parameter(torch.empty(states, 1, 2)) if memory else None
        self.double().eval()
        randomize(self, weights=True)
        with torch.no_grad():
            for tensor in (self.start, self.memory):
                if tensor is not None:
                    tensor.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What comes of the states of all steps, and of the final ones."""
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        start = self.start if self.memory is None else (self.start, self.memory)
        y, state = self.rnn(x, start)
        return self.steps(y), self.last(state[0] if isinstance(state, tuple) else state)


def masses(model: Recurrent) -> tuple[Tensor, dict[str, Tensor]]:
    """Path mass step by step, gates left out, and what it is differentiated by."""
    leaves = {k: p.detach().abs().requires_grad_() for k, p in model.named_parameters()}
    rnn, hidden = model.rnn, 2
    row = {"LSTM": slice(2 * hidden, 3 * hidden), "GRU": slice(2 * hidden, 3 * hidden)}
    rows = row.get(type(rnn).__name__, slice(0, hidden))
    adds_up = not isinstance(rnn, nn.RNN)
    seen = [torch.ones(1, SHAPE[1], dtype=torch.float64)] * SHAPE[0]
    finals: list[Tensor] = []
    for layer in range(rnn.num_layers):
        both = []
        for direction in range(1 + rnn.bidirectional):
            ending = f"l{layer}" + "_reverse" * direction

            def of(name: str, ending: str = ending) -> Tensor | None:
                return leaves.get(f"rnn.{name}_{ending}")

            number = len(finals)
            zeros = torch.zeros(1, hidden, dtype=torch.float64)
            state = leaves["start"][number] if "start" in leaves else None
            kept = leaves["memory"][number] if "memory" in leaves else state
            if kept is None or (isinstance(rnn, nn.LSTM) and "memory" not in leaves):
                kept = zeros
            states = []
            for x in reversed(seen) if direction else seen:
                new = x @ of("weight_ih")[rows].T
                if state is not None:
                    new = new + state @ of("weight_hh")[rows].T
                for bias in (of("bias_ih"), of("bias_hh")):
                    new = new if bias is None else new + bias[rows]
                kept = kept + new if adds_up else new
                projected = of("weight_hr")
                state = kept if projected is None else kept @ projected.T
                states.append(state)
            finals.append(states[-1])
            both.append(states[::-1] if direction else states)
        seen = [torch.cat(each, 1) for each in zip(*both, strict=True)]
    outputs = [
        torch.cat(seen) @ leaves["steps.weight"].T + leaves["steps.bias"],
        torch.cat(finals) @ leaves["last.weight"].T + leaves["last.bias"],
    ]
    return torch.cat([each.flatten() for each in outputs]).sum(), leaves


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-layers-both-ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
KINDS = {
    **{
        f"{kind.__name__}-{name}": (kind, options)
        for kind in (nn.LSTM, nn.GRU)
        for name, options in OPTIONS.items()
    },
    "tanh": (nn.RNN, {"batch_first": True}),
    "LSTM-projected": (nn.LSTM, {"proj_size": 1, "bidirectional": True}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("start", [False, True])
def test_mass_and_values_step_by_step(name: str, start: bool) -> None:
    kind, options = KINDS[name]
    model = Recurrent(kind, start, **options)
    total, leaves = masses(model)
    gradients = torch.autograd.grad(total.log(), [*leaves.values()], allow_unused=True)
    analysis = fxpath.analyze(model, SHAPE, gates=True)
    assert analysis.path_norm == pytest.approx(float(total.detach()), rel=1e-12)
    for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        expected = torch.zeros_like(leaf) if gradient is None else gradient * leaf
        torch.testing.assert_close(analysis.scores[key], expected.detach(), rtol=1e-9, atol=1e-15)
    # Rows that make gates are scored 0.
    if kind is not nn.RNN:
        assert not bool(analysis.scores["rnn.weight_ih_l0"][:4].any())
        assert bool(analysis.scores["rnn.weight_ih_l0"][4:6].any())
    captured, lifted = take_in(model, Given(SHAPE, gates=True))
    run = realization(lifted, captured.live())
    for scale in (1.0, 20.0):
        x = scale * torch.randn(1, *SHAPE, dtype=torch.float64)
        outputs = torch.cat([each.flatten() for each in model(x)]).detach()
        torch.testing.assert_close(run([x]).detach(), outputs, rtol=1e-11, atol=1e-12)
        size = max(1.0, float(x.abs().max()))
        assert float(outputs.abs().sum()) <= analysis.path_norm * size


class Cells(nn.Module):
    """Three steps of a cell, from zeros; the last state."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell = kind(3, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        """The last state."""
        state = None
        for value in x.unbind(1):
            state = self.cell(value, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize(
    "kinds", [(nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU), (nn.RNNCell, nn.RNN)]
)
def test_cells_are_layers_of_one_direction(kinds: tuple[Any, Any]) -> None:
    cells, layers = Cells(kinds[0]), Recurrent(kinds[1], False, batch_first=True)
    with torch.no_grad():
        for name, parameter in cells.cell.named_parameters():
            parameter.copy_(getattr(layers.rnn, f"{name}_l0"))
        for linear in (layers.steps, layers.last):
            linear.weight.zero_(), linear.bias.zero_()
        layers.last.weight.fill_(1)
    found = fxpath.analyze(cells, SHAPE, gates=True)
    expected = fxpath.analyze(layers, SHAPE, gates=True)
    assert found.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        score = found.scores[f"cell.{name}"]
        torch.testing.assert_close(score, expected.scores[f"rnn.{name}_l0"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_without_gates_they_stay_refused(kind: Any) -> None:
    with pytest.raises(fxpath.UnsupportedModelError, match="tanh and sigmoid"):
        fxpath.path_norm(Recurrent(kind, False, batch_first=True), SHAPE)


def test_dropout_between_layers_is_refused() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 2, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            zeros = [torch.zeros(2, 1, 2)] * 2
            weights = [p for p in self.rnn.parameters()]
            return torch.lstm(x, zeros, weights, True, 2, 0.5, True, False, True)[0]

    with pytest.raises(fxpath.UnsupportedModelError, match="training mode"):
        fxpath.path_norm(Always(), SHAPE, gates=True)
