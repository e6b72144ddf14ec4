"""Which factor of a product is the gate, and how large it is: attacked by outputs above the norm.

Each network with gates has a twin without any, whose path-norm and scores it must have.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxpath

Function = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two linear maps of the inputs, a function of both, and a linear map."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.kernel = nn.Parameter(torch.empty(1, 1, 3))
        self.bound = nn.Parameter(torch.empty(4))
        self.function = function
        self.double().eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-2, 2)
            self.bound.add_(5)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for a batch."""
        return self.head(self.function(self, self.a(x), self.b(x)))


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def rows(x: Tensor) -> Tensor:
    """Weights of an attention without any norm, from queries and keys."""
    return (x[:, :, None] * x[:, None, :]).softmax(-1)


def heads(x: Tensor) -> Tensor:
    """The same for three heads, which are put in front."""
    return rows(x)[:, None].expand(-1, 3, -1, -1).reshape(-1, 4, 4)


def everywhere(x: Tensor, count: int = 4) -> Tensor:
    """What an average of all entries is in path mass, several times."""
    return x.sum(-1, keepdim=True).expand(-1, count)


def parts(x: Tensor) -> tuple[Tensor, ...]:
    return torch.cat([x, 2 * x], 1).chunk(2, 1)


def fourfold(x: Tensor) -> Tensor:
    """Four paths to each entry."""
    return x[:, :, None].expand(-1, -1, 4).sum(2)


def pair(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], 1)


def channel_attention(net: Net, a: Tensor, b: Tensor) -> Tensor:
    """Efficient channel attention: a convolution along the channels of pooled maps."""
    maps = a[:, :, None, None] * torch.ones(1, 1, 2, 2)
    pooled = functional.adaptive_avg_pool2d(maps, 1)[..., 0].transpose(1, 2)
    gate = functional.conv1d(pooled, net.kernel, padding=1).sigmoid()
    return (maps * gate.transpose(1, 2)[..., None].expand_as(maps)).sum((2, 3))


def spatial_attention(net: Net, a: Tensor, b: Tensor) -> Tensor:
    """A gate for each position, from means and maxima over the channels."""
    maps = a[:, :, None] * b.new_tensor([1.0, -1.0, 2.0])
    seen = maps.mean(1, keepdim=True) + maps.amax(1, keepdim=True)
    return (maps * functional.conv1d(seen, net.kernel, padding=1).sigmoid()).sum(2)


def in_place(net: Net, a: Tensor, b: Tensor) -> Tensor:
    a = a + 0
    a.mul_(b.sigmoid())
    return a


