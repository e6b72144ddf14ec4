"""Shares of path mass in the nodes of a program, and how far torch carries them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

import fxpath
from fxpath.toolchain import annotate


class Net(nn.Module):
    """A branch, a weight that is computed, a layer that torch.export keeps in a block, a slope."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
        self.scale, self.slope, self.head = nn.Parameter(torch.rand(3)), nn.PReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu_()
        with torch.no_grad():
            z = self.second(y)
        z = z + y * (2 * self.scale)
        return self.head(self.slope(z))


@pytest.fixture
def net() -> Net:
    return Net().eval()


def program_of(net: nn.Module, rows: int = 1) -> ExportedProgram:
    return torch.export.export(net, (torch.randn(rows, 4),))


def norm(net: Net) -> float:
    """The path-norm by hand: ones through the net of absolute values."""
    net = copy.deepcopy(net).double()
    for parameter in net.parameters():
        parameter.data.abs_()
    with torch.no_grad():
        y = net.first(torch.ones(1, 4, dtype=torch.float64))
        return net.head(net.second(y) + 2 * net.scale * y).sum().item()


def lost(net: Net, *names: str) -> float:
    """The part of the path-norm that is lost with these parameters."""
    other = copy.deepcopy(net)
    for name in names:
        other.get_parameter(name).data.zero_()
    return 1 - norm(other) / norm(net)


