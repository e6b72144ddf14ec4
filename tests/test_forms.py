"""Models in another form: half precision, wrapped, exported, pruned, parametrized, tied, cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fxpath
from tests.support.checks import assert_equal_analyses, bits, relative_derivative
from tests.support.nets import (
    SMALL,
    Tied,
    chain,
    chain_log10,
    parametrized_net,
    pruned_net,
    randomize,
    resnet18,
    small_net,
)

# Models that come in another form -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    analysis = fxpath.analyze(model, SMALL)
    assert all(scores.dtype == torch.float32 for scores in analysis.scores.values())
    assert_equal_analyses(analysis, fxpath.analyze(copy.deepcopy(model).float(), SMALL), rtol=1e-6)
    deep = chain(100.0, 40).to(dtype)
    assert fxpath.analyze(deep).log10_path_norm == pytest.approx(chain_log10(deep), abs=1e-5)


def test_dtype_of_the_computation() -> None:
    model = small_net()
    wide = fxpath.analyze(model, SMALL, dtype=torch.float64)
    assert all(scores.dtype == torch.float64 for scores in wide.scores.values())
    assert_equal_analyses(wide, fxpath.analyze(copy.deepcopy(model).double(), SMALL), rtol=1e-12)
    narrow = fxpath.analyze(copy.deepcopy(model).double(), SMALL, dtype=torch.float32)
    assert all(scores.dtype == torch.float32 for scores in narrow.scores.values())
    assert_equal_analyses(narrow, wide)


def test_data_parallel_names_are_those_of_the_wrapper() -> None:
    model = small_net()
    wrapped = nn.DataParallel(model)
    analysis = fxpath.analyze(wrapped, SMALL)
    assert_equal_analyses(analysis, fxpath.analyze(model, SMALL), rtol=1e-6, prefix="module.")
    assert set(analysis.scores) <= set(dict(wrapped.named_parameters()))


def exported(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(1, *shape),))


@pytest.mark.parametrize("make", [small_net, resnet18], ids=["small_net", "resnet18"])
def test_exported_programs_and_graph_modules_are_accepted(make: Any) -> None:
    model = make()
    shape = SMALL if make is small_net else (3, 32, 32)
    expected = fxpath.analyze(model, shape)
    traced = torch.fx.symbolic_trace(model)
    assert_equal_analyses(fxpath.analyze(traced, shape), expected, rtol=1e-6)
    program = exported(model, shape)
    before = {name: bits(value) for name, value in program.state_dict.items()}
    code = program.graph_module.code
    assert_equal_analyses(fxpath.analyze(program), expected, rtol=1e-6)
    assert program.graph_module.code == code
    assert {name: bits(value) for name, value in program.state_dict.items()} == before


def test_pruned_models_have_the_scores_of_their_effective_weights() -> None:
    model, baked = pruned_net(), pruned_net()
    for module, name in ((baked.conv, "weight"), (baked.inner, "weight"), (baked.fc, "bias")):
        prune.remove(module, name)
    analysis = fxpath.analyze(model, SMALL)
    assert_equal_analyses(analysis, fxpath.analyze(baked, SMALL), rtol=1e-6)
    masked = model.conv.weight_mask == 0
    assert masked.any()
    assert (analysis.scores["conv.weight"][masked] == 0).all()
    with torch.no_grad():  # values under the mask don't matter
        model.conv.weight_orig[masked] = 1e6
    assert_equal_analyses(fxpath.analyze(model, SMALL), analysis, rtol=1e-6)


def test_parametrized_models_have_the_scores_of_their_effective_weights() -> None:
    model, baked = parametrized_net(), parametrized_net()  # a deepcopy would share their classes
    for module in (baked.conv, baked.inner):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert_equal_analyses(fxpath.analyze(model, SMALL), fxpath.analyze(baked, SMALL))


def test_parametrized_models_in_train_mode() -> None:
    # Spectral norm improves its estimate on every call in train mode; an analysis must not.
    model = parametrized_net()
    expected = fxpath.analyze(model, SMALL)
    assert_equal_analyses(fxpath.analyze(model.train(), SMALL), expected, rtol=1e-6)


def test_tied_weights_have_one_score_under_their_first_name() -> None:
    tied = randomize(Tied(), weights=True).eval().double()
    loose = copy.deepcopy(tied)
    loose.second.weight = nn.Parameter(loose.first.weight.detach().clone())
    analysis, expected = fxpath.analyze(tied, (4,)), fxpath.analyze(loose, (4,))
    assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    assert set(analysis.scores) == set(dict(tied.named_parameters()))
    total = expected.scores["first.weight"] + expected.scores["second.weight"]
    torch.testing.assert_close(analysis.scores["first.weight"], total, rtol=1e-12, atol=0)


class Reused(nn.Module):
    """One convolution with a BatchNorm of its own for each of two uses, and a shared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.bn = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for bn in self.bn:
            x = self.relu(bn(self.conv(x)))
        return x


