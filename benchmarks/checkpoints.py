"""Seconds that a checkpoint takes in a comparison, against a forward pass between any two.

    python -m benchmarks.checkpoints
    python -m benchmarks.checkpoints resnet18 --count 20 --repeats 15

Each checkpoint is the one before with one per cent of noise, so that signs differ as they do in
training. What is read is in the cache of the file system.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.timing import explained, interleave, load_module, options, positive, write_json
from fxpath.capture.loading.checkpoints import read_checkpoint
from fxpath.capture.shapes import infer_input_shape
from fxpath.checkpoints.reading import read
from fxpath.checkpoints.series import Series
from fxpath.model import Given, check_finite
from fxpath.pairs.common import CommonPart
from fxpath.pairs.matching import state_tensors
from fxpath.program.program import build

__all__ = ["main"]

#: What is timed, and what it is.
CASES = {
    "forward": "forward pass, batch 1",
    "read": "reading a file",
    "row": "a row, with reading",
    "norm": "of it the path-norm",
    "pair": "of it the metric to one other file",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; `--help` says what there is to choose."""
    told = "Time of a checkpoint in fxpath.compare, in forward passes of batch size 1."
    parser = options("checkpoints", told, 9)
    parser.add_argument("model", nargs="?", default="resnet18", metavar="MODEL")
    parser.add_argument(
        "--count",
        type=positive,
        default=6,
        metavar="N",
        help="checkpoints, three at least (default %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.count < 3:
        parser.error("--count: three at least, a reference and two to compare")
    with explained(parser):
        model = load_module(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        row = measured(model, Path(folder), arguments.count, arguments.repeats)
    row = {"model": arguments.model, **row}
    print(table(row))
    write_json(arguments.json, [row])
    return 0


def measured(model: nn.Module, folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each case, and the time beyond reading in forward passes."""
    common = CommonPart(build(model, Given()))
    sample = torch.rand(1, *infer_input_shape(model))
    files = written(model, folder, count)
    series = Series(common, files, files[0], 1.0)
    turn = itertools.cycle(range(1, count))
    own, other = series.reference.effective, read(common, files[1]).effective
    memory = common.evaluate()

    def reading() -> object:
        tensors, _ = state_tensors(common.captured, read_checkpoint(Path(files[1]), files[1]))
        check_finite(tensors)
        return tensors

    def forward() -> object:
        with torch.no_grad():
            return model(sample)

    cases = {
        "forward": forward,
        "read": reading,
        "row": lambda: next(series.rows([next(turn)])),
        "norm": lambda: common.evaluate(own.tensors, memory),
        "pair": lambda: common.apart(own, other),
    }
    found = interleave(cases, repeats)
    beyond = found["row"] - found["read"]
    return {
        **{f"{name}_ms": found[name] for name in CASES},
        "beyond_reading_ms": beyond,
        "beyond_reading_ratio": beyond / found["forward"],
    }


def written(model: nn.Module, folder: Path, count: int) -> list[str]:
    """Checkpoints, each a little further."""
    torch.manual_seed(0)
    state, files = {k: v.clone() for k, v in model.state_dict().items()}, []
    for i in range(count):
        files.append(str(folder / f"{i}.pt"))
        torch.save(state, files[-1])
        for value in state.values():
            if value.is_floating_point() and value.dim() > 1:
                value += 0.01 * value.std() * torch.randn_like(value)
    return files


def table(row: dict[str, Any]) -> str:
    """A line for each case, in milliseconds and in forward passes."""
    forward = row["forward_ms"]
    cases = [*((told, row[f"{name}_ms"]) for name, told in CASES.items())]
    cases.append(("a row beyond reading", row["beyond_reading_ms"]))
    lines = [(told, f"{ms:.1f}", f"{ms / forward:.2f}") for told, ms in cases]
    headers = [row["model"], "ms", "forward passes"]
    return tabulate(lines, headers=headers, colalign=("left", "right", "right"))


if __name__ == "__main__":
    sys.exit(main())
