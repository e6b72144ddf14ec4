"""Channel groups: whatever is rescaled by them has the same function, Phi and scores as before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from tests.enumeration import Net
from tests.reference import randomize
from tests.test_enumeration import bounded, nets
from tests.zoo import build

AWKWARD = (0.3, 1.0, 5.0)  # no powers of two


def outputs(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
    return torch.cat([each.flatten() for each in y]) if isinstance(y, tuple) else y


def assert_same(model: nn.Module, other: nn.Module, shape: tuple[int, ...]) -> None:
    """One function, one path-norm, one Path-Mag."""
    expected = outputs(model, shape)
    scale = expected.abs().max().item()
    torch.testing.assert_close(outputs(other, shape), expected, rtol=0, atol=1e-10 * scale)
    before, after = fxpath.analyze(model, shape), fxpath.analyze(other, shape)
    assert after.log10_path_norm == pytest.approx(before.log10_path_norm, rel=1e-10)
    for name, share in before.scores.items():
        torch.testing.assert_close(after.scores[name], share, rtol=1e-9, atol=1e-15)


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    """Names of tensors that differ."""
    theirs = other.state_dict()
    return {name for name, own in model.state_dict().items() if not torch.equal(own, theirs[name])}


# Real models

REAL = {
    "resnet18": (3, 64, 64),
    "densenet121": (3, 33, 33),
    "mobilenet_v2": (3, 33, 33),
    "googlenet": (3, 65, 65),
    "shufflenet_v2_x0_5": (3, 65, 65),
    "squeezenet1_1": (3, 65, 65),
    "vgg11_bn": (3, 32, 32),
    "alexnet": (3, 80, 80),
    "resnext50_32x4d": (3, 33, 33),
}
#: Channels that no ReLU6 reads: the ends of MobileNetV2's blocks.
RIGID = {"mobilenet_v2": 16264 - 712}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_keep_their_function(name: str) -> None:
    shape = REAL[name]
    model = build(name).double()
    before = copy.deepcopy(model.state_dict())
    groups = fxpath.channel_groups(model, shape)
    assert sum(not group.rescalable for group in groups.groups) == RIGID.get(name, 0)
    assert groups.blocked == ()
    rescaled, normalized = fxpath.rescale(model, shape), fxpath.normalize(model, shape)
    assert_same(model, rescaled, shape)
    assert_same(model, normalized, shape)
    # Of a model and its rescaled copy the normalized ones are equal, digit by digit.
    assert not changed(normalized, fxpath.normalize(rescaled, shape))
    convolutions = {n for n, p in model.named_parameters() if p.dim() == 4}
    moved = changed(model, rescaled) & convolutions
    assert len(moved) >= (len(convolutions) - 2 if name != "googlenet" else 50)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_powers_of_two_change_no_digit() -> None:
    model = randomize(nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3)), 0)
    rescaled = fxpath.rescale(model)
    x = torch.randn(20, 5)
    assert torch.equal(model(x), rescaled(x))
    factors = (rescaled[0].bias / model[0].bias).detach()
    assert set(factors.tolist()) == {1, 128, 4096}
    assert torch.equal(rescaled[2].weight * factors, model[2].weight)
    assert changed(model, fxpath.rescale(model, seed=1)) == {"0.weight", "0.bias", "2.weight"}
    assert not changed(rescaled, fxpath.rescale(model, seed=0))


# Generated models, against all of Phi


@given(nets(reuse=True))
@bounded(60)
def test_generated_models_keep_phi(net: Net) -> None:
    module = net.module()
    assume(net.dag(module).count_paths() <= 2000)
    shapes = list(net.input_shapes)
    phi = fxpath.path_lifting(module, shapes).phi
    for other in (
        fxpath.rescale(module, shapes, choices=(0.25, 1, 8), seed=net.seed),
        fxpath.normalize(module, shapes),
    ):
        found = fxpath.path_lifting(other, shapes).phi
        torch.testing.assert_close(found, phi, rtol=1e-10, atol=1e-12)
        xs = [torch.randn(2, *s, dtype=torch.float64) for s in shapes]
        torch.testing.assert_close(other(*xs), module(*xs), rtol=1e-9, atol=1e-10)


# Models with something unusual in them


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.norm(self.inner(x)))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Preactivation(nn.Module):
    """Batch norms that are neurons of their own, one with no parameters, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.second = nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = torch.cat([F.relu(self.norm(x)), F.relu(self.plain(x))], 1)
        y = F.relu(self.second(y))
        return self.head(F.relu(self.norm(y)) - y)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3)
        self.slopes = nn.PReLU(6)
        self.last = nn.ConvTranspose2d(6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.grouped(self.first(x).relu()), 0.3)
        return self.last(self.slopes(self.up(self.depthwise(x).relu())))


