"""Dead channels in models of other kinds: code, groups, shared biases, masks, random zeros."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxpath
from tests.support.channels import made, run
from tests.support.removal import Cat, Depthwise, check, left, mlp, zero


class Coded(nn.Module):
    """Constants and a size in the code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv, self.mid, self.last = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 1), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.conv(x) + 0.1, -0.5, 2.0).clamp(min=0.25)
        x = self.mid(F.max_pool2d(x, 3, stride=2, padding=1))
        x = F.leaky_relu(x)
        x = x.view(len(x), self.size)
        return self.last(x)


def test_constants_in_the_code_fold_and_sizes_in_it_keep_channels() -> None:
    for size in (-1, 16):
        model = made(Coded(size))
        zero(model.conv.weight, [0, 1])
        zero(model.conv.bias, [0])
        zero(model.mid.weight, [3])
        zero(model.last.weight, range(4), axis=1)
        result = check(model, (2, 6, 6), 4 if size == -1 else 2)
        lines = [row["source_line"] for row in result.kept]
        assert ["view" in line for line in lines] == [True] * (size == 16)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.conv2(F.relu(self.conv1(x)))))


def test_a_residual_stream_goes_only_with_all_members() -> None:
    model = made(Residual())
    zero(model.stem.weight, [0])
    zero(model.stem.bias, [0])
    result = check(model, (3, 4, 4), 0)
    assert result.kept == []
    zero(model.conv2.weight, [0])
    assert left(check(model, (3, 4, 4), 2))["stem"] == 5  # a constant, which the head takes up
    zero(model.conv2.bias, [0])
    assert check(model, (3, 4, 4), 2).plan.biases == {}


def test_an_empty_branch_keeps_one_channel() -> None:
    model = made(Residual())
    model.conv2.weight.data.zero_()
    result = check(model, (3, 4, 4), 5)
    assert left(result)["conv1"] == 1
    (row,) = result.kept
    assert (row["name"], row["channels"]) == ("conv1", 1)


def test_groups_stay_balanced() -> None:
    model = made(
        nn.Sequential(
            nn.Conv2d(2, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 2, 1),
        )
    )
    zero(model[0].weight, [0, 1, 4])
    zero(model[0].bias, [0, 1, 4])
    zero(model[4].weight, [1, 2, 6], axis=1)
    result = check(model, (2, 4, 4), 4)
    assert {row["name"]: row["channels"] for row in result.kept} == {"0": 1, "2": 1}


def test_transposed_and_3d_convolutions() -> None:
    for stride in (1, 2):
        model = made(
            nn.Sequential(
                nn.Conv3d(1, 5, 2),
                nn.LeakyReLU(0.1),
                nn.ConvTranspose3d(5, 4, stride, stride=stride, bias=False),
                nn.BatchNorm3d(4),
                nn.ReLU(),
                nn.ConvTranspose3d(4, 2, 1),
            )
        )
        zero(model[0].weight, [0, 1])
        zero(model[0].bias, [0])
        zero(model[2].weight, [3], axis=1)
        # With a stride each position has a tap of its own.
        result = check(model, (1, 3, 3, 3), 3 if stride == 1 else 2)
        assert [row["channels"] for row in result.kept] == ([] if stride == 1 else [1])


class Bare(nn.Module):
    """Parameters of no module."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.v, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8))
        self.w, self.u = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 2))
        self.c = nn.Parameter(torch.randn(3)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x @ self.v + self.b) @ self.w
        return F.relu(x if self.c is None else x + self.c) @ self.u


def test_parameters_of_no_module() -> None:
    for bias in (True, False):
        model = made(Bare(bias))
        zero(model.v, [0, 1], axis=1)
        model.b.data[:2] = torch.tensor([1.0, -1.0])
        result = check(model, (5,), 2 if bias else 1)
        assert set(result.plan.biases) == ({"c"} if bias else set())
        assert ["w has no bias of its own" in row["reason"] for row in result.kept] == [True] * (
            not bias
        )


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.head(F.relu(torch.cat([self.shared(a), self.shared(b)], 1)))


def test_a_bias_that_is_shared_takes_nothing_up() -> None:
    model = made(Twice())
    for layer, value in ((model.a, 1.0), (model.b, 2.0)):
        zero(layer.weight, [0, 1])
        layer.bias.data[:2] = torch.tensor([value, -1.0])
    result = check(model, (3,), 2)
    assert {row["name"]: row["channels"] for row in result.kept} == {"a": 1, "b": 1}
    assert "shared.bias with other layers" in result.kept[0]["reason"]


class Frozen(nn.Module):
    """A batch norm of nothing but buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 2, 1)
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer[:, None, None] for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return self.head(F.relu(self.conv(x) * scale + (bias - mean * scale)))  # frozen


