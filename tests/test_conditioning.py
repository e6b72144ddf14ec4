"""Path conditioning: the diagonal of the path kernel, and the rescaling that evens it out.

Phi is written out here path by path, and its Jacobian taken by autograd.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath


def layers(*sizes: int, seed: int = 0) -> nn.Sequential:
    """A fully-connected network in float64 whose neurons have all sorts of scales."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        modules += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*modules[:-1]).double()
    with torch.no_grad():
        for linear in model[::2]:
            linear.weight.mul_(torch.rand(len(linear.weight), 1).mul(4).sub(2).exp())
    return model


def lifting(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Phi of a fully-connected network, all paths in one vector."""
    found = []
    for first in range(len(weights)):
        # Paths that begin at the inputs, or at the biases of a layer: [begin, neurons passed].
        paths = weights[0].T if first == 0 else torch.diag(biases[first - 1])
        begun = [paths]
        for weight in weights[max(1, first) :]:
            paths = paths[..., None] * weight.T
            begun.append(paths)
        found.append(begun[-1].reshape(-1))
    return torch.cat([*found, biases[-1]])


def divergence(model: nn.Sequential, logs: Tensor) -> Tensor:
    """What path conditioning minimizes, at some logarithms of factors, from the Jacobian itself."""
    linears = [each for each in model if isinstance(each, nn.Linear)]
    widths = [len(each.weight) for each in linears[:-1]]
    scales = [each.exp() for each in logs.split(widths)]
    weights, biases = [], []
    for i, linear in enumerate(linears):
        out = scales[i] if i < len(widths) else torch.ones(len(linear.weight)).double()
        into = scales[i - 1] if i else torch.ones(linear.in_features).double()
        weights.append(linear.weight.detach() * out[:, None] / into)
        biases.append(linear.bias.detach() * out)
    count = len(weights)

    def phi(*theta: Tensor) -> Tensor:
        return lifting(list(theta[:count]), list(theta[count:]))

    jacobians = torch.autograd.functional.jacobian(phi, (*weights, *biases), create_graph=True)
    diagonal = torch.cat([each.square().sum(0).reshape(-1) for each in jacobians])
    diagonal = diagonal[diagonal > 0]
    return diagonal.mean().log() - diagonal.log().mean()


@pytest.mark.parametrize("sizes", [(2, 3, 2), (3, 4, 2, 3, 1)])
def test_the_diagonal_of_the_jacobian_of_phi(sizes: tuple[int, ...]) -> None:
    model = layers(*sizes)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].bias.zero_()
        model[2].weight[:, 0] = 0  # a dead neuron: Phi does not depend on what enters it
    expected = float(divergence(model, torch.zeros(sum(sizes[1:-1])).double()).detach())
    assert fxpath.path_conditioning(model) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_least_of_all_rescalings(seed: int) -> None:
    model = layers(3, 4, 3, 2, seed=seed)
    logs = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence(model, logs)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    least = fxpath.normalize(model, method="path_conditioning")
    before, after = fxpath.path_conditioning(model), fxpath.path_conditioning(least)
    assert after == pytest.approx(float(divergence(model, logs).detach()), abs=1e-8)
    assert after < before - 0.1
    x = torch.randn(10, 3).double()
    torch.testing.assert_close(least(x), model(x), rtol=1e-12, atol=1e-12)
    # The factors themselves, and the same from any other rescaling.
    ratio = least[0].weight / model[0].weight
    torch.testing.assert_close(ratio[:, 0].log(), logs.detach()[:4], rtol=1e-4, atol=1e-4)
    again = fxpath.normalize(fxpath.rescale(model, seed=seed), method="path_conditioning")
    for mine, other in zip(least.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


class Residual(nn.Module):
    """A residual block with batch norms, one of which begins at zero, and a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.first, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.last, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        y = self.norm2(self.second(functional.relu(self.norm1(self.first(x)))))
        x = functional.relu(self.last(functional.relu(x + y)))
        return self.head(x.mean((2, 3)))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, -2, 2),
                (module.bias.data, -1, 1),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model


