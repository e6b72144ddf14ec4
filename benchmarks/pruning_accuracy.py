"""The paper's Table 4 and Figure 6 at the scale of a workstation: accuracy after pruning.

`python -m benchmarks.pruning_accuracy`.  Appendix D's procedure: train, keep the weights after the
first epochs, rescale at random or not, prune, rewind the kept weights to the early ones, finetune
with the mask frozen.  Criteria whose scores are invariant give the rescaled network the mask of the
original one.  That is asserted for every mask, entries aside whose scores are within rounding of
the threshold; as the same mask on the same early weights is the same training, it is done once.

Every mask is also applied without finetuning, with the batch norms' statistics as they were, and
recalibrated on the training examples.  Recalibration voids exactness: it changes effective weights
by more than setting some to zero, and the path-metric is then no difference of path-norms (7).

Each finished cell goes to the file of `--json` at once, and the next run goes on from there;
without one, only the tables that are printed are left.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import pruning_report as report
from benchmarks.pruning_cells import REWIND, Row, measure, prepare
from benchmarks.pruning_masks import METHODS
from benchmarks.stacked import OPTIMIZERS
from benchmarks.tasks import TASKS
from benchmarks.timing import environment, explained, options, positive
from fxpath.capture.loading import UsageError

__all__ = ["Results", "main", "titles"]

AMOUNTS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
QUICK_AMOUNTS = (0.4, 0.9)
SEEDS, QUICK_SEEDS = 5, 2
#: The numbers that the README gives.
KEPT = Path(__file__).parent / "results" / "pruning_accuracy.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("pruning_accuracy", __doc__.split("\n")[0], repeats=None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS)
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help=f"default {SEEDS}, or {QUICK_SEEDS}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="SGD alone, fewer amounts and seeds; minutes"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what the JSON file holds")
    parser.add_argument(
        "--table-only",
        action="store_true",
        help=f"tables and plot of the JSON file ({KEPT.name} by default), nothing run",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG file")
    arguments = parser.parse_args(argv)
    path: Path | None = arguments.json
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks.pruning_accuracy", *given])
    with explained(parser):
        if arguments.table_only:
            rows = Results.read(path or KEPT).rows
        else:
            amounts = QUICK_AMOUNTS if arguments.quick else AMOUNTS
            results = Results.open(path, _settings(amounts), command, arguments.fresh)
            seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
            optimizers = arguments.optimizers or list(OPTIMIZERS)[: 1 if arguments.quick else None]
            _sweep(results, arguments.tasks, optimizers, seeds, amounts)
            rows = results.rows
    print(report.tables(rows, titles()))
    if arguments.plot is not None:
        report.plot(rows, titles(), arguments.plot)
    return 0


def titles() -> dict[str, str]:
    """What tasks and methods are called in tables and plots."""
    return {name: item.title for name, item in (TASKS | METHODS).items()}


def _settings(amounts: Sequence[float]) -> dict[str, Any]:
    """All that numbers depend on and the command line can change, or a later version of this."""
    return {
        "amounts": list(amounts),
        "rewind": REWIND,
        "methods": {name: asdict(method) for name, method in METHODS.items()},
        "tasks": {n: {"epochs": t.epochs, "rates": t.rates} for n, t in TASKS.items()},
    }


# -- the sweep -------------------------------------------------------------------------------------


def _sweep(
    results: Results,
    tasks: Sequence[str],
    optimizers: Sequence[str],
    seeds: int,
    amounts: Sequence[float],
) -> None:
    """Every cell that the results do not have yet: one method on one trained network."""
    cells = [
        (task, optimizer, seed, method)
        for seed in range(seeds)
        for task in tasks
        for optimizer in optimizers
        for method in METHODS
    ]
    have = {tuple(row[key] for key in KEY) for row in results.rows}
    missing = [cell for cell in cells if cell not in have]
    progress = Progress(len(cells), len(missing))
    for task, optimizer, seed, method in missing:
        # The cells of one network come one after the other, and the last network is kept.
        start = time.process_time()
        trained = prepare(task, optimizer, seed)
        place: Row = {"task": task, "optimizer": optimizer, "seed": seed, "method": method}
        rows = [place | row for row in measure(trained, METHODS[method], amounts)]
        results.add(rows, time.process_time() - start)
        progress.advance()


class Progress:
    """A bar on standard error, with the time that is left."""

    def __init__(self, total: int, missing: int) -> None:
        self._total, self._missing = total, missing
        self._done = 0
        self._start = time.monotonic()

    def advance(self) -> None:
        """Another cell is done."""
        self._done += 1
        finished = self._total - self._missing + self._done
        left = (time.monotonic() - self._start) / self._done * (self._missing - self._done)
        bar = "#" * (30 * finished // self._total)
        end = "\n" if self._done == self._missing else ""
        text = f"\r[{bar:30}] {finished}/{self._total} cells, {left / 60:.1f} min left "
        print(text, end=end, file=sys.stderr, flush=True)


# -- the file --------------------------------------------------------------------------------------

#: What identifies a cell.
KEY = ("task", "optimizer", "seed", "method")


class Results:
    """The rows so far, kept in a file, if one is named, that is whole at every moment.

    Attributes:
        rows: as in the file.
    """

    def __init__(self, path: Path | None, content: dict[str, Any]) -> None:
        """By :meth:`open` or :meth:`read`."""
        self._path, self._content = path, content
        self.rows: list[Row] = content["rows"]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Those of a file.

        Raises:
            UsageError: if there is none.
        """
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def open(
        cls, path: Path | None, settings: Mapping[str, Any], command: str, fresh: bool
    ) -> Results:
        """Those of a file that is to be gone on with, or of none yet.

        Args:
            path: a JSON file; `None` keeps the rows in memory alone.
            settings: rows of other settings do not go into one file.
            command: for the record.
            fresh: whether what is there is forgotten.

        Raises:
            UsageError: if the file has other settings.
        """
        started = {"settings": settings, "cpu_seconds": 0.0, "rows": []}
        found = path is not None and path.is_file() and not fresh
        content = cls.read(path)._content if found else started
        # As JSON has them: a tuple is a list there.
        other = json.loads(json.dumps(settings))
        differing = [key for key in other if content["settings"].get(key) != other[key]]
        if content is not started and differing:
            raise UsageError(
                f"{path} has other {', '.join(differing)}: name another file with --json, or "
                "start anew with --fresh"
            )
        return cls(path, {"environment": environment(), "command": command} | content)

    def add(self, rows: Sequence[Row], cpu_seconds: float) -> None:
        """More rows: the file is replaced by a finished one, never half written."""
        self.rows.extend(rows)
        self._content["cpu_seconds"] += cpu_seconds
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(_json(self._content), encoding="utf-8")
        os.replace(part, self._path)


def _json(content: Mapping[str, Any]) -> str:
    """One row a line: some thousand of them are to be read in a diff."""
    rest = {key: value for key, value in content.items() if key != "rows"}
    rows = ",\n    ".join(json.dumps(row) for row in content["rows"])
    return json.dumps(rest, indent=2)[:-2] + f',\n  "rows": [\n    {rows}\n  ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
