"""Canonical magnitude: least norm, invariance, and scores relative to their tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxpath
from fxpath.criteria import canonical_magnitude, path_magnitude, relative_to_layer
from fxpath.evaluate import coordinates
from fxpath.program import build
from fxpath.symmetry import least_norm
from fxpath.symmetry.balancing import Masses, balance
from tests.reference import randomize
from tests.test_symmetry import UNUSUAL, Residual, apply, changed, outputs, unusual

Scores = Mapping[str, Tensor]


def assert_equal(found: Scores, expected: Scores, rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=rtol, atol=1e-14)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def norm_of(model: nn.Module) -> float:
    return sum(float(parameter.detach().square().sum()) for parameter in model.parameters())


# Against a minimization of another kind


def minimized(
    sizes: Mapping[str, int], scaled: Callable[[dict[str, Tensor]], dict[str, Tensor]], seed: int
) -> dict[str, Tensor]:
    """Sizes of ``scaled`` at the logarithms of factors for which their squares are least."""
    generator = torch.Generator().manual_seed(seed)
    logs = {
        name: torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
        for name, n in sizes.items()
    }
    optimizer = torch.optim.LBFGS(
        list(logs.values()),
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        values = scaled({name: log.exp() for name, log in logs.items()}).values()
        loss = torch.stack([value.square().sum() for value in values]).sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return {
        name: value.detach().abs()
        for name, value in scaled({name: log.exp() for name, log in logs.items()}).items()
    }


@pytest.mark.parametrize("seed", range(2))
def test_least_norm_of_layers_in_a_row(seed: int) -> None:
    model = randomize(mlp(4, 5, 6, 3), 0)
    first, second, third = model[0], model[2], model[4]

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = factor["a"], factor["b"]
        return {
            "0.weight": a[:, None] * first.weight.detach(),
            "0.bias": a * first.bias.detach(),
            "2.weight": b[:, None] * second.weight.detach() / a,
            "2.bias": b * second.bias.detach(),
            "4.weight": third.weight.detach() / b,
            "4.bias": third.bias.detach(),
        }

    expected = minimized({"a": 5, "b": 6}, scaled, seed)
    assert_equal(canonical_magnitude(model), expected, rtol=1e-6)
    assert (expected["0.weight"] - first.weight.abs()).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(2))
def test_least_norm_of_a_residual_block_with_batch_norm(seed: int) -> None:
    model = randomize(Residual().double(), 1).eval()
    sigma = (model.norm.running_var + model.norm.eps).sqrt()
    inner = model.inner.weight / sigma[:, None, None, None]
    if model.norm.weight is not None:
        inner = inner * model.norm.weight[:, None, None, None]
    shift = model.norm.bias - model.norm.weight * model.norm.running_mean / sigma
    inner, shift = inner.detach(), shift.detach()

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        stage, hidden = factor["stage"], factor["hidden"]
        rows = hidden[:, None, None, None]
        return {
            "stem.weight": model.stem.weight.detach() * stage[:, None, None, None],
            "stem.bias": model.stem.bias.detach() * stage,
            "inner.weight": inner * rows / stage[:, None, None],
            "norm.bias": shift * hidden,
            "outer.weight": model.outer.weight.detach()
            * stage[:, None, None, None]
            / hidden[:, None, None],
            "outer.bias": model.outer.bias.detach() * stage,
            "head.weight": model.head.weight.detach() / stage.repeat_interleave(9),
            "head.bias": model.head.bias.detach(),
        }

    expected = minimized({"stage": 4, "hidden": 6}, scaled, seed)
    assert_equal(canonical_magnitude(model, (1, 6, 6)), expected, rtol=1e-6)


def test_least_norm_of_grouped_and_depthwise_convolutions() -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.PReLU(4),
            nn.Conv1d(4, 4, 3, groups=2, bias=False),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose1d(4, 6, 2, groups=2),
            nn.ReLU(),
            nn.Conv1d(6, 6, 1, groups=6, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 2, bias=False),
        ).double(),
        2,
    )
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def scaled(factor: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b, c, d = (factor[name] for name in "abcd")
        grouped, transposed = w["2.weight"].clone(), w["4.weight"].clone()
        grouped = torch.stack(
            [
                torch.stack([grouped[i, j] * b[i] / a[2 * (i // 2) + j] for j in range(2)])
                for i in range(4)
            ]
        )
        transposed = torch.stack(
            [
                torch.stack([transposed[i, j] * c[3 * (i // 2) + j] / b[i] for j in range(3)])
                for i in range(4)
            ]
        )
        return {
            "0.weight": w["0.weight"] * a[:, None, None],
            "0.bias": w["0.bias"] * a,
            "2.weight": grouped,
            "4.weight": transposed,
            "4.bias": w["4.bias"] * c,
            "6.weight": w["6.weight"] * (d / c)[:, None, None],
            "9.weight": w["9.weight"] / d.repeat_interleave(3),
        }

    expected = minimized({"a": 4, "b": 4, "c": 6, "d": 6}, scaled, 0)
    assert_equal(canonical_magnitude(model, (2, 6)), expected, rtol=1e-6)


# The same for all rescalings


class Scaled(nn.Module):
    """Learned scalings, one for each channel, after a skip connection, and one number for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.all = nn.Parameter(torch.randn(()))
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = F.relu(self.second(x)) * self.gain * self.all
        return self.last(F.relu(x + y)).mean((2, 3))


