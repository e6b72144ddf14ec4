"""How many channels go and which, and what stays with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpath
from fxpath.model import Given
from fxpath.pruning.choices import Choice
from fxpath.pruning.chosen import keep_others
from fxpath.pruning.importance import channel_importance
from fxpath.pruning.ranking import Ranking
from fxpath.pruning.removal import Network
from fxpath.pruning.units import find_units
from tests.support.channels import Residual, Wide, made, run, small

# -- how much --------------------------------------------------------------------------------------


def test_budget_is_used_up() -> None:
    model, shape = made(Residual()), (3, 6, 6)
    result = fxpath.prune_channels(model, None, shape, budget=0.3)
    assert 0 < result.certificate.relative_upper <= 0.3
    network = Network(model, Given(shape))
    importance = channel_importance(network.found, network.program.scores())
    units, _ = find_units(network.found, importance, network.found.kept)
    ranked = [channel for unit in units for channel in unit.channels]
    assert len(ranked) == len(units)
    (count,) = {len(result.plan.tensors["head.weight"].remove[1])} | {
        len(result.plan.tensors[name].remove[0]) for name in ("stem.weight", "conv.weight")
    }
    assert result.certificate.relative_upper == network.metric(ranked[:count]).relative_upper
    assert network.metric(ranked[: count + 1]).relative_upper > 0.3


def test_budget_of_nothing_takes_what_is_dead() -> None:
    model = made(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))
    model[2].weight.data[:, [1, 4]] = 0
    result = fxpath.prune_channels(model, budget=0.0)
    assert result.certificate.value == 0
    assert result.plan.tensors["0.weight"].remove == {0: (1, 4)}
    torch.testing.assert_close(run(result.model, (3,)), run(model, (3,)))


def test_constraints_are_met_with_the_fewest_units() -> None:
    layers = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    model, shape = made(nn.Sequential(*layers)), (3,)
    limits = {"parameters": "60%", "macs": 60.0}
    result = fxpath.prune_channels(model, None, shape, constraints=limits)
    assert result.parameters[1] <= 0.6 * result.parameters[0] and result.macs[1] <= 60
    fewer = fxpath.prune_channels(model, result.channels[0] - 1, shape)
    assert fewer.parameters[1] > 0.6 * fewer.parameters[0] or fewer.macs[1] > 60
    with pytest.raises(ValueError, match=r"cannot be met: parameters \d+ of at most 5"):
        fxpath.prune_channels(model, None, shape, constraints={"parameters": 5})
    same = fxpath.prune_channels(model, None, shape, constraints={"parameters": "100%"})
    assert same.channels[0] == 0 and same.certificate.value == 0


def test_multiples_and_lower_limits() -> None:
    model, shape = small(), (3,)
    result = fxpath.prune_channels(model, 1.0, shape, min_channels=3)
    assert [row["after"] for row in result.layers] == [3, 3, 3, 2]
    result = fxpath.prune_channels(model, 0.5, shape, multiple_of=2)
    assert all(row["after"] % 2 == 0 for row in result.layers)
    assert any(row["after"] < row["before"] for row in result.layers)


def test_amounts() -> None:
    model = made(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    found = Network(model, Given((3,))).found
    ranking = Ranking(found, find_units(found, torch.rand(found.count), found.kept)[0], 1, 1)
    for amount, gone in ((0, 0), (3, 3), (8, 7), (0.0, 0), (0.25, 2), (1.0, 7)):
        assert ranking.within(amount) == gone == len(ranking.first(gone))
    result = fxpath.prune_channels(model, 1.0)
    assert result.model[0].out_features == 1
    again = fxpath.prune_channels(result.model, 1.0)
    assert again.channels == (0, 1)


# -- which channels, by which scores ---------------------------------------------------------------


def test_include_and_exclude() -> None:
    model, shape = small(), (3,)

    network = Network(model, Given(shape))
    found, kept = network.found, network.found.kept

    def reduced(include: Choice | None = None, exclude: Choice = ()) -> set[str]:
        found.kept = dict(kept)
        keep_others(model, found, include, exclude)
        ranking = Ranking(found, find_units(found, torch.ones(found.count), found.kept)[0], 1, 1)
        gone = set(ranking.first(len(ranking.units)))
        return {n.removesuffix(".weight") for n, c in found.outputs.items() if gone & {*c.tolist()}}

    every = {"down.0", "low.0", "up"}
    assert reduced() == every
    assert reduced(include="down") == {"down.0"}
    assert reduced(include=["*.0.weight"], exclude=("low",)) == {"down.0"}
    assert reduced(include=Wide) == {"up"}
    assert reduced(exclude=(Wide,)) == every - {"up"}
    result = fxpath.prune_channels(model, 1.0, shape, exclude="low")
    assert [row["after"] for row in result.layers] == [1, 8, 1, 2]
    assert ("low.0", 8, "excluded by the caller") in {
        (row["name"], row["channels"], row["reason"]) for row in result.kept
    }
    # A channel that two layers make together goes only if it may go in both.
    assert fxpath.prune_channels(made(Residual()), 1.0, (3, 6, 6), include="stem").channels[0] == 0
    with pytest.raises(ValueError, match="'nope' matches no layer"):
        reduced(include=["down", "nope"])
    with pytest.raises(TypeError, match="types of modules"):
        reduced(exclude=[3])  # type: ignore[list-item]


def test_criteria() -> None:
    model = made(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))
    sizes = model[0].weight.detach().abs().sum(1)
    lowest = tuple(sorted(sizes.argsort()[:3].tolist()))
    for criterion in (
        "magnitude",
        lambda model, input_shape: fxpath.criteria.magnitude(model),
    ):
        result = fxpath.prune_channels(model, 0.5, criterion=criterion)
        assert result.plan.tensors["0.weight"].remove == {0: lowest}
    with_bias = {**fxpath.criteria.magnitude(model), "0.bias": torch.arange(6.0) * 10}
    result = fxpath.prune_channels(model, 0.5, criterion=with_bias)
    assert result.plan.tensors["0.weight"].remove == {0: (0, 1, 2)}
    found = Network(model, Given((3,))).found
    for scores, message in (
        ({"2.weight": torch.ones(2, 6)}, "no scores for 0.weight"),
        ({"0.weight": torch.ones(2, 6)}, "not the parameter's shape"),
        ({"0.weight": torch.full((6, 3), torch.nan)}, "not all finite"),
    ):
        with pytest.raises(ValueError, match=message):
            channel_importance(found, scores)
    for name, message in (("nope", "there are path_magnitude"), ("obd", "needs data")):
        with pytest.raises(ValueError, match=message):
            fxpath.prune_channels(model, 0.5, criterion=name)
    with pytest.raises(TypeError, match="criterion is a int"):
        fxpath.prune_channels(model, 0.5, criterion=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"amount": 1, "budget": 0.1}, "exactly one of"),
        ({"amount": 1.5}, "between 0 and 1"),
        ({"amount": -1}, "not negative"),
        ({"amount": 9}, "only 8 channels"),
        ({"budget": -0.1}, "budget=-0.1"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"constraints": {}}, "'parameters', 'macs'"),
        ({"constraints": {"flops": 1}}, "'flops'"),
        ({"constraints": {"macs": "60"}}, "'60%'"),
        ({"constraints": {"macs": "-3%"}}, "'60%'"),
        ({"amount": 1, "multiple_of": 0}, "multiple_of=0"),
        ({"amount": 1, "min_channels": 0}, "min_channels=0"),
    ],
)
def test_arguments(options: dict[str, object], message: str) -> None:
    model = made(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(ValueError, match=message):
        fxpath.prune_channels(model, **options)  # type: ignore[arg-type]


def test_kinds_of_arguments() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    for wrong in ({"amount": True}, {"amount": "1"}, {"budget": "1"}, {"constraints": 3}):
        with pytest.raises(TypeError):
            fxpath.prune_channels(model, **wrong)  # type: ignore[arg-type]


def test_clamped_networks_have_an_exact_certificate() -> None:
    """The bounds that a spatial reduction writes into the graph are no parameters of either."""
    model = made(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 3)
        )
    )
    result = fxpath.prune_channels(model, 1, (3, 9, 9))
    ((gone,),) = result.plan.tensors["0.weight"].remove.values()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (other[0].weight, other[0].bias, other[1].bias, other[1].running_mean):
            tensor[gone] = 0
    metric = fxpath.path_metric(model, other, (3, 9, 9))
    norms = [fxpath.path_norm(each, (3, 9, 9)) for each in (model, other)]
    assert metric.exact and metric.value == pytest.approx(norms[0] - norms[1], rel=1e-9)
    assert result.certificate.value == pytest.approx(metric.value, rel=1e-12)
    torch.testing.assert_close(run(result.model, (3, 9, 9)), run(other, (3, 9, 9)))
