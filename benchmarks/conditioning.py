"""Path conditioning before and after each rescaling, and what the rescaled networks compute.

`python -m benchmarks.conditioning`; networks as they are initialized, and after their scales were
drawn at random.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxpath
from benchmarks.timing import explained, load_module, options, write_json

__all__ = ["UNet", "main", "row"]

METHODS = ("incoming", "least_norm", "path_conditioning")
SHAPE = (3, 64, 64)


class UNet(nn.Module):
    """A small U-Net: three levels, batch norms, transposed convolutions, concatenations."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.downs = nn.ModuleList(
            _double(before, after) for before, after in zip([3, *sizes], sizes, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.middle = _double(4 * width, 8 * width)
        self.lifts = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, 2) for n in sizes[::-1])
        self.ups = nn.ModuleList(_double(2 * n, n) for n in sizes[::-1])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map of one channel, of the size of ``x``."""
        kept = []
        for down in self.downs:
            x = down(x)
            kept.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for lift, up in zip(self.lifts, self.ups, strict=True):
            x = up(torch.cat([kept.pop(), lift(x)], 1))
        result: Tensor = self.head(x)
        return result


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("conditioning", __doc__.split("\n")[0], repeats=None)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["resnet18", "mobilenet_v2", "unet"],
        metavar="MODEL",
        help="as for fxpath analyze, or unet",
    )
    arguments = parser.parse_args(argv)
    with explained(parser):
        rows = [each for name in arguments.models for each in _rows(name)]
    print(f"{_table(rows)}\n")
    write_json(arguments.json, rows)
    return 0


def _rows(name: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    builders: dict[str, Callable[[], nn.Module]] = {"unet": UNet}
    model = builders[name]() if name in builders else load_module(name)
    drawn = fxpath.rescale(model, SHAPE, choices=(0.1, 1, 10))
    return [row(name, model), row(f"{name}, rescaled", drawn)]


def row(name: str, model: nn.Module, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    """Path conditioning of a model and of its rescaled copies, seconds, and how outputs deviate."""
    found: dict[str, Any] = {"model": name, "before": fxpath.path_conditioning(model, shape)}
    for method in METHODS:
        start = time.perf_counter()
        copied = fxpath.normalize(model, shape, method=method)
        found[f"{method}_s"] = time.perf_counter() - start
        found[method] = fxpath.path_conditioning(copied, shape)
        for training in (False, True):
            key = f"{method}_{'train' if training else 'eval'}_deviation"
            found[key] = _deviation(model, copied, shape, training)
    return found


def _deviation(model: nn.Module, other: nn.Module, shape: tuple[int, ...], training: bool) -> float:
    """Of the outputs of a random batch, relative to the largest; dropout draws the same."""
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    outputs = []
    for each in (model, other):
        torch.manual_seed(0)
        with torch.no_grad():
            # A copy: training moves the statistics of batch norms.
            outputs.append(copy.deepcopy(each).train(training)(x))
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["model"],
            *(f"{row[key]:.3f}" for key in ("before", *METHODS)),
            f"{row['path_conditioning_s']:.1f}",
            *(f"{row[f'path_conditioning_{mode}_deviation']:.0e}" for mode in ("eval", "train")),
            f"{row['least_norm_train_deviation']:.0e}",
        ]
        for row in rows
    ]
    headers = ["path conditioning, nats", "before", *METHODS, "seconds"]
    headers += ["function, eval", "function, training", "the same of least_norm"]
    align = ("left", *("right",) * 8)
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