class Shared(nn.Module):
    """One convolution in front of two batch norms, and a kernel that all channels share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(2) for _ in range(2)])
        self.kernel = nn.Parameter(torch.randn(1, 1, 2, 2))
        self.last = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        x = F.relu(F.conv2d(x, self.kernel.expand(2, -1, -1, -1), groups=2))
        return self.last(x).mean((2, 3))


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2),
        nn.BatchNorm3d(3),
        nn.PReLU(),
        nn.ConvTranspose3d(3, 4, 2),
        nn.ReLU6(),
        nn.Conv3d(4, 4, 1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Flatten(),
        nn.Linear(4, 2, bias=False),
    )


MORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scaled": (Scaled, (2, 3, 3)),
    "shared": (Shared, (2, 3, 3)),
    "deep": (deep, (1, 3, 3, 3)),
}


def taken(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name in UNUSUAL:
        return unusual(name)
    make, shape = MORE[name]
    torch.manual_seed(0)
    return randomize(make().double(), 0).eval(), shape


@pytest.mark.parametrize("name", [*UNUSUAL, *MORE])
def test_scores_are_those_of_every_rescaling_and_their_squares_least(name: str) -> None:
    model, shape = taken(name)
    expected = outputs(model, shape)
    program = build(model, shape, reduced=False)
    canonical = least_norm.Canonical(program.captured, program.lifted)
    scores = canonical.scores(torch.float64)
    rescaled = fxpath.rescale(model, shape, choices=(0.3, 5.0, 2.0**-30))
    assert changed(model, rescaled)
    groups = fxpath.channel_groups(model, shape)
    least = fxpath.normalize(model, shape, method="least_norm")
    torch.testing.assert_close(outputs(least, shape), expected, rtol=1e-9, atol=1e-12)

    def norms(of: nn.Module) -> list[float]:
        """Of all effective parameters, and of those that cannot be as small as one likes."""
        model.load_state_dict(of.state_dict())
        found = list(coordinates(program.lifted, program.captured.live()))
        parts = [value for _, value in found], [value[scores[name] > 0] for name, value in found]
        return [sum(float(value.square().sum()) for value in values) for values in parts]

    before = norms(copy.deepcopy(model))
    norms(rescaled)
    assert_equal(canonical.scores(torch.float64), scores, rtol=1e-8)
    whole, reached = norms(least)
    assert whole <= before[0] * (1 + 1e-12)
    for number in [i for i, group in enumerate(groups.groups) if group.rescalable]:
        for factor in (0.9, 1.1):
            moved = apply(groups, least, {number: factor})
            assert norms(moved)[1] >= reached * (1 - 1e-12)


def test_names_shapes_and_formats_are_those_of_path_magnitude() -> None:
    model, shape = taken("preactivation")
    for each in (model, copy.deepcopy(model).float()):
        forms = [
            {name: (score.shape, score.dtype) for name, score in scores.items()}
            for scores in (canonical_magnitude(each, shape), path_magnitude(each, shape))
        ]
        assert forms[0] == forms[1]


def test_scalings_that_models_cannot_be_given() -> None:
    """Factors that no other tensor takes up: of learned scalings, and of one of two norms."""
    model, shape = taken("scaled")
    scores = canonical_magnitude(model, shape)
    other = copy.deepcopy(model)
    with torch.no_grad():
        factors = torch.tensor([2.0, 0.1, 3.0, 1.0], dtype=torch.float64)
        other.gain *= factors[:, None, None]
        other.second.weight /= factors[:, None, None, None]
        other.second.bias /= factors
    torch.testing.assert_close(outputs(other, shape), outputs(model, shape))
    assert_equal(canonical_magnitude(other, shape), scores)
    model, shape = taken("shared")
    scores = canonical_magnitude(model, shape)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (other.norms[1].weight, other.norms[1].bias):
            tensor *= 8
        other.kernel /= 8
    torch.testing.assert_close(outputs(other, shape), outputs(model, shape))
    assert_equal(canonical_magnitude(other, shape), scores)


def test_the_scale_of_a_convolution_before_a_batch_norm_plays_no_part() -> None:
    model = randomize(Residual().double(), 0).eval()
    scores = canonical_magnitude(model, (1, 6, 6))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.inner.weight *= 7
        other.norm.running_mean *= 7
        other.norm.running_var += other.norm.eps
        other.norm.running_var *= 49
        other.norm.running_var -= other.norm.eps
    assert_equal(canonical_magnitude(other, (1, 6, 6)), scores)
    with torch.no_grad():
        other.norm.weight *= 2
    assert (canonical_magnitude(other, (1, 6, 6))["inner.weight"] - scores["inner.weight"]).any()


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
    monkeypatch.setattr(least_norm, "CHUNK", 7)
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
    with pytest.raises(ValueError, match="method='l2': known are 'l1', 'least_norm'"):
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
