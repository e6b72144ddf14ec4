"""Channels are removed for real: the smaller model is the one whose weights are zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from fxpath.capture import Given
from fxpath.pruning.choices import Choice
from fxpath.pruning.chosen import keep_others
from fxpath.pruning.importance import channel_importance
from fxpath.pruning.ranking import Ranking
from fxpath.pruning.removal import Network
from fxpath.pruning.units import find_units
from tests.reference import randomize

Shape = tuple[int, ...]


def made(model: nn.Module) -> nn.Module:
    """A float64 model in eval mode with random statistics and biases."""
    randomize(model, 0)
    return model.double().eval()


def run(model: nn.Module, shape: Shape) -> Tensor:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def zeroed(model: nn.Module, plan: fxpath.Plan) -> nn.Module:
    """The model with zeros wherever the plan cuts, made from the plan's plain data."""
    masked = copy.deepcopy(model)
    named = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, cut in plan.to_dict()["tensors"].items():
            tensor = named[name]
            for axis, positions in cut["remove"].items():
                tensor.movedim(int(axis), 0)[positions] = 0
            parts = cut.get("within", [])
            for i, positions in enumerate(parts):
                each = len(tensor) // len(parts)
                tensor[i * each : (i + 1) * each, positions] = 0
    return masked


def check(model: nn.Module, shape: Shape, result: fxpath.PrunedChannels) -> None:
    """One function with the zeroed model, and a certificate that path-norms confirm."""
    masked = zeroed(model, result.plan)
    torch.testing.assert_close(run(result.model, shape), run(masked, shape), rtol=1e-9, atol=1e-12)
    assert result.certificate.exact
    left = fxpath.path_norm(result.model, shape, dtype=torch.float64)
    lost = result.certificate.path_norm - left
    if any(isinstance(m, (nn.ReLU6, Gains)) for m in model.modules()):
        # The bounds of a clamp are neurons of their own, which stay in the masked model.
        assert 0 < (result.certificate.value or 0) <= lost * (1 + 1e-12)
    else:
        assert result.certificate.value == pytest.approx(lost, rel=1e-8)
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, result.model)]
    assert result.parameters == tuple(counts)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.norm(self.conv(x))))


class Gains(nn.Module):
    """Parameters and buffers of no module, with an axis for the channels."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.list = nn.ParameterList([nn.Parameter(torch.rand(8))])
        self.register_buffer("mask", torch.rand(8) + 0.5)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x) * self.gain + self.offset) * self.mask[None, :, None, None]
        return self.head(F.hardtanh(x, -0.5, 2.0) * self.list[0][:, None, None])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(10, 4, 3, padding=1), nn.PReLU(4), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.last(torch.cat([self.up(self.low(F.max_pool2d(x, 2))), x], 1))


class Dense(nn.Module):
    """Batch norms before the ReLU, over concatenated channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return self.conv2(F.relu(self.norm2(x)))


