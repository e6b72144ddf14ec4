"""Seconds that Inductor takes before a model's first compiled scores, in this process.

`benchmarks.criteria` runs it in fresh processes, with an empty and with a filled Inductor cache:
`python -m benchmarks.compile_time MODEL [DEVICE]` prints two numbers.
"""

from __future__ import annotations

import sys
import time

import fxpath
from benchmarks.timing import device, load_module, synchronize

__all__ = ["main"]


def main(name: str, place: str = "cpu") -> None:
    """Print seconds for a MODEL: of capture, which eager programs need too, and of compilation."""
    where = device(place)
    model = load_module(name).to(where)
    seconds = [time.perf_counter()]
    program = fxpath.compile(model, backend="inductor")
    seconds.append(time.perf_counter())
    program.scores()
    synchronize(where)
    seconds.append(time.perf_counter())
    print(*(end - start for start, end in zip(seconds[:-1], seconds[1:], strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