def outputs(model: nn.Module, training: bool) -> Tensor:
    """Of a copy in one of the modes."""
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        result: Tensor = copy.deepcopy(model).train(training)(x)
    return result


@pytest.mark.parametrize("zero_init", [False, True])
def test_batch_norms_take_up_the_factors(zero_init: bool) -> None:
    torch.manual_seed(0)
    model = randomized(Residual()).double()
    if zero_init:
        nn.init.zeros_(model.norm2.weight)
    least = fxpath.normalize(model, (1, 6, 6), method="path_conditioning")
    for training in (False, True):
        expected = outputs(model, training)
        torch.testing.assert_close(outputs(least, training), expected, rtol=1e-9, atol=1e-9)
    # Statistics stay, and of a convolution with a batch norm behind it what comes out.
    assert torch.equal(least.norm1.running_mean, model.norm1.running_mean)
    assert torch.equal(least.stem.weight, model.stem.weight)
    assert not torch.equal(least.norm.weight, model.norm.weight)
    value = fxpath.path_conditioning(least, (1, 6, 6))
    assert value < fxpath.path_conditioning(model, (1, 6, 6))
    # No channel can be rescaled to a smaller value: the problem is convex.
    groups = fxpath.channel_groups(least, (1, 6, 6))
    assert len(groups) == 3 + 4 + 4
    for number in range(len(groups)):
        for factor in (0.98, 1.02):
            other = fxpath.rescale(least, (1, 6, 6), factors={number: factor})
            assert fxpath.path_conditioning(other, (1, 6, 6)) > value - 1e-12


class Preactivated(nn.Module):
    """A batch norm in front of a ReLU, and a convolution read with and without one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.both, self.norm1 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.hidden, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(functional.relu(self.stem(x))))
        x = functional.relu(self.norm1(self.both(x))) + functional.relu(self.both(x))
        x = self.head(functional.relu(self.hidden(x)))
        return x.mean((2, 3))


def test_channels_whose_scale_training_forgets_keep_it() -> None:
    torch.manual_seed(0)
    model = randomized(Preactivated()).double()
    least = fxpath.normalize(model, (1, 6, 6), method="path_conditioning")
    for training in (False, True):
        expected = outputs(model, training)
        torch.testing.assert_close(outputs(least, training), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(least.stem.weight, model.stem.weight)
    # What comes out of the convolution that is read in two ways has no one place for a factor.
    assert torch.equal(least.norm1.weight, model.norm1.weight)
    assert not torch.equal(least.norm.weight, model.norm.weight)
    assert not torch.equal(least.hidden.weight, model.hidden.weight)
    before = fxpath.path_conditioning(model, (1, 6, 6))
    assert fxpath.path_conditioning(least, (1, 6, 6)) < before


def test_ranges_and_nothing_at_all() -> None:
    model = layers(2, 3, 3, 1)
    with torch.no_grad():
        model[0].weight.mul_(1e60), model[0].bias.mul_(1e60)
        model[2].weight.mul_(1e-60)
    least = fxpath.normalize(model, method="path_conditioning")
    assert float(least[0].weight.detach().abs().max()) < 1e3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # The last bias alone moves Phi.
    assert fxpath.path_conditioning(model) == 0.0
    assert math.isfinite(fxpath.path_norm(fxpath.normalize(model, method="path_conditioning")))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_bias_that_is_a_part_of_another_batch_norm_as_well(part: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU()),
        *(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    ).double()
    for parameter in model.parameters():
        parameter.data.normal_()
    setattr(model[4], part, model[0].bias)
    better = fxpath.normalize(model, method="path_conditioning")
    x = torch.randn(8, 2).double()
    assert torch.allclose(model.train()(x), better.train()(x), rtol=1e-9)
    assert torch.allclose(model.eval()(x), better.eval()(x), rtol=1e-9)
