"""What removed channels save: parameters, multiply-adds and milliseconds of a forward pass.

`python -m benchmarks.channels`.  Weights are random.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate

import fxpath
from benchmarks.timing import explained, interleave, load_module, options, write_json
from fxpath.capture.shapes import infer_input_shape

__all__ = ["main", "measure", "table"]

MODELS = ("resnet50", "mobilenet_v2")
AMOUNT = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("channels", __doc__.split("\n")[0], repeats=15)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="MODEL", help="as for fxpath analyze"
    )
    parser.add_argument(
        "--amount",
        type=float,
        default=AMOUNT,
        metavar="SHARE",
        help="of the removable channels (default %(default)s)",
    )
    arguments = parser.parse_args(argv)
    rows = []
    with explained(parser):
        for name in arguments.models:
            rows.append(measure(name, arguments.amount, arguments.repeats))
    print(table(rows))
    write_json(arguments.json, rows)
    return 0


def measure(name: str, amount: float, repeats: int) -> dict[str, Any]:
    """One row.

    Args:
        name: a MODEL, as on fxpath's command line.
        amount: share of the removable channels that go.
        repeats: turns of which the medians are taken.
    """
    model = load_module(name)
    shape = tuple(infer_input_shape(model))
    result = fxpath.prune_channels(model, amount, shape)
    image = torch.randn(1, *shape)
    with torch.no_grad():
        times = interleave(
            {"before_ms": lambda: model(image), "after_ms": lambda: result.model(image)}, repeats
        )
    pairs = {"parameters": result.parameters, "macs": result.macs}
    sizes = {
        f"{what}_{when}": n
        for what, pair in pairs.items()
        for when, n in zip(WHEN, pair, strict=True)
    }
    lost = result.certificate.relative_upper
    return {"model": name, "amount": amount, **sizes, **times, "path_norm_lost": lost}


WHEN = ("before", "after")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All models in one table."""
    lines = [
        [
            row["model"],
            *(f"{row[f'parameters_{when}'] / 1e6:.2f}" for when in WHEN),
            *(f"{row[f'macs_{when}'] / 1e9:.3f}" for when in WHEN),
            *(f"{row[f'{when}_ms']:.1f}" for when in WHEN),
            f"{row['before_ms'] / row['after_ms']:.2f}",
        ]
        for row in rows
    ]
    headers = ["model", "M params", "left", "GMAC", "left", "ms", "now", "faster"]
    return tabulate(lines, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
