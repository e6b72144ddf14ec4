"""How many channels go and which, and what stays with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from fxpath.model import Given
from fxpath.pruning.choices import Choice
from fxpath.pruning.chosen import keep_others
from fxpath.pruning.importance import channel_importance
from fxpath.pruning.ranking import Ranking
from fxpath.pruning.removal import Network
from fxpath.pruning.units import find_units
from tests.test_channels import Residual, Wide, check, made, run, small

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


# -- what stays, and why ---------------------------------------------------------------------------


class Literal(nn.Module):
    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.conv, self.literal = nn.Conv2d(3, 4, 3), literal
        self.a, self.b = nn.Linear(36, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x.view(-1, 36) if self.literal else x.view(x.size(0), -1)  # baked
        return self.b(F.relu(self.a(x)))


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.a(x)).chunk(2, 1)  # baked
        return self.c(F.relu(self.b(left + right)))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1)
        self.c, self.d = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))  # baked
        return self.d(F.relu(self.c(x)))


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)  # baked
        return self.c(F.relu(self.b(x)))


class Reader(nn.Module):
    """Its filters are as many as it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + torch.arange(4.0, dtype=x.dtype).reshape(4, 1, 1)  # baked
        return self.c(F.relu(self.b(x)))


def regrouped(x: Tensor) -> Tensor:
    return x.view(len(x), 4, 2)


class Helped(nn.Module):
    """Its sizes are written into a function that `forward` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = regrouped(self.a(x)).amax(-1)  # baked
        return self.c(F.relu(self.b(x)))


class Obstacles(nn.Module):
    """Side by side, so that one run of the verb meets them all."""

    def __init__(self) -> None:
        super().__init__()
        self.literal, self.chunked, self.padded = Literal(True), Chunked(), Padded()
        self.shuffled, self.reader, self.helped = Shuffled(), Reader(), Helped()

    def forward(self, x: Tensor) -> Tensor:
        convs = self.chunked, self.padded, self.shuffled, self.reader
        ends = [self.literal(x), self.helped(x.mean((2, 3)))]
        return torch.cat([*ends, *(part(x).flatten(1) for part in convs)], 1)


def test_what_the_code_holds_on_to_stays() -> None:
    model, shape = made(Obstacles()), (3, 5, 5)
    result = fxpath.prune_channels(model, 0.5, shape)
    reasons = {row["name"]: row for row in result.kept if row["source_line"]}
    stays = {
        "literal.conv",
        "padded.b",
        *(f"{name}.a" for name in ("chunked", "padded", "shuffled")),
    }
    assert reasons.keys() == stays | {"reader.a", "helped.a"}
    assert all("# baked" in row["source_line"] for row in reasons.values())
    rows = {row["name"]: row for row in result.layers}
    assert all(rows[name]["before"] == rows[name]["after"] for name in reasons)
    free = {"literal.a", "chunked.b", "padded.c", "shuffled.b", "reader.b", "helped.b"}
    assert free <= rows.keys() and any(rows[n]["after"] < rows[n]["before"] for n in free)
    assert "# baked" in result.table()
    check(model, shape, result)


def test_sizes_that_follow_the_tensor_are_no_obstacle() -> None:
    model = made(Literal(False))
    result = fxpath.prune_channels(model, 1.0, (3, 5, 5), min_channels=2)
    assert [row["after"] for row in result.layers] == [2, 2, 2]
    assert result.model.get_submodule("a").in_features == 18
    check(model, (3, 5, 5), result)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x) / x.shape[1]  # counted


def test_a_number_that_depends_on_the_channels_is_an_error_with_the_line() -> None:
    with pytest.raises(ValueError, match=r"# counted.*exclude"):
        fxpath.prune_channels(made(Counted()), 0.5, (3, 4, 4))


class Loaded(nn.Module):
    def __init__(self, constant: float) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)) + self.constant  # loaded
        return self.c(F.hardtanh(self.b(x), 0.5, 2.0))  # clamped


def test_channels_that_are_not_zero_without_weights_stay() -> None:
    result = fxpath.prune_channels(made(Loaded(1.5)), 1.0)
    assert result.channels == (0, 0)
    lines = [row["source_line"].split("# ")[-1] for row in result.kept if row["source_line"]]
    assert lines == ["loaded", "clamped"]
    result = fxpath.prune_channels(made(Loaded(0.0)), 1.0)
    assert [row["after"] for row in result.layers] == [1, 4, 2]


class Shared(nn.Module):
    """What meets all channels alike is none's own: gains of positions, and one filter for all."""

    gain: Tensor
    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 2, 1)
        self.register_buffer("gain", torch.rand(4) + 0.5)
        self.register_buffer("filter", torch.rand(1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) * self.gain)
        return self.b(F.conv1d(x, self.filter.expand(x.shape[1], 1, 2), groups=x.shape[1]))


def test_what_all_channels_share_keeps_none() -> None:
    model = made(Shared())
    result = fxpath.prune_channels(model, 1.0, (3, 4))
    assert [row["after"] for row in result.layers] == [1, 2]
    assert [row["name"] for row in result.kept] == ["b"]
    check(model, (3, 4), result)


def test_modules_whose_tensors_were_exchanged_say_what_they_have() -> None:
    model = made(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    for layer, name, axis in (
        (model[0], "weight", 0),
        (model[0], "bias", 0),
        (model[2], "weight", 1),
    ):
        tensor = layer.get_parameter(name)
        setattr(layer, name, nn.Parameter(tensor.detach().narrow(axis, 0, 6).clone()))
    result = fxpath.prune_channels(model, 0.5)
    assert (result.model[0].out_features, result.model[2].in_features) == (3, 3)


def test_channels_that_all_go_together_stay() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)).mean(1, keepdim=True))))

    model = made(Mean())
    result = fxpath.prune_channels(model, 3, (3, 4, 4))
    assert [row["after"] for row in result.layers] == [4, 3, 2]
    check(model, (3, 4, 4), result)


def test_computed_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"^0\.weight: computed .*prune\.remove"):
        fxpath.prune_channels(model, 0.5)
    prune.remove(model[0], "weight")
    parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"^2\.weight: computed .*remove_parametrizations"):
        fxpath.prune_channels(model, 0.5)
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(TypeError, match="ExportedProgram"):
        fxpath.prune_channels(program, 0.5)  # type: ignore[arg-type]


def test_auxiliary_heads_are_named() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(x) + self.aux(x) if self.training else self.b(x)

    with pytest.warns(UserWarning, match="^aux: not reached in eval mode"):
        fxpath.prune_channels(Auxiliary(), 0.5)


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
