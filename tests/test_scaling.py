"""Steps that keep numbers in range: exact sums, exponents, transposes, witnesses."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxpath.graph import scaling
from tests.support.generated import bounded

DTYPES = st.sampled_from([torch.float32, torch.float64])
EXPONENTS = st.one_of(st.none(), st.integers(-5000, 5000), st.integers(-40, 40), st.just(-math.inf))


@st.composite
def entries(draw: st.DrawFn, shape: tuple[int, ...], span: int) -> Tensor:
    """Numbers >= 0 up to powers of two; zeros among them, or nothing else."""
    size = math.prod(shape)
    drawn = draw(st.lists(st.integers(-span, span), min_size=size, max_size=size))
    kept = draw(st.sampled_from([1.0, 1.0, 0.7, 0.0]))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    values = 1 + torch.rand(size, generator=generator, dtype=torch.float64)
    values = torch.ldexp(values.float().double(), torch.tensor(drawn, dtype=torch.float64))
    values *= torch.rand(size, generator=generator, dtype=torch.float64) < kept
    return values.reshape(shape)


@st.composite
def terms(draw: st.DrawFn, broadcast: bool = True) -> tuple[Any, ...]:
    """Values with exponents, and a factor or none."""
    dtype = draw(DTYPES)
    span = draw(st.sampled_from([0, 8, 30]))
    shapes = [(2, 3), (3,), (1, 3), (2, 1), ()] if broadcast else [(2, 3)]
    values = [draw(entries((2, 3), span)).to(dtype)]
    for _ in range(draw(st.integers(0, 2))):
        values.append(draw(entries(draw(st.sampled_from(shapes)), span)).to(dtype))
    scales = []
    for value in values:
        exponent = draw(EXPONENTS)
        if exponent == -math.inf:
            value.zero_()  # only zeros have it
        scales.append(None if exponent is None else torch.tensor(exponent, dtype=dtype))
    factor = draw(st.none() | entries((3,), span).map(lambda f: f.to(dtype)))
    return dtype, values, scales, factor


def exact(values: Any, scales: Any, factor: Tensor | None) -> list[Fraction]:
    """The sum in exact arithmetic, entry by entry."""
    total = [Fraction(0)] * 6
    for i, (value, scale) in enumerate(zip(values, scales, strict=True)):
        wide = value.double()
        if i == 0 and factor is not None:
            other = factor.double().expand(2, 3).flatten().tolist()
        else:
            other = [1.0] * 6
        power = 0 if scale is None or math.isinf(scale) else int(scale)
        for j, (v, f) in enumerate(zip(wide.expand(2, 3).flatten().tolist(), other, strict=True)):
            total[j] += Fraction(v) * Fraction(f) * Fraction(2) ** power
    return total


def agrees(found: Tensor, exponent: Tensor, expected: list[Fraction], near: float) -> None:
    """Each entry, up to rounding of the largest one."""
    top = max(expected)
    power = Fraction(2) ** int(exponent)
    for value, wanted in zip(found.double().flatten().tolist(), expected, strict=True):
        assert abs(Fraction(value) * power - wanted) <= Fraction(near) * top


NEAR = {torch.float32: 1e-6, torch.float64: 1e-14}


@bounded(80)
@given(terms())
def test_a_settled_sum_is_the_sum(case: Any) -> None:
    dtype, values, scales, factor = case
    total, exponent, _, shifts, smallest, _ = scaling.settle(
        values, scales, [True] * len(values), factor
    )
    assert smallest is not None and total.dtype == smallest.dtype == dtype and total.shape == (2, 3)
    assert exponent == exponent.floor() and exponent >= scaling.VOID
    expected = exact(values, scales, factor)
    agrees(total, exponent, expected, NEAR[dtype])
    # Near 1 at its top; products of spans are measured by their bound.
    if max(expected) and factor is None:
        assert 1 <= total.max() < 2 * len(values) * (1 + 1e-6)
    assert total.max() < 4 * len(values)
    assert all(shift == shift.floor() or shift == -math.inf for shift in shifts)


@bounded(60)
@given(terms(), st.integers(-3000, 3000))
def test_powers_of_two_change_exponents_alone(case: Any, by: int) -> None:
    _, values, scales, factor = case
    scales = [
        torch.zeros((), dtype=v.dtype) if s is None else s
        for v, s in zip(values, scales, strict=True)
    ]
    measured = [True] * len(values)
    one = scaling.settle(values, scales, measured, factor)
    other = scaling.settle(values, [s + by for s in scales], measured, factor)
    assert torch.equal(one[0], other[0]) and one[4].equal(other[4])
    if bool(one[0].any()):
        assert other[1] - one[1] == by
        assert [float(s) for s in one[3]] == [float(s) for s in other[3]]


@bounded(40)
@given(DTYPES, st.lists(st.integers(-6, 6), min_size=1, max_size=3), st.booleans())
def test_what_is_known_to_be_near_one_is_not_measured(
    dtype: torch.dtype, exponents: list[int], joined: bool
) -> None:
    values = [torch.rand(2, 3, dtype=dtype) + 0.5 for _ in exponents]
    scales = [torch.tensor(float(e), dtype=dtype) for e in exponents]
    if joined:
        found = scaling.join(values, scales, [False] * len(values), 1)
        expected = torch.cat([v * 2.0**e for v, e in zip(values, exponents, strict=True)], 1)
    else:
        found = scaling.settle(values, scales, [False] * len(values))
        expected = sum(v * 2.0**e for v, e in zip(values, exponents, strict=True))
    assert found[1] == max(exponents)
    torch.testing.assert_close(found[0] * 2.0 ** max(exponents), expected, rtol=1e-6, atol=0)


@bounded(60)
@given(terms(broadcast=False))
def test_joined_and_summed_values(case: Any) -> None:
    dtype, values, scales, _ = case
    joined, exponent, _, shifts, _ = scaling.join(values, scales, [True] * len(values), 1)
    expected = [exact([v], [s], None) for v, s in zip(values, scales, strict=True)]
    rows = [e[3 * row : 3 * row + 3] for row in range(2) for e in expected]
    agrees(joined, exponent, [x for row in rows for x in row], NEAR[dtype])
    assert joined.max() < 2 and len(shifts) == len(values)

    mantissa, exponent, shifts = scaling.sum_up(values, scales)
    assert mantissa.dtype == exponent.dtype == torch.float64
    whole = sum(map(sum, expected))
    assert abs(Fraction(float(mantissa)) * Fraction(2) ** int(exponent) - whole) <= whole / 10**14
    assert whole == 0 or 1 <= mantissa < 2 * len(values)
    assert len(shifts) == len(values)


# -- transposes ------------------------------------------------------------------------------------


@bounded(60)
@given(terms(), st.booleans())
def test_the_transpose_of_a_settled_sum(case: Any, deep: bool) -> None:
    _, values, scales, factor = case
    values = [v.double() for v in values]
    scales = [None if s is None else s.double() for s in scales]
    factor = None if factor is None else factor.double()
    leaves = [v.requires_grad_() for v in [*values, *([] if factor is None else [factor])]]
    grad = torch.rand(2, 3, dtype=torch.float64)
    with torch.no_grad():
        _, _, powers, shifts, _, _ = scaling.settle(values, scales, [True] * len(values), factor)
    # Powers of two are constants for differentiation.
    terms = [v * 2.0**shift for v, shift in zip(values, shifts, strict=True)]
    terms[0] = terms[0] if factor is None else terms[0] * factor
    expected = torch.autograd.grad(sum(terms), leaves, grad)
    needed = [True] * len(leaves)
    with torch.no_grad():
        told = shifts if deep else None
        masses, grads = scaling.settle_back(grad, values, powers, told, factor, needed)
        for found, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-300)
        # At least the sums of the gradients that stand for products.
        assert max(masses) >= max(grad.sum(), grads[0].sum()) * (1 - 1e-12)
        none = [False] * len(leaves)
        _, some = scaling.settle_back(grad, values, powers, told, factor, none)
        assert some == [None] * len(leaves)


@bounded(40)
@given(terms(broadcast=False), st.booleans())
def test_the_transpose_of_joined_values(case: Any, deep: bool) -> None:
    _, values, scales, _ = case
    values = [v.double().requires_grad_() for v in values]
    scales = [None if s is None else s.double() for s in scales]
    with torch.no_grad():
        _, _, powers, shifts, _ = scaling.join(values, scales, [True] * len(values), 1)
    joined = torch.cat([v * 2.0**shift for v, shift in zip(values, shifts, strict=True)], 1)
    grad = torch.rand(joined.shape, dtype=torch.float64)
    expected = torch.autograd.grad(joined, values, grad)
    with torch.no_grad():
        told = shifts if deep else None
        masses, grads = scaling.join_back(grad, [3] * len(values), powers, told, 1)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-300)
    assert max(masses) >= grad.sum() * (1 - 1e-12)


def test_powers_below_float64_are_taken_in_steps() -> None:
    grad = torch.full((2, 3), 2.0**1000, dtype=torch.float64)
    shifts = [torch.tensor(-1900.0, dtype=torch.float64)]
    ones = [torch.ones(2, 3, dtype=torch.float64)]
    _, (found,) = scaling.settle_back(grad, ones, [torch.exp2(shifts[0])], shifts, None, [True])
    assert torch.equal(found, torch.full_like(grad, 2.0**-900))
    share = scaling.seed(torch.tensor(0.5).double(), shifts[0], torch.float64, 1000)
    assert share == 2.0**-899


@pytest.mark.parametrize("scale", [None, 3, -2000])
def test_the_seed_is_the_gradient_of_the_logarithm(scale: int | None) -> None:
    values = [torch.rand(2, 3).double(), torch.rand(4).double()]
    scales = [None if scale is None else torch.tensor(float(scale)).double(), None]
    mantissa, exponent, shifts = scaling.sum_up(values, scales)
    assert scaling.seed(torch.zeros(()).double(), shifts[0], torch.float64, 0) == 0
    for shift, value in zip(shifts, values, strict=True):
        seed = scaling.seed(mantissa, shift, torch.float64, 0)
        assert seed.dtype == torch.float64 and seed.shape == ()
        grown = [v.clone() for v in values]
        next(g for g, v in zip(grown, values, strict=True) if v is value).mul_(1 + 1e-6)
        more, power, _ = scaling.sum_up(grown, scales)
        change = math.log(more / mantissa) + float(power - exponent) * math.log(2)
        assert float(seed * value.sum()) == pytest.approx(change / 1e-6, rel=1e-5, abs=1e-12)


# -- witnesses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "scale"), [(1.0, None), (2.0**40, -40), (2.0**-40, 40)])
def test_the_smallest_entry_is_told_before_scaling(value: float, scale: int | None) -> None:
    """In units of the coarsest rounding: that of each term at its own scale, or of the sum."""
    tiny = torch.tensor([[value, value * 2.0**-60]])
    scales = [None if scale is None else torch.tensor(float(scale))]
    found = scaling.settle([tiny], scales, [True])[4]
    # Entries of the sum, which is near 1 at its top, and the rounding of what it was made of.
    power = 2.0 ** -math.floor(math.log2(value))
    # A rounding of the power counts as often as the largest entry says.
    assert found == 2.0**-60 / max(1.0, power, float(tiny.max()))
    joined = scaling.join([tiny, tiny], scales * 2, [True] * 2, 0)[4]
    assert joined == 2.0**-60 / max(1.0, power)


def test_a_factor_coarsens_what_it_multiplies() -> None:
    values, factor = torch.tensor([[2.0**-50, 1.0]]), torch.tensor([1.0, 2.0**-30])
    total, exponent, _, _, smallest, _ = scaling.settle([values], [None], [True], factor)
    assert exponent == -30 and total.tolist() == [[2.0**-20, 1.0]]
    assert smallest == 2.0**-20 / 2.0**30  # a rounding of a factor counts 2^30 times


def test_a_zero_is_the_smallest_entry_and_no_entry_is_none() -> None:
    assert scaling.settle([torch.tensor([[0.0, 1.0]])], [None], [True])[4] == 0
    assert scaling.settle([torch.zeros(1, 0)], [None], [True])[4] == math.inf
    like = torch.zeros((), dtype=torch.float64)
    assert scaling.least([], like) == math.inf and scaling.most([], like) == 0
    some = [torch.tensor(3.0), torch.tensor(2.0)]
    assert scaling.least(some, like) == 2 and scaling.most([some, some], like) == 3
    unwatched = scaling.settle([torch.ones(1, 2)], [None], [True], None, False)
    assert unwatched[4] is None


def test_mass_counts_what_stands_before_a_power_and_behind_it() -> None:
    grad, values = torch.full((1, 2), 0.25), [torch.ones(1, 2), torch.ones(1, 2)]
    for powers, expected in (((1.0, 1.0), 0.5), ((1024.0, 0.125), 512.0), ((2.0**-5, 0.125), 0.5)):
        both = [torch.tensor(p) for p in powers]
        masses, _ = scaling.settle_back(grad, values, both, None, None, [True] * 2)
        assert max(masses) == expected
    factor, one = torch.tensor([2.0**20, 0.0]), [torch.tensor(1.0)]
    masses, _ = scaling.settle_back(grad, values[:1], one, None, factor, [True] * 2)
    assert max(masses) == 2.0**18


@pytest.mark.parametrize("value", [1e-45, 2.0**-127, 2.0**-126, 3.0])
def test_a_conversion_keeps_what_is_in_range(value: float) -> None:
    kept = scaling.kept(torch.tensor([value, 0.0, -3.0], dtype=torch.float64), torch.float32)
    suffices = bool(kept >= scaling.SMALLEST[torch.float32])
    assert suffices == (value >= torch.finfo(torch.float32).tiny)
    assert scaling.kept(torch.zeros(2), torch.float32) == math.inf
    assert scaling.kept(torch.zeros(0), torch.float32) == math.inf


# -- what is no number -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("scale", [None, 0, 500, -500])
def test_what_is_no_number_reaches_the_numbers_that_decide(
    bad: float, where: int, scale: int | None
) -> None:
    values = [torch.ones(2, 3), torch.ones(2, 3)]
    values[where][0, 1] = bad
    scales = [None, None if scale is None else torch.tensor(float(scale))]
    for factor in (None, torch.ones(3)):
        total, exponent, powers, *_ = scaling.settle(values, scales, [True, True], factor)
        mantissa, _, _ = scaling.sum_up([total], [exponent])
        assert not mantissa.isfinite()
        needed = [True] * (2 if factor is None else 3)
        ones = torch.ones(2, 3)
        masses, _ = scaling.settle_back(ones, values, powers, None, factor, needed)
        assert len(masses) >= 2 and scaling.most([masses], mantissa).shape == ()
    joined, exponent, *_ = scaling.join(values, scales, [True, True], 0)
    assert not scaling.sum_up([joined], [exponent])[0].isfinite()
    assert not scaling.sum_up(values, scales)[0].isfinite()


def test_a_factor_that_is_no_number_is_found() -> None:
    for bad in (math.nan, math.inf):
        factor = torch.tensor([1.0, bad, 1.0])
        total, exponent, *_ = scaling.settle([torch.ones(2, 3)], [None], [True], factor)
        assert not scaling.sum_up([total], [exponent])[0].isfinite()


# -- at the ends of float32 ------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "small"), [(1e38, 1e-38), (3e38, 1e-45), (1e-38, 1e38)])
def test_factors_at_the_ends_of_float32(large: float, small: float) -> None:
    """A large entry meets a small factor; also where an entry has few digits, they are its own."""
    values, factor = torch.tensor([[large, large]]), torch.tensor([small, 0.0])
    total, exponent, *_ = scaling.settle([values], [None], [True], factor)
    wide = float(values[0, 0].double() * factor[0].double())
    assert float(total[0, 0]) * 2.0 ** float(exponent) == pytest.approx(wide, rel=1e-6)
    assert 1 <= total[0, 0] < 2 and total[0, 1] == 0


def test_zeros_at_a_huge_exponent_do_not_count() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    for huge in (4000.0, 1e6, -math.inf):
        scales = [torch.tensor(huge), torch.tensor(-3000.0)]
        for found in (
            scaling.settle([zeros, ones], scales, [True, True]),
            scaling.settle([ones, zeros], scales[::-1], [True, True]),
            scaling.join([zeros, ones], scales, [True, True], 0),
        ):
            assert found[1] == -3000 and float(found[0].sum()) == 6
        mantissa, exponent, _ = scaling.sum_up([zeros, ones], scales)
        assert mantissa * 2.0 ** (exponent + 3000) == 6
    nothing, exponent, *_ = scaling.settle(
        [zeros, zeros], [torch.tensor(-math.inf)] * 2, [True] * 2
    )
    assert exponent == scaling.VOID and torch.equal(nothing, zeros)
    mantissa, exponent, _ = scaling.sum_up([zeros], [torch.tensor(-math.inf)])
    assert mantissa == 0 and exponent.isfinite()


@pytest.mark.parametrize("scale", [None, 0.0, 5000.0, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_are_not_multiplied_by_large_powers(scale: float | None, dtype: torch.dtype) -> None:
    zeros, factor = torch.zeros(2, 3, dtype=dtype), torch.full((3,), 100, dtype=dtype)
    scales = [None if scale is None else torch.tensor(scale, dtype=dtype), None]
    for bias in (torch.zeros(3, dtype=dtype), torch.full((3,), 0.25, dtype=dtype)):
        total, _, powers, *_ = scaling.settle([zeros, bias], scales, [True, True], factor)
        assert torch.equal(total, (bias > 0).to(dtype).expand(2, 3))
        assert powers[0] <= 1  # so that no gradient grows


def test_a_power_below_the_format_is_noticed_where_a_value_is_far_above() -> None:
    """The lesser of two terms is 2^100 times 2^-150: nothing of it is left, though it counts."""
    values, scales = (
        [torch.tensor([[2.0**100]]), torch.tensor([[1.0]])],
        [None, torch.tensor(150.0)],
    )
    total, *_, powers, shifts, smallest, largest = scaling.settle(values, scales, [True, True])
    assert float(total) == 1 and float(powers[0]) == 0 and float(largest) == 2.0**100
    assert float(smallest) < scaling.SMALLEST[torch.float32]
    masses, _ = scaling.settle_back(
        torch.ones(1, 1), values, powers, None, None, [True, True], largest
    )
    assert max(map(float, masses)) > scaling.MASS[torch.float32]
