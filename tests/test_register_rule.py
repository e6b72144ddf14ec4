"""An operator of a user's own counts as the composition that is registered for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fxpath
from fxpath.graph.compositions import COMPOSITIONS


@torch.library.custom_op("fxpath_tests::linear_relu", mutates_args=())
def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = (x[..., None, :] * weight).sum(-1)
    return torch.where(z > 0, z, 0) if bias is None else torch.where(z > -bias, z + bias, 0)


@linear_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("fxpath_tests::both_signs", mutates_args=())
def both_signs(parts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    x = sum(parts) * scale
    return torch.where(x > 0, x, 0), torch.where(x < 0, -x, 0)


@both_signs.register_fake
def _(parts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(parts[0]), torch.empty_like(parts[0])


@torch.library.custom_op("fxpath_tests::silent", mutates_args=())
def silent(x: Tensor) -> Tensor:
    return x.clone()


OWN = torch.ops.fxpath_tests.linear_relu.default
SIGNS = torch.ops.fxpath_tests.both_signs.default
Call = Callable[..., Any]


def composed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.relu(linear(x, weight, bias))


def composed_signs(parts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    x = (parts[0] + parts[1]) * scale
    return x.relu(), (-x).relu()


class Net(nn.Module):
    """A fused layer, one that is used without its bias, and a sum around both signs of it."""

    fused: Call = staticmethod(linear_relu)
    signs: Call = staticmethod(both_signs)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.second = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x, self.first.weight, self.first.bias)
        up, down = self.signs([self.fused(y, weight=self.second.weight), y], scale=0.5)
        return self.head(up - 2 * down + y)


class Twin(Net):
    """The same with plain operations."""

    fused, signs = staticmethod(composed), staticmethod(composed_signs)


@pytest.fixture
def registered() -> Iterator[None]:
    with fxpath.register_rule(OWN, composed), fxpath.register_rule(SIGNS, composed_signs):
        yield
    assert not COMPOSITIONS


@pytest.fixture
def nets() -> tuple[Net, Twin]:
    net, twin = Net(), Twin()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(net(x), twin(x))
    return net, twin


@pytest.mark.usefixtures("registered")
def test_every_verb_sees_the_composition(nets: tuple[Net, Twin]) -> None:
    net, twin = nets
    found, known = fxpath.analyze(net, (4,)), fxpath.analyze(twin, (4,))
    assert found.path_norm == known.path_norm > 0
    assert found.layers == known.layers and found.unscored == known.unscored
    for name, scores in known.scores.items():
        assert torch.equal(found.scores[name], scores)

    others = Net(), Twin()
    others[1].load_state_dict(others[0].state_dict())
    metrics = [fxpath.path_metric(a, b, (4,)) for a, b in zip(nets, others, strict=True)]
    assert metrics[0].upper == metrics[1].upper >= metrics[0].lower == metrics[1].lower > 0
    bounds = [fxpath.lipschitz_bound(a, b, (4,)) for a, b in zip(nets, others, strict=True)]
    assert float(bounds[0]) == float(bounds[1]) > 0

    liftings = [fxpath.path_lifting(model, (4,)) for model in nets]
    assert torch.equal(liftings[0].phi, liftings[1].phi)
    assert float(liftings[0].phi.abs().sum()) == pytest.approx(found.path_norm)

    masks = [fxpath.prune(model, 0.5, (4,)).masks for model in nets]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])

    scaled = fxpath.normalize(net, (4,))
    x = torch.randn(5, 4)
    assert not torch.equal(scaled.first.weight, net.first.weight)
    torch.testing.assert_close(scaled(x), net(x))


@pytest.mark.usefixtures("registered")
def test_a_program_that_was_exported_before_is_written_out_too(nets: tuple[Net, Twin]) -> None:
    net, twin = nets
    program = torch.export.export(net, (torch.zeros(1, 4),))
    assert any(node.target is OWN for node in program.graph.nodes)
    assert fxpath.path_norm(program) == fxpath.path_norm(twin, (4,))
    assert any(node.target is OWN for node in program.graph.nodes)


def test_without_a_rule_it_is_refused_with_what_to_do(nets: tuple[Net, Twin]) -> None:
    report = fxpath.check(nets[0], (4,))
    assert [p.operation for p in report.problems] == [f"{OWN}", f"{OWN}", f"{SIGNS}"]
    assert report.problems[0].source_line.endswith(
        "y = self.fused(x, self.first.weight, self.first.bias)"
    )
    assert "fxpath.register_rule" in report.problems[0].remedy


def test_a_decorator_gives_the_function_back_and_a_rule_can_call_another() -> None:
    linear_alone = torch.ops.fxpath_tests.linear_relu.default

    def through(parts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        one = scale * torch.eye(3)
        return linear_relu(parts[0] + parts[1], one), linear_relu(parts[0] + parts[1], -one)

    net, twin = Net(), Twin()
    twin.load_state_dict(net.state_dict())
    assert fxpath.register_rule(linear_alone)(composed) is composed
    try:
        with fxpath.register_rule(SIGNS, through) as handle:
            assert handle.operator is SIGNS
            assert fxpath.path_norm(net, (4,)) == pytest.approx(fxpath.path_norm(twin, (4,)))
    finally:
        del COMPOSITIONS[linear_alone]
    handle.remove()  # once more
    assert not COMPOSITIONS


def test_what_a_rule_writes_to_is_a_copy(nets: tuple[Net, Twin]) -> None:
    net, twin = nets

    def writes(parts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(False):
            up = parts[0].add_(parts[1]).mul_(scale)  # an argument, which the operator leaves alone
        return up.relu(), (-up).relu_()

    twin.load_state_dict(net.state_dict())
    with fxpath.register_rule(OWN, composed), fxpath.register_rule(SIGNS, writes):
        assert fxpath.path_norm(net, (4,)) == pytest.approx(fxpath.path_norm(twin, (4,)))


HELD = torch.tensor([1.0, 2.0, 3.0])
WRONG: dict[str, tuple[Call, str]] = {
    "raises": (lambda x, weight, bias=None: x.no(), "cannot be traced: AttributeError"),
    "another shape": (lambda x, weight, bias=None: x, "returns [1, 4] in torch.float32, and the"),
    "another format": (lambda *a, **k: composed(*a, **k).double(), "in torch.float64, and the"),
    "two results": (lambda *a, **k: 2 * (composed(*a, **k),), "returns [1, 3]"),
    "a tensor of its own": (lambda *a, **k: composed(*a, **k) + HELD, "no arguments of the"),
    "itself": (linear_relu, "calls the operator itself"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_rule_that_does_not_fit_is_refused_by_name(kind: str) -> None:
    composition, reason = WRONG[kind]
    with fxpath.register_rule(OWN, composition):
        (found,) = fxpath.check(Net(), (4,)).problems
    assert found.operation == str(OWN) and reason in found.reason
    assert "which is registered as its rule" in found.reason
    assert "fxpath.register_rule" in found.remedy


def test_what_a_rule_is_made_of_needs_rules_too() -> None:
    def smooth(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.sigmoid(linear(x, weight, bias))

    with fxpath.register_rule(OWN, smooth):
        found = fxpath.check(Net(), (4,)).problems
    assert [p.operation for p in found][:2] == ["aten.sigmoid.default"] * 2
    assert "self.fused(x, self.first.weight" in found[0].source_line


def test_what_cannot_be_registered() -> None:
    aten = torch.ops.aten
    for operator, what in (
        (torch.ops.fxpath_tests.linear_relu, "torch.ops.fxpath_tests.linear_relu.default"),
        (linear_relu, "fxpath_tests::linear_relu.* is no overload"),
        (aten.add, "torch.ops.aten.add.Tensor or torch.ops.aten.add.Scalar"),
        ("mylib::op", "mylib::op is no overload"),
    ):
        with pytest.raises(TypeError, match=what.replace("ops.", r"ops\.")):
            fxpath.register_rule(operator, composed)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="is a int, no function"):
        fxpath.register_rule(OWN, 3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"aten\.relu\.default has a rule already, one of fxpath"):
        fxpath.register_rule(aten.relu.default, torch.relu)
    with pytest.raises(ValueError, match=r"aten\.exp_\.default writes to its arguments"):
        fxpath.register_rule(aten.exp_.default, torch.exp)
    with fxpath.register_rule(OWN, composed):
        with pytest.raises(ValueError, match="has a rule already, one that was registered before"):
            fxpath.register_rule(OWN, composed)
    assert not COMPOSITIONS


def test_an_operator_that_torch_cannot_trace_is_told_of() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return silent(x)

    (found,) = fxpath.check(Silent(), (4,)).problems
    assert "does not tell torch the shape of its result" in found.reason
    assert "torch.library.register_fake" in found.remedy
