"""What the theory promises of scores: (11), (14), sums of shares, and what comes back."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxpath
from tests.support.checks import assert_equal_analyses, relative_derivative
from tests.support.nets import SMALL, Tied, mlp, randomize, resnet18, small_net, small_vgg11_bn
from tests.support.zoo import build


def test_comparison_of_analyses_notices_differences() -> None:
    model = mlp()
    expected = fxpath.analyze(model)
    assert_equal_analyses(fxpath.analyze(copy.deepcopy(model)), expected, rtol=1e-6)
    with torch.no_grad():
        model[2].weight[0, 0] *= 1.01
    with pytest.raises(AssertionError):
        assert_equal_analyses(fxpath.analyze(model), expected)


# (11) and (14) ------------------------------------------------------------------------


def set_to_zero(model: nn.Module, name: str, index: tuple[int, ...]) -> None:
    """Set one entry of the effective parameters to zero."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    with torch.no_grad():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and kind == "bias":
            # The coordinate is the folded bias beta + gamma (b - mu) / sigma. In the models here
            # each BatchNorm follows its convolution in the list of modules too.
            modules = list(model.modules())
            own = modules[modules.index(module) - 1].bias
            shift = module.running_mean - (0 if own is None else own)
            sigma = torch.sqrt(module.running_var + module.eps)
            module.bias[index] = (module.weight * shift / sigma)[index]
        else:
            model.get_parameter(name)[index] = 0.0


def assert_formula_11(model: nn.Module, shape: tuple[int, ...], names: list[str]) -> None:
    """Path-Mag = norm - norm without the entry: for the largest entry, then for any, in turn."""
    analysis = fxpath.analyze(model, shape)
    rng = np.random.default_rng(0)
    for turn, name in enumerate(names):
        scores = analysis.scores[name]
        entry = int(rng.integers(scores.numel())) if turn % 2 else int(scores.argmax())
        index = tuple(int(i) for i in np.unravel_index(entry, tuple(scores.shape)))
        pruned = copy.deepcopy(model)
        set_to_zero(pruned, name, index)
        lost = analysis.path_norm - fxpath.path_norm(pruned, shape)
        magnitude = float(analysis.path_magnitude(name)[index])
        # The subtraction loses what is below the rounding of the norm.
        tolerance = 1e-13 * analysis.path_norm + 1e-9 * magnitude
        assert abs(lost - magnitude) <= tolerance, (name, index, lost, magnitude)


def test_formula_11_on_a_resnet() -> None:
    names = ["conv1.weight", "bn1.bias", "layer2.0.downsample.0.weight", "fc.weight"]
    names += ["layer4.0.bn2.bias", "layer1.1.conv2.weight"]
    assert_formula_11(build("resnet").eval().double(), (3, 32, 32), names)


def test_formula_11_on_a_vgg_with_batch_norm() -> None:
    names = ["features.0.weight", "features.5.bias", "features.26.bias", "features.25.weight"]
    names += ["classifier.0.bias", "classifier.3.weight"]
    assert_formula_11(build("vgg_bn").eval().double(), (3, 32, 32), names)


def test_formula_11_is_checked() -> None:
    model = small_net().double()
    honest = fxpath.path_norm
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(fxpath, "path_norm", lambda *args: honest(*args) * (1 - 1e-6))
        assert_formula_11(model, SMALL, ["inner.weight"])


@pytest.mark.parametrize(
    ("make", "shape", "entries"),
    [
        (
            small_net,
            SMALL,
            [("conv.weight", (1, 0, 1, 2)), ("inner.weight", (0, 2, 0, 1)), ("fc.bias", (3,))],
        ),
        (
            lambda: randomize(Tied(), weights=True).eval(),
            (4,),
            [("first.weight", (1, 2)), ("first.bias", (0,))],
        ),
    ],
    ids=["small_net", "tied"],
)
def test_formula_14_against_finite_differences(make: Any, shape: Any, entries: Any) -> None:
    model = make().double()
    analysis = fxpath.analyze(model, shape)
    for name, index in entries:
        derivative = relative_derivative(model, shape, model.get_parameter(name), index)
        assert float(analysis.path_magnitude(name)[index]) == pytest.approx(derivative, rel=1e-8)


# Sums of shares -----------------------------------------------------------------------


