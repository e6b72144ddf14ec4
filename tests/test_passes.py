"""Passes one by one: in torch's pass manager, and from one exported program to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional

import fxpath
from fxpath.graph import ops
from fxpath.passes import Derive, Fold, Given, Lift, Lower, Reduce, Setting, capture
from fxpath.toolchain import (
    derive_program,
    fold_program,
    lift_program,
    lower_program,
    reduce_program,
)
from tests.test_spec import written_down

SHAPE = (2, 6, 6)


class Net(nn.Module):
    """Batch norms behind convolutions and on a branch, a residual sum, a max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(3)])
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(27, 2)
        for norm in self.norms:
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two, branch = self.norms
        y = one(self.first(x)).relu()
        return self.head(self.pool((two(self.second(y)) + branch(y)).relu()).flatten(1))


def path_norm(net: Net, q: float = 1) -> float:
    """The same by hand, in float64: ones through the net of absolute values, sums for maxima."""

    def folded(norm: nn.Module) -> tuple[Tensor, Tensor]:
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        return factor, norm.bias.double() - factor * norm.running_mean.double()

    def mapped(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
        factor, shift = folded(norm)
        weight = (conv.weight.double() * factor[:, None, None, None]).abs() ** q
        bias = (shift + factor * conv.bias.double()).abs() ** q
        return functional.conv2d(x, weight, bias, padding=1)

    one, two, branch = net.norms
    y = mapped(torch.ones(1, *SHAPE, dtype=torch.float64), net.first, one)
    factor, shift = (t.abs()[:, None, None] ** q for t in folded(branch))
    y = mapped(y, net.second, two) + factor * y + shift
    y = 4 * functional.avg_pool2d(y, 2)
    head = net.head
    y = y.flatten(1) @ (head.weight.double().abs() ** q).T + head.bias.double().abs() ** q
    return (y.sum() ** (1 / q)).item()


@pytest.fixture
def net() -> Net:
    return Net().eval()


def number(found: dict[str, Any]) -> float:
    return (found["mantissa"] * 2 ** found["exponent"]).item()


# -- the pass manager ------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("q", [1, 2])
def test_the_pass_manager_gives_the_norm_and_the_scores(net: Net, q: float, whole: bool) -> None:
    setting = Setting(capture(net, Given(SHAPE)), q)
    module = setting.captured.graph_module
    before = written_down(module)
    kinds = [Fold, Lift, *([] if whole else [Reduce]), Lower, Derive]
    manager = PassManager([kind(setting) for kind in kinds], run_checks_after_each_pass=True)
    result = manager(module)
    assert written_down(module) == before and result.modified
    assert result.graph_module is not module
    found = result.graph_module(*setting.captured.live().values())
    assert number(found) ** (1 / q) == pytest.approx(path_norm(net, q))
    known = fxpath.analyze(net, SHAPE, q=q).scores
    assert found["scores"].keys() == known.keys()
    for name, scores in known.items():
        torch.testing.assert_close(found["scores"][name], scores, check_dtype=False)


def test_each_pass_leaves_the_graph_that_it_is_given(net: Net) -> None:
    setting = Setting(capture(net, Given(SHAPE)))
    module = setting.captured.graph_module
    for kind in (Fold, Lift, Reduce, Lower, Derive):
        before = written_down(module)
        result = kind(setting)(module)
        assert isinstance(result, PassResult)
        assert written_down(module) == before
        module = result.graph_module


def test_a_pass_that_has_nothing_to_do_says_so() -> None:
    setting = Setting(capture(nn.Linear(2, 1), Given((2,))))
    assert not Fold(setting)(setting.captured.graph_module).modified


@pytest.mark.parametrize("kind", [Lift, Reduce, Lower, Derive])
def test_a_pass_takes_no_graph_of_another_stage(net: Net, kind: Any) -> None:
    setting = Setting(capture(net, Given(SHAPE)))
    with pytest.raises(Exception, match=f"'{kind.__name__}' pass") as caught:
        PassManager([kind(setting)])(setting.captured.graph_module)
    assert isinstance(caught.value.__cause__, ValueError)
    assert f"{kind.__name__} takes a {kind.before[0]}" in str(caught.value.__cause__)


def test_fold_takes_no_graph_that_writes_to_tensors(net: Net) -> None:
    setting = Setting(capture(net, Given(SHAPE)))
    program = torch.export.export(nn.ReLU(inplace=True), (torch.ones(2),))
    with pytest.raises(ValueError, match="Fold takes a captured graph.* writes to a tensor"):
        Fold(setting)(program.graph_module)
    with pytest.raises(ValueError, match="Fold takes a captured graph.*no ATen operation"):
        Fold(setting)(Lift(setting)(Fold(setting)(setting.captured.graph_module)[0])[0])


def test_what_a_pass_returns_is_looked_at(net: Net) -> None:
    class Careless(Lift):
        def rewritten(self, graph_module: fx.GraphModule) -> fx.GraphModule:
            made = super().rewritten(graph_module)
            next(n for n in made.graph.nodes if n.target is ops.relu).target = torch.sigmoid
            return made

    setting = Setting(capture(net, Given(SHAPE)))
    folded = Fold(setting)(setting.captured.graph_module).graph_module
    with pytest.raises(ValueError, match="this is no lifted graph: .*sigmoid is no operation of"):
        Careless(setting)(folded)


# -- exported programs -----------------------------------------------------------------------------

STEPS: list[tuple[Callable[..., ExportedProgram], str]] = [
    (fold_program, "FXPATH/FOLDED"),
    (lift_program, "FXPATH/LIFTED"),
    (reduce_program, "FXPATH/REDUCED"),
    (lower_program, "FXPATH/LOWERED"),
]


def test_each_program_is_what_its_pass_makes_of_the_one_before(net: Net) -> None:
    x = torch.randn(1, *SHAPE)
    model = program = torch.export.export(net, (x,))
    for step, dialect in STEPS:
        before = str(program), written_down(program.graph_module)
        made = step(program)
        assert (str(program), written_down(program.graph_module)) == before
        assert made.dialect == dialect
        assert all(made.state_dict[k] is v for k, v in model.state_dict.items())
        assert made.graph_signature.parameters == model.graph_signature.parameters
        if step is fold_program:
            torch.testing.assert_close(made.module()(x), net(x))
            assert not any("batch_norm" in str(node.target) for node in made.graph.nodes)
        else:
            assert made.graph_signature.user_inputs == ()
            assert made.module()().item() == pytest.approx(path_norm(net))
        program = made


def test_the_last_program_is_that_of_a_compiled_model() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU()).eval()
    lifted = lift_program(fold_program(torch.export.export(net, (torch.ones(1, 3),))))
    derived = derive_program(lower_program(reduce_program(lifted)), dtype=torch.float64)
    exported = fxpath.compile(net, (3,), backend="eager", dtype=torch.float64).exported()
    assert str(derived.graph) == str(exported.graph)
    assert derived.state_dict.keys() == exported.state_dict.keys()
    found = derived.module()()
    torch.testing.assert_close(found, exported.module()(), rtol=0, atol=0)
    known = net[0].weight.abs().sum() + net[0].bias.abs().sum()
    assert number(found) == pytest.approx(known.item(), rel=1e-4)


