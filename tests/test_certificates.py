"""Certificates rest on no tolerance; what they are made of is copied, stored and searched."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import time
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.pairs.pair import fingerprint


def line(dtype: torch.dtype, scale: float) -> nn.Sequential:
    """Four positive parameters a, b, c, d: x -> c (a x + b) + d for x = 1."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).to(dtype)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.7 * scale)
    return model


def paths(model: nn.Module) -> list[Fraction]:
    a, b, c, d = (Fraction(p.item()) for p in model.parameters())
    return [a * c, b * c, d]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1.0), (torch.float32, 1e10), (torch.float32, 1e-15),
        (torch.float64, 1.0), (torch.float64, 1e24), (torch.float64, 1e-30),
    ],
)  # fmt: skip
def test_one_digit_of_one_parameter_in_exact_arithmetic(dtype: torch.dtype, scale: float) -> None:
    model = line(dtype, scale)
    for position in range(4):
        for target in (math.inf, -math.inf):
            other = copy.deepcopy(model)
            with torch.no_grad():
                changed = list(other.parameters())[position]
                changed.copy_(torch.nextafter(changed, torch.tensor(target, dtype=dtype)))
            first, second = paths(model), paths(other)
            apart = sum(abs(p - q) for p, q in zip(first, second, strict=True))
            metric = fxpath.path_metric(model, other)
            assert metric.exact and Fraction(metric.lower) <= apart <= Fraction(metric.upper)
            assert metric.upper > 0 and metric.value == pytest.approx(float(apart), rel=1e-12)
            bound = fxpath.lipschitz_bound(model, other)
            gap = abs(sum(first) - sum(second))
            assert all(Fraction(value) >= gap for value in bound.bounds.values())


def test_what_exceeds_by_less_than_rounding_is_carried() -> None:
    model, other = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(1e-3)
        other.weight.fill_(5e-4)
        model.bias.fill_(1e24)
        other.bias.fill_(1e24 * (1 + 3e-14))
    apart = Fraction(other.bias.item()) - Fraction(model.bias.item())
    bound, metric = fxpath.lipschitz_bound(model, other), fxpath.path_metric(model, other)
    assert all(Fraction(value) >= apart for value in bound.bounds.values())
    assert not metric.dominated and metric.value is None
    assert Fraction(metric.lower) <= apart + Fraction(5e-4) <= Fraction(metric.upper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_digit_of_a_batch_norm_is_never_certified_away(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).to(dtype).eval()
    values = {"0.weight": 0.3, "0.bias": 0.7, "1.weight": 1.1, "1.bias": -0.2}
    values |= {"1.running_mean": 0.4, "1.running_var": 0.9}
    for name, value in values.items():
        model.state_dict()[name].fill_(value)
    for name in values:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state[name] = torch.nextafter(state[name], torch.tensor(9.0, dtype=dtype))
        metric = fxpath.path_metric(model, state, (1,))
        assert float(fxpath.lipschitz_bound(model, state, (1,))) > 0 < metric.upper
        assert metric.value != 0 and metric.lower <= metric.upper
    same = fxpath.path_metric(model, copy.deepcopy(model), (1,))
    assert same.exact and same.value == same.upper == 0


def test_rescaling_by_other_numbers_than_powers_of_two_is_counted_as_slack() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    for factor, value in ((2.0, 0), (3.0, None)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other[0].parameters():
                parameter.mul_(factor)
            other[2].weight.div_(factor)
        metric = fxpath.path_metric(model, other)
        true = (fxpath.path_lifting(model).phi - fxpath.path_lifting(other).phi).abs().sum().item()
        assert metric.value == value and true <= metric.upper <= 1e-12 * metric.path_norm
        # A change that is not rounding is exact again.
        with torch.no_grad():
            other[0].weight[0, 0] /= 2
        assert fxpath.path_metric(model, other).exact


# Copies, modes ------------------------------------------------------------------------------


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    return made[0], made[1]


def test_metrics_bounds_and_quantized_weights_are_copied_and_stored() -> None:
    model, other = pair()
    metric, bound = fxpath.path_metric(model, other), fxpath.lipschitz_bound(model, other)
    quantized = fxpath.quantize(model, 4)
    stored, copied = pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)
    with torch.no_grad():
        expected = metric.to_dict()
        assert stored.to_dict() == expected == copied.to_dict() and str(stored) == str(metric)
    stored_bound, copied_bound = pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)
    assert stored_bound.table() == bound.table() == copied_bound.table()
    assert torch.equal(stored_bound.per_output, bound.per_output)
    assert stored_bound.lipschitz_in_x == bound.lipschitz_in_x
    assert copied_bound.search() == bound.search() > 0
    with pytest.raises(RuntimeError, match="no networks to search"):
        stored_bound.search()
    again = pickle.loads(pickle.dumps(quantized))
    assert again.certificate.to_dict() == quantized.certificate.to_dict()
    assert len(pickle.dumps(metric)) < 4000


