"""Compiled programs: one graph, compiled once, the eager results; and without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxpath
from tests.support.nets import randomize


class Residual(nn.Module):
    """A bit of everything that is compiled differently, and a linear layer read twice."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deeper = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.hidden = nn.Linear(8 * 4 * 4, features)
        self.shared = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = nn.functional.max_pool2d(y + self.deeper(y), 2, stride=2)
        y = torch.relu(self.hidden(y.flatten(1)))
        return self.shared(torch.relu(self.shared(y)))


SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_follows(program: fxpath.PathProgram, model: nn.Module, shape: Any) -> None:
    """The program's numbers are those of the model as it is."""
    expected = fxpath.analyze(model, shape, dtype=torch.float64)
    assert program.path_norm() == pytest.approx(expected.path_norm, rel=1e-5)
    for name, share in program.scores().items():
        top = float(expected.scores[name].max())
        torch.testing.assert_close(
            share.double(), expected.scores[name], rtol=1e-5, atol=1e-5 * top
        )


@pytest.mark.slow
def test_inductor_compiles_one_graph_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual()
    compile_, asked = torch.compile, []

    def recorded(*args: Any, **options: Any) -> Any:
        asked.append((options["backend"], options["fullgraph"]))
        return compile_(*args, **options)

    monkeypatch.setattr(torch, "compile", recorded)
    program = fxpath.compile(model, SHAPE)
    buffers = {name: torch.full_like(share, -1.0) for name, share in program.scores().items()}
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    program.path_norm()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    # The scores, and the norm alone; a graph break would have been an error.
    assert asked == [("inductor", True)] * 2
    assert counters["stats"]["unique_graphs"] == 2
    for seed in range(3):
        randomize(model, seed, weights=True)
        assert_follows(program, model, SHAPE)
        given = program.scores(out=buffers)
        for name, buffer in buffers.items():
            assert given[name] is buffer and buffer.data_ptr() == places[name]
            torch.testing.assert_close(buffer, program.scores()[name], rtol=1e-6, atol=0)
    assert counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_one_line_says_so_and_results_are_the_same() -> None:
    model = Residual()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found") as caught,
    ):
        program = fxpath.compile(model, SHAPE)
        scores = program.scores()
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = fxpath.analyze(model, SHAPE)
    for name, share in expected.scores.items():
        torch.testing.assert_close(scores[name], share, rtol=1e-5, atol=1e-9)


class Mixer(nn.Module):
    """Activations whose axes are exchanged in between: strides differ from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(3, 7), nn.Linear(4, 5)
        self.slope, self.head = nn.PReLU(7), nn.Linear(35, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.channels(self.tokens(x.transpose(1, 2)).transpose(1, 2)).relu()
        y = self.slope(y).transpose(1, 2)
        return self.head((y + y.relu()).flatten(1))


@pytest.mark.parametrize("reduce", [True, False])
def test_other_backends_exchanged_axes_and_other_number_formats(reduce: bool) -> None:
    """What is passed on to ``torch.compile`` holds for any backend; this one generates nothing."""
    model = Mixer()
    program = fxpath.compile(model, (3, 4), reduce=reduce, backend="aot_eager")
    for seed, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16)):
        randomize(model.to(dtype), seed, weights=True)
        assert_follows(program, model, (3, 4))


def test_more_forms_of_a_weight_than_dynamo_compiles_one_function_for() -> None:
    model = nn.Linear(3, 2)
    program = fxpath.compile(model, backend="aot_eager")
    for stride in range(1, 10):
        model.weight.data = torch.rand(2, 3 * stride)[:, ::stride]
        expected = sum(p.detach().abs().sum().item() for p in model.parameters())
        assert program.path_norm() == pytest.approx(expected, rel=1e-5)


def test_gradients_run_through_the_backend() -> None:
    model, twin = Mixer(), Mixer()
    twin.load_state_dict(model.state_dict())
    for each, backend in ((model, "aot_eager"), (twin, "eager")):
        fxpath.compile(each, (3, 4), backend=backend).log_path_norm().backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    assert counters["stats"]["unique_graphs"] == 1


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="backend='inductr': known are eager, inductor"):
        fxpath.compile(Mixer(), (3, 4), backend="inductr")
