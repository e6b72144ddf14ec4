"""What rewriting costs grows no faster than the graph; counted in calls, not in seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from benchmarks.growth import CASES
from fxpath.capture import capture
from fxpath.model import Given
from fxpath.passes import Setting, fold, lift, rewrite
from fxpath.program.program import PathProgram, build
from fxpath.program.theta import coordinates


def calls(run: Callable[[], Any]) -> int:
    """How many functions, of Python and of C, are called."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    # What earlier tests left behind must not be cleared away, and counted, meanwhile.
    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def rewriting(case: str, size: int) -> int:
    """Calls of all passes and of one evaluation, after the model was captured."""
    model, shape = CASES[case](size)
    captured = capture(model, Given(shape))

    def run() -> None:
        setting = Setting(captured)
        lifted = lift(fold(captured.graph_module, setting), setting)
        program = PathProgram(captured, rewrite(lifted, setting), torch.float32, 1.0)
        program.evaluate(scores=True)
        list(coordinates(program.lifted, captured.live()))

    return calls(run)


@pytest.mark.parametrize("case", ["chain", "concatenation", "mask", "residual"])
def test_twice_the_graph_takes_twice_the_calls(case: str) -> None:
    rewriting(case, 4)  # what is cached once and for all
    small, large, larger = (rewriting(case, size) for size in (4, 8, 16))
    assert larger - large <= 2.1 * (large - small)


def test_sound_of_any_length_takes_the_same_calls() -> None:
    rewriting("sound", 2000)
    # Both too long for dense matrices along their axis.
    short, long = rewriting("sound", 40_000), rewriting("sound", 400_000)
    assert long <= 1.02 * short


class Masked(nn.Module):
    """A mask, and a weight, that are computed step by step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.map = steps, nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        mask, weight = torch.ones(4), self.map.weight
        for _ in range(self.steps):
            mask, weight = mask * mask, weight * 1.001
        return torch.where(mask > 0, nn.functional.linear(x, weight, self.map.bias), 0.0)

    def expected(self) -> float:
        """The path-norm."""
        weight = float(self.map.weight.detach().abs().sum())
        return 1.001**self.steps * weight + float(self.map.bias.detach().abs().sum())


def test_hundreds_of_steps_are_taken_once_each() -> None:
    """By recursion, with each input evaluated twice, that would be 2 ** 340 evaluations."""
    ours, theirs = Masked(340), Masked(340)
    theirs.load_state_dict({k: v / 2 for k, v in ours.state_dict().items()})
    program = build(ours, Given((3,)))
    assert program.path_norm() == pytest.approx(ours.expected(), rel=1e-10)
    weight, bias = (value for _, value in coordinates(program.lifted, program.captured.live()))
    assert torch.allclose(weight, 1.001**ours.steps * ours.map.weight.detach())
    assert torch.equal(bias, ours.map.bias.detach())
    metric = fxpath.path_metric(ours, theirs, (3,))
    assert metric.upper == pytest.approx(ours.expected() / 2, rel=1e-10)
