"""Peak memory of `fxpath.analyze` and of the published recipe, beyond the model itself.

`python -m benchmarks.memory`; each measurement has a process of its own.  Weights are random.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

import fxpath
from benchmarks.recipe import recipe
from benchmarks.timing import explained, fresh_process, load_module, options, write_json
from fxpath.capture.shapes import infer_input_shape

__all__ = ["extra_bytes", "main", "peak_bytes", "table"]

MODELS = ("alexnet", "vgg16", "resnet18")
SUBJECTS: dict[str, Callable[[nn.Module, tuple[int, ...]], object]] = {
    "analyze": fxpath.analyze,
    "recipe_f64": recipe,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("memory", __doc__.split("\n")[0], repeats=None)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="MODEL", help="as for fxpath analyze"
    )
    parser.add_argument(
        "--here", choices=SUBJECTS, help="measure one MODEL in this process and print the bytes"
    )
    arguments = parser.parse_args(argv)
    with explained(parser):
        if arguments.here:
            print(*extra_bytes(arguments.here, arguments.models[0]))
            return 0
        rows = [_row(name) for name in arguments.models]
    print(f"{table(rows)}\n")
    write_json(arguments.json, rows)
    return 0


def _row(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name}
    for subject in SUBJECTS:
        extra, parameters = fresh_process("benchmarks.memory", "--here", subject, "--models", name)
        row["parameter_bytes"] = int(parameters)
        row[f"{subject}_bytes"] = int(extra)
        row[f"{subject}_multiple"] = extra / parameters
    return row


def extra_bytes(subject: str, name: str) -> tuple[int, int]:
    """How far a subject raises this process's peak memory, and the bytes of the parameters."""
    run = SUBJECTS[subject]
    # What is loaded and set up at the first run is no part of a model's cost.
    run(_Small(), (1, 8, 8))
    model = load_module(name)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    shape = tuple(infer_input_shape(model))
    before = peak_bytes()
    result = run(model, shape)
    extra = peak_bytes() - before
    # Alive until here: the scores are part of the cost.
    del result
    return extra, parameters


class _Small(nn.Module):
    """One of each kind of layer that the models have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, 2, 1))
        self.skip = nn.Conv2d(2, 2, 1, 4, bias=False)
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last((self.second(x) + self.skip(x)).relu())
        return y


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Example:
        >>> 1e6 < peak_bytes() < 1e12
        True
    """
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands ru_maxrss on from parent to child; this one starts anew with the program.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, in multiples of the parameters' bytes."""
    lines = [
        [
            row["model"],
            f"{row['parameter_bytes'] / 1e6:.1f}",
            *(f"{row[f'{subject}_bytes'] / 1e6:.1f}" for subject in SUBJECTS),
            *(f"{row[f'{subject}_multiple']:.2f}" for subject in SUBJECTS),
        ]
        for row in rows
    ]
    headers = ["model", "parameters (MB)", "analyze (MB)", "published, float64 (MB)"]
    headers += ["analyze / parameters", "published / parameters"]
    align = ("left", *("right",) * 5)
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
