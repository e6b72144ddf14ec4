"""A compiled program follows the live parameters, and differentiates into them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from tests.support.checks import assert_equal_analyses, differences, relative_derivative, snapshot
from tests.support.nets import SMALL, mlp, small_net

# Programs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> Iterator[tuple[nn.Module, fxpath.PathProgram]]:
    """A tiny MLP and its program; compiling is slow, so all tests share one."""
    model = mlp().double()
    yield model, fxpath.compile(model, (5,), backend="eager")


def test_program_agrees_with_the_analysis_on_live_parameters(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    for factor in (1.0, 3.0, 0.5):
        with torch.no_grad():
            model[2].weight.mul_(factor)
            model[0].bias[0].neg_()
        analysis = fxpath.analyze(model)
        assert program.path_norm() == pytest.approx(analysis.path_norm, rel=1e-12)
        assert program.log10_path_norm() == pytest.approx(analysis.log10_path_norm, abs=1e-12)
        scores = program.scores()
        assert set(scores) == set(analysis.scores)
        for name, wanted in analysis.scores.items():
            torch.testing.assert_close(scores[name], wanted, rtol=1e-11, atol=0)


def test_program_follows_load_state_dict_and_new_data(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    kept = copy.deepcopy(model.state_dict())
    before = program.path_norm()
    model.load_state_dict({name: 2 * value for name, value in kept.items()})
    assert program.path_norm() == pytest.approx(fxpath.path_norm(model), rel=1e-12)
    assert program.path_norm() != pytest.approx(before, rel=0.1)
    model[0].weight.data = model[0].weight.data * 5
    assert program.path_norm() == pytest.approx(fxpath.path_norm(model), rel=1e-12)
    model.load_state_dict(kept)
    assert program.path_norm() == pytest.approx(before, rel=1e-12)


def test_program_differentiates_into_the_parameters(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    model.zero_grad()
    value = program.log_path_norm()
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(math.log(program.path_norm()), rel=1e-12)
    value.backward()
    scores = program.scores()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # (14): the share is theta_i d log||Phi||_1 / d theta_i.
        torch.testing.assert_close(
            parameter.grad * parameter.detach(), scores[name], rtol=1e-10, atol=1e-14
        )
    for name, index in (("0.weight", (3, 2)), ("2.bias", (1,)), ("4.weight", (0, 5))):
        parameter = model.get_parameter(name)
        size = float(parameter.detach()[index])
        derivative = relative_derivative(model, (5,), parameter, index) / program.path_norm()
        assert float(parameter.grad[index]) * size == pytest.approx(derivative, rel=1e-8)


def test_program_regularizes_a_training_loss(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    kept = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = program.log10_path_norm()
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().mean() + 0.5 * program.log_path_norm()).backward()
        optimizer.step()
    assert program.log10_path_norm() < before - 0.01
    model.load_state_dict(kept)
    model.zero_grad()


def test_program_writes_scores_into_buffers_of_the_caller(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    expected = {name: scores.clone() for name, scores in program.scores().items()}
    buffers = {name: torch.full_like(scores, math.nan) for name, scores in expected.items()}
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    for _ in range(2):  # the second call finds the program compiled
        returned = program.scores(out=buffers)
        for name, buffer in buffers.items():
            assert returned[name] is buffer
            assert buffer.data_ptr() == addresses[name]
            torch.testing.assert_close(buffer, expected[name], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"0\.bias"):
        program.scores(out={name: b for name, b in buffers.items() if name != "0.bias"})
    with pytest.raises(ValueError, match=r"0\.bias"):
        program.scores(out={**buffers, "0.bias": torch.zeros(1, dtype=torch.float64)})


def test_program_results_do_not_share_memory(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    first = program.scores()
    kept = {name: scores.clone() for name, scores in first.items()}
    with torch.no_grad():
        model[4].weight[0].mul_(7)
    second = program.scores()
    assert not torch.equal(second["4.weight"], kept["4.weight"])
    for name, scores in first.items():
        assert torch.equal(scores, kept[name]), name
    with torch.no_grad():
        model[4].weight[0].div_(7)


def test_program_leaves_the_model_alone(compiled: tuple[nn.Module, fxpath.PathProgram]) -> None:
    model, program = compiled
    model.zero_grad()
    before = snapshot(model)
    program.path_norm()
    program.log10_path_norm()
    program.scores()
    assert differences(before, snapshot(model)) == []
    program.log_path_norm().backward()
    for parameter in model.parameters():
        parameter.grad = None
    assert differences(before, snapshot(model)) == []


def test_graph_of_a_program_lints_and_prints(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    assert isinstance(program.graph_module, torch.fx.GraphModule)
    program.graph_module.graph.lint()
    code, graph = (
        program.graph_module.print_readable(print_output=False),
        program.graph_module.graph,
    )
    for name, _ in model.named_parameters():
        shown = f"p_{name.replace('.', '_')}"
        assert shown in code and f"%{shown} : " in str(graph), name


def test_program_notices_values_that_are_not_finite(
    compiled: tuple[nn.Module, fxpath.PathProgram],
) -> None:
    model, program = compiled
    kept = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"2\.weight"):
        program.path_norm()
    with pytest.raises(ValueError, match=r"2\.weight"):
        program.scores()
    with torch.no_grad():
        model[2].weight.copy_(kept)


@pytest.mark.slow
def test_program_of_a_network_with_batch_norm_follows_its_statistics() -> None:
    model = small_net().double()
    program = fxpath.compile(model, SMALL, backend="eager")
    for _ in range(2):
        analysis = fxpath.analyze(model, SMALL)
        assert program.path_norm() == pytest.approx(analysis.path_norm, rel=1e-12)
        scores = program.scores()
        for name, wanted in analysis.scores.items():
            torch.testing.assert_close(scores[name], wanted, rtol=1e-11, atol=0)
        with torch.no_grad():
            model.bn.running_var.mul_(3)
            model.bn.running_mean.add_(0.2)
            model.bn.weight[1].neg_()
    program.log_path_norm().backward()
    # gamma has no score, but a regularizer must reach it: through the folded weight and bias.
    for name in ("weight", "bias"):
        parameter = getattr(model.bn, name)
        derivative = relative_derivative(model, SMALL, parameter, (2,)) / program.path_norm()
        grad = float(parameter.grad[2] * parameter.detach()[2])
        assert grad == pytest.approx(derivative, rel=1e-6)


@pytest.mark.slow
def test_analysis_compiled_equals_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_net()
    expected = fxpath.analyze(model, SMALL)
    calls = []
    compile_ = torch.compile

    # What Inductor makes of a program is compared in tests.test_compile and tests.test_range.
    def traced(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return compile_(*args, **{**options, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", traced)
    assert_equal_analyses(fxpath.analyze(model, SMALL, compile=True), expected)
    assert calls
