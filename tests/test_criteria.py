"""Pruning criteria: OBD against the exact Hessian, names, and a model that nothing happens to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize, prune

import fxpath
from fxpath import criteria

Batch = tuple[Tensor, Tensor]


def small_net() -> nn.Module:
    """Convolution, batch norm, in-place ReLU, max-pooling, dropout and linear layers; float64."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 2),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(2, 3),
    ).double()
    nn.init.normal_(model[1].running_mean, std=0.1)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def small_batch(count: int = 5) -> Batch:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (count,))


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


def loss_of(model: nn.Module, loss: Callable[..., Tensor], batch: Batch) -> Callable[..., Tensor]:
    """The loss as a function of the flat vector of all weights with more than one axis."""
    evaluated = copy.deepcopy(model).eval()
    named = {n: p for n, p in evaluated.named_parameters() if p.dim() > 1}

    def function(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        state = {n: part.view(p.shape) for (n, p), part in zip(named.items(), parts, strict=True)}
        return loss(torch.func.functional_call(evaluated, state, (batch[0].clone(),)), batch[1])

    return function


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


# OBD, the numbers


def test_obd_is_exact_where_the_hessian_is_diagonal() -> None:
    # The Hessian of a linear layer with squared loss is X^T X for each output.
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5])
    layer = nn.Linear(4, 3)
    for seed in range(3):
        scores = criteria.obd(layer, squared, (scale.diag(), torch.randn(4, 3)), seed=seed)
        torch.testing.assert_close(scores["weight"], scale**2 * layer.weight.detach() ** 2 / 2)


def test_obd_is_the_exact_one_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    # Over the rows of a Hadamard matrix, whose columns are orthogonal, the estimate's noise
    # averages to zero, as it does over all sign vectors.
    model, batch = small_net(), small_batch()
    theta = flat_weights(model)
    hessian = torch.autograd.functional.hessian(loss_of(model, cross_entropy, batch), theta)
    exact = hessian.diag() * theta**2 / 2
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < len(theta):
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    total = torch.zeros_like(theta)
    for row in rows:
        left = iter(row)

        def signs(like: Tensor, _: object, left: Iterator[Tensor] = left) -> Tensor:
            return torch.stack([next(left) for _ in range(like.numel())]).view(like.shape)

        monkeypatch.setattr(criteria, "_rademacher", signs)
        total += flat(criteria.obd(model, cross_entropy, batch))
    torch.testing.assert_close(total / len(rows), exact, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(total, exact)


def test_obd_agrees_with_finite_differences_of_the_gradient() -> None:
    model, batch = small_net(), small_batch()
    theta = flat_weights(model)
    generator = torch.Generator().manual_seed(7)
    signs = flat(
        {
            name: criteria._rademacher(weight, generator)
            for name, weight in model.named_parameters()
            if weight.dim() > 1
        }
    )
    gradient = torch.func.grad(loss_of(model, cross_entropy, batch))
    step = 1e-6
    product = (gradient(theta + step * signs) - gradient(theta - step * signs)) / (2 * step)
    scores = flat(criteria.obd(model, cross_entropy, batch, seed=7))
    torch.testing.assert_close(scores, product * signs * theta**2 / 2, rtol=1e-5, atol=1e-9)


def test_obd_is_linear_in_the_loss() -> None:
    model, (inputs, targets) = small_net(), small_batch(6)

    def total(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, reduction="sum")

    whole = criteria.obd(model, total, (inputs, targets))
    parts = [criteria.obd(model, total, (inputs[i::2], targets[i::2])) for i in range(2)]
    for name, score in whole.items():
        torch.testing.assert_close(score, parts[0][name] + parts[1][name])


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
def test_random_signs(numel: int) -> None:
    def draw(seed: int) -> Tensor:
        return criteria._rademacher(
            torch.empty(1, numel, dtype=torch.float64), torch.Generator().manual_seed(seed)
        )

    signs = draw(0)
    assert signs.shape == (1, numel) and signs.dtype == torch.float64
    assert (signs.abs() == 1).all() and torch.equal(signs, draw(0))
    if numel == 1000:
        assert abs(signs.sum().item()) < 150
        assert abs((signs * draw(1)).sum().item()) < 150
        assert abs((signs[:, 1:] * signs[:, :-1]).sum().item()) < 150


def test_obd_follows_its_seed() -> None:
    model, batch = small_net(), small_batch()
    first, again, other = (criteria.obd(model, cross_entropy, batch, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


# OBD, what it accepts


def test_obd_of_layers_in_one_and_three_dimensions() -> None:
    for model, shape in (
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(True), nn.MaxPool1d(2)), (2, 9)),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.ReLU6(True)), (2, 4, 4)),
        (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.MaxPool3d(2)), (2, 5, 5, 5)),
    ):
        inputs = torch.randn(2, *shape)
        target = torch.randn_like(model.eval()(inputs))
        scores = criteria.obd(model.train(), squared, (inputs, target))
        assert list(scores) == ["0.weight"] and scores["0.weight"].isfinite().all()
        assert scores["0.weight"].abs().sum() > 0


