"""Path-norms that no float holds, that are zero, or that are not finite."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torchvision
from torch import nn

import fxpath
from tests.support.nets import SMALL, chain, chain_log10, mlp, randomize, small_net

# Numbers that do not fit --------------------------------------------------------------


@pytest.mark.slow
def test_resnet152_in_float32() -> None:
    model = randomize(torchvision.models.resnet152(num_classes=10, width_per_group=8)).eval()
    exported = torch.export.export(model, (torch.ones(1, 3, 32, 32),))
    found = fxpath.analyze(exported)
    exact = fxpath.path_norm(exported, dtype=torch.float64)
    assert found.log10_path_norm > 100
    assert abs(found.log10_path_norm - math.log10(exact)) < 1e-4 / math.log(10)
    for name, scores in found.scores.items():
        assert scores.isfinite().all(), name
    starts = [s for n, s in found.scores.items() if n == "conv1.weight" or n.endswith("bias")]
    assert sum(float(s.double().sum()) for s in starts) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weight", "depth"), [(1e20, 20), (1e-20, 20), (1e35, 12), (1e-35, 12)])
def test_norms_of_1e400_and_1e_minus_400(dtype: torch.dtype, weight: float, depth: int) -> None:
    model = chain(weight, depth).to(dtype)
    analysis = fxpath.analyze(model)
    assert abs(analysis.log10_path_norm) > 390
    assert analysis.log10_path_norm == pytest.approx(chain_log10(model), abs=1e-5)
    assert analysis.path_norm == (math.inf if weight > 1 else 0.0)
    for scores in analysis.scores.values():
        torch.testing.assert_close(scores, torch.full((2, 2), 0.25, dtype=dtype))
    if weight > 1:
        with pytest.raises(OverflowError, match="log10"):
            analysis.path_magnitude("0.weight")
        with pytest.raises(OverflowError, match="log10"):
            fxpath.path_magnitude(model)


def test_path_magnitude_that_fits_float64_only() -> None:
    model = chain(1e20, 3)
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == pytest.approx(10 ** chain_log10(model), rel=1e-5)
    with pytest.raises(OverflowError, match="log10"):
        analysis.path_magnitude("0.weight")
    wide = fxpath.analyze(model, dtype=torch.float64)
    magnitudes = wide.path_magnitude("0.weight")
    assert magnitudes.dtype == torch.float64
    torch.testing.assert_close(magnitudes, wide.scores["0.weight"] * wide.path_norm)


@pytest.mark.parametrize("q", [0, 0.5, 2, 4])
def test_norm_of_1e400_for_other_exponents(q: float) -> None:
    model = chain(1e20, 20)
    paths, depth, weight = 2**21, 20, math.log10(float(model[0].weight.detach()[0, 0]))
    expected = math.log10(paths) / q + depth * weight if q else math.log10(paths)
    analysis = fxpath.analyze(model, q=q)
    assert analysis.log10_path_norm == pytest.approx(expected, abs=1e-5)
    assert analysis.path_norm == (paths if q == 0 else math.inf)


def test_branches_of_very_different_size_both_count() -> None:
    # 1e25 * 1e-25 and 1e-25 * 1e25: float32 with one scale per tensor would lose one of them.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e25], [1e-25]]))
        model[2].weight.copy_(torch.tensor([[1e-25, 0.0], [0.0, 1e25]]))
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == pytest.approx(2, rel=1e-5)
    first, second = analysis.scores["0.weight"].float(), analysis.scores["2.weight"].float()
    torch.testing.assert_close(first, torch.tensor([[0.5], [0.5]]))
    torch.testing.assert_close(second, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))


@pytest.mark.parametrize("exponent", [1, -1])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_folded_weights_that_do_not_fit_float32(exponent: int, dtype: torch.dtype | None) -> None:
    # gamma W / sigma is 1e45 or 1e-45, and the last layer brings it back.
    model = nn.Sequential(
        nn.Conv1d(1, 1, 1, bias=False), nn.BatchNorm1d(1), nn.Conv1d(1, 1, 1, bias=False)
    ).eval()
    with torch.no_grad():
        model[0].weight.fill_(10.0 ** (30 * exponent))
        model[1].weight.fill_(10.0 ** (15 * exponent))
        model[1].running_var.fill_(1 - model[1].eps)
        model[2].weight.fill_(10.0 ** (-30 * exponent))
    analysis = fxpath.analyze(model, (1, 3), dtype=dtype)
    assert analysis.log10_path_norm == pytest.approx(math.log10(3) + 15 * exponent, abs=1e-6)
    assert {name: float(scores.sum()) for name, scores in analysis.scores.items()} == {
        "0.weight": pytest.approx(1, rel=1e-5),
        "1.bias": 0,
        "2.weight": pytest.approx(1, rel=1e-5),
    }


def test_norm_of_zero() -> None:
    model = mlp(bias=False)
    nn.init.zeros_(model[2].weight)
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == 0
    assert analysis.log10_path_norm == -math.inf
    for name, scores in analysis.scores.items():
        assert torch.equal(scores, torch.zeros_like(scores)), name
        assert torch.equal(analysis.path_magnitude(name), torch.zeros_like(scores)), name
    data = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert data["path_norm"] == 0 and data["log10_path_norm"] is None
    assert "path-norm 0 (log10 -inf)" in str(analysis)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "bn.weight", "bn.running_mean", "fc.bias"])
def test_a_value_that_is_not_finite_is_an_error_that_names_it(name: str, value: float) -> None:
    model = small_net()
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        fxpath.analyze(model, SMALL)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        fxpath.path_norm(model, SMALL)
