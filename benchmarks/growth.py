"""Seconds from a captured model to its path-norm, by the size of its graph.

``python -m benchmarks.growth`` prints a table of processor time for chains, concatenations, masks
computed step by step, residual networks and sound; ``python -m benchmarks.growth CASE SIZE ...``
for one of them.  Time per node (or per thousand samples) that stays the same is linear growth.
What ``torch.export`` takes is told apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxpath.capture import capture
from fxpath.model import Given
from fxpath.passes import Setting, fold, lift, rewrite
from fxpath.program.program import PathProgram

__all__ = ["CASES", "main", "rows"]

HEADERS = ("case", "size", "nodes", "torch.export, s", "fxpath, s", "ms per node")

#: Sizes with graphs of 100 to 10,000 nodes; samples for sound.
SIZES = {
    "chain": (20, 200, 2000),
    "concatenation": (20, 200, 2000),
    "mask": (100, 1000, 10000),
    "residual": (10, 100, 500),
    "sound": (5000, 50000, 500000),
}


class Concatenation(nn.Module):
    """Layers side by side, and one that reads them all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(size))
        self.head = nn.Linear(4 * size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.head(torch.cat([layer(x) for layer in self.layers], 1))
        return found


class Mask(nn.Module):
    """A mask that is computed step by step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.layer = size, nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Masked features."""
        mask = torch.ones(4)
        for _ in range(self.size):
            mask = mask * 1.001
        return torch.where(mask > 0, self.layer(x), torch.zeros(()))


class Residual(nn.Module):
    """Padded convolutions with skip connections."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(size))

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * 0.5
        return x


def _chain(size: int) -> tuple[nn.Module, tuple[int, ...]]:
    layers = [(nn.Linear(4, 4), nn.ReLU()) for _ in range(size)]
    return nn.Sequential(*(module for pair in layers for module in pair)), (4,)


def _sound(size: int) -> tuple[nn.Module, tuple[int, ...]]:
    layers = (nn.Conv1d(1, 8, 80, 4), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(8, 8, 3, padding=1))
    return nn.Sequential(*layers), (1, size)


#: Size -> a model and the shape of its input.
CASES: dict[str, Callable[[int], tuple[nn.Module, tuple[int, ...]]]] = {
    "chain": _chain,
    "concatenation": lambda size: (Concatenation(size), (4,)),
    "mask": lambda size: (Mask(size), (3,)),
    "residual": lambda size: (Residual(size), (2, 16, 16)),
    "sound": _sound,
}


def rows(case: str, sizes: Sequence[int]) -> Iterator[tuple[str, int, int, float, float, float]]:
    """One row of the table for each size."""
    for size in sizes:
        torch.manual_seed(0)
        model, shape = CASES[case](size)
        start = time.process_time()
        captured = capture(model.eval(), Given(shape))
        exported = time.process_time()
        nodes = size / 1000 if case == "sound" else len(captured.graph_module.graph.nodes)
        setting = Setting(captured)
        lifted = lift(fold(captured.graph_module, setting), setting)
        PathProgram(captured, rewrite(lifted, setting), torch.float32, 1.0).path_norm()
        taken = time.process_time() - exported
        yield case, size, int(nodes), exported - start, taken, 1000 * taken / nodes


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    cases = {arguments[0]: [int(n) for n in arguments[1:]]} if arguments else SIZES
    table = [row for case, sizes in cases.items() for row in rows(case, sizes)]
    print(tabulate(table, headers=HEADERS, floatfmt=("", "", "", ".2f", ".2f", ".3f")))


if __name__ == "__main__":
    main(sys.argv[1:])
