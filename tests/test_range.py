"""Numbers that float32 holds one by one, but not their products: float64 takes over, or an error.

A rescaling that the function does not notice is the oracle, and float64 where there is none.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpath
from tests.support.nets import chain


def check_against_double(model: nn.Module, shape: tuple[int, ...], compiled: bool) -> float:
    """Norm and scores in float32 equal those in float64."""
    expected = fxpath.analyze(copy.deepcopy(model).double(), shape)
    found = fxpath.analyze(model, shape, dtype=torch.float32, compile=compiled)
    assert found.path_norm == pytest.approx(expected.path_norm, rel=1e-5)
    for name, share in expected.scores.items():
        torch.testing.assert_close(found.scores[name].double(), share, rtol=1e-4, atol=1e-7)
    program = fxpath.compile(model, shape, backend="eager")
    assert program.log_path_norm().exp().item() == pytest.approx(expected.path_norm, rel=1e-5)
    return found.path_norm


def normalized(kind: str) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A layer, the batch norm behind it, and one more layer."""
    torch.manual_seed(0)
    if kind == "linear":
        first, norm, last = nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1)
        return nn.Sequential(first, norm, nn.ReLU(), last).eval(), (1,)
    convolution = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
    first, last = convolution(1, 3, 2, bias=False), nn.Conv2d(3, 1, 2)
    return nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), last).eval(), (1, 4, 4)