def test_a_folded_program_becomes_one_of_aten_operators(net: Net) -> None:
    x = torch.randn(1, *SHAPE)
    plain = fold_program(torch.export.export(net, (x,))).run_decompositions({})
    called = [node.target for node in plain.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in called} == {"aten"}
    assert not any("batch_norm" in str(target) for target in called)
    torch.testing.assert_close(plain.module()(x), net(x))


class Many(nn.Module):
    """Tied weights, a mask, positions, a literal, a keyword input, results of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.norm.running_var.uniform_(0.5, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]), persistent=False)
        self.register_buffer("order", torch.tensor([2, 0]))

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Any]:
        z = torch.where(self.mask > 0, self.norm(self.b(self.a(x).relu())), torch.tensor(0.5))
        return {"z": z[:, self.order], "none": None, "pair": (z + y, 3)}


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_is_called_as_its_model_is(dynamic: bool) -> None:
    model = Many().eval()
    rows = {0: Dim("rows", min=2)}
    program = torch.export.export(
        model,
        (torch.randn(3, 3),),
        {"y": torch.randn(3, 3)},
        dynamic_shapes={"x": rows, "y": rows} if dynamic else None,
    )
    folded = fold_program(program)
    x, y = torch.randn(1, 3), torch.randn(1, 3)
    torch.testing.assert_close(folded.module()(x, y=y), model(x, y=y))
    lifted = lift_program(folded)
    lowered = lower_program(reduce_program(lifted))
    assert lowered.module()().item() == pytest.approx(fxpath.path_norm(program))


def test_a_graph_is_not_used_for_other_numbers_than_it_was_made_for() -> None:
    model = Many().eval()
    program = torch.export.export(model, (torch.ones(1, 3),), {"y": torch.ones(1, 3)})
    lifted = lift_program(fold_program(program))
    program.constants["mask"][1] = 1.0
    with pytest.raises(ValueError, match="mask has other entries, which select"):
        reduce_program(lifted)


def test_a_program_of_another_stage_is_refused_with_what_to_run_first(net: Net) -> None:
    model = torch.export.export(net, (torch.ones(1, *SHAPE),))
    folded = fold_program(model)
    lifted = lift_program(folded)
    for step, program, what in (
        (lift_program, model, "is the model's own, and .* folded: run fold_program on it first"),
        (reduce_program, model, "run fold_program, then lift_program on it first"),
        (lower_program, folded, "is folded, and .* lifted or reduced: run lift_program on it"),
        (derive_program, lifted, "run reduce_program, then lower_program on it first"),
        (fold_program, lifted, "the program is lifted already, and what is wanted is the model's"),
        (lift_program, lifted, "the program is lifted already, and what is wanted is folded"),
    ):
        with pytest.raises(ValueError, match=what):
            step(program)
    with pytest.raises(ValueError, match="no model's program, but of the dialect FXPATH/LIFTED"):
        fxpath.path_norm(lifted)
    with pytest.raises(TypeError, match="a Net is no ExportedProgram"):
        fold_program(net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"computed in torch\.float32 or torch\.float64"):
        derive_program(lower_program(lifted), dtype=torch.float16)


def test_a_program_that_does_not_hold_to_its_stage_is_refused(net: Net) -> None:
    folded = fold_program(torch.export.export(net, (torch.ones(1, *SHAPE),)))
    lifted = lift_program(folded)
    node = next(n for n in lifted.graph.nodes if n.target is ops.relu)
    node.target = torch.sigmoid
    with pytest.raises(ValueError, match="no lifted one: relu: sigmoid is no operation"):
        reduce_program(lifted)
    with pytest.raises(Exception, match="not an allowed operator"):
        lifted.validate()
    node.target = functional.relu
    with pytest.raises(Exception, match="is no word of fxpath.graph.ops"):
        lifted.validate()


def test_what_has_no_rule_is_refused_when_it_is_lifted() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    folded = fold_program(torch.export.export(model, (torch.ones(1, 2),)))
    with pytest.raises(fxpath.UnsupportedModelError, match="smooth activation") as caught:
        lift_program(folded)
    assert [p.module_path for p in caught.value.report.problems] == ["1"]


def test_numbers_that_no_norm_is_defined_for_are_named(net: Net) -> None:
    program = torch.export.export(net, (torch.ones(1, *SHAPE),))
    lowered = lower_program(lift_program(fold_program(program)))
    program.state_dict["head.weight"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite entries in head\.weight"):
        derive_program(lowered)
