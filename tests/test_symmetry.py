"""Channel groups: whatever is rescaled by them has the same function, Phi and scores as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from tests.oracles.networks import Net
from tests.support.generated import bounded, nets
from tests.support.nets import randomize
from tests.support.symmetric import UNUSUAL, apply, changed, outputs, unusual
from tests.support.zoo import build

AWKWARD = (0.3, 1.0, 5.0)  # no powers of two


def assert_same(
    model: nn.Module, *others: nn.Module, shape: tuple[int, ...], scores: bool = True
) -> None:
    """One function, one path-norm, one Path-Mag."""
    expected = outputs(model, shape)
    scale = expected.abs().max().item()
    for other in others:
        torch.testing.assert_close(outputs(other, shape), expected, rtol=0, atol=1e-10 * scale)
    if not scores:
        norm, *norms = [fxpath.path_norm(each, shape) for each in (model, *others)]
        assert norms == pytest.approx([norm] * len(others), rel=1e-10)
        return
    before, *analyses = [fxpath.analyze(each, shape) for each in (model, *others)]
    for after in analyses:
        assert after.log10_path_norm == pytest.approx(before.log10_path_norm, rel=1e-10)
        for name, share in before.scores.items():
            torch.testing.assert_close(after.scores[name], share, rtol=1e-9, atol=1e-15)


# Real models


REAL: dict[str, tuple[int, ...]] = {
    "resnet": (3, 33, 33),
    "mobilenet": (3, 33, 33),
    "shufflenet": (3, 65, 65),
    "squeezenet1_1": (3, 33, 33),
    "vgg_bn": (3, 32, 32),
    "alexnet": (3, 80, 80),
    "resnext": (3, 33, 33),
}


def has_relu6(module: nn.Module) -> bool:
    """Whether a module is a convolution, its batch norm and a ReLU6 in a row."""
    return isinstance(module, nn.Sequential) and isinstance([None, *module][-1], nn.ReLU6)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_keep_their_function(name: str) -> None:
    model, shape = build(name), REAL[name]
    if name == "alexnet":
        # Narrower behind the flattening: gigabytes in float64 say nothing more.
        (first, *_) = (m for m in model.classifier if isinstance(m, nn.Linear))
        model.classifier = nn.Sequential(
            nn.Linear(first.in_features, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    model = model.double().eval()
    before = copy.deepcopy(model.state_dict())
    groups = fxpath.channel_groups(model, shape)
    # Channels that a ReLU6 reads; the others are the ends of MobileNetV2's blocks.
    rigid = sum(m[0].out_channels for m in model.modules() if has_relu6(m))
    assert sum(not group.rescalable for group in groups.groups) == rigid
    assert groups.blocked == ()
    rescaled, normalized = fxpath.rescale(model, shape), fxpath.normalize(model, shape)
    small = name in ("resnet", "squeezenet1_1")  # gradients of the others take long
    assert_same(model, rescaled, normalized, shape=shape, scores=small)
    # Of a model and its rescaled copy the normalized ones are equal, digit by digit.
    assert not changed(normalized, fxpath.normalize(rescaled, shape))
    convolutions = {n for n, p in model.named_parameters() if p.dim() == 4}
    moved = changed(model, rescaled) & convolutions
    assert len(moved) > len(convolutions) / 2
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
@bounded(12)
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


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_keep_their_function(name: str) -> None:
    model, shape = unusual(name)
    groups = fxpath.channel_groups(model, shape)
    rescalable = sum(group.rescalable for group in groups.groups)
    assert (len(groups), rescalable) == UNUSUAL[name][2:]
    rescaled = [fxpath.rescale(model, shape, choices=AWKWARD, seed=seed) for seed in range(2)]
    assert_same(model, *rescaled, fxpath.normalize(model, shape), shape=shape)


class Repeated(nn.Module):
    """A kernel that all channels share, and a matrix with rows that are read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel = nn.Conv2d(1, 4, 1), nn.Parameter(torch.randn(1, 1, 2, 2))
        self.rows = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 2)
        self.register_buffer("picked", torch.tensor([0, 1, 1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(F.relu(self.first(x)), self.kernel.expand(4, 1, 2, 2), groups=4))
        return self.head(F.relu(F.linear(x.amax((2, 3)), self.rows[self.picked])))


def test_entries_that_are_shown_several_times_have_one_factor() -> None:
    torch.manual_seed(0)
    model = Repeated().double()
    # The channels in front of the kernel and behind it, and the rows: the second is read twice.
    assert len(fxpath.channel_groups(model, (1, 3, 3))) == 1 + 1 + 3
    assert_same(model, fxpath.rescale(model, (1, 3, 3), choices=(0.3, 5.0)), shape=(1, 3, 3))


def test_the_comparison_notices_a_change() -> None:
    model, shape = unusual("residual")
    other = copy.deepcopy(model)
    assert_same(model, other, shape=shape)
    with torch.no_grad():
        other.inner.weight[2] *= 1.001
    with pytest.raises(AssertionError):
        assert_same(model, other, shape=shape)


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_members_of_a_group_are_what_a_factor_changes(name: str) -> None:
    model, shape = unusual(name)
    groups = fxpath.channel_groups(model, shape)
    free = [i for i, group in enumerate(groups.groups) if group.rescalable]
    factors = {i: 2.0 ** (k % 5 - 2) for k, i in enumerate(free)}
    expected = fxpath.rescale(model, shape, factors=factors)
    assert not changed(expected, apply(groups, model, factors))
    assert changed(expected, model)
    one = {free[-1]: 2.0}
    assert not changed(fxpath.rescale(model, shape, factors=one), apply(groups, model, one))


def test_groups_of_a_residual_block_are_listed() -> None:
    model, shape = unusual("residual")
    Member = fxpath.Member
    first, *_, last = fxpath.channel_groups(model, shape).groups
    assert set(first.members) == {
        Member("stem.weight", 0, (0,), True),
        Member("stem.bias", 0, (0,), True),
        Member("inner.weight", 1, (0,), False),
        Member("outer.weight", 0, (0,), True),
        Member("outer.bias", 0, (0,), True),
        Member("head.weight", 1, tuple(range(9)), False),
    }
    assert set(last.members) == {
        Member("inner.weight", 0, (5,), True),
        Member("norm.bias", 0, (5,), True),
        Member("norm.running_mean", 0, (5,), True),
        *(
            Member(f"norm.{name}", 0, (5,), way)
            for name in ("weight", "running_var")
            for way in (True, False)
        ),
        Member("outer.weight", 1, (5,), False),
    }


def test_a_grouped_convolution_tells_the_rows_of_its_inputs() -> None:
    model, shape = unusual("grouped")
    (member,) = [
        m for m in fxpath.channel_groups(model, shape)[5].members if m.tensor == "grouped.weight"
    ]
    # Channel 5 is the second of group 2, whose outputs are 6, 7 and 8.
    assert member == fxpath.Member("grouped.weight", 1, (1,), False, (0, (6, 7, 8)))


# Normalization


def test_rows_of_a_fully_connected_network_have_norm_1() -> None:
    """Algorithm 1 of Gonon et al. (2024), to the letter."""
    layers = [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.LeakyReLU(), nn.Linear(6, 2)]
    model = nn.Sequential(*layers).double()
    normalized = fxpath.normalize(model)
    for layer in (normalized[0], normalized[2]):
        norms = layer.weight.abs().sum(1) + layer.bias.abs()
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)
    # What is left is the path-norm.
    norm = normalized[4].weight.abs().sum() + normalized[4].bias.abs().sum()
    assert norm.item() == pytest.approx(fxpath.path_norm(model), rel=1e-12)


class Watched(nn.Module):
    """A network of non-negative weights that keeps what its layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.outer = nn.Conv2d(6, 4, 1)
        self.skip = nn.AvgPool2d(2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        inner = self.inner(stem).relu()
        outer = self.outer(inner)
        joined = self.skip(stem) + outer
        self.seen = {"stem": [stem, outer, joined], "inner": [inner]}
        return self.head(joined.relu().mean((2, 3)))


def test_largest_incoming_norm_of_each_group_is_1() -> None:
    model = randomize(Watched().double(), 0)
    normalized = fxpath.normalize(model, (1, 6, 6))
    lifted = copy.deepcopy(normalized)
    with torch.no_grad():
        for parameter in lifted.parameters():
            parameter.abs_()
    lifted(torch.ones(1, 1, 6, 6, dtype=torch.float64))
    for tensors in lifted.seen.values():
        largest = torch.stack([each.amax((0, 2, 3)) for each in tensors]).amax(0)
        torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-12, atol=0)


def test_a_dead_channel_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0
    normalized = fxpath.normalize(model)
    assert torch.equal(normalized[2].weight[:, 1], model[2].weight[:, 1])
    assert_same(model, normalized, shape=(2,))


# The model that is handed in, and refusals


def test_the_model_is_left_alone_and_keeps_its_mode() -> None:
    model = randomize(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)), 0).train()
    before = copy.deepcopy(model.state_dict())
    other = fxpath.rescale(model)
    assert other.training and type(other) is type(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        other[0].weight.zero_()
    assert not torch.equal(model[0].weight, other[0].weight)
    assert changed(model, other) == {
        *("0.weight", "0.bias", "1.bias", "1.running_mean", "2.weight")
    }


def test_computed_weights_are_refused_by_name() -> None:
    pruned = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    prune.l1_unstructured(pruned[0], "weight", amount=2)
    normed = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    parametrizations.weight_norm(normed[2], "weight")
    for model, name in ((pruned, "0.weight"), (normed, "2.weight")):
        groups = fxpath.channel_groups(model)
        assert groups.blocked == (name,)
        assert not any(group.rescalable for group in groups.groups)
        for verb in (fxpath.rescale, fxpath.normalize):
            with pytest.raises(ValueError, match=f"{name}: computed from other parameters"):
                verb(model)
    prune.remove(pruned[0], "weight")
    assert_same(pruned.double(), fxpath.normalize(pruned), shape=(3,))


def test_wrong_arguments() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"factors\[3\]: no such group"):
        fxpath.rescale(model, factors={3: 2.0})
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            fxpath.rescale(model, factors={0: wrong})
    with pytest.raises(ValueError, match="0.weight, 0.bias, 2.weight: the rescaled values over"):
        fxpath.rescale(model, factors={0: 1e42})
    exported = torch.export.export(model, (torch.zeros(1, 3),))
    assert len(fxpath.channel_groups(exported)) == 3
    with pytest.raises(TypeError, match="ExportedProgram"):
        fxpath.normalize(exported)
    with pytest.raises(fxpath.UnsupportedModelError, match="gelu"):
        fxpath.channel_groups(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="0.weight"):
        fxpath.normalize(model)


# Parts that only training reaches ----------------------------------------------------


class Auxiliary(nn.Module):
    """A second head that reads hidden channels in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.aux = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        return (self.out(h), self.aux(h)) if self.training else self.out(h)


@pytest.mark.parametrize("change", [fxpath.rescale, fxpath.normalize])
def test_heads_that_only_training_reaches_are_named(change: Any) -> None:
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.randn(5, 3)
    with pytest.warns(UserWarning, match=r"^aux: not reached in eval mode"):
        other = change(model)
    heads, changed = model.train()(x), other.train()(x)
    torch.testing.assert_close(heads[0], changed[0])
    assert (heads[1] - changed[1]).abs().max() > 1e-3
    # Nothing is rescaled here, so that nothing changes.
    assert fxpath.rescale(model, choices=(1,)) is not model
