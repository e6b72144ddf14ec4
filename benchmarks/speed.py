"""The passes and one evaluation, eager and through Inductor, for pytest-benchmark.

    python -m pytest benchmarks/speed.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/speed.py --benchmark-only --benchmark-compare

They time and assert nothing, so that the test run leaves them out: its files are called test_*.py.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import fx, nn

import fxpath
from benchmarks.timing import load_module
from fxpath.capture import capture
from fxpath.model import Captured, Given
from fxpath.passes import Setting, fold, lift, lower, reduce
from fxpath.passes.derive import derive
from fxpath.passes.place import place

SHAPE = (3, 224, 224)
ROUNDS = 7


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """ResNet-18 with random weights."""
    return load_module("resnet18")


def fold_and_lift(captured: Captured) -> fx.GraphModule:
    """The two passes that rewrite the captured graph."""
    setting = Setting(captured)
    return lift(fold(captured.graph_module, setting), setting)


def test_capture(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    """Model to ATen graph."""
    benchmark.pedantic(capture, (model, Given(SHAPE)), rounds=ROUNDS, warmup_rounds=1)


def test_fold_and_lift(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    """ATen graph to lifted graph."""
    benchmark.pedantic(
        fold_and_lift,
        setup=lambda: ((capture(model, Given(SHAPE)),), {}),
        rounds=ROUNDS,
        warmup_rounds=1,
    )


def test_reduce(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    """Lifted graph to reduced graph."""
    captured = capture(model, Given(SHAPE))
    lifted, setting = fold_and_lift(captured), Setting(captured)
    benchmark.pedantic(reduce, (lifted, setting), rounds=ROUNDS, warmup_rounds=1)


def test_lower(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    """Reduced graph to products."""
    captured = capture(model, Given(SHAPE))
    setting = Setting(captured)
    reduced = reduce(fold_and_lift(captured), setting)
    benchmark.pedantic(lower, (reduced, setting), rounds=ROUNDS, warmup_rounds=1)


def test_derive_and_place(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    """Products to the flat graph, forward and reverse, that runs in given memory."""
    captured = capture(model, Given(SHAPE))
    setting = Setting(captured)
    lowered = lower(reduce(fold_and_lift(captured), setting), setting)

    def derive_and_place() -> fx.GraphModule:
        return place(derive(lowered, setting, torch.float32), setting)

    benchmark.pedantic(derive_and_place, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_scores(benchmark: BenchmarkFixture, model: nn.Module, backend: str) -> None:
    """One evaluation of Path-Mag."""
    program = fxpath.compile(model, SHAPE, backend=backend)
    buffers = program.scores()
    benchmark.pedantic(program.scores, (buffers,), rounds=3 * ROUNDS, warmup_rounds=2)