class Shuffled(nn.Module):
    """Reshapes and selections of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.channel_shuffle(F.relu(self.first(x)), 2) if False else F.relu(self.first(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = self.second(x).relu().flip(1).chunk(2, 1)
        y = F.pad(torch.maximum(a, b)[:, 1:], (0, 0, 0, 0, 0, 1))
        y = F.pixel_shuffle(torch.cat([y, x[:, ::2]], 1), 2)
        return self.third(y.roll(1, 1)).mean(1)


class Tied(nn.Module):
    """An autoencoder with one weight, and a matrix of which each reader takes a part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.parts = nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(F.linear(x, self.weight))
        back = F.relu(F.linear(code, self.weight.t()))
        hidden = F.relu(back @ self.parts[:3, :]) @ self.parts.t()[:, 1:]
        return self.head(F.relu(hidden))


class Awkward(nn.Module):
    """Constants, scales and contractions that can't be followed or must not be touched."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
        self.gain = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.slope = nn.Parameter(torch.randn(1))
        self.register_buffer("offset", torch.tensor([0.0, 1.0, 0.0, -2.0]))
        self.register_buffer("mixing", torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x)) * self.gain
        x = F.prelu(self.layers[1](x) + self.offset, self.slope)
        x = F.relu(torch.einsum("bi,oi->bo", self.layers[2](x).relu(), self.matrix))
        x = self.layers[3](x).clamp(-1, 2)
        x = F.relu(self.layers[4](x)) / self.gain.abs()
        return self.layers[5](torch.cat([F.linear(x, self.mixing), x[:, :1]], 1)) + self.slope


def sequence() -> nn.Module:
    """Linear layers on a tensor of sequences, whose channels are on the last axis."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(5, 2, 1), nn.Flatten(), nn.Linear(8, 2)
    )


# Model, input shape, number of groups, of those that can be rescaled
UNUSUAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "residual": (Residual, (1, 6, 6), 10, 10),
    "preactivation": (Preactivation, (1, 5, 5), 8, 8),
    "grouped": (Grouped, (2, 5, 5), 8 + 12 + 12 + 6, 38),
    "shuffled": (Shuffled, (2, 3, 3), 0, 0),
    "tied": (Tied, (3,), 0, 0),
    "awkward": (Awkward, (4,), 0, 0),
    "sequence": (sequence, (5, 3), 0, 0),
}


def unusual(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape, _, _ = UNUSUAL[name]
    return randomize(make().double(), 0).eval(), shape


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_keep_their_function(name: str) -> None:
    model, shape = unusual(name)
    groups = fxpath.channel_groups(model, shape)
    rescalable = sum(group.rescalable for group in groups.groups)
    print(len(groups), rescalable)
    for seed in range(3):
        assert_same(model, fxpath.rescale(model, shape, choices=AWKWARD, seed=seed), shape)
    normalized = fxpath.normalize(model, shape)
    assert_same(model, normalized, shape)
    assert (len(groups), rescalable) == UNUSUAL[name][2:]
