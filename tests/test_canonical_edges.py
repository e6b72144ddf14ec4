"""Canonical magnitude at its edges: computed weights, no minimum, extremes; relative scores."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from fxpath.criteria import canonical_magnitude, relative_to_layer
from fxpath.symmetry import masses
from fxpath.symmetry.balancing import Masses, balance
from tests.support.canonical import assert_equal, minimized, mlp, norm_of, taken
from tests.support.nets import randomize

# Computed weights


def test_pruned_and_parametrized_weights_count_as_they_are_read() -> None:
    model = randomize(mlp(3, 6, 5, 2), 0)
    prune.random_unstructured(model[2], "weight", 0.4)
    parametrizations.weight_norm(model[0])
    plain = mlp(3, 6, 5, 2)
    with torch.no_grad():
        for ours, theirs in zip(plain, model, strict=True):
            if isinstance(ours, nn.Linear):
                ours.weight.copy_(theirs.weight)
                ours.bias.copy_(theirs.bias)
    state = copy.deepcopy(model.state_dict())
    scores, expected = canonical_magnitude(model), canonical_magnitude(plain)
    assert_equal(scores, expected)
    assert_equal(canonical_magnitude(fxpath.rescale(plain)), expected)
    assert torch.equal(scores["2.weight"] == 0, model[2].weight_mask == 0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="computed from other parameters"):
        fxpath.normalize(model, method="least_norm")


def test_a_tied_weight_has_one_factor_for_each_channel() -> None:
    """Two square layers of one weight: what they read and make has the same factors."""
    model = randomize(mlp(3, 4, 4, 4, 2, bias=False), 0)
    model[4].weight = model[2].weight
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        a = factor["a"]
        return {
            "0.weight": w["0.weight"] * a[:, None],
            "2.weight": w["2.weight"] * a[:, None] / a,
            "6.weight": w["6.weight"] / a,
        }

    assert_equal(canonical_magnitude(model), minimized({"a": 4}, scaled, 0), rtol=1e-6)


# Where no minimum is attained, and extremes


def test_dead_channels_have_size_0_and_leave_others_alone() -> None:
    model = randomize(mlp(3, 6, 4, bias=False), 0)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 4] = 0
        model[0].weight[4] *= 1e3
        model[2].weight[:, 1] *= 1e3
    scores = canonical_magnitude(model)
    assert not scores["2.weight"][:, 1].any() and not scores["0.weight"][4].any()
    alive = [0, 2, 3, 5]
    small = mlp(3, 4, 4, bias=False)
    with torch.no_grad():
        small[0].weight.copy_(model[0].weight[alive])
        small[2].weight.copy_(model[2].weight[:, alive])
    expected = canonical_magnitude(small)
    torch.testing.assert_close(scores["0.weight"][alive], expected["0.weight"])
    torch.testing.assert_close(scores["2.weight"][:, alive], expected["2.weight"])
    least = fxpath.normalize(model, method="least_norm")
    torch.testing.assert_close(least[0].weight[alive].abs(), expected["0.weight"])
    torch.testing.assert_close(least[2].weight[:, alive].abs(), expected["2.weight"])
    # Nobody reads them at a scale that matters: as they were.
    assert torch.equal(least[0].weight[4], model[0].weight[4])
    assert torch.equal(least[2].weight[:, 1], model[2].weight[:, 1])


def test_dead_channels_do_not_grow_with_their_neighbours() -> None:
    """The least norm enlarges what a dead channel is read by; then that channel shrinks."""
    model = mlp(2, 3, 3, 2, bias=False)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [2, 1], [0, 0]]))
        model[2].weight[:, :2] = 1e-3
        model[2].weight[:, 2] = 1.0
        model[4].weight.fill_(50.0)
    least = fxpath.normalize(model, method="least_norm")
    assert (least[2].weight[:, 2].abs() <= 1 + 1e-12).all()
    assert (least[2].weight[:, :2] > 0.01).all()
    assert norm_of(least) < norm_of(model)
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(least(x), model(x))


class Stage(nn.Module):
    """A residual stage that no input reaches, as its stem is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3, bias=False)
        self.inner, self.outer = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.outer(F.relu(self.inner(x)))))


