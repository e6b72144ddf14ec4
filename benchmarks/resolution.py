"""Time of a forward pass and of eager Path-Mag against the size of the input image.

`python -m benchmarks.resolution`; a table, a JSON file and a plot.  Weights are random.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn

import fxpath
from benchmarks.timing import (
    explained,
    interleave,
    load_module,
    options,
    positive,
    write_json,
)

__all__ = ["grown", "main", "measure", "plot", "table"]

SIZES = (64, 128, 224, 448, 896, 1024)
# Times are told in multiples of those at this size too, if it is among them.
USUAL = 224
# MODEL, or MODEL/submodule: the classifier of VGG16 fixes the size of its input.
MODELS = ("resnet18", "vgg16/features")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("resolution", __doc__.split("\n")[0], repeats=9)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL[/SUBMODULE]")
    parser.add_argument(
        "--sizes", nargs="+", type=positive, default=SIZES, metavar="N", help="in pixels"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into a PNG file")
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.models:
        with explained(parser):
            model = _load(name)
        own = []
        for size in arguments.sizes:
            own.append(measure(name, model, size, arguments.repeats))
            print(f"{name} at {size} pixels done", flush=True)
        rows += grown(own)
    print(f"\n{table(rows)}\n")
    write_json(arguments.json, rows)
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    return 0


def _load(name: str) -> nn.Module:
    name, _, submodule = name.partition("/")
    return load_module(name).get_submodule(submodule)


def measure(name: str, model: nn.Module, size: int, repeats: int) -> dict[str, Any]:
    """One row: a square RGB image of ``size`` pixels."""
    inputs = torch.randn(1, 3, size, size)
    program = fxpath.compile(model, (3, size, size), backend="eager")
    buffers = {name: torch.empty_like(score) for name, score in program.scores().items()}

    def forward() -> None:
        with torch.no_grad():
            model(inputs)

    cases = {
        "forward_ms": forward,
        "path_magnitude_ms": lambda: program.scores(out=buffers),
    }
    return {"model": name, "pixels": size, **interleave(cases, repeats)}


def grown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one model with their times in multiples of those at 224 pixels, where that is known.

    Example:
        >>> rows = [{"pixels": 224, "forward_ms": 20.0, "path_magnitude_ms": 30.0},
        ...         {"pixels": 448, "forward_ms": 80.0, "path_magnitude_ms": 33.0}]
        >>> [(row["forward_growth"], row["path_magnitude_growth"]) for row in grown(rows)]
        [(1.0, 1.0), (4.0, 1.1)]
    """
    usual = next((row for row in rows if row["pixels"] == USUAL), None)
    if usual is None:
        return list(rows)
    what = "forward", "path_magnitude"
    return [row | {f"{w}_growth": row[f"{w}_ms"] / usual[f"{w}_ms"] for w in what} for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows."""
    growth = ["forward_growth", "path_magnitude_growth"]
    lines = [
        [
            row["model"],
            row["pixels"],
            f"{row['forward_ms']:.1f}",
            f"{row['path_magnitude_ms']:.1f}",
            f"{row['path_magnitude_ms'] / row['forward_ms']:.2f}",
            *(f"{row[key]:.2f}" if key in row else "" for key in growth),
        ]
        for row in rows
    ]
    headers = ["model", "pixels", "forward (ms)", "Path-Mag (ms)", "Path-Mag / forward"]
    headers += [f"forward / at {USUAL}", f"Path-Mag / at {USUAL}"]
    align = ("left", *("right",) * 6)
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Both times against the size, on logarithmic axes, as a PNG file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({row["pixels"] for row in rows})
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == name]
        for key, label, style in (
            ("forward_ms", "forward", "--"),
            ("path_magnitude_ms", "Path-Mag", "-"),
        ):
            axes.loglog(
                [row["pixels"] for row in own],
                [row[key] for row in own],
                style,
                color=f"C{number}",
                marker="o",
                markersize=4,
                label=f"{name}: {label}",
            )
    axes.set_xticks(sizes, labels=[str(size) for size in sizes], rotation=45)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("height and width of the input (pixels)")
    axes.set_ylabel("median time (ms)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    print(f"plotted to {path}")


if __name__ == "__main__":
    sys.exit(main())
