"""The float64 oracle against numbers made by hand, listed paths and finite differences."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.oracles.lifted import UnknownOperation
from tests.oracles.reference import Reference, reference
from tests.support.nets import randomize
from tests.support.reference import close
from tests.support.zoo import INPUTS, build


def test_a_network_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    net[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    net[0].bias.data = torch.tensor([-1.0, 4.0])
    net[2].weight.data = torch.tensor([[-5.0, 2.0]])
    net[2].bias.data = torch.tensor([-6.0])
    # Paths: 1*5, 2*5, 1*5 (bias), 3*2, 4*2 (bias), 6 (bias).
    result = reference(net, (2,))
    assert result.path_norm == 40 and result.log10_path_norm == pytest.approx(math.log10(40))
    expected = {
        "0.weight": [[5.0, 10.0], [6.0, 0.0]],
        "0.bias": [5.0, 8.0],
        "2.weight": [[20.0, 14.0]],
        "2.bias": [6.0],
    }
    for name, magnitude in expected.items():
        torch.testing.assert_close(result.scores[name] * 40, torch.tensor(magnitude).double())
    paths = torch.tensor([5.0, 10.0, 5.0, 6.0, 8.0, 6.0])
    for q in (0.5, 1, 2, 4):
        assert reference(net, (2,), q).path_norm == pytest.approx(float(paths.norm(q)), rel=1e-6)
    assert reference(net, (2,), 0).path_norm == 6


class Skip(nn.Module):
    """A residual block of vectors, with a ReLU in place and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x), inplace=True)
        z = self.b(y)
        z += y
        return self.c(torch.relu_(z))


@pytest.mark.parametrize("q", [0, 0.5, 1, 2, 4])
def test_listed_paths(q: float) -> None:
    """Products along paths, one by one; Path-Mag as the sum over the paths through an entry."""
    net = Skip().double()
    net.a.weight.data[0, 1] = 0
    a, b, c = net.a.weight.tolist(), net.b.weight.tolist(), net.c.weight.tolist()
    paths: list[dict[tuple[str, int, int], float]] = []
    for o, v in itertools.product(range(2), range(3)):
        tail = {("c.weight", o, v): c[o][v]}
        paths.append({**tail, ("b.bias", v, 0): net.b.bias[v].item()})
        for u in range(3):
            bends = [{**tail, ("b.weight", v, u): b[v][u]}] + ([tail] if u == v else [])
            for bend in bends:
                paths.append({**bend, ("a.bias", u, 0): net.a.bias[u].item()})
                paths += [{**bend, ("a.weight", u, i): a[u][i]} for i in range(3)]

    products = [abs(math.prod(path.values())) for path in paths]
    powers = [float(p > 0) if q == 0 else p**q for p in products]
    result = reference(net, (3,), q)
    assert result.path_norm == pytest.approx(sum(powers) ** (1 / (q or 1)), rel=1e-12)
    for name, share in result.scores.items():
        for index in itertools.product(*map(range, share.shape)):
            key = (name, *index, *[0] * (2 - len(index)))
            through = sum(p for p, path in zip(powers, paths, strict=True) if key in path)
            assert share[index].item() == pytest.approx(through / sum(powers), rel=1e-12)


def test_homogeneity_and_shares_of_a_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.LazyLinear(3, bias=False),
    )
    net(torch.ones(1, 2, 9, 9))
    before = reference(net, (2, 9, 9))
    for name in ("0.weight", "3.weight", "6.weight"):
        assert before.scores[name].sum().item() == pytest.approx(1, rel=1e-12)
    for parameter in net.parameters():
        parameter.data.mul_(-2)
    after = reference(net, (2, 9, 9))
    assert after.path_norm == 8 * before.path_norm
    close(Reference(before.path_norm, 0, after.scores), before)


def test_rescaling_of_neurons_changes_nothing() -> None:
    net = randomize(
        nn.Sequential(
            *[nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(4, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)],
        ),
        seed=1,
    )
    before = reference(net, (2, 8, 8))
    factor = 2.0 ** torch.arange(-4, 12, 4)
    for tensor in (net[1].weight, net[1].bias):
        tensor.data.mul_(factor)
    net[4].weight.data.div_(factor[:, None, None])
    close(reference(net, (2, 8, 8)), before)


