"""What a monitor says of a model in training, and what it leaves alone."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from fxpath.plugins.monitor import LOWER, NORM, UPPER, PathNormMonitor
from tests.support.checks import differences, snapshot
from tests.support.watched import SHAPE, Watched, assert_said, copied, examples


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs, classes = examples()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), classes).backward()
    optimizer.step()


def test_numbers_of_a_loop_are_those_of_the_verbs() -> None:
    model, lines = Watched(), list[tuple[int, dict[str, float]]]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states, kept = [copied(model)], [0]
    monitor = PathNormMonitor(
        model, SHAPE, every=2, log=lambda values, step: lines.append((step, values))
    )
    for number in range(1, 7):
        step(model, optimizer)
        states.append(copied(model))
        before = snapshot(model)
        found = monitor.after_step(number)
        assert (found is None) == (number % 2 > 0) and monitor.after_step(number) is None
        if number == 3:
            monitor.checkpoint()
        kept.append(3 if number >= 3 else 0)
        assert not differences(before, snapshot(model))
    assert [number for number, _ in lines] == [2, 4, 6]
    for number, values in lines:
        assert list(values) == [NORM, LOWER, UPPER]
        assert_said(values, states[number], states[kept[number]])
    monitor.checkpoint()
    assert [monitor.measure()[name] for name in (LOWER, UPPER)] == [0, 0]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_a_wrapped_model_is_measured(wrap: Any) -> None:
    model = Watched()
    monitor = PathNormMonitor(wrap(model), SHAPE)
    before, parameter = copied(model), model.head.weight
    with torch.no_grad():
        parameter.mul_(1.5)
    assert_said(monitor.measure(), copied(model), before)


def test_the_norm_alone_takes_no_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="1.weight: slopes .* metric=False .* freeze"):
        PathNormMonitor(model)
    monitor = PathNormMonitor(model, metric=False)
    with torch.no_grad():
        model[1].weight.fill_(3)
    monitor.checkpoint()
    assert monitor.measure() == {NORM: fxpath.analyze(model).log10_path_norm}
    model[1].weight.requires_grad_(False)
    assert PathNormMonitor(model).measure()[UPPER] == 0


def test_what_is_refused_is_refused_at_once() -> None:
    with pytest.raises(fxpath.UnsupportedModelError, match="gelu"):
        PathNormMonitor(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    with pytest.raises(ValueError, match="every=0"):
        PathNormMonitor(nn.Linear(2, 2), every=0)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    for metric in (True, False):
        with pytest.raises(ValueError, match="NaN"):
            PathNormMonitor(model, metric=metric)


def test_gradients_are_left_as_they_are() -> None:
    model = Watched()
    monitor = PathNormMonitor(model, SHAPE)
    inputs, _ = examples()
    loss = model(inputs).sum()
    monitor.measure()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with torch.inference_mode():
        monitor.measure()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(
    "plugin, needs, extra",
    [
        ("lightning", ["lightning.pytorch", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "transformers"),
        ("torch_pruning", ["torch_pruning"], "torch-pruning"),
    ],
)
def test_a_library_that_is_missing_is_named(
    plugin: str, needs: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in needs:
        monkeypatch.setitem(sys.modules, name, None)
    name = f"fxpath.plugins.{plugin}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'torch-fxpath[{extra}]'")):
        importlib.import_module(name)


def test_nothing_imports_a_plugin() -> None:
    """So that what they need is imported by those alone who ask for it."""
    package = Path(fxpath.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name != "plugins":
            assert "fxpath.plugins" not in path.read_text(), path


def test_slopes_that_change_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 1))
    model[1].weight.requires_grad_(False)
    monitor = PathNormMonitor(model)
    model[1].weight.data.add_(0.1)
    with pytest.raises(ValueError, match=r"call checkpoint\(\) after they change"):
        monitor.measure()
    monitor.checkpoint()
    assert monitor.measure()[UPPER] == 0