def test_obd_takes_several_inputs_and_any_output() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.left(x) + self.right(y)}

    inputs = torch.eye(3), torch.zeros(3, 3)
    scores = criteria.obd(
        model := Pair(), lambda out, _: out["sum"].square().sum() / 2, (inputs, None)
    )
    torch.testing.assert_close(scores["left.weight"], model.left.weight.detach() ** 2 / 2)
    assert not scores["right.weight"].any()


def test_obd_of_frozen_weights_without_gradients() -> None:
    model, batch = small_net(), small_batch()
    expected = criteria.obd(model, cross_entropy, batch)
    model.requires_grad_(False)
    with torch.no_grad():
        scores = criteria.obd(model, cross_entropy, batch)
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name])
        assert not scores[name].requires_grad


def test_obd_of_a_loss_without_the_model_is_zero() -> None:
    scores = criteria.obd(
        nn.Linear(2, 2), lambda out, y: y.sum(), (torch.ones(1, 2), torch.ones(1))
    )
    assert not scores["weight"].any()


def test_obd_without_layers_is_empty() -> None:
    assert criteria.obd(nn.ReLU(), squared, (torch.ones(1), torch.ones(1))) == {}


def test_obd_says_what_is_wrong_with_the_loss() -> None:
    with pytest.raises(ValueError, match=r"loss has shape \(5,\): take its sum or mean"):
        criteria.obd(
            small_net(), lambda out, y: cross_entropy(out, y, reduction="none"), small_batch()
        )


# Magnitude and Path-Mag


def test_magnitude_fresh_and_into_buffers() -> None:
    model = small_net()
    scores = criteria.magnitude(model)
    assert list(scores) == ["0.weight", "5.weight", "8.weight"]
    for name, score in scores.items():
        weight = model.get_parameter(name)
        assert torch.equal(score, weight.detach().abs())
        assert not score.requires_grad and score.data_ptr() != weight.data_ptr()
    buffers = {name: torch.full_like(score, math.nan) for name, score in scores.items()}
    written = criteria.magnitude(model, out=buffers)
    assert list(written) == list(scores)
    assert all(written[name] is buffers[name] for name in buffers)
    assert all(torch.equal(written[name], scores[name]) for name in buffers)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out: out.pop("weight"), r"differs in \['weight'\]"),
        (lambda out: out.update(bias=torch.zeros(3)), r"differs in \['bias'\]"),
        (lambda out: out.update(weight=torch.zeros(2, 3)), r"\(2, 3\) .*, its score \(3, 2\)"),
        (lambda out: out.update(weight=torch.zeros(3, 2).half()), "float16, its score .*float32"),
    ],
)
def test_magnitude_refuses_other_buffers(change: Callable[..., Any], message: str) -> None:
    buffers = {"weight": torch.zeros(3, 2)}
    change(buffers)
    with pytest.raises(ValueError, match=message):
        criteria.magnitude(nn.Linear(2, 3), out=buffers)


