"""The least norm found by an optimizer, and models to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.nets import randomize
from tests.support.symmetric import UNUSUAL, unusual

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
