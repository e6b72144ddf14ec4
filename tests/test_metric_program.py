"""Path-metrics from one capture are those of `path_metric`, pair by pair."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpath
from fxpath.pairs.program import MetricProgram
from tests.support.nets import SMALL, small_net


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def metrics(model: nn.Module) -> MetricProgram:
    return MetricProgram(fxpath.compile(model, SMALL, backend="eager"))


@pytest.mark.parametrize("change", ["smaller", "larger", "any"])
def test_metric_is_that_of_the_verb(model: nn.Module, metrics: MetricProgram, change: str) -> None:
    first, before = copy.deepcopy(model), metrics.copied()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand_like(parameter)
            factor = {"smaller": 1 - noise / 9, "larger": 1 + noise / 9, "any": 3 * noise - 1}
            parameter.mul_(factor[change])
    found, expected = metrics.metric(before), fxpath.path_metric(first, model, SMALL)
    numbers, others = found.to_dict(), expected.to_dict()
    assert numbers.pop("bounds") == pytest.approx(others.pop("bounds"))
    assert numbers == pytest.approx(others)
    back = metrics.metric(metrics.copied(), before)
    assert (back.path_norm, back.upper) == pytest.approx((found.other_path_norm, found.upper))
    lower, upper = found.carried_bounds()
    assert lower <= found.relative_lower * (1 + 1e-9) and lower < upper
    assert upper == found.bound("m") / found.path_norm
    assert lower == pytest.approx(abs(found.path_norm - found.other_path_norm) / found.path_norm)


def test_both_bounds_are_the_metric_where_entries_decide() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    metrics = MetricProgram(fxpath.compile(model, backend="eager"))
    before = metrics.copied()
    with torch.no_grad():
        model[0].weight[1:3] *= 0.5
    found = metrics.metric(before)
    assert found.exact and found.value
    assert found.carried_bounds() == pytest.approx([found.value / found.path_norm] * 2)
    assert metrics.metric(metrics.copied()).carried_bounds() == (0, 0)


def test_what_is_no_part_of_theta_may_not_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU())
    metrics = MetricProgram(fxpath.compile(model, backend="eager"))
    before = metrics.copied()
    with torch.no_grad():
        model[1].weight.mul_(0.5)
    with pytest.raises(ValueError, match="1.weight differ.*are architecture"):
        metrics.metric(before)


def test_another_structure_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    metrics = MetricProgram(fxpath.compile(model, backend="eager"))
    before = metrics.copied()
    model[0].weight = nn.Parameter(torch.ones(4, 3))
    assert metrics.metric(before).other_path_norm == pytest.approx(fxpath.path_norm(model))
    model[0].weight = nn.Parameter(torch.ones(5, 3))
    for reading in (metrics.copied, lambda: metrics.metric(before)):
        with pytest.raises(ValueError, match="0.weight has shape"):
            reading()
