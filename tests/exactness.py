"""How far the package is from the float64 oracle on each of the 51 torchvision models.

Run ``python -m tests.exactness``, or with names of models to see only those.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from tabulate import tabulate

import fxpath
from tests.reference import reference
from tests.zoo import INPUTS, build

HEADERS = ("model", "input", "log10 path-norm", "error float32", "error float64")


def rows(names: Sequence[str]) -> Iterator[tuple[str, str, float, float, float]]:
    """Yield a row of the table for each model, with relative errors of the path-norm."""
    for name in names:
        model, shape = build(name), INPUTS[name]
        expected = reference(model, shape)
        single, double = (
            abs(fxpath.path_norm(model, shape, dtype=dtype) / expected.path_norm - 1)
            for dtype in (torch.float32, torch.float64)
        )
        yield name, " x ".join(map(str, shape)), expected.log10_path_norm, single, double


def main(names: Sequence[str]) -> int:
    """Print the table; return an exit code."""
    unknown = [name for name in names if name not in INPUTS]
    if unknown:
        print(f"not among the 51 models: {', '.join(unknown)}", file=sys.stderr)
        return 2
    table = list(rows(names or list(INPUTS)))
    print(tabulate(table, headers=HEADERS, floatfmt=("", "", ".3f", ".1e", ".1e")))
    worst = (max(row[column] for row in table) for column in (3, 4))
    print("\nlargest relative error: {:.1e} in float32, {:.1e} in float64".format(*worst))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
