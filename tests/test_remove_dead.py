"""Dead channels go, and the outputs stay: zeros on either side, constants put into biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from tests.support.channels import made, run
from tests.support.removal import Cat, Depthwise, check, left, mlp, zero


def test_nothing_dead_leaves_the_model_as_it_is() -> None:
    model = made(mlp())
    result = check(model, (4,), 0)
    assert result.plan == fxpath.Plan()
    assert result.kept == []
    assert result.parameters[0] == result.parameters[1]


def test_channels_without_a_path_are_gone_in_chains() -> None:
    model = made(mlp())
    # Read by nobody: and so are those that only these read.
    zero(model[4].weight, range(4), axis=1)
    model[2].weight.data[4:, :3] = 0
    result = check(model, (4,), 7)
    assert left(result) == {"0": 5, "2": 4, "4": 8, "6": 2}
    assert result.plan.biases == {}


def test_unreached_channels_are_gone_in_chains() -> None:
    model = made(mlp())
    zero(model[0].weight, range(3))
    zero(model[0].bias, range(3))
    model[2].weight.data[:2, 3:] = 0
    zero(model[2].bias, range(2))
    result = check(model, (4,), 5)
    assert result.plan.biases == {}


def test_constants_go_into_the_next_bias_in_chains(tmp_path: Path) -> None:
    model = made(
        nn.Sequential(
            nn.Linear(4, 8),
            nn.ReLU(),
            nn.Linear(8, 8, bias=False),
            nn.LeakyReLU(0.1),
            nn.Linear(8, 2),
        )
    )
    zero(model[0].weight, range(3))
    model[0].bias.data[:3] = torch.tensor([1.0, -1.0, 2.0])
    model[2].weight.data[:2, 3:] = 0  # constants of constants
    result = check(model, (4,), 5)
    # The layer without a bias has one now.
    assert set(result.plan.biases) == {"2.bias", "4.bias"}
    weight, bias = model[2].weight.data, result.model[2].bias
    torch.testing.assert_close(bias.data, (weight[:, 0] + 2 * weight[:, 2])[2:])
    result.save(tmp_path / "small.safetensors")
    loaded = fxpath.load_pruned(tmp_path / "small.safetensors", model)
    assert torch.equal(run(loaded, (4,)), run(result.model, (4,)))


def test_constants_that_are_zero_behind_the_activation_need_no_bias() -> None:
    # ReLU6 has bounds, which are path mass: its share is not 0, its value is.
    model = made(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU6(), nn.Conv2d(6, 2, 3, padding=1))
    )
    zero(model[0].weight, range(3))
    model[0].bias.data[:3] = -1
    assert check(model, (2, 4, 4), 3).plan.biases == {}


@pytest.mark.parametrize("padding", [0, 1])
def test_zero_padding_keeps_constants(padding: int) -> None:
    model = made(
        nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU6(), nn.Conv2d(6, 3, 3, padding=padding), nn.ReLU()
        )
    )
    zero(model[0].weight, range(3))
    model[0].bias.data[:3] = torch.tensor([1.0, -1.0, 9.0])
    result = check(model, (2, 5, 5), 1 if padding else 3)
    if padding:
        (row,) = result.kept
        assert row["name"] == "0"
        assert row["channels"] == 2
        assert "zero padding" in row["reason"]


def test_padding_that_meets_only_zeros_folds_and_so_does_circular_padding() -> None:
    model = made(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)))
    zero(model[0].weight, range(3))
    model[0].bias.data[:3] = 1
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    model[2].weight.data[:, :2] *= centre
    assert left(check(model, (2, 5, 5), 2)) == {"0": 4, "2": 3}
    model = made(
        nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1, padding_mode="circular")
        )
    )
    zero(model[0].weight, range(3))
    model[0].bias.data[:3] = 1
    check(model, (2, 5, 5), 3)


def test_gamma_zero_makes_constants_and_batch_norms_take_them_up() -> None:
    model = made(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.PReLU(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, affine=False),
            nn.LeakyReLU(),
            nn.Conv2d(4, 2, 1, bias=False),
            nn.BatchNorm2d(2, affine=False),
        )
    )
    for norm, places in ((model[1], [0, 1]), (model[4], [0])):
        zero(norm.weight, places)
        norm.bias.data[places] = 0.7
    zero(model[6].weight, [3])
    result = check(model, (2, 5, 5), 4)
    assert set(result.plan.biases) == {"4.bias", "6.bias", "10.running_mean"}


def test_depthwise_channels_go_with_both_sides() -> None:
    model = made(Depthwise(1))
    zero(model.deep.weight, [0])  # constant behind it; what it reads has no path
    zero(model.norm1.weight, [1])  # constant before it, but padded
    model.norm1.bias.data[1] = 1.0
    model.norm2.bias.data[:2] = torch.tensor([8.0, 3.0])
    model.norm2.weight.data[1] = 0.1
    zero(model.last.weight, [2], axis=1)  # no path
    result = check(model, (3, 5, 5), 4)
    assert {row["name"]: row["channels"] for row in result.kept} == {"first": 1, "deep": 1}


def test_concatenated_channels_are_constants_behind_their_batch_norm() -> None:
    model = made(Cat(1))
    zero(model.conv1.weight, [0, 1])  # constants
    model.norm2.bias.data[4:6] = 5.0
    zero(model.conv2.weight, [7], axis=1)  # no path
    assert check(model, (3, 4, 4), 3).model.conv2.bias is not None


def test_flatten_folds_at_every_position() -> None:
    model = made(
        nn.Sequential(
            nn.Conv1d(2, 5, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(5, 4, 3, padding=1),  # constants that differ from position to position
            nn.ReLU(),
            nn.MaxPool1d(2, padding=1),
            nn.Flatten(),
            nn.Linear(4 * 4, 3),
        )
    )
    zero(model[0].weight, range(5))
    model[0].bias.data.abs_()
    result = check(model, (2, 6), 3)
    # Nothing but constants: one channel stays, and what that reads through zero padding.
    assert left(result) == {"0": 5, "2": 1, "6": 3}
    assert any("one channel" in row["reason"] for row in result.kept)


class Bounded(nn.Module):
    def __init__(self, lo: float | None, hi: float | None) -> None:
        super().__init__()
        self.bounds = lo, hi

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(*self.bounds)


@pytest.mark.parametrize("bounds", [(0.25, None), (None, -0.25), (0.125, 0.25)])
def test_constants_that_a_small_bound_makes_go_into_the_next_bias(
    bounds: tuple[float | None, float | None],
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Bounded(*bounds), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 0
    smaller = fxpath.remove_dead(model, (3,)).model
    assert smaller[0].weight.shape == (3, 3) and smaller[2].weight.shape == (2, 3)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-12, atol=1e-12)