def test_components_without_an_input_are_balanced_by_themselves() -> None:
    model = Stage().double()
    with torch.no_grad():
        model.stem.weight.zero_()
    scores = canonical_magnitude(model)
    assert not scores["stem.weight"].any() and not scores["head.weight"].any()
    torch.testing.assert_close(scores["head.bias"], model.head.bias.abs().detach())
    inner, outer = scores["inner.weight"].square(), scores["outer.weight"].square()
    torch.testing.assert_close(inner.sum(1), outer.sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(outer.sum(1), inner.sum(0), rtol=1e-9, atol=0)
    rescaled = fxpath.rescale(model, choices=(0.3, 1, 5))
    assert_equal(canonical_magnitude(rescaled), scores)
    least = fxpath.normalize(model, method="least_norm")
    assert norm_of(least) <= norm_of(model) * (1 + 1e-12)


def test_a_model_without_any_path() -> None:
    model = mlp(2, 3, 2, bias=False)
    with torch.no_grad():
        model[2].weight.zero_()
    assert all(not score.any() for score in canonical_magnitude(model).values())
    assert not any(
        (a != b).any()
        for a, b in zip(
            fxpath.normalize(model, method="least_norm").parameters(),
            model.parameters(),
            strict=True,
        )
    )
    assert canonical_magnitude(nn.ReLU(), (3,)) == {}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_entries() -> None:
    model = mlp(2, 0, 2)
    assert canonical_magnitude(model)["0.weight"].shape == (0, 2)
    least = fxpath.normalize(model, method="least_norm")
    assert torch.equal(least[2].bias, model[2].bias)


@pytest.mark.parametrize("size", [1e30, 1e150])
def test_extreme_scales(size: float) -> None:
    model = randomize(mlp(3, 8, 8, 8, 2), 0)
    scores = canonical_magnitude(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for before, after, sign in ((0, 2, 1), (2, 4, -1), (4, 6, 1)):
            factors = size ** (sign * torch.linspace(0, 1, 8, dtype=torch.float64))
            other[before].weight *= factors[:, None]
            other[before].bias *= factors
            other[after].weight /= factors
    assert_equal(canonical_magnitude(other), scores, rtol=1e-8)


def test_small_sizes_are_kept_in_float64() -> None:
    model = randomize(mlp(2, 3, 2, bias=False), 0).float()
    with torch.no_grad():
        model[0].weight[1] *= 1e-30
        model[2].weight[:, 1] *= 1e-30
    scores = canonical_magnitude(model)
    assert scores["0.weight"].dtype == torch.float32  # 1e-30 is within it
    with torch.no_grad():
        model[0].weight[1] *= 1e-5
        model[2].weight[:, 1] *= 1e-14
    scores = canonical_magnitude(model)
    assert scores["0.weight"].dtype == torch.float64
    assert scores["0.weight"][1].all() and scores["2.weight"][:, 1].all()
    assert_equal(canonical_magnitude(model.double()), scores, rtol=1e-6)


def test_matrices_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = taken("residual")
    scores = canonical_magnitude(model, shape)
    monkeypatch.setattr(masses, "CHUNK", 7)
    assert_equal(canonical_magnitude(model, shape), scores, rtol=1e-12)


def test_balance_is_as_exact_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    log = 30 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
    ids = torch.arange(40)
    logs = balance([Masses(log, ids[:, None], ids[None])], 40).logs
    moved = (log + 2 * (logs[:, None] - logs)).fill_diagonal_(-torch.inf)
    into, out = moved.logsumexp(1), moved.logsumexp(0)
    torch.testing.assert_close(into, out, rtol=0, atol=1e-10)
    assert logs[0] == 0


# Refusals


def test_what_is_refused() -> None:
    model = mlp(2, 3, 2)
    with pytest.raises(ValueError, match="known are 'incoming', 'least_norm', 'path_conditioning'"):
        fxpath.normalize(model, method="l2")
    with pytest.raises(TypeError, match="ExportedProgram"):
        fxpath.normalize(
            torch.export.export(model, (torch.zeros(1, 2).double(),)), method="least_norm"
        )
    with pytest.raises(fxpath.UnsupportedModelError, match="gelu"):
        canonical_magnitude(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.bias"):
        canonical_magnitude(model)
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    norm[1].running_var.fill_(-1.0)
    with pytest.raises(ValueError, match=r"0\.weight: the effective value is NaN or infinite"):
        canonical_magnitude(norm)


def test_exported_programs_and_options() -> None:
    model = mlp(2, 3, 3, 2)
    exported = torch.export.export(model, (torch.zeros(1, 2).double(),))
    assert_equal(canonical_magnitude(exported), canonical_magnitude(model))
    until = canonical_magnitude(model, until="2")
    assert_equal(until, canonical_magnitude(model[:3]))


# Relative scores


def naive(score: Tensor) -> Tensor:
    values = score.double().flatten().tolist()
    whole = sum(v * v for v in values)
    found = []
    for s in values:
        if s > 0:
            found.append(s * s / sum(v * v for v in values if v >= s))
        else:
            found.append(-s * s / whole if s else 0.0)
    return torch.tensor(found, dtype=torch.float64).reshape(score.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["positive", "signed", "ties", "negative"])
def test_relative_scores_are_those_of_the_definition(kind: str, dtype: torch.dtype) -> None:
    score = torch.randn(5, 4, 3)
    if kind == "positive":
        score = score.abs()
        score[2] = 0
    elif kind == "ties":
        score = (2 * score).round()
    elif kind == "negative":
        score = -score.abs()
    score = score.to(dtype)
    before = score.clone()
    (found,) = relative_to_layer({"weight": score}).values()
    assert torch.equal(score, before)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), naive(score), rtol=rtol, atol=0)
    order = score.flatten().argsort()
    assert (found.flatten()[order].diff() >= 0).all()
    same = score.flatten()[:, None] == score.flatten()
    assert (found.flatten()[:, None] == found.flatten())[same].all()


def test_the_scale_of_a_layer_plays_no_part_in_relative_scores() -> None:
    scores = {name: torch.randn(7, dtype=torch.float64).abs() for name in "ab"}
    expected = relative_to_layer(scores)
    for factor in (2.0**600, 2.0**-600, 3.0):
        found = relative_to_layer({"a": scores["a"] * factor, "b": scores["b"]})
        assert_equal(found, expected, rtol=1e-12)
    assert expected["a"].max() == expected["b"].max() == 1


def test_relative_scores_of_everything_and_nothing() -> None:
    scores = {"zero": torch.zeros(2, 3), "empty": torch.zeros(0, 3), "one": torch.tensor(3)}
    found = relative_to_layer(scores)
    assert not found["zero"].any() and found["zero"].shape == (2, 3)
    assert found["empty"].shape == (0, 3) and found["one"] == 1
    # Much smaller than an estimate below 0, and still in order.
    mixed = relative_to_layer({"s": torch.tensor([-1.0, 1e-200, 3e-200], dtype=torch.float64)})
    torch.testing.assert_close(
        mixed["s"], torch.tensor([-1.0, 0.1, 1.0], dtype=torch.float64), rtol=1e-12, atol=0
    )
    small = relative_to_layer({"s": torch.tensor([1e-30, 1.0])})["s"]
    assert small.dtype == torch.float64 and small[0].item() == pytest.approx(1e-60)
    negative = relative_to_layer({"s": torch.tensor([-1e-30, 1.0])})["s"]
    assert negative[0].item() == pytest.approx(-1e-60)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite scores of b"):
            relative_to_layer({"a": torch.ones(2), "b": torch.tensor([1.0, wrong])})
