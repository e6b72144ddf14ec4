"""What holds after each pass, and that a graph for which it does not is found out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxpath.capture import capture
from fxpath.graph import ops
from fxpath.graph.spec import NOTES, violations
from fxpath.model import Captured, Given
from fxpath.passes import Setting, fold, hoist, lift, lower, reduce


class Moved(nn.Module):
    """Adds a product of two parameters, which the captured graph does not write out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x, self.a, self.b)


NET = nn.Sequential(
    nn.Conv2d(2, 4, 3, padding=1),
    nn.BatchNorm2d(4),
    nn.PReLU(4),
    nn.BatchNorm2d(4),
    Moved(),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Hardtanh(-1, 3),
    nn.MaxPool2d(3, 2, 1),
    nn.Flatten(),
    nn.Linear(256, 3),
).eval()


@pytest.fixture
def captured() -> Captured:
    return capture(NET, Given((2, 8, 8)))


def lifted(captured: Captured) -> fx.GraphModule:
    setting = Setting(captured)
    return lift(fold(captured.graph_module, setting), setting)


def test_every_pass_keeps_the_spec_and_the_graph_that_it_is_given(captured: Captured) -> None:
    setting = Setting(captured)
    module = captured.graph_module
    for stage, step in (
        ("folded", fold),
        ("lifted", lift),
        ("reduced", reduce),
        ("reduced", hoist),
        ("lowered", lower),
    ):
        before = written_down(module)
        result = step(module, setting)
        assert violations(result, stage, captured) == []
        assert written_down(module) == before
        module = result


def written_down(module: fx.GraphModule) -> list[str]:
    """Everything about a graph that a pass could change."""
    return [
        f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {list(node.users)} "
        f"{sorted((key, str(value)) for key, value in node.meta.items() if key in {*NOTES, 'val'})}"
        for node in module.graph.nodes
    ]


def test_a_frozen_norm_that_was_not_folded_is_found(captured: Captured) -> None:
    found = violations(captured.graph_module, "folded", captured)
    assert [what.split(": ")[1] for what in found] == ["a frozen norm is left"] * 2


def test_a_fold_with_a_wrong_shape_is_found(captured: Captured) -> None:
    module = fold(captured.graph_module, Setting(captured))
    first(module, ops.folded_weight).meta["val"] = torch.empty(7)
    found = violations(module, "folded", captured)
    assert [what.split(": ")[1] for what in found] == ["its shape is not that of its operation"]


def first(module: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in module.graph.nodes if node.target is target)


def _shape(module: fx.GraphModule) -> None:
    first(module, ops.slope).meta["val"] = torch.empty(1, 4, 8, 9, device="meta")


def _note(module: fx.GraphModule) -> None:
    first(module, ops.slope).meta["hint"] = 1


def _operation(module: fx.GraphModule) -> None:
    first(module, ops.clamp).target = torch.clamp


def _coefficient(module: fx.GraphModule) -> None:
    module.get_buffer(str(first(module, ops.along).args[3].target)).mul_(2)


def _weight(module: fx.GraphModule) -> None:
    node = first(module, ops.coordinate)
    with module.graph.inserting_after(node):
        changed = module.graph.call_function(torch.neg, (node,))
    changed.meta = {**node.meta, "static": True}


def _name(module: fx.GraphModule) -> None:
    one, other = [n for n in module.graph.nodes if n.target is ops.coordinate][:2]
    other.args = (other.args[0], one.args[1])


def _axis(module: fx.GraphModule) -> None:
    node = first(module, ops.along)
    node.meta["stencil"] = node.meta["stencil"][0] - 1, node.meta["stencil"][1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_shape, "its shape is not that of its operation"),
        (_note, "notes that are not declared: hint"),
        (_operation, "clamp is no operation of this stage"),
        (_coefficient, "its tensors are not those of its stencil"),
        (_weight, "a weight is computed by neg"),
        (_name, "0.weight has another shape elsewhere"),
        (_axis, "its tensors are not those of its stencil"),
    ],
)
def test_damage_is_found(
    captured: Captured, damage: Callable[[fx.GraphModule], None], said: str
) -> None:
    module = lifted(captured)
    assert violations(module, "lifted", captured) == []
    damage(module)
    found = violations(module, "lifted", captured)
    assert {what.split(": ", 1)[1] for what in found} == {said}


def test_a_later_stage_has_other_operations(captured: Captured) -> None:
    found = violations(lifted(captured), "reduced", captured)
    assert {what.split(": ")[1].split(" ")[0] for what in found} == {"along", "pool"}
