"""Quantization: what lies on the grid, and what its certificate says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import fxpath
from fxpath.pairs.quantization import _round
from tests.support.generated import bounded
from tests.support.nets import randomize


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 5),
    )
    return randomize(model, 0)


SHAPE = (2, 6, 6)
ROUNDED = {"0.weight", "4.weight", "4.bias", "7.weight", "7.bias"}


def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    return copied


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rounding", ["zero", "nearest"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entries_lie_on_the_grid(bits: int, rounding: str, per_channel: bool) -> None:
    model = net()
    quantized = fxpath.quantize(
        model, bits, rounding=rounding, per_channel=per_channel, input_shape=SHAPE
    )
    assert set(quantized.steps) == ROUNDED
    assert quantized.state_dict.keys() == model.state_dict().keys()
    for name, original in model.state_dict().items():
        found = quantized.state_dict[name]
        assert found.dtype == original.dtype and found.data_ptr() != original.data_ptr()
        if name not in ROUNDED:
            assert torch.equal(found, original)
            continue
        step = quantized.steps[name]
        level = found.double() / step
        assert torch.equal(level, level.round()) and level.abs().max() <= 2 ** (bits - 1) - 1
        off = (original.double() - found.double()).abs() / step
        if rounding == "zero":
            assert (found.abs() <= original.abs()).all() and (off < 1).all()
            assert (found * original >= 0).all()
        else:
            assert (off <= 0.5).all()


def test_one_step_for_each_output_channel() -> None:
    model = net()
    steps = fxpath.quantize(model, 4, per_channel=True, input_shape=SHAPE).steps
    assert {name: tuple(step.shape) for name, step in steps.items()} == {
        "0.weight": (4, 1, 1, 1),
        "4.weight": (1, 3, 1, 1),  # a transposed convolution lists its inputs first
        "4.bias": (1,),
        "7.weight": (5, 1),
        "7.bias": (1,),
    }
    largest = model[7].weight.abs().amax(1, keepdim=True).double()
    torch.testing.assert_close(steps["7.weight"], largest / 7, rtol=1e-5, atol=0)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.integers(2, 16),
    st.sampled_from([torch.float32, torch.float64]),
)
@bounded(200)
def test_rounding_towards_zero_never_enlarges(values: list[float], bits: int, dtype: Any) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    tensor[tensor.abs() < 1e-30] = 0  # below, steps would have no binary digits left
    step, found = _round("w", tensor, bits, "zero", [])
    assert (found.abs() <= tensor.abs()).all()
    assert (found * tensor >= 0).all()
    assert ((tensor.double() - found.double()).abs() <= step).all()
    assert torch.equal(found.double(), (found.double() / step).round() * step)
    # What lies on the grid stays.
    again = (found.double() / step).round()
    assert again.abs().max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_certificate_of_rounding_towards_zero_is_the_exact_metric(bits: int) -> None:
    model = net()
    quantized = fxpath.quantize(model, bits, input_shape=SHAPE)
    metric = quantized.certificate
    assert isinstance(metric, fxpath.PathMetric) and metric.exact
    other = load(model, quantized.state_dict)
    norms = [fxpath.path_norm(m, SHAPE, dtype=torch.float64) for m in (model, other)]
    assert metric.value == pytest.approx(norms[0] - norms[1], rel=1e-9)
    x = torch.rand(50, *SHAPE, dtype=torch.float64) * 2 - 1
    gap = (model.double()(x) - other.double()(x)).abs().sum(1)
    assert gap.max() <= metric.value * (1 + 1e-9)
    assert gap.max() > 0


def test_enumerated_distance_equals_the_certificate() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    quantized = fxpath.quantize(model, 3)
    other = load(model, quantized.state_dict)
    first, second = (fxpath.path_lifting(m).phi for m in (model, other))
    distance = (first - second).abs().sum().item()
    assert quantized.certificate.value == pytest.approx(distance, rel=1e-9)
    nearest = load(model, fxpath.quantize(model, 3, rounding="nearest").state_dict)
    metric = fxpath.path_metric(model, nearest)
    distance = (first - fxpath.path_lifting(nearest).phi).abs().sum().item()
    assert not metric.exact
    assert metric.lower * (1 - 1e-9) <= distance <= metric.upper * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_certificate_of_rounding_to_nearest_holds(bits: int) -> None:
    model = net()
    quantized = fxpath.quantize(model, bits, rounding="nearest", input_shape=SHAPE)
    bound = quantized.certificate
    assert isinstance(bound, fxpath.Bound)
    other = load(model, quantized.state_dict)
    x = torch.rand(50, *SHAPE, dtype=torch.float64) * 2 - 1
    gap = (model.double()(x) - other.double()(x)).abs().sum(1)
    assert 0 < gap.max() <= float(bound) * (1 + 1e-9)


def test_more_bits_are_closer() -> None:
    model = net()
    values = [fxpath.quantize(model, b, input_shape=SHAPE).certificate.value for b in (2, 4, 8, 12)]
    assert values == sorted(values, reverse=True) and values[-1] > 0


def test_rounding_batch_norm_parameters_would_break_the_certificate() -> None:
    """Why they are left alone: rounding them towards zero enlarges an effective bias."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(2.0)
        model[1].running_mean.fill_(2.5)
    worse = copy.deepcopy(model)
    worse[0].bias.data.fill_(1.0)  # towards zero
    assert fxpath.path_norm(worse) > fxpath.path_norm(model)
    quantized = fxpath.quantize(model.eval(), 2)
    assert set(quantized.steps) == {"0.weight"}


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    state = fxpath.quantize(Tied(), 3, input_shape=(3,)).state_dict
    assert torch.equal(state["first.weight"], state["second.weight"])
    assert len(state["first.weight"].unique()) <= 7


def test_a_tensor_of_zeros_stays() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.bias)
    model.weight.data[1] = 0
    state = fxpath.quantize(model, 4, per_channel=True).state_dict
    assert not state["bias"].any() and not state["weight"][1].any()


def test_half_precision_values_are_numbers_of_the_format() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).to(torch.bfloat16)
    quantized = fxpath.quantize(model, 8, input_shape=(8,))
    for name, step in quantized.steps.items():
        level = quantized.state_dict[name].double() / step
        assert torch.equal(level, level.round())
    assert quantized.certificate.exact
    with pytest.raises(ValueError, match="0.weight: torch.bfloat16 has 8 binary digits"):
        fxpath.quantize(model, 9, input_shape=(8,))


def test_wrong_arguments() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="bits=1"):
        fxpath.quantize(model, 1)
    with pytest.raises(ValueError, match="rounding='up'"):
        fxpath.quantize(model, 4, rounding="up")
    prune.l1_unstructured(model[0], "weight", amount=2)
    with pytest.raises(ValueError, match="0.weight: computed from other parameters"):
        fxpath.quantize(model, 4)
    model = nn.Linear(3, 1)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite entries in weight"):
        fxpath.quantize(model, 4)
    with pytest.raises(fxpath.UnsupportedModelError, match="gelu"):
        fxpath.quantize(nn.Sequential(nn.Linear(2, 2), nn.GELU()), 4)
