"""How far the package is from the float64 oracle, and from itself, on 51 torchvision models.

Run ``python -m tests.exactness``, or with names of models to see only those.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fxpath.program.program import build as program
from tests.oracles.reference import reference
from tests.support.zoo import INPUTS, build

HEADERS = (
    *("model", "input", "log10 path-norm"),
    *("norm, float32", "norm, float64"),
    *("norm, reduced", "scores, reduced", "scores, float32"),
)

#: Shares below this are not compared: float32 ends at 1e-38.
FLOOR = 1e-30


def score_error(scores: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative error of any share."""
    assert scores.keys() == expected.keys()
    errors = [
        ((scores[name].double() - share).abs() / share.clamp(min=FLOOR)).amax().item()
        for name, share in expected.items()
    ]
    return max(errors)


def rows(names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield a row of the table for each model, all errors relative.

    The norms in both formats against the oracle; then the reduced program against the one at full
    resolution, both in float64; then the scores in float32 against those in float64.
    """
    for name in names:
        model, shape = build(name), INPUTS[name]
        expected = reference(model, shape)
        single, double, full = (
            program(model, shape, dtype=dtype, reduced=reduced)
            for dtype, reduced in (
                (torch.float32, True),
                (torch.float64, True),
                (torch.float64, False),
            )
        )
        scores = double.scores()
        yield (
            *(name, " x ".join(map(str, shape)), expected.log10_path_norm),
            *(abs(each.path_norm() / expected.path_norm - 1) for each in (single, double)),
            abs(double.path_norm() / full.path_norm() - 1),
            score_error(scores, full.scores()),
            score_error(single.scores(), scores),
        )


def main(names: Sequence[str]) -> int:
    """Print the table; return an exit code."""
    unknown = [name for name in names if name not in INPUTS]
    if unknown:
        print(f"not among the 51 models: {', '.join(unknown)}", file=sys.stderr)
        return 2
    table = list(rows(names or list(INPUTS)))
    print(tabulate(table, headers=HEADERS, floatfmt=("", "", ".3f", *(".1e",) * 5)))
    for column in range(3, len(HEADERS)):
        print(f"largest error, {HEADERS[column]}: {max(row[column] for row in table):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
