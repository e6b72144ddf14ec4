"""Data sets and small networks for `benchmarks.pruning_accuracy`; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["TASKS", "Data", "Residual", "Task"]


@dataclass(frozen=True)
class Data:
    """Examples ``[count, channels, *size]`` and their classes ``[count]``."""

    train_inputs: Tensor
    train_classes: Tensor
    test_inputs: Tensor
    test_classes: Tensor


@dataclass(frozen=True)
class Task:
    """A network, its data, and how long and how fast it learns.

    Attributes:
        title: for tables and plots.
        data: returns the same examples at every call.
        network: constructor, with random weights.
        rates: name of an optimizer in ``benchmarks.stacked`` -> its largest learning rate.
        epochs: of the dense training.
        normalized: whether there is batch normalization to recalibrate.
    """

    title: str
    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    rates: dict[str, float]
    epochs: int
    normalized: bool


class Residual(nn.Module):
    """A block with two convolutions, and one of stride 2 on the shortcut."""

    def __init__(self, inside: int, outside: int, normalized: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inside, outside, 3, 2, normalized),
            nn.ReLU(),
            *_convolution(outside, outside, 3, 1, normalized),
        )
        self.shortcut = nn.Sequential(*_convolution(inside, outside, 1, 2, normalized))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps ``[batch, inside, H, W]`` to ``[batch, outside, H / 2, W / 2]``."""
        output: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return output


def _convolution(
    inside: int, outside: int, kernel: int, stride: int, normalized: bool
) -> list[nn.Module]:
    """A convolution with a bias, or with batch norm instead."""
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=not normalized)
    # torch's own initial weights let the signal of a network without normalization fade.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return [layer, nn.BatchNorm2d(outside)] if normalized else [layer]


def residual_network(normalized: bool) -> nn.Module:
    """Five thousand weights, for images of 8 x 8 pixels."""
    return nn.Sequential(
        *_convolution(1, 6, 3, 1, normalized),
        nn.ReLU(),
        Residual(6, 8, normalized),
        Residual(8, 16, normalized),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def signal_network() -> nn.Module:
    """Five thousand weights, for signals of 64 samples; no residual, but a flattened end."""
    return nn.Sequential(
        nn.Conv1d(1, 8, 7, 2, 3, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 16, 5, 1, 2, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 24, 5, 2, 2, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(96, 24),
        nn.ReLU(),
        nn.Linear(24, 12),
    )


@lru_cache(maxsize=1)
def digits() -> Data:
    """The 1797 digits of scikit-learn, 8 x 8: a thousand to learn from, the others to test.

    They are shuffled, once for all: in their own order the last are by other writers.
    """
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[order], torch.tensor(source.target)[order]
    return Data(images[:1000], classes[:1000], images[1000:], classes[1000:])


#: What a signal is made of: shapes of 16 samples, of the same energy.
_MOTIFS = 4
_LENGTH, _WIDTH = 64, 16
_NOISE = 0.6


@lru_cache(maxsize=1)
def signals() -> Data:
    """Two different motifs of four in noise; the class, of twelve, is which and in what order.

    Where the motifs lie, how strong they are and their sign are random.
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.linspace(-1, 1, _WIDTH)
    window = torch.cos(time * torch.pi / 2)
    motifs = torch.stack(
        [
            window,
            window * torch.sin(time * torch.pi),
            window * torch.cos(time * 2 * torch.pi),
            window * torch.sin(time * 3 * torch.pi),
        ]
    )
    motifs /= motifs.square().mean(1, keepdim=True).sqrt()
    pairs = torch.tensor([[a, b] for a in range(_MOTIFS) for b in range(_MOTIFS) if a != b])
    count = 2000
    classes = torch.randint(len(pairs), (count,), generator=generator)
    inputs = _NOISE * torch.randn(count, _LENGTH, generator=generator)
    for place, motif in enumerate(pairs[classes].T):
        # The first one in the first half of the signal, the second in the second.
        free = _LENGTH // 2 - _WIDTH + 1
        starts = place * _LENGTH // 2 + torch.randint(free, (count, 1), generator=generator)
        strength = 0.5 + torch.rand(count, 1, generator=generator)
        sign = 2 * torch.randint(2, (count, 1), generator=generator) - 1
        positions = starts + torch.arange(_WIDTH)
        inputs.scatter_add_(1, positions, sign * strength * motifs[motif])
    inputs = inputs[:, None]
    return Data(inputs[:1000], classes[:1000], inputs[1000:], classes[1000:])


#: Name on the command line -> task.
TASKS: dict[str, Task] = {
    "digits": Task(
        "digits, ResNet with batch norm",
        digits,
        lambda: residual_network(True),
        {"sgd": 0.1, "adamw": 0.01},
        7,
        True,
    ),
    "digits-plain": Task(
        "digits, ResNet without batch norm",
        digits,
        lambda: residual_network(False),
        {"sgd": 0.05, "adamw": 0.01},
        7,
        False,
    ),
    "signals": Task(
        "signals, 1-d convolutions",
        signals,
        signal_network,
        {"sgd": 0.1, "adamw": 0.01},
        7,
        True,
    ),
}
