"""Networks with gates: how far two of them can be apart, pruning, and rescaling of what remains."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath

SHAPE = (2, 4, 4)
Activation = Callable[[Tensor], Tensor]


class Excited(nn.Module):
    """A convolution with a batch norm, squeeze and excitation, a convex combination, a tanh."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.squeeze, self.excite = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
        self.second, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        squeezed = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        y = torch.relu(self.second(x * torch.sigmoid(self.excite(squeezed))))
        return torch.tanh(self.head((y * (3 * y).softmax(1) + x).amax((2, 3))))


def drawn(activation: Activation, seed: int, scale: float = 1.0) -> Excited:
    torch.manual_seed(seed)
    model = Excited(activation).double().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return model


def moved(model: nn.Module, size: float, inside: bool = False) -> nn.Module:
    """A copy with other weights, of the gates alone if ``inside``."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if not inside or name.startswith(("squeeze", "excite")):
            parameter.data.add_(size * torch.randn_like(parameter))
    return other


ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "selu": functional.selu,
    "elu": lambda x: functional.elu(x, 3.0),
    "softsign": functional.softsign,
    "sin": torch.sin,
    "relu": functional.relu,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_difference_is_above_the_bound(name: str, inside: bool) -> None:
    seed = 2 * list(ACTIVATIONS).index(name) + inside
    model = drawn(ACTIVATIONS[name], seed, (0.5, 1.0, 3.0)[seed % 3])
    other = moved(model, (1e-3, 0.1, 1.0)[seed % 3], inside)
    radius = (0.1, 1.0, 5.0)[seed % 3]
    bound = fxpath.lipschitz_bound(model, other, SHAPE, radius=radius, gates=True)
    assert list(bound.bounds) == ["inductive"] and not bound.invariant
    # By an ascent of its own, on the modules themselves.
    x = (2 * torch.rand(64, *SHAPE).double() - 1) * radius
    for _ in range(15):
        x.requires_grad_()
        apart = (model(x) - other(x)).abs().sum(1)
        (slope,) = torch.autograd.grad(apart.sum(), x)
        x = (x.detach() + 0.3 * radius * slope.sign()).clamp(-radius, radius)
    found = float((model(x) - other(x)).detach().abs().sum(1).max())
    assert found <= bound.value
    # On a batch, with each sample's own sizes.
    batch = fxpath.lipschitz_bound(model, other, SHAPE, x=x.detach(), gates=True)
    assert found <= batch.value <= bound.value * (1 + 1e-12)
    with pytest.raises(ValueError, match="gates, which change with x"):
        _ = bound.lipschitz_in_x


def test_the_bound_is_attained_where_activations_are_steep() -> None:
    """A sigmoid at 0, and a tanh near 0, in front of numbers that they meet at their best."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.signal, self.factor = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.signal(x) * torch.sigmoid(self.factor(x))

    model, other = Net().double(), Net().double()
    for net, weight in ((model, 1e-4), (other, -1e-4)):
        net.signal.weight.data.fill_(2.0)
        net.factor.weight.data.fill_(weight)
    bound = fxpath.lipschitz_bound(model, other, gates=True)
    # |x| |sigmoid(w x) - sigmoid(-w x)| at x = 1.
    assert bound.value == pytest.approx(2.0 * 2e-4 / 4, rel=1e-6)
    assert bound.search(5.0) == pytest.approx(bound.value, rel=1e-6)
    # Nothing differs: nothing is lost.
    assert fxpath.lipschitz_bound(model, copy.deepcopy(model), gates=True).value == 0


def test_networks_without_gates_have_all_bounds() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    other = moved(model, 0.1)
    one, two = (fxpath.lipschitz_bound(model, other, gates=gates) for gates in (False, True))
    assert one.bounds == two.bounds and len(one.bounds) > 1


class Inside(nn.Module):
    """A product whose factor goes through something first."""

    def __init__(self, function: Activation, outside: Activation = torch.sigmoid) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.function, self.outside = function, outside

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.outside(self.function(self.b(x)))