def everything(model: nn.Module, other: nn.Module) -> list[Any]:
    bound = fxpath.lipschitz_bound(model, other)
    rescaled = fxpath.rescale(model), fxpath.normalize(model)
    return [
        fxpath.path_metric(model, other).to_dict(),
        bound.bounds,
        bound.search(),
        bound.lipschitz_in_x,
        fxpath.quantize(model, 4).certificate.to_dict(),
        [p.detach().cpu().tolist() for each in rescaled for p in each.parameters()],
        fxpath.channel_groups(model).groups,
    ]


@contextlib.contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_whatever_the_caller_has_switched_on() -> None:
    model, other = pair()
    expected = everything(model, other)
    modes = [
        torch.device("meta"), torch.no_grad(), torch.inference_mode(), default_dtype(),
        torch.autocast("cpu", torch.bfloat16),
    ]  # fmt: skip
    for mode in modes:
        with mode:
            assert everything(model, other) == expected, mode
    pruned = copy.deepcopy(model)
    pruned[0].weight.data[0, 0] = 0
    metric = fxpath.path_metric(model, pruned)
    with torch.inference_mode():
        assert metric.path_magnitude_sum == pytest.approx(metric.value, rel=1e-6)


def test_a_cast_of_a_constant_on_the_way_to_edges() -> None:
    """Integers that a weight is multiplied with are cast, which is no step of the network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)
            self.register_buffer("whole", torch.tensor([1, -2, 3]))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x) * self.whole))

    torch.manual_seed(0)
    model, other = Net(), Net()
    other.two.bias.data.neg_()
    metric = fxpath.path_metric(model, other, (3,))
    x = torch.rand(200, 3) * 2 - 1
    gap = (model(x) - other(x)).abs().sum(1).max().item()
    assert gap <= metric.upper < math.inf and gap <= metric.bound("theorem_f2")


def test_a_fingerprint_sees_every_kind_of_change() -> None:
    base = torch.arange(300_000, dtype=torch.float32)
    seen = {fingerprint(base), fingerprint(base.clone())}
    assert len(seen) == 1
    swapped, signed, ulp = base.clone(), base.clone(), base.clone()
    swapped[[5, 200_000]] = base[[200_000, 5]]
    signed[299_999] = -299_999
    ulp[7] = torch.nextafter(base[7], torch.tensor(9.0))
    moved = base.roll(1 << 17)
    for tensor in (swapped, signed, ulp, moved, base.double(), base.reshape(2, -1)):
        seen.add(fingerprint(tensor))
    assert len(seen) == 7
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64):
        assert fingerprint(torch.ones(3).to(dtype)) != fingerprint(torch.zeros(3).to(dtype))


# Reports ------------------------------------------------------------------------------------


def test_the_search_runs_when_asked_for_and_keeps_to_its_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    other = copy.deepcopy(model)
    other[0].weight.data.mul_(1.1)
    bound = fxpath.lipschitz_bound(model, other, (3, 32, 32))
    assert "found" not in str(bound.table())
    seen: list[Any] = []
    start = time.monotonic()
    assert 0 < bound.search(seconds=0.0, progress=seen.append) <= float(bound)
    assert len(seen) == 1 and seen[0].done == 1 < seen[0].planned
    assert time.monotonic() - start < 30
    small = fxpath.lipschitz_bound(*pair())
    assert small.search(progress=seen.append) == small.largest_difference == seen[-1].best
    assert seen[-1].done == seen[-1].planned
    assert "bound / found" in str(small.table(search=10))


def test_relative_says_which_of_lower_and_upper_it_is_and_may_exceed_1() -> None:
    model, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(other.weight, -4.0)
    metric = fxpath.path_metric(model, other)
    assert metric.relative_lower == pytest.approx(3, rel=1e-12)
    assert metric.relative == metric.relative_upper == pytest.approx(5, rel=1e-12)
    assert {"relative_lower", "relative_upper"} <= metric.to_dict().keys()
    assert "relative to the path-norm, at least" in str(metric)


def test_a_batch_says_what_shape_the_input_has() -> None:
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()) for _ in range(2))
    x = torch.randn(5, 2, 7, 9)
    found = fxpath.lipschitz_bound(model, other, x=x)
    assert found.value == fxpath.lipschitz_bound(model, other, (2, 7, 9), x=x).value
    assert (model(x) - other(x)).abs().flatten(1).sum(1).max() <= found.value
