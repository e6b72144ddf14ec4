"""What the benchmarks share: interleaved timing, a record of the environment, the command line."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxpath
from fxpath.capture.loading import UsageError, load_model

__all__ = [
    "CPU",
    "device",
    "environment",
    "explained",
    "fresh_process",
    "interleave",
    "load_module",
    "options",
    "positive",
    "synchronize",
    "write_json",
]

CPU = torch.device("cpu")


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    where: torch.device = CPU,
) -> dict[str, float]:
    """Median milliseconds of each case.

    The cases take turns, so that a slow spell of the machine meets all of them, and each finds the
    caches as another one left them.  Each runs once before the first turn, for what happens only
    once (compiling, allocating).

    Args:
        cases: name -> function without arguments; its result is dropped inside the timing.
        repeats: number of turns.
        where: what they run on; a run ends when all that was asked of it is done.

    Returns:
        Name -> median of the turns, in milliseconds.

    Example:
        >>> medians = interleave({"sleep": lambda: time.sleep(0.002), "nothing": lambda: None}, 3)
        >>> medians["sleep"] > medians["nothing"]
        True
    """
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        gc.collect()
        for name, case in cases.items():
            seconds[name].append(_seconds(case, where))
    return {name: 1e3 * statistics.median(turns) for name, turns in seconds.items()}


def _seconds(case: Callable[[], object], where: torch.device) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize(where)
        start = time.perf_counter()
        case()
        synchronize(where)
        return time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()


def synchronize(where: torch.device) -> None:
    """Wait for all that a device was asked to do; a CPU has done it."""
    if where.type != "cpu":
        torch.accelerator.synchronize(where)


def load_module(name: str) -> nn.Module:
    """A MODEL of the command line with random weights, in eval mode.

    Raises:
        UsageError: for an unknown name; for an exported program, which is no module.
    """
    model = load_model(name)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}: the benchmarks need a module, not an exported program")
    return model.eval()


def fresh_process(module: str, *arguments: str, **variables: str) -> list[float]:
    """Run a module that prints numbers, and return those of its last line.

    Args:
        module: qualified name; of this checkout, whatever the current directory.
        arguments: of its command line.
        variables: added to the environment.

    Raises:
        UsageError: if it fails; what went wrong is on standard error.
    """
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", module, *arguments]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
    result = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise UsageError(f"python -m {module} {' '.join(arguments)} failed")
    return [float(number) for number in result.stdout.splitlines()[-1].split()]


def environment() -> dict[str, Any]:
    """The machine and the software that numbers depend on; the load tells whether it was idle."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fxpath": fxpath.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the environment, and say where; nothing where no file was named."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), "rows": list(rows)}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def options(name: str, description: str, repeats: int | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have.

    Args:
        name: of the benchmark's module.
        description: shown by `--help`.
        repeats: default of `--repeats`; `None` for a benchmark that measures once.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the results there too (default: nowhere)",
    )
    if repeats is not None:
        parser.add_argument(
            "--repeats",
            type=positive,
            default=repeats,
            metavar="N",
            help="turns of which the medians are taken (default %(default)s)",
        )
    return parser


@contextlib.contextmanager
def explained(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what the user can put right into a line and exit code 2."""
    try:
        yield
    except UsageError as error:
        parser.error(str(error))


def positive(text: str) -> int:
    """A positive number on the command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def device(text: str) -> torch.device:
    """A device on the command line that is there."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).split("\n")[0]) from error
    return found