def notes(module: fx.GraphModule, key: str = "fxpath") -> dict[str, Any]:
    """Name -> note, also of operations in blocks."""
    found: dict[str, Any] = {}
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else []:
            note = node.meta.get("custom", {}).get("fxpath") if key == "custom" else None
            note = node.meta.get(key) if key == "fxpath" else note
            if note is not None:
                found[node.name] = note
    return found


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Layer -> share."""
    layers = [note for note in found.values() if {*note} >= {"layer", "share"}]
    return {note["layer"]: note["share"] for note in layers}


def test_layers_have_the_part_of_the_norm_that_is_lost_without_them(net: Net) -> None:
    found = notes(annotate(program_of(net)).graph_module)
    known = {
        "first": lost(net, "first.weight", "first.bias"),
        "second": lost(net, "second.weight", "second.bias"),
        "scale": lost(net, "scale"),
        "head": 1.0,
    }
    assert shares(found) == pytest.approx(known, rel=1e-5)
    for name in ("first.weight", "second.bias", "scale", "head.weight"):
        placeholder = found[f"p_{name.replace('.', '_')}"]
        assert placeholder == {"share": pytest.approx(lost(net, name), rel=1e-5)}
    assert "p_slope_weight" not in found and "x" not in found


def test_every_operation_on_activations_says_its_layer_and_its_rule(net: Net) -> None:
    found = notes(annotate(program_of(net)).graph_module)
    rules = {name: (note["layer"], note["rule"]) for name, note in found.items() if "rule" in note}
    assert sorted(rules.values()) == [
        ("", "add"),
        ("", "relu"),
        ("first", "linear"),
        ("head", "linear"),
        ("scale", "mul"),  # and none for 2 * scale, which is a weight
        ("second", "linear"),
        ("slope", "prelu"),
    ]


def test_a_frozen_norm_belongs_to_the_layer_before_it() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).eval()
    program = annotate(program_of(net))
    found = [note for note in notes(program.graph_module).values() if "layer" in note]
    known = {row["name"]: row["share"] for row in fxpath.analyze(net, (4,)).layers}
    assert found == [
        {"share": known["0"], "layer": "0", "rule": "linear"},
        {"layer": "1", "rule": "fold"},
        {"layer": "2", "rule": "relu"},
        {"share": known["3"], "layer": "3", "rule": "fold"},
    ]


def test_the_program_is_the_same_and_its_argument_stays_as_it_is(net: Net) -> None:
    program = program_of(net)
    next(iter(program.graph.nodes)).meta["custom"] = {"mine": 1}
    before = str(program), [dict(node.meta) for node in program.graph.nodes]
    annotated = annotate(program)
    assert (str(program), [dict(node.meta) for node in program.graph.nodes]) == before
    assert str(annotated.graph) == str(program.graph)
    assert str(annotated.graph_signature) == str(program.graph_signature)
    assert all(annotated.state_dict[k] is v for k, v in program.state_dict.items())
    x = torch.randn(1, 4)
    assert torch.equal(annotated.module()(x), net(x))
    first = next(iter(annotated.graph.nodes))
    assert first.meta["custom"] == {"mine": 1, "fxpath": first.meta["fxpath"]}
    known = {"fxpath", "custom"}
    for node, old in zip(annotated.graph.nodes, program.graph.nodes, strict=True):
        assert node.meta.keys() - old.meta.keys() <= known


def test_annotating_twice_follows_the_weights(net: Net) -> None:
    once = annotate(program_of(net))
    net.second.weight.data.mul_(3)
    again = annotate(once)
    assert shares(notes(again.graph_module))["second"] == pytest.approx(
        lost(net, "second.weight", "second.bias"), rel=1e-5
    )
    assert notes(again.graph_module) == notes(again.graph_module, "custom")
    assert notes(again.graph_module) != notes(once.graph_module)


def test_how_far_torch_carries_the_notes(net: Net) -> None:
    program = annotate(program_of(net))
    own = notes(program.graph_module)
    assert own == notes(program.graph_module, "custom")
    known = shares(own)

    called = program.module()
    assert shares(notes(called)) == shares(notes(called, "custom")) == known

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).graph_module
    assert shares(notes(loaded, "custom")) == known
    assert notes(loaded, "custom") == {k: v for k, v in own.items() if not k.startswith("p_")}
    assert notes(loaded) == {}

    del known["second"]  # in a block
    for traced in (
        torch.export.export(called, (torch.ones(1, 4),)),
        program.run_decompositions({}),
        program.run_decompositions(),
    ):
        assert shares(notes(traced.graph_module, "custom")) == known
        assert shares(notes(traced.graph_module)) == {}


def test_what_a_backend_of_torch_compile_is_handed_bears_them() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    program = annotate(program_of(net))
    seen: list[dict[str, float]] = []

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(shares(notes(module, "custom")))
        return module.forward

    torch.compile(program.module(), backend=backend)(torch.ones(1, 4))
    torch._dynamo.reset()
    assert seen == [shares(notes(program.graph_module))]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_that_is_traced_again_finds_its_nodes(net: Net, dynamic: bool) -> None:
    shapes = ({0: Dim("rows", min=2)},) if dynamic else None
    program = torch.export.export(net, (torch.randn(3, 4),), dynamic_shapes=shapes)
    found = notes(annotate(program).graph_module)
    assert shares(found) == pytest.approx(shares(notes(annotate(program_of(net)).graph_module)))


def test_writing_through_views_leaves_layers_where_they_are() -> None:
    class Views(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y[:, 0] = 0
            return y.relu()

    net = Views(4, 3)
    program = annotate(program_of(net))
    assert shares(notes(program.graph_module)) == pytest.approx({"weight": 1.0})


def test_an_operator_with_a_rule_of_its_own_is_one_layer() -> None:
    @torch.library.custom_op("fxpath_tests::relu_of_linear", mutates_args=())
    def own(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.T).clamp(min=0)

    @own.register_fake
    def _(x: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(len(x), len(weight))

    def relu_of_linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, weight))

    class Fused(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fxpath_tests.relu_of_linear(x, self.weight)

    net = nn.Sequential(Fused(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    with fxpath.register_rule(torch.ops.fxpath_tests.relu_of_linear.default, relu_of_linear):
        found = notes(annotate(program_of(net)).graph_module)
    assert found["relu_of_linear"]["layer"] == "0"
    assert found["relu_of_linear"]["rule"] == "relu_of_linear"
    assert shares(found) == pytest.approx({"0": 1.0, "1": 1.0})


def test_what_cannot_be_annotated_is_refused(net: Net) -> None:
    with pytest.raises(TypeError, match="a Net is no ExportedProgram"):
        annotate(net)  # type: ignore[arg-type]
    with pytest.raises(fxpath.UnsupportedModelError, match="smooth activation"):
        annotate(program_of(nn.Sequential(nn.Linear(4, 2), nn.Tanh())))