def test_a_reused_module_scores_the_sum_over_its_uses() -> None:
    model = randomize(Reused(), weights=True).eval().double()
    convolutions = [copy.deepcopy(model.conv) for _ in model.bn]
    layers = zip(convolutions, copy.deepcopy(model.bn), strict=True)
    unrolled = nn.Sequential(*[nn.Sequential(conv, bn, nn.ReLU()) for conv, bn in layers]).eval()
    analysis, expected = fxpath.analyze(model, (2, 7)), fxpath.analyze(unrolled, (2, 7))
    assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    assert set(analysis.scores) == {"conv.weight", "bn.0.bias", "bn.1.bias"}
    total = expected.scores["0.0.weight"] + expected.scores["1.0.weight"]
    torch.testing.assert_close(analysis.scores["conv.weight"], total, rtol=1e-12, atol=0)
    for use in (0, 1):
        torch.testing.assert_close(
            analysis.scores[f"bn.{use}.bias"], expected.scores[f"{use}.1.bias"], rtol=1e-12, atol=0
        )


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions: it has an effective bias for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 2, 3, padding=1)
        self.second = nn.Conv1d(2, 2, 3, padding=1)
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.second(F.relu(self.bn(self.first(x)))))


def test_a_reused_batch_norm_scores_the_sum_over_its_uses() -> None:
    model = randomize(SharedNorm(), weights=True).eval().double()
    first, second = (nn.Sequential(c, copy.deepcopy(model.bn)) for c in (model.first, model.second))
    unrolled = nn.Sequential(first, nn.ReLU(), second).eval()
    analysis, expected = fxpath.analyze(model, (2, 7)), fxpath.analyze(unrolled, (2, 7))
    assert analysis.path_norm == pytest.approx(expected.path_norm, rel=1e-12)
    assert set(analysis.scores) == {"first.weight", "second.weight", "bn.bias"}
    total = expected.scores["0.1.bias"] + expected.scores["2.1.bias"]
    torch.testing.assert_close(analysis.scores["bn.bias"], total, rtol=1e-12, atol=0)


