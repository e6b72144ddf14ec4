"""Peak memory of each rank while a sharded model is analysed or pruned, beside its own part of it.

`python -m benchmarks.sharded`: a chain of equal linear layers, made on the ranks part by part, that
`fully_shard` spreads over gloo processes on this machine, against the same chain in one process.
Each measurement has processes of its own.  Weights are random.

glibc is told to give large blocks back as soon as they are freed, so that what is measured is what
is held: by default it keeps many of them for later, here up to three times the parameters.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import distributed, multiprocessing, nn

import fxpath
from benchmarks.memory import peak_bytes
from benchmarks.timing import explained, options, positive, write_json

__all__ = ["main", "measured", "table"]

#: What is asked of a model; the result stays alive, and its scores or masks are part of the cost.
SUBJECTS: dict[str, Callable[[nn.Module], object]] = {
    "norm": fxpath.path_norm,
    "analyze": fxpath.analyze,
    "prune": lambda model: fxpath.prune(model, 0.4),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("sharded", __doc__.split("\n")[0], repeats=None)
    parser.add_argument("--ranks", nargs="+", type=positive, default=(1, 2, 4), metavar="N")
    parser.add_argument("--layers", type=positive, default=20, metavar="N")
    parser.add_argument("--width", type=positive, default=2048, metavar="N")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=tuple(SUBJECTS))
    arguments = parser.parse_args(argv)
    with explained(parser):
        rows = [
            measured(subject, ranks, arguments.layers, arguments.width)
            for subject in arguments.subjects
            for ranks in arguments.ranks
        ]
    print(f"{table(rows)}\n")
    write_json(arguments.json, rows)
    return 0


def measured(subject: str, ranks: int, layers: int, width: int) -> dict[str, Any]:
    """One measurement, on one rank without any sharding.

    Args:
        subject: a key of ``SUBJECTS``.
        ranks: processes.
        layers: of the chain.
        width: features of each of them.

    Returns:
        Bytes: of all parameters and of one layer, and the most that a rank takes beside its part.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, subject, layers, width, folder)
        # Read by processes when they start.
        with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}):
            multiprocessing.spawn(_rank, given, ranks)  # type: ignore[no-untyped-call]
        found = [int((Path(folder) / f"{rank}").read_text()) for rank in range(ranks)]
    layer = 4 * width * width
    return {
        "subject": subject,
        "ranks": ranks,
        "parameter_bytes": layers * layer,
        "layer_bytes": layer,
        "extra_bytes": max(found),
        "extra_multiple": max(found) / (layers * layer),
        "extra_layers": max(found) / layer,
    }


def _rank(rank: int, ranks: int, subject: str, layers: int, width: int, folder: str) -> None:
    """What one process does; the bytes that it took go into a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    run = SUBJECTS[subject]
    # What is loaded and set up at the first run is no part of a model's cost.
    run(_chain(2, 8, ranks))
    model = _chain(layers, width, ranks)
    before = peak_bytes()
    result = run(model)
    extra = peak_bytes() - before
    del result
    (Path(folder) / f"{rank}").write_text(str(extra))
    distributed.barrier()
    distributed.destroy_process_group()


def _chain(layers: int, width: int, ranks: int) -> nn.Module:
    """A chain of which no process ever holds more than its part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        parts = [(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(layers)]
        model = nn.Sequential(*(part for pair in parts for part in pair))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer, _ in parts:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, width**-0.5)
    return model


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows."""
    lines = [
        [
            row["subject"],
            row["ranks"],
            f"{row['parameter_bytes'] / 1e6:.0f}",
            f"{row['parameter_bytes'] / row['ranks'] / 1e6:.0f}",
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['extra_multiple']:.2f}",
            f"{row['extra_layers']:.1f}",
        ]
        for row in rows
    ]
    headers = ["", "ranks", "parameters (MB)", "a rank's part (MB)", "peak beside it (MB)"]
    headers += ["peak / parameters", "peak / layer"]
    return tabulate(lines, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
