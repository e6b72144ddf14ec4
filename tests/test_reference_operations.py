"""Single operations of the float64 oracle, each against a definition of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.lifted import UnknownOperation
from tests.oracles.reference import reference
from tests.support.nets import randomize
from tests.support.reference import Wrapped


def test_linear_on_sequences_is_not_folded_over_another_axis() -> None:
    net = randomize(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), seed=4)
    assert reference(net, (3, 3)).scores.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert reference(net, (3,)).scores.keys() == {"0.weight", "1.bias"}


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [7, 8, 9, 12])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(2, 2, 0, 1), (3, 2, 1, 1), (3, 3, 1, 2), (2, 5, 1, 1), (1, 3, 0, 1), (4, 3, 2, 1)],
)
def test_pooling_windows(
    kernel: int, stride: int, padding: int, dilation: int, size: int, ceil_mode: bool
) -> None:
    """Max pooling against a convolution of ones; average pooling, linear, against itself."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, size, size + 1, dtype=torch.float64)

    def value(pool: Callable[[Tensor], Tensor]) -> float:
        # A positional weight makes every entry matter.
        return reference(_Scaled(image, pool), (3, size, size + 1)).path_norm

    pooled = F.max_pool2d(image, kernel, stride, padding, dilation, ceil_mode)
    reach = [(n - 1) * stride + (kernel - 1) * dilation + 1 for n in pooled.shape[2:]]
    wide = F.pad(image, (padding, 2 * size, padding, 2 * size))[..., : reach[0], : reach[1]]
    ones = torch.ones(3, 1, kernel, kernel, dtype=torch.float64)
    sums = F.conv2d(wide, ones, stride=stride, dilation=dilation, groups=3)
    assert sums.shape == pooled.shape
    maximum = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    assert value(maximum) == pytest.approx((sums * _weights(sums)).sum().item(), rel=1e-13)

    for include, override in itertools.product((True, False), (None, 3)):
        average = nn.AvgPool2d(kernel, stride, padding, ceil_mode, include, override)
        expected = average(image)
        assert value(average) == pytest.approx((expected * _weights(expected)).sum().item())
    for adaptive in (nn.AdaptiveAvgPool2d((5, None)), nn.AdaptiveAvgPool2d(10)):
        expected = adaptive(image)
        assert value(adaptive) == pytest.approx((expected * _weights(expected)).sum().item())


def _weights(like: Tensor) -> Tensor:
    return torch.arange(1.0, like.numel() + 1, dtype=like.dtype).reshape(like.shape)


class _Scaled(nn.Module):
    """Multiply by an image, apply a function, weight the entries of the result."""

    def __init__(self, image: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("image", image)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x * self.image)
        return y * _weights(torch.empty(y.shape, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
@pytest.mark.parametrize("align_corners", [None, True])
@pytest.mark.parametrize("size", [{"size": (7, 11)}, {"scale_factor": 2.0}])
def test_upsampling(mode: str, align_corners: bool | None, size: dict[str, object]) -> None:
    if mode != "bilinear" and align_corners:
        pytest.skip("no such mode")
    image = torch.rand(1, 2, 4, 5, dtype=torch.float64)

    def upsample(x: Tensor) -> Tensor:
        return F.interpolate(x, mode=mode, align_corners=align_corners, **size)

    net = _Scaled(image, upsample)
    expected = upsample(image)
    norm = reference(net, (2, 4, 5)).path_norm
    assert norm == pytest.approx((expected * _weights(expected)).sum().item(), rel=1e-12)
    # The coefficients are the Jacobian's entries, each raised to q.
    jacobian = torch.autograd.functional.jacobian(upsample, image)
    squares = torch.einsum("abcdefgh,efgh->abcd", jacobian**2, image**2)
    norm = reference(net, (2, 4, 5), 2).path_norm
    assert norm**2 == pytest.approx((squares * _weights(expected) ** 2).sum().item(), rel=1e-12)


@pytest.mark.parametrize("q", [0, 1, 2])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (F.relu6, [2.0, 6.0]),
        (lambda x: F.relu6(x, inplace=True), [2.0, 6.0]),
        (lambda x: F.hardtanh(x, -3, 4), [2.0, -3.0, 4.0]),
        (lambda x: x.clamp(-math.inf, 0), [2.0]),
        (lambda x: x.clamp_(max=-5), [2.0, 5.0]),
        (lambda x: torch.maximum(x, torch.tensor(7.0)), [2.0, 7.0]),
        (lambda x: torch.maximum(x, -x), [2.0, 2.0]),
        (lambda x: F.leaky_relu(x, -3.0), [6.0]),
        (lambda x: F.leaky_relu(x, 0.3), [2.0]),
        (lambda x: 5 - x / 4, [5.0, 0.5]),
        (lambda x: x.add(x, alpha=3), [2.0, 6.0]),
        (lambda x: F.pad(x, (1, 2), value=-3.0), [2.0, 3.0, 3.0, 3.0]),
        (lambda x: torch.cat([x, x, torch.full((1, 1), 9.0)], 1), [2.0, 2.0, 9.0]),
        (lambda x: x.expand(1, 2).mean(1), [1.0, 1.0]),
        (lambda x: x.expand(2, 2)[:, 1:].abs().sum(), [2.0, 2.0]),
    ],
)
def test_single_operations(
    function: Callable[[Tensor], Tensor], expected: list[float], q: float
) -> None:
    """The path that comes in has weight 2; the list names all paths that go out."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x * -2)

    powers = [float(p != 0) if q == 0 else abs(p) ** q for p in expected]
    norm = reference(Net(), (1,), q).path_norm
    assert norm == pytest.approx(sum(powers) ** (1 / (q or 1)), rel=1e-13)


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        F.softplus,
        F.gelu,
        lambda x: x.softmax(1),
        lambda x: x * x,
        lambda x: x / x,
        lambda x: x @ x.transpose(-1, -2),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.conv2d(x, x[:, :, :1, :1].expand(3, 3, 1, 1)),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x.relu_().data,
        lambda x: x.flatten(1).add_(1),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: x**2,
    ],
)
def test_what_has_no_rule_raises(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnknownOperation):
        reference(Wrapped(function), (2, 4, 4))


def test_an_output_that_depends_on_no_input_raises() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.ones(3)

    with pytest.raises(UnknownOperation, match="depends on no input"):
        reference(Net(), (3,))
