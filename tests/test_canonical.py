"""Canonical magnitude: least norm, invariance, and scores relative to their tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxpath
from fxpath.criteria import canonical_magnitude, path_shares
from fxpath.program.program import build
from fxpath.program.theta import coordinates
from fxpath.symmetry import least_norm
from tests.support.canonical import MORE, assert_equal, minimized, mlp, taken
from tests.support.nets import randomize
from tests.support.symmetric import UNUSUAL, Residual, apply, changed, outputs


@pytest.mark.parametrize("seed", range(2))
def test_least_norm_of_layers_in_a_row(seed: int) -> None:
    model = randomize(mlp(4, 5, 6, 3), 0)
    first, second, third = model[0], model[2], model[4]

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = factor["a"], factor["b"]
        return {
            "0.weight": a[:, None] * first.weight.detach(),
            "0.bias": a * first.bias.detach(),
            "2.weight": b[:, None] * second.weight.detach() / a,
            "2.bias": b * second.bias.detach(),
            "4.weight": third.weight.detach() / b,
            "4.bias": third.bias.detach(),
        }

    expected = minimized({"a": 5, "b": 6}, scaled, seed)
    assert_equal(canonical_magnitude(model), expected, rtol=1e-6)
    assert (expected["0.weight"] - first.weight.abs()).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(2))
def test_least_norm_of_a_residual_block_with_batch_norm(seed: int) -> None:
    model = randomize(Residual().double(), 1).eval()
    sigma = (model.norm.running_var + model.norm.eps).sqrt()
    inner = model.inner.weight / sigma[:, None, None, None]
    if model.norm.weight is not None:
        inner = inner * model.norm.weight[:, None, None, None]
    shift = model.norm.bias - model.norm.weight * model.norm.running_mean / sigma
    inner, shift = inner.detach(), shift.detach()

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        stage, hidden = factor["stage"], factor["hidden"]
        rows = hidden[:, None, None, None]
        return {
            "stem.weight": model.stem.weight.detach() * stage[:, None, None, None],
            "stem.bias": model.stem.bias.detach() * stage,
            "inner.weight": inner * rows / stage[:, None, None],
            "norm.bias": shift * hidden,
            "outer.weight": model.outer.weight.detach()
            * stage[:, None, None, None]
            / hidden[:, None, None],
            "outer.bias": model.outer.bias.detach() * stage,
            "head.weight": model.head.weight.detach() / stage.repeat_interleave(9),
            "head.bias": model.head.bias.detach(),
        }

    expected = minimized({"stage": 4, "hidden": 6}, scaled, seed)
    assert_equal(canonical_magnitude(model, (1, 6, 6)), expected, rtol=1e-6)


def test_least_norm_of_grouped_and_depthwise_convolutions() -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.PReLU(4),
            nn.Conv1d(4, 4, 3, groups=2, bias=False),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose1d(4, 6, 2, groups=2),
            nn.ReLU(),
            nn.Conv1d(6, 6, 1, groups=6, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 2, bias=False),
        ).double(),
        2,
    )
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b, c, d = (factor[name] for name in "abcd")
        grouped, transposed = w["2.weight"].clone(), w["4.weight"].clone()
        grouped = torch.stack(
            [
                torch.stack([grouped[i, j] * b[i] / a[2 * (i // 2) + j] for j in range(2)])
                for i in range(4)
            ]
        )
        transposed = torch.stack(
            [
                torch.stack([transposed[i, j] * c[3 * (i // 2) + j] / b[i] for j in range(3)])
                for i in range(4)
            ]
        )
        return {
            "0.weight": w["0.weight"] * a[:, None, None],
            "0.bias": w["0.bias"] * a,
            "2.weight": grouped,
            "4.weight": transposed,
            "4.bias": w["4.bias"] * c,
            "6.weight": w["6.weight"] * (d / c)[:, None, None],
            "9.weight": w["9.weight"] / d.repeat_interleave(3),
        }

    expected = minimized({"a": 4, "b": 4, "c": 6, "d": 6}, scaled, 0)
    assert_equal(canonical_magnitude(model, (2, 6)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", [*UNUSUAL, *MORE])
def test_scores_are_those_of_every_rescaling_and_their_squares_least(name: str) -> None:
    model, shape = taken(name)
    expected = outputs(model, shape)
    program = build(model, shape, reduced=False)
    canonical = least_norm.Canonical(program.captured, program.lifted)
    scores = canonical.scores(torch.float64)
    rescaled = fxpath.rescale(model, shape, choices=(0.3, 5.0, 2.0**-30))
    assert changed(model, rescaled)
    groups = fxpath.channel_groups(model, shape)
    least = fxpath.normalize(model, shape, method="least_norm")
    torch.testing.assert_close(outputs(least, shape), expected, rtol=1e-9, atol=1e-12)

    def norms(of: nn.Module) -> list[float]:
        """Of all effective parameters, and of those that cannot be as small as one likes."""
        model.load_state_dict(of.state_dict())
        found = list(coordinates(program.lifted, program.captured.live()))
        parts = [value for _, value in found], [value[scores[name] > 0] for name, value in found]
        return [sum(float(value.square().sum()) for value in values) for values in parts]

    before = norms(copy.deepcopy(model))
    norms(rescaled)
    assert_equal(canonical.scores(torch.float64), scores, rtol=1e-8)
    whole, reached = norms(least)
    assert whole <= before[0] * (1 + 1e-12)
    for number in [i for i, group in enumerate(groups.groups) if group.rescalable]:
        for factor in (0.9, 1.1):
            moved = apply(groups, least, {number: factor})
            assert norms(moved)[1] >= reached * (1 - 1e-12)


def test_names_shapes_and_formats_are_those_of_path_magnitude() -> None:
    model, shape = taken("preactivation")
    for each in (model, copy.deepcopy(model).float()):
        forms = [
            {name: (score.shape, score.dtype) for name, score in scores.items()}
            for scores in (canonical_magnitude(each, shape), path_shares(each, shape))
        ]
        assert forms[0] == forms[1]


def test_scalings_that_models_cannot_be_given() -> None:
    """Factors that no other tensor takes up: of learned scalings, and of one of two norms."""
    model, shape = taken("scaled")
    scores = canonical_magnitude(model, shape)
    other = copy.deepcopy(model)
    with torch.no_grad():
        factors = torch.tensor([2.0, 0.1, 3.0, 1.0], dtype=torch.float64)
        other.gain *= factors[:, None, None]
        other.second.weight /= factors[:, None, None, None]
        other.second.bias /= factors
    torch.testing.assert_close(outputs(other, shape), outputs(model, shape))
    assert_equal(canonical_magnitude(other, shape), scores)
    model, shape = taken("shared")
    scores = canonical_magnitude(model, shape)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (other.norms[1].weight, other.norms[1].bias):
            tensor *= 8
        other.kernel /= 8
    torch.testing.assert_close(outputs(other, shape), outputs(model, shape))
    assert_equal(canonical_magnitude(other, shape), scores)


def test_the_scale_of_a_convolution_before_a_batch_norm_plays_no_part() -> None:
    model = randomize(Residual().double(), 0).eval()
    scores = canonical_magnitude(model, (1, 6, 6))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.inner.weight *= 7
        other.norm.running_mean *= 7
        other.norm.running_var += other.norm.eps
        other.norm.running_var *= 49
        other.norm.running_var -= other.norm.eps
    assert_equal(canonical_magnitude(other, (1, 6, 6)), scores)
    with torch.no_grad():
        other.norm.weight *= 2
    assert (canonical_magnitude(other, (1, 6, 6))["inner.weight"] - scores["inner.weight"]).any()
