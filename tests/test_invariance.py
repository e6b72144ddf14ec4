"""Rescaling neurons by powers of two changes neither path-norm nor scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from tests.support.checks import assert_equal_analyses
from tests.support.nets import mlp, randomize, resnet18, small_vgg11_bn

# Invariance ---------------------------------------------------------------------------


def powers_of_two(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 21, (count,), generator=generator)
    exponents[: min(count, 2)] = torch.tensor([-20, 20])[: min(count, 2)]
    return torch.exp2(exponents.float())


@torch.no_grad()
def rescale(first: nn.Module, norm: nn.Module | None, second: nn.Module, seed: int) -> None:
    """Multiply the neurons of `first` by powers of two and divide them out in `second`.

    With BatchNorm in between its running mean and bias take part, as in appendix D of the paper.
    """
    factors = powers_of_two(len(first.weight), seed)
    first.weight.mul_(factors.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.mul_(factors)
    if norm is not None:
        norm.running_mean.mul_(factors)
        norm.bias.mul_(factors)
    columns = factors.repeat_interleave(second.weight.shape[1] // len(factors))
    second.weight.div_(columns.view(1, -1, *[1] * (second.weight.dim() - 2)))


def rescaled_resnet18(model: nn.Module) -> nn.Module:
    for number, block in enumerate(m for m in model.modules() if hasattr(m, "downsample")):
        rescale(block.conv1, block.bn1, block.conv2, number)
    return model


def rescaled_chain(model: nn.Module) -> nn.Module:
    """Rescales between all layers with weights that follow each other in `model.modules()`."""
    maps = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for number, (first, second) in enumerate(zip(maps, maps[1:], strict=False)):
        norm = norms[number] if number < len(norms) else None
        rescale(first, norm, second, number)
    return model


def conv_net() -> nn.Module:
    return randomize(
        nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 2 * 2, 10),
        ),
        weights=True,
    ).eval()


@pytest.mark.parametrize(
    ("make", "change", "shape"),
    [
        (mlp, rescaled_chain, (5,)),
        (conv_net, rescaled_chain, (2, 10, 10)),
        (small_vgg11_bn, rescaled_chain, (3, 32, 32)),
        (resnet18, rescaled_resnet18, (3, 32, 32)),
    ],
    ids=["mlp", "conv_net", "vgg11_bn", "resnet18"],
)
def test_invariance_under_rescaling_of_neurons(make: Any, change: Any, shape: Any) -> None:
    model = make()
    rescaled = change(copy.deepcopy(model))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(rescaled(x), model(x), rtol=1e-3, atol=1e-4)
    changed = [
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), rescaled.parameters(), strict=True)
    ]
    assert sum(changed) > 2
    assert_equal_analyses(fxpath.analyze(rescaled, shape), fxpath.analyze(model, shape))


def test_a_change_that_is_no_rescaling_is_noticed() -> None:
    model = conv_net()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[4].weight[:, 0].mul_(1.001)
    with pytest.raises(AssertionError):
        assert_equal_analyses(
            fxpath.analyze(changed, (2, 10, 10)), fxpath.analyze(model, (2, 10, 10))
        )