class Rearranged(nn.Module):
    """Parameters that the forward pass shows in another shape, or cut off from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(8, 4))
        self.v = nn.Parameter(torch.empty(4, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor([0.5, -0.25]))

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.w.chunk(2)
        hidden = F.relu(F.linear(F.relu(F.linear(x, upper)), lower)) * self.scale
        return F.linear(hidden, self.v.detach().t()[:2]) - self.shift


def test_a_rearranged_parameter_keeps_its_name_and_shape() -> None:
    model = randomize(Rearranged(), weights=True).eval().double()
    analysis = fxpath.analyze(model, (4,))
    assert {name: s.shape for name, s in analysis.scores.items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    for name, index in (
        ("w", (1, 2)),
        ("w", (6, 0)),
        ("v", (3, 1)),
        ("scale", ()),
        ("shift", (1,)),
    ):
        derivative = relative_derivative(model, (4,), model.get_parameter(name), index)
        assert float(analysis.path_magnitude(name)[index]) == pytest.approx(derivative, rel=1e-8)
    assert (analysis.scores["v"][:, 2] == 0).all()


def test_batch_norm_without_parameters_gives_its_bias_a_name() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, affine=False), nn.ReLU())
    model = randomize(model, weights=True).eval().double()
    scores = fxpath.analyze(model, (2, 5)).scores
    assert set(scores) == {"0.weight", "1.bias"}
    total = sum(float(share.sum()) for share in scores.values())
    assert total == pytest.approx(1, rel=1e-12)


class Several(nn.Module):
    """Two inputs, and a nest of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.left(x) + self.right(y))
        return {"hidden": hidden, "heads": (self.head(hidden), [-hidden])}


class OneOfSeveral(Several):
    """Only one of those outputs."""

    def __init__(self, pick: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pick(super().forward(x, y))


def test_several_inputs_and_outputs() -> None:
    model = randomize(Several(), weights=True).eval().double()
    analysis = fxpath.analyze(model, [(3,), (2,)])
    picks = (lambda o: o["hidden"], lambda o: o["heads"][0], lambda o: o["heads"][1][0])
    norms = []
    for pick in picks:
        part = OneOfSeveral(pick)
        part.load_state_dict(model.state_dict())
        norms.append(fxpath.path_norm(part.double().eval(), [(3,), (2,)]))
    assert analysis.path_norm == pytest.approx(sum(norms), rel=1e-12)
    inputs = (torch.randn(1, 3).double(), torch.randn(1, 2).double())
    again = fxpath.analyze(model, example_inputs=inputs)
    assert_equal_analyses(again, analysis, rtol=1e-12)
    with_keywords = fxpath.analyze(model, [(3,), (2,)], q=2)
    assert with_keywords.path_norm < analysis.path_norm


class WithHead(nn.Module):
    """A supported body and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net()
        self.classifier = nn.Linear(4, 3)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.classifier(F.relu(self.body(x))))


class WithoutHead(WithHead):
    """The same without the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.body(x)))


def test_until_cuts_the_network_after_a_module() -> None:
    model = randomize(WithHead(), weights=True).eval()
    with pytest.raises(fxpath.UnsupportedModelError, match="softmax"):
        fxpath.analyze(model, SMALL)
    cut = WithoutHead()
    cut.load_state_dict(model.state_dict())
    expected = fxpath.analyze(cut.eval(), SMALL)
    assert_equal_analyses(fxpath.analyze(model, SMALL, until="classifier"), expected, rtol=1e-6)
    body = fxpath.analyze(model, SMALL, until="body")
    assert_equal_analyses(body, fxpath.analyze(model.body, SMALL), rtol=1e-6, prefix="body.")
    assert set(fxpath.analyze(model, SMALL, until="body.bn").scores) == {
        "body.conv.weight",
        "body.bn.bias",
    }
    assert fxpath.path_norm(model, SMALL, until="body") == pytest.approx(body.path_norm)
    with pytest.raises((ValueError, KeyError, AttributeError), match="nowhere"):
        fxpath.analyze(model, SMALL, until="nowhere")


def test_until_names_one_of_several_blocks_of_a_resnet() -> None:
    model = resnet18()
    analysis = fxpath.analyze(model, (3, 32, 32), until="layer1")
    trunk = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
    expected = fxpath.analyze(trunk, (3, 32, 32))
    assert analysis.log10_path_norm == pytest.approx(expected.log10_path_norm, abs=1e-6)
    torch.testing.assert_close(
        analysis.scores["layer1.1.conv2.weight"], expected.scores["4.1.conv2.weight"]
    )