def test_norms_of_buffers_are_cut_with_their_channels() -> None:
    model = made(Frozen())
    zero(model.head.weight, [1], axis=1)
    zero(model.conv.weight, [2])
    result = check(model, (2, 3, 3), 2)
    assert result.model.get_buffer("var").shape == (2,)
    # Without weights those channels are not zero, which is said.
    (row, _) = fxpath.prune_channels(model, 0.5, (2, 3, 3)).kept
    assert row["channels"] == 4 and "# frozen" in row["source_line"]
    assert re.findall(r"\b(?:weight|bias|mean|var)(?=[,:])", row["reason"]) == [
        "bias", "mean", "weight", "var",
    ]  # fmt: skip


def test_masks_of_torch_count_and_are_made_permanent() -> None:
    model = made(mlp())
    mask = torch.ones(8, 8)
    mask[:, :3] = 0
    prune.custom_from_mask(model[2], "weight", mask)
    run(model, (4,))  # leaves a tensor in the module that does not copy
    result = check_masked(model)
    assert isinstance(result.model[2].weight, nn.Parameter)
    assert left(result)["0"] == 5


def check_masked(model: nn.Module) -> fxpath.PrunedChannels:
    result = fxpath.remove_dead(model, (4,))
    torch.testing.assert_close(run(result.model, (4,)), run(model, (4,)), rtol=1e-9, atol=1e-12)
    return result


def test_small_is_not_zero() -> None:
    model = made(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)))
    model[0].weight.data[0] = model[1].weight.data[0] = 1e-200  # their product underflows
    model[1].bias.data[0] = model[0].bias.data[0] = model[1].running_mean[0] = 0
    model[3].weight.data[:, 1] = 1e-200
    model[0].weight.data[1] = 1e-200
    model[1].bias.data[1] = model[0].bias.data[1] = model[1].running_mean[1] = 0
    scores = fxpath.analyze(model, (2,)).scores
    assert not scores["0.weight"][:2].any()
    assert check(model, (2,), 0).plan == fxpath.Plan()


def test_other_formats_up_to_their_rounding() -> None:
    dtype = torch.bfloat16
    model = made(mlp()).to(dtype)
    zero(model[0].weight, range(3))
    model[0].bias.data[:3] = 1
    result = fxpath.remove_dead(model, (4,))
    assert left(result)["0"] == 5
    assert result.model[2].bias.dtype == dtype
    rounded = copy.deepcopy(model).double()
    exact = rounded[2].bias.data + rounded[2].weight.data[:, :3].sum(1)
    torch.testing.assert_close(result.model[2].bias.data, exact.to(dtype), rtol=0, atol=0)


def brute_force(model: nn.Sequential) -> int:
    """Hidden neurons of an MLP that are constant or unread, by running it and by reachability."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    driven = [torch.ones(layers[0].in_features, dtype=torch.bool)]
    for layer in layers[:-1]:
        driven.append(((layer.weight != 0) & driven[-1]).any(1))
    leads = torch.ones(layers[-1].out_features, dtype=torch.bool)
    count = 0
    for layer, reached in zip(reversed(layers[1:]), reversed(driven[1:]), strict=True):
        leads = ((layer.weight != 0) & leads[:, None]).any(0)
        idle = int((~(leads & reached)).sum())
        count += min(idle, len(reached) - 1)
    return count


@pytest.mark.parametrize("seed", range(2))
def test_random_masks_on_an_mlp(seed: int) -> None:
    model = made(mlp(), seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) < 0.2
    assert isinstance(model, nn.Sequential)
    check(model, (4,), brute_force(model))


@pytest.mark.parametrize("build", [Residual, lambda: Depthwise(1), lambda: Cat(3)])
def test_random_masks_leave_nothing_to_a_second_run(build: Callable[[], nn.Module]) -> None:
    model = made(build())
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            kernels = torch.rand(layer.weight.shape[:2], generator=generator) < 0.3
            layer.weight.data *= kernels[:, :, None, None]
    shape = (3, 4, 4)
    result = fxpath.remove_dead(model, shape)
    torch.testing.assert_close(run(result.model, shape), run(model, shape), rtol=1e-9, atol=1e-12)
    assert check(result.model, shape, 0).kept == result.kept


def test_heads_and_models_that_cannot_be_cut() -> None:
    model = made(nn.Sequential(mlp(), nn.Softmax(-1)))
    zero(model[0][2].weight, [0, 1], axis=1)
    result = fxpath.remove_dead(model, (4,), until="0")
    torch.testing.assert_close(run(result.model, (4,)), run(model, (4,)), rtol=1e-9, atol=1e-12)
    assert result.channels[0] == 2
    with pytest.raises(TypeError, match="ExportedProgram"):
        fxpath.remove_dead(torch.export.export(made(mlp()), (torch.randn(1, 4).double(),)))  # type: ignore[arg-type]
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="computed from other parameters"):
        fxpath.remove_dead(nn.Sequential(parametrized, nn.ReLU(), nn.Linear(4, 1)).eval(), (4,))