def test_path_magnitude_is_that_of_analyze() -> None:
    model = small_net()
    for options in ({}, {"q": 2}, {"until": "5"}):
        scores = criteria.path_shares(model, (2, 6, 6), **options)
        expected = fxpath.analyze(model, (2, 6, 6), **options).scores
        assert scores.keys() == expected.keys()
        assert all(torch.equal(scores[name], expected[name]) for name in expected)


# All of them


def every(model: nn.Module, batch: Batch) -> dict[str, dict[str, Tensor]]:
    return {
        "magnitude": criteria.magnitude(model),
        "path_magnitude": criteria.path_shares(model, tuple(batch[0].shape[1:])),
        "obd": criteria.obd(model, cross_entropy, batch),
    }


@pytest.mark.parametrize("change", ["pruned", "parametrized", "parallel", "tied"])
def test_scores_are_those_of_effective_weights(change: str) -> None:
    model, batch = small_net(), small_batch()
    prefix = ""
    if change == "tied":
        model.insert(5, nn.Linear(8, 8, bias=False).double())
        model.insert(6, nn.Linear(8, 8, bias=False).double())
        model[6].weight = model[5].weight
    plain = copy.deepcopy(model)
    with torch.no_grad():
        if change == "pruned":
            prune.l1_unstructured(model[5], "weight", 0.5)
            prune.random_unstructured(model[5], "weight", 0.5)
            # As after a training step: the attribute `weight` is stale until the next forward pass.
            model[5].weight_orig.mul_(-2)
            plain[5].weight.copy_(model[5].weight_orig * model[5].weight_mask)
        elif change == "parametrized":
            parametrizations.weight_norm(model[0])
            parametrizations.spectral_norm(model[5])
            plain[5].weight.copy_(copy.deepcopy(model).eval()[5].weight)
        elif change == "parallel":
            model, prefix = nn.DataParallel(model), "module."
    state = copy.deepcopy(model.state_dict())
    scores, expected = every(model, batch), every(plain, batch)
    for criterion, wanted in expected.items():
        assert set(scores[criterion]) == {prefix + name for name in wanted}
        for name, score in wanted.items():
            torch.testing.assert_close(scores[criterion][prefix + name], score)
        # Every criterion has a score for each weight, by the same name.
        assert set(scores["magnitude"]) <= set(scores[criterion])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if change == "parametrized":
        assert parametrize.is_parametrized(model[0]) and parametrize.is_parametrized(model[5])
        assert "5.weight" not in dict(model.named_parameters())
    if change == "pruned":
        assert prune.is_pruned(model[5]) and "weight" in vars(model[5])


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    for score in (criteria.magnitude, lambda m: criteria.obd(m, squared, (weight, weight))):
        with pytest.raises(ValueError, match="0: its weight is no parameter"):
            score(model)


class Counting(nn.Module):
    """Draws random numbers and writes into a buffer, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + 0 * torch.rand(())


def test_the_model_is_left_alone() -> None:
    model, batch = small_net(), small_batch()
    noisy = nn.Sequential(Counting(), *model)
    cross_entropy(noisy(batch[0]), batch[1]).backward()
    noisy[1].weight.requires_grad_(False)
    noisy[3].eval()
    before = copy.deepcopy(noisy)
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in noisy.named_parameters()}
    identities = {n: id(p) for n, p in noisy.named_parameters()}
    inputs, random = batch[0].clone(), torch.get_rng_state()

    criteria.magnitude(noisy)
    criteria.obd(noisy, cross_entropy, batch)
    criteria.path_shares(model, (2, 6, 6))

    assert torch.equal(torch.get_rng_state(), random) and torch.equal(batch[0], inputs)
    assert [m.training for m in noisy.modules()] == [m.training for m in before.modules()]
    assert identities == {n: id(p) for n, p in noisy.named_parameters()}
    for name, value in noisy.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    for (name, now), then in zip(noisy.named_parameters(), before.parameters(), strict=True):
        assert now.requires_grad == then.requires_grad, name
        assert (now.grad is None) == (gradients[name] is None), name
        assert now.grad is None or torch.equal(now.grad, gradients[name]), name