class Grouped(nn.Module):
    """A grouped convolution in a residual stream, read by one with another number of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 1, groups=2)
        self.mid = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.up(F.relu(x + self.mid(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.first(x))))))
        return F.linear(x, self.first.weight.t(), self.bias)


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8))
        self.w = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.v + self.b) @ self.w


class Wide(nn.Linear):
    """A type of its own."""


def small() -> nn.Module:
    """Layers `down.0`, `low.0`, `up` (of another type) and `head`."""
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = nn.Sequential()
    model.add_module("down", body)
    model.add_module("low", nn.Sequential(nn.Linear(8, 8), nn.PReLU(8)))
    model.add_module("up", Wide(8, 6))
    model.add_module("head", nn.Linear(6, 2))
    return made(model)


NETS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "residual": (Residual, (3, 6, 6)),
    "gains": (Gains, (3, 5, 5)),
    "unet": (UNet, (3, 4, 4)),
    "dense": (Dense, (3, 4, 4)),
    "grouped": (Grouped, (4, 4, 4)),
    "tied": (Tied, (4,)),
    "matrices": (Matrices, (5,)),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, 12, 3, groups=6),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 6, 1, groups=6),
            nn.Conv2d(6, 2, 1),
        ),
        (3, 5, 5),
    ),
    "1-d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3),
            nn.PReLU(6),
            nn.ConvTranspose1d(6, 4, 3),
            nn.ReLU(),
            nn.Conv1d(4, 1, 1),
        ),
        (2, 7),
    ),
    "3-d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 6, 3),
            nn.BatchNorm3d(6),
            nn.LeakyReLU(),
            nn.MaxPool3d(2),
            nn.Flatten(),
            nn.Linear(48, 4),
            nn.PReLU(4),
            nn.Linear(4, 2),
        ),
        (1, 6, 6, 6),
    ),
    "pixels": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 3)
        ),
        (3, 5, 5),
    ),
    "no scales": (
        lambda: nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 2)
        ),
        (3,),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_smaller_is_the_zeroed_model(name: str) -> None:
    make, shape = NETS[name]
    model = made(make())
    before = copy.deepcopy(model.state_dict())
    result = fxpath.prune_channels(model, 0.5, shape)
    removed, removable = result.channels
    assert 0.25 * removable < removed <= round(0.5 * removable)
    assert removed == sum(row["before"] - row["after"] for row in result.layers)
    assert result.parameters[1] < result.parameters[0] and result.macs[1] < result.macs[0]
    check(model, shape, result)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What modules say about themselves is what they are: a new one of that form holds the tensors.
    for module in result.model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            again = copy.deepcopy(module)
            again.reset_parameters()
            kernel = (
                (module.out_features, module.in_features)
                if isinstance(module, nn.Linear)
                else (module.out_channels, module.in_channels // module.groups)
                if isinstance(module, nn.Conv2d)
                else (module.in_channels, module.out_channels // module.groups)
            )
            assert again.weight.shape[:2] == kernel


@pytest.mark.parametrize("name", ["residual", "dense", "grouped", "depthwise", "tied"])
def test_importance_bounds_what_is_lost(name: str) -> None:
    make, shape = NETS[name]
    model = made(make())
    network = Network(model, Given(shape))
    importance = channel_importance(network.found, network.program.scores())
    units, _ = find_units(network.found, importance, network.found.kept)
    assert len(units) > 3
    for unit in units[:: len(units) // 2]:
        metric = network.metric(unit.channels)
        assert metric.exact
        assert metric.relative_upper <= unit.importance * (1 + 1e-9)
        assert network.lost(unit.channels) == pytest.approx(metric.relative, rel=1e-6)


def test_importance_is_what_is_lost_where_nothing_comes_back() -> None:
    model = made(
        nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 6, 3, groups=3),
            nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1, groups=3), nn.Conv2d(3, 2, 1),
        )
    )  # fmt: skip
    network = Network(model, Given((3, 3, 3)))
    importance = channel_importance(network.found, network.program.scores())
    units, _ = find_units(network.found, importance, network.found.kept)
    assert len(units) == 3
    for unit in units:
        lost = network.metric(unit.channels).relative
        assert lost == pytest.approx(unit.importance, rel=1e-8)


def test_grouped_convolutions_lose_as_much_in_each_group() -> None:
    model = made(Grouped())
    result = fxpath.prune_channels(model, 0.5, (4, 4, 4))
    mid = result.model.get_submodule("mid")
    assert isinstance(mid, nn.Conv2d)
    assert mid.groups == 4 and mid.out_channels == mid.in_channels and mid.out_channels % 4 == 0
    # Within each group the least important go.
    network = Network(model, Given((4, 4, 4)))
    importance = channel_importance(network.found, network.program.scores())
    gone = result.plan.tensors["up.weight"].within
    for outputs, positions in zip(network.found.grouped["up.weight"][0].outputs, gone, strict=True):
        lowest = importance[outputs].argsort()[: len(positions)]
        assert sorted(lowest.tolist()) == list(positions)


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
