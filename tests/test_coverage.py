"""Every parameter is scored, or listed with the reason why it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxpath
from fxpath.program.program import build


def names(model: nn.Module) -> set[str]:
    """Parameters by every name that they have."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def assert_covered(model: nn.Module, analysis: fxpath.Analysis) -> None:
    """Raise unless each parameter is in exactly one of the two, and nothing else is unscored."""
    assert not analysis.unscored.keys() & analysis.scores.keys()
    assert analysis.unscored.keys() == names(model) - analysis.scores.keys()


class Everything(nn.Module):
    """A parameter for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.PReLU()
        self.again = nn.BatchNorm2d(2)
        self.mean = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 4))
        self.pruned = prune.identity(nn.Linear(4, 4), "weight")
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.pruned.weight_orig
        self.top = nn.Parameter(torch.ones(4))
        self.shape = nn.Parameter(torch.ones(4))
        self.covered = nn.Parameter(torch.ones(4))
        self.idle = nn.Linear(2, 2)
        self.second = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.again(self.act(self.norm(self.conv(x))))
        x = self.normed(self.mean(x).flatten(1)) + torch.zeros_like(self.shape)
        x = torch.minimum(self.tied(self.pruned(x)), self.top)
        y = self.covered.expand_as(x).clone()
        y[:, :] = x
        return y, self.second(y)


FRONT = {
    "conv.bias": "part of norm.bias",
    "norm.weight": "normalization factor, part of conv.weight and norm.bias",
    "act.weight": "slope",
}
REST = {
    "normed.parametrizations.weight.original0": "part of normed.weight",
    "normed.parametrizations.weight.original1": "part of normed.weight",
    "tied.weight": "same tensor as pruned.weight_orig",
    "top": "bound",
    "covered": "not reached by a path",
    "shape": "unused",
    "idle.weight": "unused",
    "idle.bias": "unused",
}


def test_each_reason() -> None:
    model = Everything().eval()
    analysis = fxpath.analyze(model, (1, 4, 4))
    assert_covered(model, analysis)
    # What the batch norm behind the PReLU, and the frozen instance norm, learned are scores.
    assert {"again.weight", "mean.weight", "pruned.weight", "pruned.weight_orig"} <= {
        *analysis.scores
    }
    assert analysis.unscored == {**FRONT, **REST}


@pytest.mark.parametrize("cut", [{"until": "act"}, {"outputs": 0}])
def test_behind_a_cut(cut: dict[str, Any]) -> None:
    model = Everything().eval()
    analysis = fxpath.analyze(model, (1, 4, 4), **cut)
    assert_covered(model, analysis)
    behind = {"second.weight", "second.bias", "shape", "covered", "idle.weight"}
    assert {analysis.unscored[name] for name in behind} == {"not reached by a path"}
    assert FRONT.items() <= analysis.unscored.items()


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_exported_program() -> None:
    model = Everything().eval()
    program = torch.export.export(model, (torch.ones(1, 1, 4, 4),))
    assert fxpath.analyze(program).unscored == {**FRONT, **REST}


def test_tied_without_a_score() -> None:
    """Both names of one slope, and of one factor."""
    model = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3), nn.PReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3)
    )
    model.append(nn.PReLU())
    model[4].weight, model[5].weight = model[1].weight, model[2].weight
    analysis = fxpath.analyze(model)
    assert_covered(model, analysis)
    unscored = analysis.unscored
    assert unscored["2.weight"] == unscored["5.weight"] == "slope"
    factor = "normalization factor, part of 0.weight and 1.bias and 3.weight and 4.bias"
    assert unscored["1.weight"] == unscored["4.weight"] == factor


def test_only_what_no_path_meets_can_change_freely() -> None:
    model = Everything().eval()
    program = build(model, (1, 4, 4))
    norm, unscored = program.path_norm(), fxpath.analyze(model, (1, 4, 4)).unscored
    for name, reason in unscored.items():
        parameter = model.get_parameter(name)
        before = parameter.detach().clone()
        parameter.data.add_(3 + torch.rand_like(parameter))
        moved = program.path_norm() != norm
        assert moved == (reason not in ("unused", "not reached by a path")), name
        parameter.data.copy_(before)


def test_shown_below_the_table_and_as_data() -> None:
    model = Everything().eval()
    analysis = fxpath.analyze(model, (1, 4, 4))
    text = " ".join(str(analysis).split("Not scored: ")[1].split())
    assert text.startswith(f"{len(analysis.unscored)} parameters (")
    assert "act.weight: slope;" in text and "shape: unused, as 2 more;" in text
    assert max(map(len, str(analysis).splitlines())) <= 100
    assert "Not scored: " in analysis._repr_html_()
    assert json.loads(json.dumps(analysis.to_dict()))["unscored"] == analysis.unscored
    scored = fxpath.analyze(nn.Linear(2, 1))
    assert scored.unscored == {} and "Not scored" not in str(scored) + scored._repr_html_()
