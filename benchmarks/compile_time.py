"""Seconds from a model to its first compiled scores, in this process.

`benchmarks.criteria` runs it in fresh processes, with an empty and with a filled Inductor cache:
`python -m benchmarks.compile_time MODEL` prints one number.
"""

from __future__ import annotations

import sys
import time

import fxpath
from benchmarks.timing import load_module

__all__ = ["main"]


def main(name: str) -> None:
    """Print the seconds for a MODEL; importing and building it do not count."""
    model = load_module(name)
    start = time.perf_counter()
    fxpath.compile(model, backend="eager").scores()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