def test_what_cannot_be_followed_is_named() -> None:
    normalized = Inside(lambda x: functional.layer_norm(x, (3,)))
    assert fxpath.path_norm(normalized, gates=True) > 0
    with pytest.raises(fxpath.UnsupportedModelError, match="normalizes by statistics"):
        fxpath.lipschitz_bound(normalized, copy.deepcopy(normalized), gates=True)
    with pytest.raises(fxpath.UnsupportedModelError, match="normalizes by statistics"):
        fxpath.rescale(normalized, gates=True)
    pruned = fxpath.prune(normalized, 0.3, gates=True)
    assert pruned.bound is None and "not bounded" in str(pruned)
    jumping = nn.Sequential(nn.Linear(3, 3), nn.Hardshrink())
    assert fxpath.path_norm(jumping, gates=True) > 0
    with pytest.raises(fxpath.UnsupportedModelError, match="jumps"):
        fxpath.lipschitz_bound(jumping, copy.deepcopy(jumping), gates=True)
    with pytest.raises(fxpath.UnsupportedModelError):
        fxpath.path_metric(jumping, copy.deepcopy(jumping))


def test_pruning_keeps_the_gates_and_carries_the_bound() -> None:
    model = drawn(functional.silu, 3)
    with pytest.raises(ValueError, match="budget"):
        fxpath.prune(model, input_shape=SHAPE, budget=0.1, gates=True)
    pruned = fxpath.prune(model, 0.4, SHAPE, gates=True)
    assert set(pruned.masks) == {"first.weight", "second.weight", "head.weight"}
    # The smallest scores go.
    scores = fxpath.analyze(model, SHAPE, gates=True, dtype=torch.float64).scores
    kept = torch.cat([scores[n][mask] for n, mask in pruned.masks.items()])
    cut = torch.cat([scores[n][~mask] for n, mask in pruned.masks.items()])
    assert cut.max() <= kept.min() and float(cut.sum()) == pytest.approx(
        pruned.path_magnitude_share
    )
    with pytest.raises(ValueError, match="no exact certificate"):
        _ = pruned.certificate
    x = 2 * torch.rand(500, *SHAPE).double() - 1
    found = (model(x) - pruned.model()(x)).detach().abs().sum(1).max()
    assert pruned.bound is not None and float(found) <= pruned.bound.value
    again = fxpath.lipschitz_bound(model, pruned.state_dict, SHAPE, gates=True)
    assert pruned.bound.value == pytest.approx(again.value, rel=1e-9)
    assert "no exact certificate" in str(pruned)
    assert pruned.to_dict()["certificate"] is None