def conv_chain(bias: bool) -> nn.Sequential:
    return randomize(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=bias),
            nn.LeakyReLU(1.5),
            nn.AvgPool2d(2, stride=1),
            nn.ConvTranspose2d(4, 3, 2, stride=2, bias=bias),
            nn.Flatten(),
            nn.Linear(3 * 6 * 6, 5, bias=bias),
        ),
        weights=True,
    ).eval()


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (conv_chain, (2, 11, 11))])
def test_shares_of_each_layer_of_a_chain_without_biases_add_up_to_1(make: Any, shape: Any) -> None:
    analysis = fxpath.analyze(make(bias=False).double(), shape)
    assert len(analysis.scores) in (3, 4)
    for name, scores in analysis.scores.items():
        assert float(scores.sum()) == pytest.approx(1, rel=1e-12), name


@pytest.mark.parametrize(
    ("make", "shape", "first"),
    [
        (mlp, (5,), "0.weight"),
        (lambda: conv_chain(bias=True), (2, 11, 11), "0.weight"),
        (small_net, SMALL, "conv.weight"),
        (resnet18, (3, 32, 32), "conv1.weight"),
        (small_vgg11_bn, (3, 32, 32), "features.0.weight"),
    ],
    ids=["mlp", "conv_chain", "small_net", "resnet18", "vgg11_bn"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_path_starts_at_the_first_layer_or_at_a_bias(
    make: Any, shape: Any, first: str, dtype: torch.dtype
) -> None:
    scores = fxpath.analyze(make().to(dtype), shape).scores
    starts = [s for name, s in scores.items() if name == first or name.endswith("bias")]
    total = sum(float(share.double().sum()) for share in starts)
    assert total == pytest.approx(1, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert all(0 <= s.min() and s.max() <= 1 + 1e-6 for s in scores.values())
    assert all(s.dtype == dtype for s in scores.values())


@pytest.mark.parametrize(
    ("make", "shape", "layers"),
    [
        (mlp, (5,), [("0", "0.bias"), ("2", "2.bias"), ("4", "4.bias")]),
        (small_net, SMALL, [("conv", "bn.bias"), ("fc", "fc.bias"), ("inner", None)]),
    ],
    ids=["mlp", "small_net"],
)
def test_share_of_a_neuron_is_the_sum_over_its_edges_and_bias(
    make: Any, shape: Any, layers: Any
) -> None:
    analysis = fxpath.analyze(make().double(), shape)
    for layer, bias in layers:
        expected = analysis.scores[f"{layer}.weight"].flatten(1).sum(1)
        expected = expected + (analysis.scores[bias] if bias else 0)
        torch.testing.assert_close(analysis.neuron_shares[layer], expected, rtol=1e-9, atol=0)


# What comes back ----------------------------------------------------------------------


def test_one_liners_agree_with_the_analysis() -> None:
    model = small_net().double()
    analysis = fxpath.analyze(model, SMALL)
    assert analysis.log10_path_norm == pytest.approx(math.log10(analysis.path_norm), abs=1e-12)
    assert fxpath.path_norm(model, SMALL) == analysis.path_norm
    magnitudes = fxpath.path_magnitude(model, SMALL)
    assert set(magnitudes) == set(analysis.scores)
    for name, magnitude in magnitudes.items():
        torch.testing.assert_close(magnitude, analysis.scores[name] * analysis.path_norm)
        torch.testing.assert_close(magnitude, analysis.path_magnitude(name))
    norms = fxpath.path_norms(model, SMALL, q=(1, 2, 4))
    assert dict(norms) == {
        q: pytest.approx(fxpath.path_norm(model, SMALL, q=q), rel=1e-12) for q in (1, 2, 4)
    }
    assert fxpath.check(model, SMALL)


def test_scores_have_names_and_shapes_of_parameters() -> None:
    model = resnet18()
    parameters = dict(model.named_parameters())
    scores = fxpath.analyze(model, (3, 32, 32)).scores
    assert {name: s.shape for name, s in scores.items()} == {
        name: parameters[name].shape for name in scores
    }
    gammas = {
        name for name in parameters if name.endswith(".weight") and parameters[name].dim() == 1
    }
    assert set(scores) == set(parameters) - gammas


def test_the_report_is_data_and_a_table() -> None:
    model = resnet18()
    analysis = fxpath.analyze(model, (3, 32, 32))
    assert max(len(line) for line in str(analysis).splitlines()) <= 100
    assert "layer1.0.conv1" in str(analysis)
    data = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert data["log10_path_norm"] == analysis.log10_path_norm
    assert [row["name"] for row in data["layers"]] == [row["name"] for row in analysis.layers]
    assert len(analysis.layers) >= sum(
        isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()
    )
