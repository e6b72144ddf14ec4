"""Compiled programs: one graph, compiled once, the eager results; and without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from fxpath.program.kernels import generated
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


def test_new_weights_run_through_the_graph_that_was_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Residual()
    compile_, whole = torch.compile, []

    def recorded(*args: Any, **options: Any) -> Any:
        whole.append(options["fullgraph"])
        return compile_(*args, **options)

    monkeypatch.setattr(torch, "compile", recorded)
    program = fxpath.compile(model, SHAPE)
    program.scores()
    program.path_norm()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled == 2  # the scores, and the norm alone
    for seed in range(3):
        randomize(model, seed, weights=True)
        expected = fxpath.analyze(model, SHAPE)
        scores = program.scores()
        assert program.path_norm() == pytest.approx(expected.path_norm, rel=1e-6)
        for name, share in expected.scores.items():
            torch.testing.assert_close(scores[name], share, rtol=1e-5, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == compiled
    assert len(whole) == compiled and all(whole)  # a graph break would have been an error


def test_scores_go_into_the_tensors_that_were_given() -> None:
    model = Residual()
    program = fxpath.compile(model, SHAPE)
    buffers = {name: torch.full_like(share, -1.0) for name, share in program.scores().items()}
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    for seed in range(2):
        randomize(model, seed, weights=True)
        given = program.scores(out=buffers)
        expected = fxpath.analyze(model, SHAPE).scores
        for name, buffer in buffers.items():
            assert given[name] is buffer and buffer.data_ptr() == places[name]
            torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_generated_code_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are swept by generated code from a size on that no test reaches by itself."""
    monkeypatch.setattr(generated, "LARGE", 1)
    swept = []
    for name in ("dot", "column_sums", "scores_into"):
        sweep = getattr(generated, name)
        monkeypatch.setattr(generated, name, lambda *a, s=sweep: swept.append(s) or s(*a))
    model = Residual()
    program = fxpath.compile(model, SHAPE)
    for seed in range(2):
        randomize(model, seed, weights=True)
        expected = fxpath.analyze(model, SHAPE)
        for name, share in program.scores().items():
            torch.testing.assert_close(share, expected.scores[name], rtol=1e-5, atol=1e-9)
        assert program.path_norm() == pytest.approx(expected.path_norm, rel=1e-6)
    assert len(set(swept)) == 3, "all three sweeps were used"


@pytest.mark.slow
def test_generated_code_serves_more_forms_than_dynamo_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generated, "LARGE", 1)
    generator = torch.Generator().manual_seed(0)
    for rows in range(8, 8 * (torch._dynamo.config.recompile_limit + 3), 8):
        weight = torch.randn(rows, 5, generator=generator)
        x = torch.rand(5, 1, generator=generator)
        assert generated.applies(weight, x, 1.0)
        torch.testing.assert_close(generated.dot(weight, x[:, 0]), weight.abs() @ x[:, 0])


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
    assert program.path_norm() == pytest.approx(expected.path_norm, rel=1e-6)
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
def test_exchanged_axes_and_other_number_formats(reduce: bool) -> None:
    model = Mixer()
    program = fxpath.compile(model, (3, 4), reduce=reduce)
    for seed, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float32)):
        randomize(model.to(dtype), seed, weights=True)
        expected = fxpath.analyze(model, (3, 4), dtype=torch.float32)
        assert program.path_norm() == pytest.approx(expected.path_norm, rel=1e-5)
        for name, share in program.scores().items():
            torch.testing.assert_close(share, expected.scores[name], rtol=1e-4, atol=1e-9)
    for stride in range(1, 10):  # more forms than Dynamo compiles one function for
        wide = torch.rand(7, 3 * stride)
        model.tokens.weight.data = wide[:, ::stride]
        expected = fxpath.analyze(model, (3, 4))
        assert program.path_norm() == pytest.approx(expected.path_norm, rel=1e-5)