@pytest.mark.parametrize("kind", ["linear", "convolution", "transposed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_norm_may_undo_any_scale(kind: str, compiled: bool) -> None:
    norms = []
    # Compiling takes a hundred times as long, and is the same for what is between.
    exponents = (0, 100) if compiled else (0, 60, 83, 100)
    for exponent in exponents:
        model, shape = normalized(kind)
        with torch.no_grad():
            model[0].weight.mul_(2.0**exponent)
            model[1].weight.mul_(2.0**-exponent)
        norms.append(check_against_double(model, shape, compiled))
    assert norms == pytest.approx([norms[0]] * len(exponents), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 1e30, 1e38])
def test_a_factor_below_float32_in_front_of_a_weight(weight: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(weight)
        model[1].weight.copy_(1e-33 * (1 + torch.rand(3)))
        model[1].running_var.fill_(1e20)
        model[1].bias.zero_()
    check_against_double(model, (1,), False)


def test_a_float64_model_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.mul_(1e-45)
        model[0].bias.mul_(1e-45)
        model[2].weight.mul_(1e45)
    check_against_double(model, (2,), False)


def test_a_constant_that_hides_what_later_weights_blow_up() -> None:
    """One channel of 1e30 beside one of 1e-15, brought to one size by the next layer."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [3e-15]]))
        model[0].bias.copy_(torch.tensor([1e30, 1e-15]))
        model[2].weight.copy_(torch.tensor([[1e-30, 1e15]]))
    check_against_double(model, (1,), False)


def test_a_root_of_a_weight_that_is_zero_has_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    fxpath.compile(model, (2,), q=0.5, backend="eager").log_path_norm().backward()
    grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 4 and all(bool(grad.isfinite().all()) for grad in grads)
    assert model[0].weight.grad is not None and model[0].weight.grad[0, 0] == 0


def test_counting_paths_refuses_what_is_no_number() -> None:
    model = nn.Linear(2, 1)
    program = fxpath.compile(model, (2,), q=0, backend="eager")
    assert program.path_norm() == 3
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight"):
        program.path_norm()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_neurons() -> None:
    model = nn.Sequential(nn.Linear(2, 0), nn.ReLU(), nn.Linear(0, 3))
    analysis = fxpath.analyze(model, (2,))
    assert analysis.path_norm == pytest.approx(model[2].bias.abs().sum().item())
    assert analysis.scores["0.weight"].shape == (0, 2)


def test_buffers_for_scores_are_checked() -> None:
    model = nn.Linear(2, 1)
    program = fxpath.compile(model, (2,), backend="eager")
    with pytest.raises(ValueError, match="int64"):
        program.scores(out={"weight": torch.zeros(1, 2).long(), "bias": torch.zeros(1)})
    tracked = {
        name: torch.zeros_like(p, requires_grad=True) for name, p in program.scores().items()
    }
    program.scores(out=tracked)
    assert tracked["weight"].sum().item() + tracked["bias"].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("first", "second", "bias"), [(1e28, 1e-25, 1e23), (1e28, 1e-25, 1e26), (1e15, 1e-12, 1e30)]
)
def test_shares_that_fit_although_their_gradient_does_not(
    first: float, second: float, bias: float
) -> None:
    # The bias has nearly all path mass, and a gradient of 1e-42 has few digits in float32.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    for parameter, number in zip(model.parameters(), (first, second, bias), strict=True):
        nn.init.constant_(parameter, number)
    out = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    scores = fxpath.compile(model, backend="eager").scores(out)
    assert scores["0.weight"] is out["0.weight"]
    for found in (scores["0.weight"], fxpath.analyze(model).scores["0.weight"]):
        torch.testing.assert_close(found, torch.tensor([[1e3 / bias]]), rtol=1e-5, atol=0)


class Dead(nn.Module):
    """A branch that weights of zero end, behind norms of its own, beside one that lives."""

    def __init__(self, factor: float, weight: float, how: str) -> None:
        super().__init__()
        self.before, self.how = chain(weight, 20), how
        self.dead, self.norm = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.live = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.dead.weight)
        nn.init.ones_(self.live.weight)
        self.norm.running_var.fill_(1 / factor**2)

    def forward(self, x: Tensor) -> Any:
        dead, live = self.norm(self.dead(self.before(x))), self.live(x)
        if self.how == "add":
            return dead + live
        return torch.cat([dead, live], 1) if self.how == "cat" else (dead, live)


@pytest.mark.parametrize("how", ["add", "cat", "outputs"])
@pytest.mark.parametrize(("factor", "weight"), [(100.0, 1.0), (1e-3, 1e20), (100.0, 1e20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_branch_does_not_count(
    how: str, factor: float, weight: float, dtype: torch.dtype
) -> None:
    model = Dead(factor, weight, how).eval().to(dtype)
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == 4
    for name, share in analysis.scores.items():
        expected = 0.25 if name == "live.weight" else 0.0
        assert torch.equal(share, torch.full_like(share, expected)) and share.dtype == dtype


@pytest.mark.parametrize("bias", [1e-40, 1e-44, 1e-310])
def test_biases_below_the_number_format(bias: float) -> None:
    model = nn.Linear(2, 1).double() if bias < 1e-44 else nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, bias)
    if bias < 2.0**-1022:
        with pytest.raises(FloatingPointError, match="orders of magnitude"):
            fxpath.path_norm(model)
        return
    analysis = fxpath.analyze(model)
    assert analysis.path_norm == pytest.approx(float(model.bias.detach()), rel=1e-6)
    assert analysis.scores["bias"].tolist() == [1.0]


def test_a_folded_bias_below_float32_that_grows_again() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        model[0].bias.fill_(1.0)
        model[1].weight.fill_(1e-38)
        model[1].running_var.fill_(1e10)
        model[1].running_mean.fill_(0.7)
        model[3].weight.fill_(1e30)
        model[3].bias.zero_()
    expected = fxpath.path_norm(model, (1,), dtype=torch.float64)
    assert expected == pytest.approx(1e30 * 1e-43 * (0.3 + 1e-3), rel=1e-3)
    assert fxpath.path_norm(model, (1,)) == pytest.approx(expected, rel=1e-5)


def test_a_bias_beside_a_tiny_activation() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last((self.first(x) * 1e-20) * 1e-20 + 1e-42)

    model = Tiny()
    found, wide = (fxpath.analyze(model, (3,), dtype=d) for d in (None, torch.float64))
    assert found.log10_path_norm == pytest.approx(wide.log10_path_norm, rel=1e-6)
    for name, share in found.scores.items():
        torch.testing.assert_close(share.double(), wide.scores[name], rtol=1e-4, atol=0)


def test_powers_below_float64_are_refused() -> None:
    model = nn.Linear(2, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, 1e-80)
    with pytest.raises(FloatingPointError, match="orders of magnitude"):
        fxpath.path_norm(model, q=4)


def test_fixed_kernels_behind_each_other() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(1, 1, 1, bias=False)
            self.register_buffer("c", torch.tensor([[[1.3, 1.1]]]))
            self.register_buffer("d", torch.tensor([[[0.3, 2.1]]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv1d(nn.functional.conv1d(self.layer(x), self.c), self.d)

    model = Fixed()
    expected = 3 * 2.4 * 2.4 * float(model.layer.weight.detach().abs())
    assert fxpath.path_norm(model, (1, 5)) == pytest.approx(expected, rel=1e-5)


def test_the_share_of_a_folded_bias_that_float32_holds_in_few_digits() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 1e-40]))
        model[1].running_var.fill_(1e8)
        model[2].weight.copy_(torch.tensor([[1e-5, 1e14]]))
        model[2].bias.zero_()
    found, wide = (fxpath.analyze(model, (1,), dtype=d) for d in (None, torch.float64))
    for name, share in found.scores.items():
        top = float(wide.scores[name].max())
        torch.testing.assert_close(share.double(), wide.scores[name], rtol=0, atol=1e-4 * top)
