"""An analysis as a table, and as the plain data that pictures and pages are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxpath.gates import Gate, as_data, norm_name
from fxpath.program.findings import Finding
from fxpath.program.rows import QUANTILES, LayerRow
from fxpath.program.spread import Spread
from fxpath.report.plain import by_module
from fxpath.report.table import Column, Table

#: Columns of every table of an analysis.
COLUMNS = (
    Column("layer", "layer", "text", ""),
    Column("operation", "operation", "text", ""),
    Column("shape", "shape", "text", ""),
    Column("parameters", "params", "count", "weights and biases that have a score"),
    Column("zeros", "zeros", "part", "part of the weights that is zero"),
    Column(
        "share",
        "share",
        "part",
        "part of all path mass that crosses the layer, counted at each crossing",
    ),
    Column(
        "effective",
        "effective weights",
        "number",
        "over how many weights its mass is spread (exp of the entropy of their scores)",
        shown=False,
    ),
    Column(
        "effective_part",
        "spread",
        "part",
        "over which part of the weights its mass is spread: 100% where all scores are equal",
    ),
    Column("per_parameter", "per parameter", "number", "share divided by parameters", shown=False),
    Column("p10", "p10", "number", "a tenth of the weights have a smaller share", shown=False),
    Column("p50", "median", "number", "half of the weights have a smaller share of the path mass"),
    Column("p90", "p90", "number", "nine tenths of the weights have a smaller share", shown=False),
    Column("channels", "channels", "count", "output channels", shown=False),
    Column("dead_channels", "dead", "count", "output channels that no path crosses", shown=False),
)

#: Bins of a spread in one bar of a histogram: a power of two, so that all bars are equally wide.
BAR = 16

#: Points of the curve of sparsity against certificate.
POINTS = 200


def make_table(
    title: str,
    rows: Sequence[LayerRow],
    weights: Mapping[str, Spread],
    depth: int | None = None,
) -> Table:
    """One row for each layer, or for each module down to a depth.

    Raises:
        ValueError: if ``depth`` is below 1.
    """
    groups = by_module(rows, lambda row: row["name"], depth)
    columns: tuple[Column, ...] = COLUMNS
    if depth is not None:
        about = "how many of its layers path mass crosses on average"
        crossed = Column("share", "crossed", "number", about)
        columns = tuple(crossed if column.name == "share" else column for column in COLUMNS)
    return Table(title, columns, tuple(_row(n, g, weights) for n, g in groups.items()))


def _row(name: str, group: Sequence[LayerRow], weights: Mapping[str, Spread]) -> dict[str, Any]:
    """The values of one row; of several layers as if their weights were one tensor."""
    spreads = [weights[row["name"]] for row in group]
    entries = [spread.entries for spread in spreads]
    parameters = sum(row["parameters"] for row in group)
    share = sum(row["share"] for row in group)
    if len(group) == 1:
        operation, shape = group[0]["operation"], "x".join(map(str, group[0]["shape"]))
        effective, quantiles = group[0]["effective"], group[0]["quantiles"]
    else:
        spread = Spread.union(spreads)
        operation, shape, effective = f"{len(group)} layers", "", spread.effective
        quantiles = {f"{q:.0%}": spread.quantile(q) for q in QUANTILES}
    zeros = sum(row["sparsity"] * n for row, n in zip(group, entries, strict=True))
    return {
        "layer": name,
        "operation": operation,
        "shape": shape,
        "parameters": parameters,
        "zeros": zeros / max(1, sum(entries)),
        "share": share,
        "effective": effective,
        # Where all are equal, rounding must not make more of them.
        "effective_part": min(1.0, effective / max(1, sum(entries))),
        "per_parameter": share / max(1, parameters),
        **{f"p{q[:-1]}": value for q, value in quantiles.items()},
        "channels": sum(row["channels"] for row in group),
        "dead_channels": sum(row["dead_channels"] for row in group),
    }


def make_report(
    title: str,
    table: Table,
    summary: Sequence[tuple[str, str]],
    findings: Sequence[Finding],
    weights: Mapping[str, Spread],
    prunable: Sequence[str],
    unscored: Mapping[str, str],
    gates: Sequence[Gate],
    about_gates: str,
) -> dict[str, Any]:
    """All that a picture or a page shows, as plain data."""
    return {
        "title": title,
        "summary": [list(line) for line in summary],
        "findings": [{"kind": f.kind, "text": f.text, "layers": list(f.layers)} for f in findings],
        "columns": [
            {"name": c.name, "heading": c.heading, "kind": c.kind, "about": c.about}
            for c in table.columns
        ],
        "rows": [dict(row) for row in table.rows],
        "histograms": {name: histogram(spread) for name, spread in weights.items()},
        "weights": {name: [spread.entries, spread.total] for name, spread in weights.items()},
        "curve": curve([weights[name] for name in prunable]),
        "unscored": dict(unscored),
        "norm": norm_name(gates),
        "gates": as_data(gates),
        "about_gates": about_gates,
    }


def histogram(spread: Spread) -> dict[str, Any]:
    """Counts of shares by their decimal logarithm, and how many are 0."""
    edges, counts = spread.histogram(BAR)
    return {"edges": edges, "counts": counts, "zeros": spread.zeros}


def curve(weights: Sequence[Spread]) -> list[list[float]]:
    """Global pruning by Path-Mag in one shot: part of the weights gone, and what is lost at most.

    The loss is the sum of Path-Mag over what is cut, as a part of the path-norm: by (13) the
    path-metric is no larger.
    """
    if not weights:
        return []
    every = Spread.union(weights)
    total, last, found = every.total, -1.0, [[0.0, 0.0]]
    for part, mass in every.curve():
        if part - last >= 1 / POINTS or part == 1:
            last = part
            found.append([part, mass * total])
    return found if math.isfinite(total) else []
