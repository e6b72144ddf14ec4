"""The table of activations: each constant holds on a fine grid, and none is needlessly large."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpath
from fxpath.graph.squashes import SQUASHES, Squash, squash_of
from tests.support.generated import bounded

#: Of those that take arguments, some.
SOME: dict[str, tuple[float, ...]] = {
    "elu": (1.5, 1.0, 1.0),
    "celu": (0.5,),
    "softshrink": (0.5,),
    "hardshrink": (0.5,),
    "softmax": (0.0,),
}
PLAIN = [name for name in SQUASHES if name != "softmax"]
#: What torch computes by itself.
TORCH: dict[str, nn.Module] = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "softsign": nn.Softsign(),
    "softshrink": nn.Softshrink(0.5),
    "hardshrink": nn.Hardshrink(0.5),
    "tanhshrink": nn.Tanhshrink(),
    "elu": nn.ELU(1.5),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.5),
    "sigmoid": nn.Sigmoid(),
}


def grid() -> Tensor:
    """Fine near zero, and far out on both sides; with 0 itself."""
    near = torch.linspace(-12, 12, 60_001, dtype=torch.float64)
    nearer = torch.linspace(-0.01, 0.01, 1001, dtype=torch.float64)
    far = torch.logspace(-12, 12, 5_001, dtype=torch.float64)
    return torch.cat([near, nearer, far, -far, torch.zeros(1, dtype=torch.float64)]).unique()


def known(name: str, *numbers: float) -> Squash:
    found = squash_of(name, numbers or SOME.get(name, ()))
    assert found is not None
    return found


def assert_holds(squash: Squash, x: Tensor) -> None:
    """Size, slope and range, at all points and between neighbours; by some of them attained."""
    y = squash.function(x)
    rounding = 1e-12 * y.abs() + 1e-12
    assert bool((y >= squash.low - rounding).all()) and bool((y <= squash.high + rounding).all())
    if squash.size is not None:
        assert float(squash.function(torch.zeros(1, dtype=torch.float64))) == 0
        assert bool((y.abs() <= squash.size * x.abs() + rounding).all())
        largest = float((y.abs() / x.abs())[x != 0].max())
        assert largest == pytest.approx(squash.size, rel=1e-4)
    steps, rises = x.diff(), y.diff().abs()
    if math.isfinite(squash.lipschitz):
        assert bool((rises <= squash.lipschitz * steps + rounding[1:] + rounding[:-1]).all())
        wide = steps > 1e-9 * (x.abs() + y.abs())[1:]
        assert float((rises / steps)[wide].max()) == pytest.approx(squash.lipschitz, rel=1e-4)
    else:
        assert float((rises / steps).max()) > 1000


@pytest.mark.parametrize("name", PLAIN)
def test_each_constant_holds_and_is_attained(name: str) -> None:
    squash, x = known(name), grid()
    assert_holds(squash, x)
    y = squash.function(x)
    for bound, found in ((squash.low, float(y.min())), (squash.high, float(y.max()))):
        if math.isfinite(bound):
            assert found == pytest.approx(bound, rel=1e-4, abs=1e-9)
        else:
            assert abs(found) > 25
    assert squash.proof


@pytest.mark.parametrize("name", TORCH)
def test_functions_are_those_of_torch(name: str) -> None:
    x = grid()
    torch.testing.assert_close(known(name).function(x), TORCH[name](x), rtol=1e-13, atol=1e-13)


NUMBERS = st.floats(0.01, 5.0)
SIGNED = st.floats(-3.0, 3.0).filter(lambda number: abs(number) > 0.01)


@bounded(5)
@given(SIGNED, SIGNED, NUMBERS)
def test_elu_for_all_arguments(alpha: float, scale: float, inner: float) -> None:
    squash, x = known("elu", alpha, scale, inner), grid()[::2]
    assert_holds(squash, x)
    expected = torch.ops.aten.elu(x, alpha, scale, inner)
    torch.testing.assert_close(squash.function(x), expected, rtol=1e-12, atol=1e-12)
    assert squash_of("elu", (alpha, scale, -inner)) is None


@bounded(8)
@given(NUMBERS)
def test_celu_and_shrinking_for_all_arguments(number: float) -> None:
    x = torch.linspace(-60_000, 60_000, 120_001).double()
    x = torch.cat([x, torch.linspace(-12, 12, 24_001).double()]).unique()
    for name, module in (
        ("celu", nn.CELU(number)),
        ("softshrink", nn.Softshrink(number)),
        ("hardshrink", nn.Hardshrink(number)),
    ):
        squash = known(name, number)
        y = squash.function(x)
        torch.testing.assert_close(y, module(x), rtol=1e-13, atol=1e-13)
        assert squash.size == 1.0
        assert bool((y.abs() <= x.abs()).all()) and bool((y >= squash.low).all())
        assert float((y.abs() / x.abs())[x != 0].max()) == pytest.approx(1.0, rel=1e-4)
        if name != "hardshrink":
            assert bool((y.diff().abs() <= x.diff() * squash.lipschitz + 1e-10).all())
    assert squash_of("celu", (-number,)) is None


@bounded(50)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(1e-3, 30.0))
def test_softmax_moves_by_half_the_largest_difference(seed: int, size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = scale * torch.randn(2, 200, size, dtype=torch.float64, generator=generator)
    squash = known("softmax", 1.0)
    p, q = squash.function(a), squash.function(b)
    moved = (p - q).abs().amax(1)
    assert bool((moved <= squash.lipschitz * (a - b).abs().amax(1) + 1e-15).all())
    assert bool((p >= squash.low).all() and (p <= squash.high).all())
    torch.testing.assert_close(p.sum(1), torch.ones(200, dtype=torch.float64))


def test_half_is_what_a_softmax_of_two_moves_by() -> None:
    a = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)
    p, q = (known("softmax", 1.0).function(each) for each in (a, -a))
    assert float((p - q).abs().max() / 2e-4) == pytest.approx(0.5, rel=1e-6)


def test_largest_slopes_where_the_proofs_say() -> None:
    for name, at in (("silu", 2.3994), ("gelu", 2**0.5), ("gelu_tanh", 1.42), ("mish", 1.4907)):
        squash = known(name)
        x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(squash.function(x), x)
        assert float(slope) <= squash.lipschitz <= float(slope) * (1 + 3e-5)


@pytest.mark.parametrize(
    "module", [nn.Softplus(), nn.LogSigmoid(), nn.Sigmoid(), nn.Softmax(1), nn.Softmin(1)]
)
def test_what_is_not_zero_at_zero_is_refused_on_a_path(module: nn.Module) -> None:
    assert float(module(torch.zeros(1, 2)).abs().max()) > 0
    report = fxpath.check(nn.Sequential(nn.Linear(2, 2), module), (2,), gates=True)
    assert not report


def test_the_comparison_notices_constants_that_are_wrong() -> None:
    x = grid()
    right = known("silu")
    for changed in (
        {"size": 0.99},
        {"size": 1.01},
        {"lipschitz": 1.0998},
        {"lipschitz": 1.11},
        {"low": -0.278},
        {"function": torch.sigmoid},
    ):
        with pytest.raises(AssertionError):
            assert_holds(Squash(**{**vars(right), **changed}), x)
