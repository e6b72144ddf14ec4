"""Operators of ATen in an exported program, and how often each stands there.

`python -m benchmarks.operators resnet18`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from tabulate import tabulate
from torch import nn

import fxpath
from benchmarks.timing import explained, load_module, options, write_json

__all__ = ["count", "main", "table"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("operators", __doc__.split("\n")[0], repeats=None)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as for fxpath analyze")
    parser.add_argument("--norm", action="store_true", help="of the path-norm, without scores")
    arguments = parser.parse_args(argv)
    rows = []
    with explained(parser):
        for name in arguments.models:
            counts = count(load_module(name), scores=not arguments.norm)
            rows.append({"model": name, "scores": not arguments.norm, "operators": counts})
            print(f"{table(name, counts)}\n", flush=True)
    write_json(arguments.json, rows)
    return 0


def count(
    model: nn.Module, shape: Sequence[int] | None = None, scores: bool = True
) -> Counter[str]:
    """Operators of a model's exported program, the most frequent first.

    Example:
        >>> found = count(nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()))
        >>> all(name.startswith("aten.") for name in found), found["aten.abs.default"]
        (True, 1)
    """
    exported = fxpath.compile(model, backend="eager").exported(scores=scores)
    nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
    return Counter(dict(Counter(str(node.target) for node in nodes).most_common()))


def table(name: str, counts: Counter[str]) -> str:
    """One model's operators."""
    lines = [*counts.items(), ("in all", counts.total())]
    return tabulate(lines, headers=[name, "times"])


if __name__ == "__main__":
    sys.exit(main())