#: The function, what it is in path mass, and the parameters that only gates read.
A, B, KERNEL = {"a.weight", "a.bias"}, {"b.weight", "b.bias"}, {"kernel"}
TAKEN: dict[str, tuple[Function, Function, set[str]]] = {
    "sigmoid": (lambda n, a, b: a * sigmoid(b), lambda n, a, b: a, B),
    "sigmoid first": (lambda n, a, b: sigmoid(b) * a, lambda n, a, b: a, B),
    "swish": (lambda n, a, b: a * sigmoid(a), lambda n, a, b: a, set()),
    "mish": (
        lambda n, a, b: a * torch.tanh(functional.softplus(a)),
        lambda n, a, b: a,
        set(),
    ),
    "mish of a bounded value": (
        lambda n, a, b: torch.tanh(functional.softplus(b)) * a.clamp(-0.5, 0.5),
        lambda n, a, b: a.clamp(-0.5, 0.5),
        B,
    ),
    "hardswish": (lambda n, a, b: a * functional.relu6(a + 3) / 6, lambda n, a, b: a, set()),
    "hard gate": (
        lambda n, a, b: functional.relu6(a) * functional.hardsigmoid(b),
        lambda n, a, b: functional.relu6(a),
        B,
    ),
    "lstm": (lambda n, a, b: sigmoid(a) * torch.tanh(b), lambda n, a, b: b, A),
    "lstm, other order": (lambda n, a, b: torch.tanh(b) * sigmoid(a), lambda n, a, b: b, A),
    "hard lstm": (
        lambda n, a, b: torch.tanh(b) * functional.hardsigmoid(a),
        lambda n, a, b: b,
        A,
    ),
    "hard lstm, other order": (
        lambda n, a, b: functional.hardsigmoid(a) * torch.tanh(b),
        lambda n, a, b: b,
        A,
    ),
    "gru": (
        lambda n, a, b: (1 - sigmoid(b)) * torch.tanh(a) + sigmoid(b) * a,
        lambda n, a, b: a + a,
        B,
    ),
    "shared by two": (
        lambda n, a, b: a * sigmoid(b) + functional.relu(b) * (1 - sigmoid(b)),
        lambda n, a, b: a + functional.relu(b),
        set(),
    ),
    "glu": (
        lambda n, a, b: functional.glu(torch.cat([a, b], 1)),
        lambda n, a, b: a + 0 * b,
        set(),
    ),
    "chunks": (
        lambda n, a, b: parts(a)[0] * sigmoid(parts(a)[1]) + b * parts(a)[1].sigmoid(),
        lambda n, a, b: a + b,
        set(),
    ),
    "channels": (channel_attention, lambda n, a, b: fourfold(a), KERNEL),
    "positions": (spatial_attention, lambda n, a, b: 4 * a, KERNEL),
    "selective kernels": (
        lambda n, a, b: (pair(a, b) * pair(b, a).softmax(1)).sum(1),
        lambda n, a, b: a + b,
        set(),
    ),
    "attention": (
        lambda n, a, b: (rows(b) @ a[:, :, None])[..., 0],
        lambda n, a, b: everywhere(a),
        B,
    ),
    "attention of several heads": (
        lambda n, a, b: (heads(b) @ a[:, :, None].repeat_interleave(3, 0))[::3, :, 0],
        lambda n, a, b: everywhere(a),
        B,
    ),
    "attention, batches": (
        lambda n, a, b: torch.bmm(rows(b), a[:, :, None])[..., 0],
        lambda n, a, b: everywhere(a),
        B,
    ),
    "attention, columns": (
        lambda n, a, b: (a[:, None, :] @ rows(b).transpose(1, 2))[:, 0],
        lambda n, a, b: everywhere(a),
        B,
    ),
    "attention, columns of a softmax": (
        lambda n, a, b: (a[:, None, :] @ (b[:, :, None] * b[:, None, :]).softmax(1))[:, 0],
        lambda n, a, b: everywhere(a),
        B,
    ),
    "attention of torch": (
        lambda n, a, b: functional.scaled_dot_product_attention(
            b[:, None, :, None], 2 * b[:, None, :, None], a[:, None, :, None], is_causal=True
        )[:, 0, :, 0],
        lambda n, a, b: everywhere(a),
        B,
    ),
    "gates in gates": (
        lambda n, a, b: a * sigmoid(b * sigmoid(torch.tanh(b) * b)),
        lambda n, a, b: a,
        B,
    ),
    "norm in a gate": (
        lambda n, a, b: a * sigmoid(functional.layer_norm(b, (4,))),
        lambda n, a, b: a,
        B,
    ),
    "unbounded product in a gate": (lambda n, a, b: a * sigmoid(b * b), lambda n, a, b: a, B),
    "in place": (in_place, lambda n, a, b: a, B),
    "broadcast signal": (
        lambda n, a, b: a.mean(1, keepdim=True) * sigmoid(b),
        lambda n, a, b: a.mean(1, keepdim=True).expand(-1, 4),
        B,
    ),
    "other dtype": (
        lambda n, a, b: a * sigmoid(b.float()).double(),
        lambda n, a, b: a,
        B,
    ),
    "amplified": (lambda n, a, b: a * (1 + 2 * torch.tanh(b)), lambda n, a, b: 3 * a, B),
    "shifted": (lambda n, a, b: a * (sigmoid(b) - 0.5), lambda n, a, b: a / 2, B),
    "negative": (lambda n, a, b: a * -(sigmoid(b) / 4 + 1), lambda n, a, b: 1.25 * a, B),
    "clamped by a gate": (
        lambda n, a, b: a * torch.clamp(sigmoid(b), min=6 * sigmoid(b)),
        lambda n, a, b: 6 * a,
        B,
    ),
    "clamped in two steps": (
        lambda n, a, b: a * functional.relu(b).clamp(max=3) * b.clamp(max=1).clamp_min(-2),
        lambda n, a, b: 6 * a,
        B,
    ),
    "crossed bounds": (lambda n, a, b: a * b.clamp(3, -2), lambda n, a, b: 2 * a, B),
    "zero": (lambda n, a, b: a * b.clamp(0, 0) + b, lambda n, a, b: 0 * a + b, set()),
    "two of one value": (
        lambda n, a, b: torch.tanh(a) * torch.tanh(a),
        lambda n, a, b: a,
        set(),
    ),
    "gates behind each other": (
        lambda n, a, b: sigmoid(b) * sigmoid(a) * a,
        lambda n, a, b: a,
        B,
    ),
    "softsign": (
        lambda n, a, b: functional.softsign(a) * functional.softsign(b),
        lambda n, a, b: a,
        B,
    ),
    "tanhshrink": (lambda n, a, b: functional.tanhshrink(a), lambda n, a, b: a, set()),
    "parameter on a path and in a gate": (
        lambda n, a, b: a * sigmoid(a * n.bound) + n.bound,
        lambda n, a, b: a + n.bound,
        set(),
    ),
}


