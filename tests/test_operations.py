"""The black-box oracle held against sums done by hand, and the comparison against wrong results.

The operations themselves are tested in the files test_operations_*.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath
from tests.oracles.blackbox import (
    Case,
    Expected,
    Sandwich,
    assert_norm,
    assert_scores,
    case,
    check,
    expected,
)
from tests.oracles.steps import (
    Call,
    Coordinates,
    Step,
    affine,
    batch_norm,
    clamp,
    homogeneous,
    maximum,
    minimum,
    power,
    quotient,
)


def lift(step: Step, *values: list[float] | Tensor, q: float = 1) -> list[float]:
    """What a step makes of mass that is given by hand, flattened."""
    tensors = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    coordinates = Coordinates(step.module, q)
    outputs = step.rule(step.module.double().eval(), "op", coordinates, tuple(tensors))
    return [x for y in outputs for x in y.detach().flatten().tolist()]


def conv(weight: list[float], bias: float, **flags: object) -> nn.Module:
    """A convolution of one channel with the given taps."""
    module = nn.Conv1d(1, 1, len(weight), **flags)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight).reshape(1, 1, -1))
        module.bias.fill_(bias)
    return module


ROW = [[1.0, 10.0, 100.0]]
BY_HAND = {
    "conv": (affine(conv([2.0, -3.0], -0.5)), 1, [2 + 30 + 0.5, 20 + 300 + 0.5]),
    "conv-q2": (affine(conv([2.0, -3.0], -0.5)), 2, [4 + 90 + 0.25, 40 + 900 + 0.25]),
    "conv-q0": (affine(conv([0.0, -3.0], -0.5)), 0, [10 + 1, 100 + 1]),
    "conv-zero-padding": (affine(conv([2.0, 0, 3], 1, padding=1)), 1, [31, 2 + 300 + 1, 21]),
    # Position 0 is read by two taps: two paths, 4 + 9, where its Jacobian would say (2 + 3)^2.
    "conv-replicate": (
        affine(conv([2.0, 3.0, 0.0], 0.0, padding=1, padding_mode="replicate")),
        2,
        [4 + 9, 4 + 90, 40 + 900],
    ),
    "conv-circular": (
        affine(conv([2.0, 3.0, 5.0], 0.0, padding=1, padding_mode="circular")),
        1,
        [200 + 3 + 50, 2 + 30 + 500, 20 + 300 + 5],
    ),
    "average": (affine(nn.AvgPool1d(2, 1)), 2, [11 / 4, 110 / 4]),
    "average-included": (affine(nn.AvgPool1d(2, 1, 1)), 1, [0.5, 5.5, 55, 50]),
    "average-excluded": (affine(nn.AvgPool1d(2, 1, 1, False, False)), 1, [1, 5.5, 55, 100]),
    # 3 -> 2: positions 0.25 and 1.75; both taps of a border position are one edge.
    "upsampling": (
        affine(lambda x: functional.interpolate(x, size=2, mode="linear")),
        2,
        [9 / 16 + 10 / 16, 10 / 16 + 100 * 9 / 16],
    ),
    "border": (
        affine(lambda x: functional.interpolate(x, scale_factor=2.0, mode="linear")[..., :2]),
        2,
        [1, 9 / 16 + 10 / 16],
    ),
    "constant-pad": (affine(nn.ConstantPad1d((1, 0), -3.0)), 2, [9, 1, 10, 100]),
    "multiple": (affine(lambda x: 2 - 3 * x), 2, [4 + 9, 4 + 90, 4 + 900]),
    "max-pool": (maximum(nn.MaxPool1d(2, 1, 1)), 2, [1, 11, 110, 100]),
    "max-pool-dilated": (maximum(nn.MaxPool1d(2, 1, 1, dilation=2)), 1, [10, 101, 10]),
    "amax": (maximum(lambda x: x.amax(2)), 2, [111]),
    "amin": (minimum(lambda x: x.amin(2)), 2, [111]),
    "relu": (homogeneous(nn.ReLU()), 2, [1, 10, 100]),
    "leaky": (homogeneous(nn.LeakyReLU(0.5)), 2, [1, 10, 100]),
    "steep": (homogeneous(nn.LeakyReLU(-3.0)), 2, [9, 90, 900]),
    "relu6": (clamp(nn.ReLU6()), 2, [37, 46, 136]),
    "hardtanh": (clamp(nn.Hardtanh(-2.0, 3.0)), 1, [6, 15, 105]),
    "hardtanh-q0": (clamp(nn.Hardtanh(-2.0, 3.0)), 0, [3, 12, 102]),
    "lower-bound": (clamp(lambda x: x.clamp(min=-2)), 2, [5, 14, 104]),
    "infinite-bound": (clamp(lambda x: x.clamp(-math.inf, 0.5)), 1, [1.5, 10.5, 100.5]),
    "flip": (affine(lambda x: x.flip(2)), 2, [100, 10, 1]),
    "split": (affine(lambda x: x.split([2, 1], 2)), 2, [1, 10, 100]),
}


@pytest.mark.parametrize(("step", "q", "wanted"), BY_HAND.values(), ids=BY_HAND)
def test_oracle_by_hand(step: Step, q: float, wanted: list[float]) -> None:
    assert lift(step, ROW, q=q) == pytest.approx(wanted, rel=1e-12)


def test_oracle_of_two_inputs_by_hand() -> None:
    left, right = [[1.0, 2.0]], [[10.0, 20.0]]
    assert lift(affine(torch.sub), left, right) == [11, 22]
    assert lift(affine(lambda x, y: torch.add(x, y, alpha=-3)), left, right, q=2) == [91, 182]
    assert lift(maximum(torch.maximum), left, right, q=2) == [11, 22]
    assert lift(affine(lambda x, y: torch.cat([y, x], 1)), left, right) == [10, 20, 1, 2]
    # What is read twice has two paths, although x - x is zero.
    assert lift(affine(torch.sub), left, left, q=2) == [2, 4]


def test_oracle_of_parameters_by_hand() -> None:
    scale = Call(lambda x, p: torch.add(x, p, alpha=-2), p=(2,))
    ratio = Call(lambda x, weight: x / weight, weight=(2,))
    norm = nn.BatchNorm1d(1, eps=0.25)
    with torch.no_grad():
        scale.p.copy_(torch.tensor([3.0, -5.0]))
        ratio.weight.copy_(torch.tensor([2.0, -4.0]))
        norm.weight.fill_(3.0)
        norm.bias.fill_(-1.0)
        norm.running_mean.fill_(4.0)
        norm.running_var.fill_(4.0 - norm.eps)
    assert lift(affine(scale), [1.0, 1.0], q=2) == [37, 101]
    assert lift(quotient(ratio), [1.0, 1.0], q=2) == [1 / 4, 1 / 16]
    # gamma / sigma = 3 / 2, and beta - gamma mu / sigma = -7.
    assert lift(batch_norm(norm), [[1.0, 2.0]]) == [8.5, 10]
    folded = affine(
        nn.Sequential(conv([2.0], 1.0), norm), names=("0.weight",), folded_bias="1.bias"
    )
    # The bias is -1 + 3 (1 - 4) / 2 = -5.5, not 1.5 + 7.
    assert lift(folded, [[1.0, 2.0]]) == [3 + 5.5, 6 + 5.5]


def test_zero_to_the_power_of_zero_is_zero() -> None:
    assert power(torch.tensor([0.0, -2.0, 0.5]), 0).tolist() == [0, 1, 1]


POSITIVE = [
    case("conv", (2, 4, 3), affine(nn.Conv2d(2, 3, 3, stride=2, padding=1))),
    case("average", (2, 4, 3), affine(nn.AvgPool2d(3, 2, 1, ceil_mode=True))),
    case("upsampling", (2, 3, 2), affine(nn.UpsamplingBilinear2d(size=(5, 4)))),
    case("join", [(2, 3), (1, 3)], affine(lambda x, y: torch.cat([y.flip(2), x], 1))),
    case("chain", (2, 6), affine(nn.Conv1d(2, 2, 3)), affine(nn.ReplicationPad1d(2))),
]


@pytest.mark.parametrize("layout", ["dense", "spatial"])
@pytest.mark.parametrize("item", POSITIVE, ids=lambda item: item.id)
def test_oracle_is_a_forward_pass_where_nothing_is_negative(item: Case, layout: str) -> None:
    """With non-negative weights a linear network fed with ones computes its own path-norm."""
    model = Sandwich(item.steps, item.shapes, layout).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        ones = [torch.ones(1, *shape, dtype=torch.float64) for shape in model.input_shapes]
        total = sum(float(y.sum()) for y in model(*ones))
    wanted = expected(model, 1)
    assert wanted.path_norm == pytest.approx(total, rel=1e-12)
    # Shares of the last layer: every path ends in one of its weights or biases.
    last = sum(float(x.sum()) for name, x in wanted.scores.items() if name.startswith("after"))
    assert last == pytest.approx(1, rel=1e-12)


SMALL = case("pool", (2, 5), homogeneous(nn.PReLU(2)), maximum(nn.MaxPool1d(3, 2, 1)))


def test_comparison_accepts_what_is_right() -> None:
    check(SMALL, "spatial")


@pytest.mark.parametrize(
    "wrong",
    [
        maximum(nn.MaxPool1d(3, 2)),
        maximum(nn.MaxPool1d(3, 2, 1, ceil_mode=True, dilation=2)),
        affine(nn.AvgPool1d(3, 2, 1)),
        maximum(lambda x: functional.max_pool1d(x, 3, 2, 1).flip(2)),
        maximum(lambda x: functional.max_pool1d(x, 3, 2, 1).flip(1)),
    ],
)
@pytest.mark.parametrize("layout", ["dense", "spatial"])
def test_comparison_refuses_another_operation(wrong: Step, layout: str) -> None:
    """The package analyses one network, the oracle describes another."""
    first = SMALL.steps[0]
    model = Sandwich(SMALL.steps, SMALL.shapes, layout)
    other = Sandwich((first, wrong), SMALL.shapes, layout)
    analysis = fxpath.analyze(model, model.input_shapes[0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_norm(analysis.path_norm, expected(other, 1), 1)


def test_comparison_refuses_small_errors() -> None:
    model = Sandwich(SMALL.steps, SMALL.shapes, "dense")
    wanted = expected(model, 1)
    assert_norm(wanted.path_norm, wanted, 1)
    assert_scores(dict(wanted.scores), wanted, model)
    for factor in (1 + 1e-9, 1 - 1e-9, math.nan, math.inf, -1.0, 0.0):
        with pytest.raises(AssertionError):
            assert_norm(wanted.path_norm * factor, wanted, 1)

    def refused(scores: dict[str, Tensor]) -> None:
        with pytest.raises(AssertionError):
            assert_scores(scores, wanted, model)

    for name, share in wanted.scores.items():
        refused({key: x for key, x in wanted.scores.items() if key != name})
        refused({**wanted.scores, name: share * (1 + 1e-9)})
        refused({**wanted.scores, name: share.flatten()[:, None]})
        refused({**wanted.scores, name: share * math.nan})
        if float(share.max()) > float(share.min()):
            refused({**wanted.scores, name: share.flatten().flip(0).reshape(share.shape)})
    slope = "op.parts.0.weight"
    assert slope in dict(model.named_parameters())
    refused({**wanted.scores, slope: torch.zeros(2)})


def test_comparison_tolerates_names_that_are_no_parameters() -> None:
    model = Sandwich(SMALL.steps, SMALL.shapes, "dense")
    wanted = expected(model, 1)
    assert_scores({**wanted.scores, "op.constant": torch.zeros(2)}, wanted, model)
    without = {key: x for key, x in wanted.scores.items() if key != "after.0.1.bias"}
    assert_scores(without, Expected(1.0, wanted.scores, {"after.0.1.bias"}), model)
