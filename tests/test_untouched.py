"""The model that is handed in is left alone, and so are the caller's modes and inputs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxpath
from tests.support.checks import assert_equal_analyses, describe_tensor, differences, snapshot
from tests.support.nets import (
    SMALL,
    SmallNet,
    mlp,
    parametrized_net,
    pruned_net,
    randomize,
    resnet18,
    small_net,
)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv.weight.detach().mul_(1.0),
        lambda m: m.conv.weight.data.view(-1)[0].neg_(),
        lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.detach().clone())),
        lambda m: m.bn.running_mean.add_(1),
        lambda m: m.bn.num_batches_tracked.add_(1),
        lambda m: m.drop.train(),
        lambda m: m.fc.bias.requires_grad_(False),
        lambda m: setattr(m.fc.bias, "grad", torch.ones(4)),
        lambda m: m.fc.register_forward_hook(lambda *_: None),
        lambda m: m.fc.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        lambda m: m.register_buffer("extra", torch.ones(1)),
        lambda m: m.add_module("extra", nn.ReLU()),
        lambda m: setattr(m.conv, "forward", m.conv.forward),
        lambda m: torch.rand(1),
        lambda m: np.random.rand(),
        lambda m: random.random(),
    ],
)
def test_snapshot_notices_changes(change: Callable[[nn.Module], object]) -> None:
    model = small_net()
    before = snapshot(model)
    assert not differences(before, snapshot(model))
    change(model)
    assert differences(before, snapshot(model))


class Unsupported(SmallNet):
    """An operation outside the model class, after some that are inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Branching(SmallNet):
    """Control flow that depends on data: it can't be captured at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else x


def in_training(model: nn.Module) -> nn.Module:
    """Train mode, except for one module, with gradients and a frozen parameter."""
    model.train()
    model(torch.ones(3, *SMALL)).sum().backward()
    model.fc.bias.requires_grad_(False)
    model.bn.eval()
    return model


def hooked_net() -> nn.Module:
    model = small_net()
    model.conv.register_forward_hook(lambda *_: None)
    model.fc.register_full_backward_hook(lambda *_: None)
    return model


UNTOUCHED = {
    "eval": small_net,
    "train": lambda: in_training(small_net()),
    "unsupported": lambda: in_training(randomize(Unsupported(), weights=True).eval()),
    "branching": lambda: randomize(Branching(), weights=True).eval().train(),
    "pruned": lambda: pruned_net().train(),
    "parametrized": parametrized_net,
    "parametrized, train": lambda: parametrized_net().train(),
    "half": lambda: small_net().half(),
    "hooks": hooked_net,
    "data parallel": lambda: nn.DataParallel(small_net()).train(),
    "not finite": lambda: small_net().apply(
        lambda m: isinstance(m, nn.Linear) and nn.init.constant_(m.bias, math.nan)
    ),
    "all frozen": lambda: small_net().requires_grad_(False),
}


RAISES = {"unsupported", "branching", "not finite"}


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_the_model_is_left_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = UNTOUCHED[kind]()
    before = snapshot(model)
    for verb in (fxpath.analyze, fxpath.path_norm, fxpath.path_magnitude):
        if kind in RAISES:
            with pytest.raises((fxpath.UnsupportedModelError, ValueError)):
                verb(model, SMALL)
        else:
            verb(model, SMALL)
        assert differences(before, snapshot(model)) == [], verb.__name__
    if kind != "branching":
        fxpath.check(model, SMALL)
        assert differences(before, snapshot(model)) == []


def test_a_real_model_in_train_mode_is_left_alone() -> None:
    model = resnet18().train()
    before = snapshot(model)
    analysis = fxpath.analyze(model, (3, 32, 32))
    assert differences(before, snapshot(model)) == []
    assert_equal_analyses(analysis, fxpath.analyze(model.eval(), (3, 32, 32)), rtol=1e-6)


class Lazy(dict[str, str]):
    """Makes what it returns where it is read, as registries of large libraries do."""

    def __getitem__(self, key: str) -> str:
        raise ImportError(key)

    def keys(self) -> Any:
        return ["something large"]

    def values(self) -> Any:
        return [self[key] for key in self.keys()]

    def __iter__(self) -> Any:
        return iter(self.keys())


REGISTRY = Lazy(stored="here")


class Registered(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        REGISTRY.update(stored="by forward")
        return super().forward(x)


def test_a_dictionary_is_not_asked_to_make_what_it_holds() -> None:
    analysis = fxpath.analyze(Registered(2, 1))
    assert analysis.scores.keys() == {"weight", "bias"}
    assert dict.__getitem__(REGISTRY, "stored") == "here"


def test_example_inputs_are_left_alone() -> None:
    model = small_net()
    x = torch.randn(1, *SMALL, requires_grad=True)
    before = snapshot(model), describe_tensor(x)
    analysis = fxpath.analyze(model, example_inputs=(x,))
    assert differences(before[0], snapshot(model)) == []
    assert describe_tensor(x) == before[1]
    assert_equal_analyses(analysis, fxpath.analyze(model, SMALL), rtol=1e-6)


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.enable_grad,
    ],
    ids=["no_grad", "inference_mode", "autocast", "enable_grad"],
)
def test_modes_of_the_caller_change_nothing(context: Callable[[], Any]) -> None:
    model = small_net()
    expected = fxpath.analyze(model, SMALL)
    before = snapshot(model)
    with context():
        analysis = fxpath.analyze(model, SMALL)
    assert_equal_analyses(analysis, expected, rtol=1e-6)
    assert differences(before, snapshot(model)) == []


def test_results_are_detached_and_independent_of_the_model() -> None:
    model = mlp()
    analysis = fxpath.analyze(model)
    kept = {name: scores.clone() for name, scores in analysis.scores.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, scores in analysis.scores.items():
        assert not scores.requires_grad
        assert torch.equal(scores, kept[name])
