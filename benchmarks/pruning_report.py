"""Tables and plot of `benchmarks.pruning_accuracy`, from the rows of its JSON file alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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
            if all(key in row for row in own):
                parts.append(f"{title}\n{_table(own, titles, key, decimals)}")
    note = f"{SAME} with and without the random rescaling: the masks are the same"
    return "\n\n".join([*parts, note]) + "\n"


def _table(rows: Sequence[Row], titles: Titles, key: str, decimals: int) -> str:
    scale = 100 if key == "lost" else 1
    lines = [
        [title, *(_spread([scale * v for v in values], decimals) for values in _columns(own, key))]
        for title, own in _titled(rows, titles)
    ]
    amounts = rows[0]["amounts"]
    headers = ["pruned", *(f"{amount:.0%}" for amount in amounts)]
    align = ("left", *("right",) * len(amounts))
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def _titled(rows: Sequence[Row], titles: Titles) -> list[tuple[str, list[Row]]]:
    """Rows by method and network, by what they are called."""
    suffixes = {"original": "", "rescaled": ", rescaled", "both": f" {SAME}"}
    return [
        (titles[method] + suffixes[network], own)
        for (method, network), own in _grouped(rows, "method", "network")
    ]


def _columns(rows: Sequence[Row], key: str) -> list[tuple[float, ...]]:
    """For each amount, the values of all seeds."""
    return list(zip(*(row[key] for row in rows), strict=True))


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
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2 * len(across))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
    print(f"plotted to {path}")


def _draw(axes: Axes, rows: Sequence[Row], titles: Titles) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    kept = [100 * (1 - amount) for amount in rows[0]["amounts"]]
    for title, own in _titled(rows, titles):
        columns = _columns(own, "accuracy")
        axes.errorbar(
            kept,
            [statistics.fmean(values) for values in columns],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns],
            color=f"C{methods.index(own[0]['method'])}",
            linestyle=":" if own[0]["network"] == "rescaled" else "-",
            marker="o",
            markersize=3,
            capsize=2,
            label=title,
        )
    # Differences lie where little is kept.
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(kept, labels=[f"{value:.0f}" for value in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("weights kept (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