def attacked(model: nn.Module, scale: float) -> float:
    """The largest output that inputs of some scale give, against ``max(|x|, 1)``."""
    x = scale * torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sizes = model(x).abs().sum(1) / x.abs().amax(1).clamp(min=1)
    return float(sizes.max())


@pytest.mark.parametrize("name", TAKEN)
def test_a_gate_is_what_multiplies_a_signal(name: str) -> None:
    function, mass, gated = TAKEN[name]
    found = fxpath.analyze(Net(function), (3,), gates=True)
    twin = fxpath.analyze(Net(mass), (3,))
    assert found.path_norm == pytest.approx(twin.path_norm, rel=1e-12)
    assert found.scores.keys() == twin.scores.keys() - gated
    for key, scores in found.scores.items():
        torch.testing.assert_close(scores, twin.scores[key], rtol=1e-10, atol=1e-12)
    inside = {key for key, why in found.unscored.items() if "inside a gate" in why}
    assert inside == gated
    for scale in (0.1, 1.0, 30.0, 1000.0):
        assert attacked(Net(function), scale) <= found.path_norm * (1 + 1e-9)


@pytest.mark.parametrize("name", ["selective kernels", "channels"])
def test_reduction_and_exponents_do_not_see_gates(name: str) -> None:
    function, mass, _ = TAKEN[name]
    exponents = (0, 1, 2)
    expected = fxpath.path_norms(Net(mass), (3,), q=exponents)
    for reduce in (True, False):
        found = fxpath.path_norms(Net(function), (3,), q=exponents, gates=True, reduce=reduce)
        assert found == pytest.approx(expected, rel=1e-12)


