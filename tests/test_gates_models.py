"""Networks of torchvision and timm with gates, against a slow evaluation in float64.

In the reference each module that is a gate of its input, or multiplies it by gates, is put out of
the way: what is left is a ReLU network whose paths and weights are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxpath
from tests.oracles.reference import reference
from tests.support.nets import randomize
from tests.test_torchvision import assert_close_norm, assert_close_scores

#: Modules of which a path takes a factor of size at most 1.
GATES = {
    *("SiLU", "Hardswish", "GELU", "Mish", "Tanh", "Sigmoid", "Hardsigmoid"),
    *("SqueezeExcitation", "SqueezeExcite", "SEModule", "EcaModule", "CecaModule"),
}


def ungated(model: nn.Module) -> nn.Module:
    """A copy in which nothing is left of the gates, nor of what only they read."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in GATES:
                setattr(module, name, nn.Identity())
    return twin


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=10)


def timm_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        made: nn.Module = timm.create_model(name, num_classes=10)
        return made

    return make


def long(*values: Any, id: str) -> Any:
    return pytest.param(*values, id=id, marks=pytest.mark.long)


MODELS = [
    pytest.param(torchvision_model("mobilenet_v3_small"), 33, id="mobilenet_v3_small"),
    pytest.param(timm_model("seresnet18"), 33, id="seresnet18"),
    long(torchvision_model("mobilenet_v3_small"), 64, id="mobilenet_v3_small-64"),
    long(torchvision_model("mobilenet_v3_large"), 64, id="mobilenet_v3_large"),
    long(torchvision_model("efficientnet_b0"), 33, id="efficientnet_b0"),
    long(torchvision_model("efficientnet_v2_s"), 33, id="efficientnet_v2_s"),
    long(torchvision_model("regnet_y_400mf"), 33, id="regnet_y_400mf"),
    long(timm_model("legacy_seresnet18"), 65, id="legacy_seresnet18"),
    long(timm_model("ecaresnet26t"), 65, id="ecaresnet26t"),
    long(timm_model("eca_resnet33ts"), 65, id="eca_resnet33ts"),
    long(timm_model("cs3darknet_focus_s"), 64, id="cs3darknet_focus_s"),
    long(timm_model("sedarknet21"), 64, id="sedarknet21"),
]


@pytest.mark.parametrize(("make", "size"), MODELS)
def test_agrees_with_the_reference_without_gates(make: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    model, shape = randomize(make()).eval(), (3, size, size)
    expected = reference(ungated(model), shape)
    analysis = fxpath.analyze(model, shape, gates=True, dtype=torch.float64)
    assert_close_norm(analysis.path_norm, expected.path_norm, 1e-9)
    assert_close_scores(analysis.scores, expected.scores, 1e-8)
    # What the reference has thrown out is what is inside a gate, and nothing else is.
    thrown = {n for n, _ in model.named_parameters()}
    thrown -= {n for n, _ in ungated(model).named_parameters()}
    inside = {n for n, why in analysis.unscored.items() if "inside a gate" in why}
    assert inside == thrown
    x = torch.randn(4, *shape)
    with torch.no_grad():
        outputs = model(x).double().abs().sum(1)
    assert bool((outputs <= analysis.path_norm * x.abs().amax((1, 2, 3)).clamp(min=1)).all())


def small() -> nn.Module:
    """A network of the blocks of MobileNetV3 and EfficientNet."""
    torch.manual_seed(0)
    setting = torchvision.models.mobilenetv3.InvertedResidualConfig
    blocks = [
        setting(8, 3, 16, 8, True, "HS", 1, 1, 1.0),
        setting(8, 5, 16, 12, True, "RE", 2, 1, 1.0),
        setting(12, 3, 24, 12, False, "HS", 1, 2, 1.0),
    ]
    made: nn.Module = torchvision.models.MobileNetV3(blocks, 16, num_classes=3)
    return randomize(made).double().eval()


def absolute(model: nn.Module) -> nn.Module:
    """The lifted network as a module: batch norms folded by hand, absolute values everywhere."""
    lifted = ungated(model)
    for module in lifted.modules():
        if isinstance(module, nn.ReLU):
            module.forward = lambda x: x  # type: ignore[method-assign]
        if isinstance(module, nn.Sequential):
            pairs = zip(module, list(module)[1:], strict=False)
            for conv, norm in pairs:
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    fold(conv, norm)
    with torch.no_grad():
        for parameter in lifted.parameters():
            parameter.abs_()
    return lifted


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert conv.bias is None
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv.weight.mul_(scale[:, None, None, None])
        norm.bias.sub_(scale * norm.running_mean)
        norm.weight.fill_(1)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)


def test_jacobian_of_the_lifted_network() -> None:
    """It is affine, and the path-norm is what its outputs for ones sum up to."""
    model, shape = small(), (3, 12, 12)
    lifted = absolute(model)

    def total(x: Tensor) -> Tensor:
        return lifted(x[None]).sum()

    points = torch.randn(2, *shape, dtype=torch.float64)
    slopes = [torch.autograd.functional.jacobian(total, x) for x in points]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
    at_zero = total(torch.zeros(shape, dtype=torch.float64)).detach()
    norm = fxpath.path_norm(model, shape, gates=True)
    assert norm == pytest.approx(float(slopes[0].sum() + at_zero), rel=1e-11)


def test_exponents_with_and_without_reduction() -> None:
    model, shape = small(), (3, 13, 12)
    exponents = (0, 1, 2)
    expected = {q: reference(ungated(model), shape, q, scores=False).path_norm for q in exponents}
    for reduce in (True, False):
        norms = fxpath.path_norms(model, shape, q=exponents, gates=True, reduce=reduce)
        assert norms == pytest.approx(expected, rel=1e-10)


def test_gates_do_not_change_what_needs_none() -> None:
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    plain, asked = (fxpath.analyze(model, (3,), gates=gates) for gates in (False, True))
    assert plain.path_norm == asked.path_norm
    for name, score in plain.scores.items():
        assert torch.equal(score, asked.scores[name])
