"""Models with something unusual in them, and their channel groups applied as data."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpath
from tests.support.nets import randomize


def outputs(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
    return torch.cat([each.flatten() for each in y]) if isinstance(y, tuple) else y


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    """Names of tensors that differ."""
    theirs = other.state_dict()
    return {name for name, own in model.state_dict().items() if not torch.equal(own, theirs[name])}


# Models with something unusual in them


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.norm(self.inner(x)))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Preactivation(nn.Module):
    """Batch norms that are neurons of their own, one with no parameters, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.second = nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = torch.cat([F.relu(self.norm(x)), F.relu(self.plain(x))], 1)
        y = F.relu(self.second(y))
        return self.head(F.relu(self.norm(y)) - y)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3)
        self.slopes = nn.PReLU(6)
        self.last = nn.ConvTranspose2d(6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.grouped(self.first(x).relu()), 0.3)
        return self.last(self.slopes(self.up(self.depthwise(x).relu())))


class Shuffled(nn.Module):
    """Reshapes and selections of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = self.second(x).relu().flip(1).chunk(2, 1)
        y = F.pad(torch.maximum(a, b)[:, 1:], (0, 0, 0, 0, 0, 1))
        y = F.pixel_shuffle(torch.cat([y, x[:, ::2]], 1), 2)
        return self.third(y.roll(1, 1)).mean(1)


class Tied(nn.Module):
    """An autoencoder with one weight, and a matrix of which each reader takes a part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.parts = nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(F.linear(x, self.weight))
        back = F.relu(F.linear(code, self.weight.t()))
        hidden = F.relu(back @ self.parts[:3, :]) @ self.parts.t()[:, 1:]
        return self.head(F.relu(hidden))


class Awkward(nn.Module):
    """Constants, scales and contractions that can't be followed or must not be touched."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
        self.gain = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.slope = nn.Parameter(torch.randn(1))
        self.register_buffer("offset", torch.tensor([0.0, 1.0, 0.0, -2.0]))
        self.register_buffer("mixing", torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x)) * self.gain
        x = F.prelu(self.layers[1](x) + self.offset, self.slope)
        x = F.relu(torch.einsum("bi,oi->bo", self.layers[2](x).relu(), self.matrix))
        x = self.layers[3](x).clamp(-1, 2)
        x = F.relu(self.layers[4](x)) / self.gain.abs()
        return self.layers[5](torch.cat([F.linear(x, self.mixing), x[:, :1]], 1)) + self.slope


def sequence() -> nn.Module:
    """Linear layers on a tensor of sequences, whose channels are on the last axis."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(5, 2, 1), nn.Flatten(), nn.Linear(8, 2)
    )


# Model, input shape, number of groups, of those that can be rescaled
UNUSUAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "residual": (Residual, (1, 6, 6), 4 + 6, 10),
    # The second use of the norm ties what it returns to what it reads.
    "preactivation": (Preactivation, (1, 5, 5), 4, 4),
    "grouped": (Grouped, (2, 5, 5), 8 + 12 + 12 + 6, 38),
    # Of the first layer's 8 channels 4 share a channel of the last layer's input; of the second's
    # 4 pairs, each a maximum, 3 do.
    "shuffled": (Shuffled, (2, 3, 3), 1 + 4 + 1 + 1, 7),
    # Only the part of the matrix that is used once, by its last row.
    "tied": (Tied, (3,), 1, 1),
    # Layers 0 to 2, an einsum, layers 3 and 4; layer 1 adds a constant to two channels, layer 3 is
    # clamped, and the last layer reads one mixture.
    "awkward": (Awkward, (4,), 4 + 4 + 4 + 4 + 4 + 1, 4 + 2 + 4 + 4 + 0 + 1),
    # The convolution's channels are the positions of the sequence.
    "sequence": (sequence, (5, 3), 1 + 2, 3),
}


def unusual(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape, _, _ = UNUSUAL[name]
    return randomize(make().double(), 0).eval(), shape


# Groups as data


def apply(groups: fxpath.ChannelGroups, model: nn.Module, factors: dict[int, float]) -> nn.Module:
    """Rescale by the listed members, entry by entry."""
    copied = copy.deepcopy(model)
    tensors = dict(copied.named_parameters()) | dict(copied.named_buffers())
    for number, factor in factors.items():
        for member in groups[number].members:
            tensor = tensors[member.tensor].data
            places: list[object] = [slice(None)] * tensor.dim()
            places[member.axis] = list(member.indices)
            if member.within is not None:
                axis, positions = member.within
                shape = [1] * 2
                shape[0 if axis < member.axis else 1] = -1
                places[axis] = torch.tensor(positions).reshape(shape)
                shape.reverse()
                places[member.axis] = torch.tensor(member.indices).reshape(shape)
            tensor[tuple(places)] *= factor if member.incoming else 1 / factor
    return copied