def test_shares_are_logarithmic_derivatives() -> None:
    """Finite differences of log ||Phi||_q along log |theta|, with and without folding."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)
            self.twice = nn.Conv2d(4, 4, 3, padding=1)
            self.late = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu6(self.bn(self.conv(x))), 2, ceil_mode=True)
            y = self.twice(F.relu(self.twice(x))) + x
            y = self.late(torch.cat([F.avg_pool2d(y, 3, 1, 1), x], 1))
            return self.head(F.relu(y).mean((2, 3)))

    net = randomize(Net(), seed=2).double()
    shape, step = (2, 5, 5), 1e-6
    scale = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt()
    folded = net.bn.bias + scale * (net.conv.bias - net.bn.running_mean)
    late = net.late.weight / (net.late.running_var + net.late.eps).sqrt()
    shift = net.late.bias - late * net.late.running_mean
    # What one has to add to a parameter to stretch the effective coordinate by 1 + step.
    stretch = {name: p.detach().clone() for name, p in net.named_parameters()}
    stretch["bn.bias"] = folded.detach()
    stretch["late.bias"] = shift.detach()
    for q in (1, 2):
        result = reference(net, shape, q)
        assert result.scores.keys() == stretch.keys() - {"conv.bias", "bn.weight"}
        for name, share in result.scores.items():
            for index in [tuple(i) for i in torch.nonzero(share).tolist()][::17]:
                logs = []
                for sign in (1, -1):
                    moved = copy.deepcopy(net)
                    move = sign * step * stretch[name][index]
                    moved.get_parameter(name).data[index] += move
                    if name == "late.weight":  # the shift is a coordinate of its own
                        mean = moved.late.running_mean[index]
                        moved.late.bias.data[index] += move * mean * (late / net.late.weight)[index]
                    logs.append(reference(moved, shape, q).log10_path_norm * math.log(10))
                slope = (logs[0] - logs[1]) / (2 * step)
                assert slope == pytest.approx(share[index].item(), rel=1e-5, abs=1e-9), name


def test_batch_norm_is_folded_like_by_hand() -> None:
    net = randomize(
        nn.Sequential(
            *[nn.ConvTranspose2d(2, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()],
            *[nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False), nn.ReLU()],
            *[nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3)],
        ),
        seed=3,
    ).double()
    twin = copy.deepcopy(net)
    for i, axis in ((0, 1), (3, 0), (7, 0)):
        conv, bn = twin[i], twin[i + 1]
        scale = (bn.running_var + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight)
        shape = [-1 if a == axis else 1 for a in range(conv.weight.dim())]
        bias = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        bias = scale * bias + (0 if bn.bias is None else bn.bias)
        conv.weight.data = conv.weight.data * scale.detach().view(shape)
        conv.bias = nn.Parameter(bias.detach())
        twin[i + 1] = nn.Identity()
    expected = reference(twin, (2, 2, 2))
    renamed = {
        (f"{int(n[0]) + 1}.bias" if n.endswith("bias") else n): s
        for n, s in expected.scores.items()
    }
    close(reference(net, (2, 2, 2)), Reference(expected.path_norm, 0, renamed))


def _relu_between(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    y = conv(x)
    y.relu_()  # its result isn't used: what `y` is must have changed
    return bn(y)


@pytest.mark.parametrize(
    ("wiring", "direct"),
    [
        (lambda conv, bn, x: bn(F.relu(conv(x))), 0),
        (_relu_between, 0),
        (lambda conv, bn, x: bn(conv(x).contiguous()), 0),
        (lambda conv, bn, x: bn(F.dropout(conv(x), training=False)), 0),
        (lambda conv, bn, x: (bn(y := conv(x)), y), 2 + 3),
        (lambda conv, bn, x: bn(y := conv(x)) + y, 2 + 3),
    ],
)
def test_batch_norm_that_is_not_folded(wiring: Callable[..., Tensor], direct: int) -> None:
    """An edge gamma/sigma and a bias of its own, wherever something else reads or comes between."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1, eps=0.25)

        def forward(self, x: Tensor) -> Tensor:
            return wiring(self.conv, self.bn, x)

    net = Net()
    net.conv.weight.data.fill_(2)
    net.conv.bias.data.fill_(-3)
    net.bn.running_mean.fill_(10)
    net.bn.running_var.fill_(4 - net.bn.eps)
    net.bn.weight.data.fill_(-1)
    net.bn.bias.data.fill_(7)
    result = reference(net, (1, 1))
    assert result.path_norm == (2 + 3) / 2 + (7 + 10 / 2) + direct
    assert result.scores.keys() == {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}


def test_names_of_shared_pruned_and_computed_weights() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    net[1].weight = net[0].weight
    plain = reference(net, (4,))
    names = {f"{i}.{kind}" for i in range(4) for kind in ("weight", "bias")} - {"1.weight"}
    assert plain.scores.keys() == names
    parametrizations.weight_norm(net[2])
    computed = reference(net, (4,))
    assert computed.path_norm == pytest.approx(plain.path_norm, rel=1e-6)
    assert computed.scores.keys() == names
    prune.ln_structured(net[3], "weight", 0.5, 1, 0)
    pruned = reference(net, (4,))
    assert pruned.scores.keys() == names
    assert (pruned.scores["3.weight"] == 0).all(1).sum() == 2
    prune.remove(net[3], "weight")
    close(reference(net, (4,)), pruned)


def test_until_outputs_and_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(2, 3), nn.Linear(4, 3), nn.Sigmoid()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            x, y = self.a(x), self.b(y)
            return {"sum": x + y, "x": self.act(x)}

    net = Two()
    shapes = [(2,), (4,)]
    with pytest.raises(UnknownOperation, match="sigmoid"):
        reference(net, shapes)
    with pytest.raises(ValueError, match="nobody"):
        reference(net, shapes, until="nobody")
    a, b = (sum(p.abs().sum().item() for p in m.parameters()) for m in (net.a, net.b))
    assert reference(net, shapes, until="a").path_norm == pytest.approx(a)
    net.act = nn.Identity()
    assert reference(net, shapes).path_norm == pytest.approx(2 * a + b)
    tensors = [torch.randn(5, 2), torch.randn(5, 4)]
    close(reference(net, tensors), reference(net, shapes))


def test_the_model_and_the_generator_are_left_alone() -> None:
    net = build("shufflenet_v2_x0_5").train()
    prune.l1_unstructured(net.fc, "weight", 0.5)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    reference(net, (3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.dtype == torch.float32 for p in net.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_randomize_reaches_every_bias_and_statistic() -> None:
    first, again, other = (build("resnet18", seed) for seed in (0, 0, 1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if "weight" not in name and "num_batches" not in name:
            assert not torch.equal(value, other.state_dict()[name]), name
            assert value.unique().numel() > 0.9 * value.numel(), name
    assert (first.bn1.weight < 0).any() and (first.bn1.running_var > 0).all()


def test_the_zoo_has_the_51_models() -> None:
    assert len(INPUTS) == 51
