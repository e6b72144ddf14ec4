"""Bounds of the difference of two functions: attacked, reached, and held against known values."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpath
from tests.oracles.networks import Net
from tests.support.attack import assert_never_above, attack, outputs
from tests.support.changes import CHANGES, changed, inputs_of, lenet, rescale
from tests.support.generated import MAX_PATHS, bounded, nets
from tests.support.nets import randomize

SHAPE = (1, 14, 14)


def test_the_check_of_these_tests_can_fail() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    other = copy.deepcopy(model)
    other.weight.data.add_(1)
    bound = fxpath.lipschitz_bound(model, other)
    assert float(bound) == pytest.approx(1, rel=1e-12)
    assert_never_above(bound, torch.ones(1, 1))
    with pytest.raises(AssertionError):
        assert_never_above(bound, torch.full((1, 1), 1 + 1e-6))


# No violation -------------------------------------------------------------------------


@bounded(30)
@given(
    nets(),
    st.sampled_from(sorted(CHANGES)),
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.sampled_from([1, 2, math.inf]),
    st.integers(0, 10**6),
)
def test_no_input_of_the_ball_exceeds_a_bound(
    net: Net, how: str, radius: float, norm: float, seed: int
) -> None:
    model = net.module()
    assume(0 < net.dag(model).count_paths() < MAX_PATHS)
    other = changed(model, how, seed)
    bound = fxpath.lipschitz_bound(
        model, other, example_inputs=inputs_of(net), radius=radius, norm=norm
    )
    attack(
        model, other, net.input_shapes, radius, norm, seed, lambda g: assert_never_above(bound, g)
    )
    assert float(bound) == bound.value == pytest.approx(min(bound.bounds.values()), rel=1e-11)
    assert torch.linalg.vector_norm(bound.per_output, norm).item() == pytest.approx(bound.value)


@bounded(15)
@given(nets(), st.sampled_from(sorted(CHANGES)), st.integers(0, 10**6))
def test_no_input_of_a_batch_exceeds_its_bound(net: Net, how: str, seed: int) -> None:
    model = net.module()
    assume(0 < net.dag(model).count_paths() < MAX_PATHS)
    other = changed(model, how, seed)
    rng = np.random.default_rng(seed)
    batch = [torch.tensor(rng.normal(size=(3, *shape))) for shape in net.input_shapes]
    options: dict[str, Any] = {"example_inputs": inputs_of(net)}
    # A state dict: the same pair, and one capture instead of two.
    state = other.state_dict()
    bound = fxpath.lipschitz_bound(model, state, x=batch, **options)
    with torch.no_grad():
        gap = outputs(model, batch) - outputs(other, batch)
    assert_never_above(bound, gap)
    size = torch.linalg.vector_norm(gap, 1, dim=1).max().item()
    assert bound.largest_difference == pytest.approx(size, rel=1e-9, abs=1e-12)
    # Each inequality is at least as sharp as on the ball that the batch lies in.
    radius = max(x.abs().max().item() for x in batch)
    ball = fxpath.lipschitz_bound(model, state, radius=radius, **options)
    assert bound.bounds.keys() == ball.bounds.keys()
    for name, value in bound.bounds.items():
        assert value <= ball.bounds[name] * (1 + 1e-9) + 1e-12, name


def clamped(activation: nn.Module) -> nn.Sequential:
    return (
        randomize(
            nn.Sequential(
                nn.Linear(4, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 2)
            ),
            weights=True,
        )
        .eval()
        .double()
    )


class Clamp(nn.Module):
    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU6(),
        nn.Hardtanh(-0.2, 0.3),
        nn.LeakyReLU(-1.5),
        Clamp(None, 0.4),
        Clamp(0.3, None),
        Clamp(0.3, 0.5),
        Clamp(-0.6, -0.2),
        Clamp(0.5, -0.5),
        Clamp(None, -0.4),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["pruned", "anything", "signs flipped"])
def test_clamps_and_slopes(activation: nn.Module, how: str) -> None:
    model = clamped(activation)
    other = changed(model, how, 3)
    for radius in (0.5, 10.0):
        bound = fxpath.lipschitz_bound(model, other.state_dict(), radius=radius)
        for seed in range(3):
            attack(
                model, other, [(4,)], radius, 1, seed, lambda g, b=bound: assert_never_above(b, g)
            )


@pytest.mark.parametrize(
    ("low", "high", "value"),
    [
        (0.3, 0.5, 0.3),
        (0.3, None, 0.3),
        (-0.6, -0.2, 0.2),
        (None, -0.4, 0.4),
        (0.5, -0.25, 0.25),
        (-1.0, 1.0, 0.0),
    ],
)
def test_a_clamp_can_also_enlarge(low: float | None, high: float | None, value: float) -> None:
    model = nn.Sequential(
        nn.Linear(1, 1, bias=False), Clamp(low, high), nn.Linear(1, 1, bias=False)
    ).double()
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[2].weight)
    other = copy.deepcopy(model)
    nn.init.constant_(other[2].weight, 2.0)
    bound = fxpath.lipschitz_bound(model, other)
    assert bound.bounds["inductive"] == pytest.approx(value, rel=1e-12)
    gap = model(torch.zeros(1, 1).double()) - other(torch.zeros(1, 1).double())
    assert gap.abs().item() == pytest.approx(value, rel=1e-12)
    assert_never_above(bound, gap.detach())


def test_a_clamp_caps_the_inductive_bound() -> None:
    model = clamped(nn.Hardtanh(-0.2, 0.3))
    other = changed(model, "anything", 0)
    bound = fxpath.lipschitz_bound(model, other, radius=1e6)
    assert bound.inequality == "inductive"
    # The last layer reads values within [-0.2, 0.3]: nothing before it matters.
    first, second = model[4], other[4]
    apart = (first.weight - second.weight).abs().sum() * 0.3 + (
        first.bias - second.bias
    ).abs().sum()
    widest = torch.minimum(first.weight.abs(), second.weight.abs()).sum() * 0.5
    assert bound.value <= (apart + widest).item() * (1 + 1e-9)


def test_learned_slopes_that_differ_are_covered_by_the_inductive_bound_alone() -> None:
    model = (
        randomize(
            nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.PReLU(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
            ),
            weights=True,
        )
        .eval()
        .double()
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.25, -0.5, 2.0]))
    other = changed(model, "close", 0)
    with torch.no_grad():
        other[1].weight.copy_(torch.tensor([0.75, 0.5, 1.0]))
    with pytest.raises(ValueError, match="1.weight differ: slopes"):
        fxpath.path_metric(model, other, (1, 6, 6))
    bound = fxpath.lipschitz_bound(model, other, (1, 6, 6))
    assert list(bound.bounds) == ["inductive"] and not bound.invariant
    for seed in range(5):
        attack(model, other, [(1, 6, 6)], 1, 1, seed, lambda g: assert_never_above(bound, g))
    # One neuron, a slope each: |a - a'| |x| is reached.
    slope, steeper = nn.PReLU(init=0.5).double(), nn.PReLU(init=0.75).double()
    tight = fxpath.lipschitz_bound(slope, steeper, (1,), radius=2.0)
    assert float(tight) == pytest.approx(0.5, rel=1e-12)


def test_pooling_is_a_maximum_in_the_inductive_bound() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(4)).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.add_(0.25)
    bound = fxpath.lipschitz_bound(model, other, (1, 4, 4))
    assert bound.bounds["inductive"] == pytest.approx(0.25, rel=1e-12)
    assert bound.bounds["any_pair"] == pytest.approx(16 * 0.25, rel=1e-12)


# Sharpness ----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_equality_case_of_theorem_3_1(depth: int) -> None:
    """Theorem 3.1: weights a and b along one path, zero elsewhere, and an input on that path."""
    a, b, x0 = 1.5, 1.25, 3.0
    layers = [m for _ in range(depth) for m in (nn.Linear(3, 3, bias=False), nn.ReLU())][:-1]
    model = nn.Sequential(*layers).double()
    other = copy.deepcopy(model)
    for network, value in ((model, a), (other, b)):
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
            parameter.data[1, 1] = value
    expected = (a**depth - b**depth) * x0
    x = torch.tensor([[0.0, x0, 0.0]], dtype=torch.float64)
    assert (model(x) - other(x)).abs().sum().item() == pytest.approx(expected, rel=1e-12)
    metric = fxpath.path_metric(model, other)
    assert metric.exact and metric.value * x0 == pytest.approx(expected, rel=1e-12)
    for options in ({"radius": x0}, {"x": x}):
        bound = fxpath.lipschitz_bound(model, other, **options)
        assert bound.inequality == "theorem_b1" and bound.invariant
        assert bound.value == pytest.approx(expected, rel=1e-12)
        assert bound.largest_difference == pytest.approx(expected, rel=1e-9)
        assert bound.per_output.tolist() == pytest.approx([0, expected, 0])


def test_figure_5_is_bounded_though_its_path_liftings_are_equal() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    other = copy.deepcopy(model)
    for network, value in ((model, 1.0), (other, -1.0)):
        for parameter in network.parameters():
            nn.init.constant_(parameter, value)
    bound = fxpath.lipschitz_bound(model, other)
    assert "theorem_b1" not in bound.bounds
    assert 2 <= bound.bounds["any_pair"] == pytest.approx(2, rel=1e-12)
    assert bound.largest_difference == 1
    assert bound.value >= bound.largest_difference


@pytest.mark.parametrize("scaled", [False, True])
def test_theorem_b1_keeps_inputs_and_biases_apart(scaled: bool) -> None:
    model = lenet()
    other = changed(model, "pruned", 4)
    second = rescale(other, 7) if scaled else other
    values = {r: fxpath.lipschitz_bound(model, second, SHAPE, radius=r) for r in (0.0, 1.0, 3.0)}
    assert {bound.bounds["theorem_b1"] > 0 for bound in values.values()} == {True}
    parts = {r: bound.bounds["theorem_b1"] for r, bound in values.items()}
    # Affine in the radius, and at radius 1 the whole metric.
    assert parts[3.0] - parts[0.0] == pytest.approx(3 * (parts[1.0] - parts[0.0]), rel=1e-9)
    metric = fxpath.path_metric(model, other, SHAPE)
    assert parts[1.0] == pytest.approx(metric.value, rel=1e-9)
    assert fxpath.lipschitz_bound(model, second, SHAPE, norm=math.inf).value < parts[1.0]


@pytest.mark.parametrize("how", sorted(CHANGES))
def test_what_is_called_invariant_does_not_change_with_the_scale_of_neurons(how: str) -> None:
    model = lenet()
    other = changed(model, how, 1)
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    scaled, state = rescale(model, 1), rescale(other, 2).state_dict()
    for options in ({}, {"x": x}, {"radius": 0.1}):
        bound = fxpath.lipschitz_bound(model, other.state_dict(), SHAPE, **options)
        again = fxpath.lipschitz_bound(scaled, state, SHAPE, **options)
        for name in bound.bounds.keys() & {"theorem_b1", "any_pair_normalized"}:
            assert again.bounds[name] == pytest.approx(bound.bounds[name], rel=1e-9), name
        assert again.bounds["any_pair"] > bound.bounds["any_pair"] * (1 + 1e-4)


def test_lipschitz_constant_in_x_leaves_bias_paths_out() -> None:
    model = lenet()
    bound = fxpath.lipschitz_bound(model, changed(model, "close", 0), SHAPE)
    without = copy.deepcopy(model)
    for name, parameter in without.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    assert bound.lipschitz_in_x == pytest.approx(fxpath.path_norm(without, SHAPE), rel=1e-9)
    x, y = torch.randn(2, 50, *SHAPE, dtype=torch.float64)
    apart = (x - y).flatten(1).abs().amax(1)
    assert bool(((model(x) - model(y)).abs().sum(1) <= bound.lipschitz_in_x * apart).all())


# Beside other bounds --------------------------------------------------------------------


def fully_connected(bias: bool = False) -> nn.Sequential:
    return randomize(
        nn.Sequential(
            nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(),
            nn.Linear(5, 3, bias=bias),
        ).double(), weights=True).eval()  # fmt: skip


def rows(table: str) -> dict[str, float]:
    """Bounds of a printed table by name."""
    found = {}
    for line in table.splitlines()[2:]:
        cells = [cell for cell in line.split("  ") if cell.strip()]
        found[cells[0].strip()] = float(cells[2 if "largest" not in cells[0] else 1])
    return found


def test_table_has_the_bounds_of_fully_connected_networks() -> None:
    model = fully_connected()
    other = changed(model, "close", 0)
    bound = fxpath.lipschitz_bound(model, other, radius=2.0)
    printed = rows(str(bound.table(search=60)))
    matrices = [[m.weight.detach() for m in n if isinstance(m, nn.Linear)] for n in (model, other)]
    size = max(1.0, *(w.abs().sum(1).max().item() for both in matrices for w in both))
    apart = max((a - b).abs().max().item() for a, b in zip(*matrices, strict=True))
    width, layers = 6, 3
    expected = layers * width**2 * size ** (layers - 1) * apart
    assert printed["(5) with (9), (29)"] == pytest.approx(2 * expected, rel=1e-4)
    paper = (width * 2 + 1) * width * layers**2 * size ** (layers - 1) * apart
    assert printed["(2)"] == pytest.approx(paper, rel=1e-4)
    assert fxpath.path_metric(model, other).upper <= expected
    assert printed["largest difference found"] <= bound.value < min(paper, 2 * expected)

    flipped = fxpath.lipschitz_bound(model, changed(model, "signs flipped", 0))
    assert "Corollary G.1" in rows(str(flipped.table())) and "(29)" not in str(flipped.table())
    biased = fully_connected(bias=True)
    with_biases = fxpath.lipschitz_bound(biased, changed(biased, "close", 0))
    assert "(2)" in rows(str(with_biases.table()))
    assert "(29)" not in str(with_biases.table())
    images = fxpath.lipschitz_bound(lenet(), changed(lenet(), "close", 0), SHAPE)
    assert "(2)" not in str(images.table())


@pytest.mark.parametrize("how", sorted(CHANGES))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("radius", [0.1, 5.0])
def test_bounds_of_fully_connected_networks_hold(how: str, bias: bool, radius: float) -> None:
    from fxpath.model import Given
    from fxpath.pairs.matching import make_pair
    from fxpath.pairs.rivals import find_layered

    model = fully_connected(bias)
    other = changed(model, how, 0)
    layered = find_layered(make_pair(model, other, Given()))
    assert layered is not None and layered.biases == bias

    def check(gap: Tensor) -> None:
        for name, value in layered.bounds(radius).items():
            assert gap.abs().sum(1).max().item() <= value, name

    attack(model, other, [(4,)], radius, 1, 0, check)


def test_search_finds_what_is_there_and_repeats_itself() -> None:
    model = lenet()
    other = changed(model, "pruned", 0)
    bound = fxpath.lipschitz_bound(model, other, SHAPE)
    again = fxpath.lipschitz_bound(model, other, SHAPE)
    assert bound.largest_difference == again.largest_difference <= bound.value
    with torch.no_grad():
        x = torch.rand(200, *SHAPE, dtype=torch.float64) * 2 - 1
        random = (model(x) - other(x)).abs().sum(1).max().item()
    assert bound.largest_difference > random
    small = lenet().float()
    assert fxpath.lipschitz_bound(small, small, SHAPE).largest_difference == 0
    assert fxpath.lipschitz_bound(small, small, SHAPE).log10 == -math.inf


def test_inputs_and_options_are_checked() -> None:
    model = lenet()
    with pytest.raises(ValueError, match="radius=-1"):
        fxpath.lipschitz_bound(model, model, SHAPE, radius=-1)
    with pytest.raises(ValueError, match="norm=3"):
        fxpath.lipschitz_bound(model, model, SHAPE, norm=3)
    with pytest.raises(ValueError, match=r"the model reads \(batch, 1, 14, 14\)"):
        fxpath.lipschitz_bound(model, model, SHAPE, x=torch.zeros(2, 1, 14, 15))
    with pytest.raises(ValueError, match="x has 2 tensors"):
        fxpath.lipschitz_bound(model, model, SHAPE, x=[torch.zeros(2, *SHAPE)] * 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fxpath.lipschitz_bound(model, model, SHAPE, x=torch.full((2, *SHAPE), math.nan))
    with pytest.raises(ValueError, match="missing"):
        fxpath.lipschitz_bound(model, {}, SHAPE)