def test_channels_that_remain_are_rescaled() -> None:
    """Those of a ReLU inside a gate, and between a ReLU and a convolution."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.excited = Excited(functional.silu)
            self.before, self.after = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(torch.relu(self.before(self.excited(x))))

    torch.manual_seed(0)
    model = Net().double().eval()
    other = fxpath.rescale(model, SHAPE, choices=(0.3, 5.0), gates=True)
    changed = {
        name.rpartition(".")[0]
        for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"excited.squeeze", "excited.excite", "before", "after"}
    x = torch.randn(5, *SHAPE).double()
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)
    one, two = (fxpath.analyze(each, SHAPE, gates=True) for each in (model, other))
    assert one.log10_path_norm == pytest.approx(two.log10_path_norm, rel=1e-12)
    for name, score in one.scores.items():
        torch.testing.assert_close(two.scores[name], score, rtol=1e-9, atol=1e-15)
    least = fxpath.normalize(model, SHAPE, method="least_norm", gates=True)
    torch.testing.assert_close(least(x), model(x), rtol=1e-10, atol=1e-12)


class Product(nn.Module):
    """A linear map times a function of another one."""

    def __init__(self, factor: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.signal, self.inner = nn.Linear(2, 3, bias=False), nn.Linear(2, 3)
        self.bound = nn.Parameter(torch.full((3,), 10.0))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.signal(x) * self.factor(self.inner(x), self.bound)


def test_a_gate_that_is_clamped_above_its_range() -> None:
    torch.manual_seed(0)
    raised = Product(lambda x, bound: x.sigmoid().clamp(min=3.0)).double()
    x = 2 * torch.rand(500, 2).double() - 1
    norm = float(fxpath.path_norm(raised, gates=True))
    assert float(raised(x).abs().sum(1).max().detach()) <= norm * (1 + 1e-6)
    assert norm == pytest.approx(3 * float(raised.signal.weight.detach().abs().sum()), rel=1e-6)


@pytest.mark.parametrize(
    "factor",
    [
        lambda x, bound: x.sigmoid().clamp(min=bound),
        lambda x, bound: x.sigmoid().clamp(max=-bound),
        lambda x, bound: torch.div(x.sigmoid() - 0.5, 1.0, rounding_mode="floor"),
    ],
)
def test_a_factor_that_leaves_its_range_is_no_gate(
    factor: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(fxpath.UnsupportedModelError, match="neither of which is bounded"):
        fxpath.path_norm(Product(factor), gates=True)


def test_a_gate_that_is_always_closed() -> None:
    model, other = (Product(lambda x, bound: x.clamp(0.0, 0.0)) for _ in range(2))
    assert fxpath.lipschitz_bound(model, other, gates=True).value == 0


def test_path_conditioning_beside_gates() -> None:
    """What a gate reads takes up factors, and no part in what is minimized."""
    torch.manual_seed(0)
    after = Product(lambda x, bound: x.sigmoid())
    after.signal, after.inner = nn.Linear(4, 3), nn.Linear(4, 3)
    after.bound = None
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), after).double()
    plain = nn.Sequential(model[0], model[1], after.signal)
    better = fxpath.normalize(model, method="path_conditioning", gates=True)
    x = torch.randn(4, 2).double()
    assert torch.allclose(model(x), better(x), rtol=1e-9)
    expected = fxpath.normalize(plain, method="path_conditioning")
    for one, two in ((better[0], expected[0]), (better[2].signal, expected[2])):
        assert torch.allclose(one.weight, two.weight, rtol=1e-9)
    assert not torch.equal(better[2].inner.weight, after.inner.weight)


def test_a_softmax_over_the_batch_is_not_bounded_sample_by_sample() -> None:
    model = Inside(lambda x: x.softmax(0), lambda x: x)
    with pytest.raises(fxpath.UnsupportedModelError, match="over the batch axis"):
        fxpath.lipschitz_bound(model, copy.deepcopy(model), (3,), gates=True)
    inputs = torch.randn(4, 3)
    other, whole = moved(model, 0.5), {"batch_dim": None, "example_inputs": inputs}
    bound = fxpath.lipschitz_bound(model, other, gates=True, radius=3.0, **whole)
    assert float((model(inputs) - other(inputs)).detach().abs().sum()) <= bound.value


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "shape", "name", "gated"),
    [
        # The second half of what a GLU reads; input, forget and output of an LSTM.
        (
            nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 3)),
            (4,),
            "0.weight",
            slice(4, 8),
        ),
        (Recurrent(), (3, 2), "lstm.weight_ih_l0", [0, 1, 2, 3, 4, 5, 9, 10, 11]),
    ],
)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_spares_rows_that_only_make_gates(
    model: nn.Module, shape: tuple[int, ...], name: str, gated: object, scope: str
) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    pruned = fxpath.prune(model, 0.1, shape, scope=scope, gates=True)
    assert pruned.masks[name][gated].all() and any(not m.all() for m in pruned.masks.values())
    # By every criterion: what no path crosses has no certificate either.
    sizes = {n: s.abs() for n, s in model.state_dict().items() if n in pruned.masks}
    by_size = fxpath.prune(model, 0.1, shape, criterion=sizes, gates=True)
    assert by_size.masks[name][gated].all()
    with pytest.raises(ValueError, match="a gate may read"):
        fxpath.prune(model, 0.9, shape, scope=scope, gates=True)