#: The function, and an operation that is in the way.
REFUSED: dict[str, tuple[Function, str]] = {
    "two unbounded factors": (lambda n, a, b: a * b, "aten.mul.Tensor"),
    "a square": (lambda n, a, b: torch.tanh(a) ** 2, "aten.pow.Tensor_Scalar"),
    "no product": (lambda n, a, b: sigmoid(a), "aten.sigmoid.default"),
    "no signal": (lambda n, a, b: sigmoid(a) * sigmoid(b), "aten.sigmoid.default"),
    "a sum with a gate": (lambda n, a, b: sigmoid(a) - 0.5, "aten.sigmoid.default"),
    "softplus": (lambda n, a, b: functional.softplus(a), "aten.softplus.default"),
    "logarithm": (lambda n, a, b: functional.logsigmoid(a), "aten.log_sigmoid.default"),
    "exponential": (lambda n, a, b: torch.exp(a), "aten.exp.default"),
    "norm on a path": (
        lambda n, a, b: functional.layer_norm(a, (4,)) * sigmoid(b),
        "aten.layer_norm.default",
    ),
    "quotient by another size": (lambda n, a, b: a / (1 + b.abs()), "aten.div.Tensor"),
    "quotient by a size": (lambda n, a, b: a / (0.5 + a.abs()), "aten.div.Tensor"),
    "quotient": (lambda n, a, b: a / (1 + torch.exp(-b)), "aten.div.Tensor"),
    "sums that are not averages": (
        lambda n, a, b: (rows(b).transpose(1, 2) @ a[:, :, None])[..., 0],
        "aten.matmul.default",
    ),
    "values in front": (
        lambda n, a, b: (a[:, None, :] @ rows(b))[:, 0],
        "aten.matmul.default",
    ),
    "weights that are dropped at random": (
        lambda n, a, b: (functional.dropout(rows(b), 0.5, True) @ a[:, :, None])[..., 0],
        "aten.matmul.default",
    ),
    # Bounds that are there, and not known.
    "clamped by a parameter": (
        lambda n, a, b: a * torch.clamp(sigmoid(b), min=n.bound),
        "aten.mul.Tensor",
    ),
    "clamped by an activation": (
        lambda n, a, b: a * torch.clamp(sigmoid(b), min=b.abs()),
        "aten.mul.Tensor",
    ),
    "clamped from both sides, one unknown": (
        lambda n, a, b: a * torch.minimum(functional.relu(b), n.bound).clamp(min=-1),
        "aten.mul.Tensor",
    ),
    "clamped from below": (lambda n, a, b: a * b.clamp(min=-1), "aten.mul.Tensor"),
    # Numbers that are not what they were.
    "rounded": (
        lambda n, a, b: a * torch.div(torch.tanh(b) * 0.1, 1.0, rounding_mode="floor"),
        "aten.mul.Tensor",
    ),
    "booleans": (lambda n, a, b: a * (0.1 * sigmoid(b)).to(torch.bool), "aten.mul.Tensor"),
    "other bytes": (lambda n, a, b: a * sigmoid(b).view(torch.int64), "aten.mul.Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gate_is_refused(name: str) -> None:
    function, operation = REFUSED[name]
    report = fxpath.check(Net(function), (3,), gates=True)
    assert operation in {problem.operation for problem in report.problems}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda n, a, b: a * b, "neither of which is bounded"),
        (
            lambda n, a, b: (a[:, None, :] @ rows(b))[:, 0],
            "neither is a softmax along the axis that is summed",
        ),
        (lambda n, a, b: torch.addcmul(a, sigmoid(b), a), "in plain products alone"),
        (lambda n, a, b: sigmoid(a), "it is not 0 at 0"),
        (lambda n, a, b: a * b.clamp(-1e300, 1e300).mul(1e300), "neither of which is bounded"),
    ],
)
def test_refusals_say_what_is_in_the_way(function: Function, reason: str) -> None:
    report = fxpath.check(Net(function), (3,), gates=True)
    assert any(reason in problem.reason for problem in report.problems)


@pytest.mark.parametrize("kind", [nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish])
def test_decomposed_activations_are_the_same(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), kind(), nn.Linear(4, 2)).double().eval()
    exported = torch.export.export(model, (torch.zeros(1, 3, dtype=torch.float64),))
    expected = fxpath.path_norm(nn.Sequential(model[0], model[2]), (3,))
    for program in (exported, exported.run_decompositions()):
        found = fxpath.path_norm(program, (3,), gates=True)
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_attack_finds_a_norm_that_is_too_small() -> None:
    model = Net(lambda n, a, b: 4 * a * sigmoid(b))
    assert attacked(model, 30.0) > fxpath.path_norm(Net(lambda n, a, b: a), (3,))
