"""Tables and plot of `benchmarks.pruning_accuracy`, from the rows of its JSON file alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

__all__ = ["plot", "tables"]

Row = Mapping[str, Any]
Titles = Mapping[str, str]

#: Column of the rows -> what the table of it is called, and decimals.
COLUMNS = {
    "accuracy": ("test accuracy (%) after rewinding and finetuning", 1),
    "pruned": ("test accuracy (%) of the pruned network, not finetuned", 1),
    "recalibrated": ("the same, batch norm recalibrated (the certificate is void then)", 1),
    "lost": ("path-norm lost (%): the exact path-metric to the dense network", 2),
}
#: In a table, that both networks have the same masks.
SAME = "(*)"


def tables(rows: Sequence[Row], titles: Titles) -> str:
    """Mean and standard deviation over seeds, for each task and optimizer.

    Args:
        rows: as in the file.
        titles: names of tasks and methods -> what they are called.
    """
    parts = []
    for (task, optimizer), own in _grouped(rows, "task", "optimizer"):
        dense = {row["seed"]: row["dense"] for row in own}
        head = f"{titles[task]}, {optimizer}: dense {_spread(list(dense.values()), 1)} %"
        parts.append(f"{head}, {len(dense)} seeds")
        for key, (title, decimals) in COLUMNS.items():
            if all(row[key] is not None for row in own):
                parts.append(f"{title}\n{_table(own, titles, key, decimals)}")
    note = f"{SAME} with and without the random rescaling: the masks are the same"
    return "\n\n".join([*parts, note]) + "\n"


def _table(rows: Sequence[Row], titles: Titles, key: str, decimals: int) -> str:
    amounts = sorted({row["amount"] for row in rows})
    lines = []
    for (method, rescaled), own in _grouped(rows, "method", "rescaled"):
        if _reused(own):
            continue
        same = any(_reused(other) for other in _others(rows, method))
        suffix = f" {SAME}" if same else ", rescaled" if rescaled else ""
        line = [titles[method] + suffix]
        for amount in amounts:
            values = [row[key] for row in own if row["amount"] == amount]
            if key == "lost":
                values = [100 * value for value in values]
            line.append(_spread(values, decimals))
        lines.append(line)
    headers = ["pruned", *(f"{amount:.0%}" for amount in amounts)]
    align = ("left", *("right",) * len(amounts))
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def _reused(rows: Sequence[Row]) -> bool:
    """Whether these are copies of those without rescaling."""
    return all(row["reused"] for row in rows)


def _others(rows: Sequence[Row], method: str) -> Iterator[list[Row]]:
    return (own for (name, _), own in _grouped(rows, "method", "rescaled") if name == method)


def _spread(values: Sequence[float], decimals: int) -> str:
    """Mean, and the standard deviation of a sample where there are several."""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def _grouped(rows: Sequence[Row], *keys: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by some of their entries, in the order in which these are first met."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.items())


def plot(rows: Sequence[Row], titles: Titles, path: Path) -> None:
    """Accuracy after finetuning against the amount, one panel for each task and optimizer.

    Args:
        rows: as in the file.
        titles: names of tasks and methods -> what they are called.
        path: a PNG file.
    """
    across = list(dict.fromkeys(row["optimizer"] for row in rows))
    down = list(dict.fromkeys(row["task"] for row in rows))
    size = 1 + 5.5 * len(across), 1 + 4 * len(down)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(down), len(across), squeeze=False)
    for (task, optimizer), own in _grouped(rows, "task", "optimizer"):
        axes = panels[down.index(task), across.index(optimizer)]
        axes.set_title(f"{titles[task]}, {optimizer}")
        _draw(axes, own, titles)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
    print(f"plotted to {path}")


def _draw(axes: Axes, rows: Sequence[Row], titles: Titles) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for (method, rescaled), own in _grouped(rows, "method", "rescaled"):
        if _reused(own):
            continue
        amounts = sorted({row["amount"] for row in own})
        values = [[row["accuracy"] for row in own if row["amount"] == a] for a in amounts]
        axes.errorbar(
            # Towards 1 every weight counts: what is kept, on a logarithmic axis.
            [100 * (1 - amount) for amount in amounts],
            [statistics.fmean(v) for v in values],
            [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
            color=f"C{methods.index(method)}",
            linestyle=":" if rescaled else "-",
            marker="o",
            markersize=3,
            capsize=2,
            label=titles[method] + (", rescaled" if rescaled else ""),
        )
    kept = sorted({100 * (1 - row["amount"]) for row in rows})
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(kept, labels=[f"{value:.0f}" for value in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("weights kept (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
