"""Pictures by matplotlib, each drawn from plain data."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fxpath.report.plain import ending
from fxpath.report.table import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Axes", "analysis", "bounds", "checkpoints", "pruned"]

#: Colours of Okabe and Ito, which all kinds of sight tell apart.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"

#: Inches for a row, its label's size in points, and the letters that a label has room for.
ROW, POINTS, LETTERS = 0.19, 8, 34

#: Rows that a figure of checkpoints is as high as, names below it, and the letters of each.
STEPS, MOST, SHORT = 14, 24, 18


def analysis(report: Mapping[str, Any], dark: bool) -> list[Axes]:
    """The share and the quantiles of the scores of each layer, one row for each.

    Args:
        report: of :meth:`fxpath.Analysis.report`.
        dark: light lines on a dark ground.
    """
    rows = report["rows"]
    with _figure(len(rows), 2, dark) as axes:
        _label(axes[0], [row["layer"] for row in rows])
        places = range(len(rows))
        axes[0].barh(places, [row["share"] for row in rows], color=BLUE, height=0.7)
        axes[0].set_xlim(0, max([1.0, *(row["share"] for row in rows)]) * 1.02)
        axes[0].set_xlabel("share of the path mass that crosses the layer")
        axes[0].set_title(report["title"], loc="left", fontsize=9, parse_math=False)
        positive = [(i, row) for i, row in enumerate(rows) if row["p90"] > 0]
        floor = min((row["p10"] or row["p50"] or row["p90"] for _, row in positive), default=1.0)
        for i, row in positive:
            axes[1].plot([row["p10"] or floor, row["p90"]], [i, i], color=SKY, linewidth=4)
        seen = [(row["p50"], i) for i, row in positive if row["p50"] > 0]
        axes[1].plot([x for x, _ in seen], [y for _, y in seen], "o", color=ORANGE, markersize=4)
        if positive:
            axes[1].set_xscale("log")
        axes[1].set_xlabel("Path-Mag of a weight, as a share: 10 % to 90 %, and the median")
        return _done(axes)


def pruned(
    rows: Sequence[Mapping[str, Any]],
    sparsity: float,
    lost: float,
    dark: bool,
    norm: str = "path-norm",
    exact: bool = True,
) -> list[Axes]:
    """What is zero in each parameter, and what of the norm is lost by it.

    Args:
        rows: ``parameter``, ``zeros`` and ``lost`` (Path-Mag of what is cut) of each.
        sparsity: of all together.
        lost: the relative path-metric of all together, or what is lost at most.
        dark: light lines on a dark ground.
        norm: what the norm is called.
        exact: whether all together lose just that.
    """
    names = [*(row["parameter"] for row in rows), "all together"]
    colors = [BLUE] * len(rows) + [GREEN]
    with _figure(len(names), 2, dark) as axes:
        _label(axes[0], names)
        zeros = [*(row["zeros"] for row in rows), sparsity]
        axes[0].barh(range(len(names)), zeros, color=colors, height=0.7)
        axes[0].set_xlim(0, 1)
        axes[0].set_xlabel("part that is zero")
        losses = [*(row["lost"] for row in rows), lost]
        axes[1].barh(range(len(names)), losses, color=colors, height=0.7)
        axes[1].set_xlabel(f"part of the {norm} lost: at most by each" + ", exactly by all" * exact)
        if any(loss > 0 for loss in losses):
            # A layer of which nothing is lost has no bar.
            axes[1].set_xscale("log")
        most = "" if exact else "at most "
        axes[0].set_title(f"{sparsity:.1%} zeros, {most}{lost:.1%} of the {norm} lost", loc="left")
        return _done(axes)


def bounds(rows: Sequence[Mapping[str, Any]], title: str, dark: bool) -> list[Axes]:
    """Bounds beside each other, on a logarithmic scale; above them what a search found.

    Args:
        rows: ``inequality`` and ``bound`` of each.
        title: one line.
        dark: light lines on a dark ground.
    """
    with _figure(len(rows), 1, dark) as axes:
        _label(axes[0], [row["inequality"] for row in rows])
        colors = [GREEN if row["invariant"] is None else BLUE for row in rows]
        values = [row["bound"] for row in rows]
        axes[0].barh(range(len(rows)), values, color=colors, height=0.7)
        if any(value > 0 for value in values):
            axes[0].set_xscale("log")
        axes[0].set_xlabel("how far outputs can be apart")
        axes[0].set_title(textwrap.fill(title, 56), loc="left", parse_math=False)
        return _done(axes)


def checkpoints(rows: Sequence[Mapping[str, Any]], title: str, dark: bool) -> list[Axes]:
    """The path-norm, and the metrics as parts of it, checkpoint by checkpoint.

    Args:
        rows: of :class:`fxpath.Comparison`.
        title: one line.
        dark: light lines on a dark ground.
    """
    places = range(len(rows))
    with _figure(STEPS, 2, dark, shared=False) as axes:
        for each in axes:
            # As many names as there is room for.
            ticks = places[:: max(1, math.ceil(len(rows) / MOST))]
            names = [ending(shown(rows[i]["file"], "text"), SHORT) for i in ticks]
            each.set_xticks(ticks, names, rotation=60, ha="right", parse_math=False)
            each.tick_params(axis="x", labelsize=POINTS)
            each.set_xlim(-0.5, max(1, len(rows)) - 0.5)
        norms = [row["log10_path_norm"] for row in rows]
        axes[0].plot(places, norms, "o-", color=BLUE, markersize=3)
        axes[0].set_ylabel("log10 of the path-norm")
        axes[0].set_title(textwrap.fill(title, 64), loc="left", parse_math=False)
        lines = {
            "reference": (ORANGE, "to the reference"),
            "previous": (GREEN, "to the one before"),
        }
        drawn = False
        for name, (color, told) in lines.items():
            # On a logarithmic scale there is no place for 0.
            values = [row[f"{name}_relative"] or math.nan for row in rows]
            axes[1].plot(places, values, "-", color=color, linewidth=1, label=told)
            for kind, marker in (("exact", "s"), ("at most", "v")):
                here = [i for i in places if rows[i][f"{name}_kind"] == kind]
                axes[1].plot(here, [values[i] for i in here], marker, color=color, markersize=4)
            drawn = drawn or any(0 < value < math.inf for value in values)
        if drawn:
            axes[1].set_yscale("log")
        axes[1].set_ylabel("path-metric, as a part of the path-norm")
        axes[1].set_title("squares: exact; triangles: at most", loc="left")
        axes[1].legend(frameon=False)
        return _done(axes, "y")


@contextlib.contextmanager
def _figure(rows: int, columns: int, dark: bool, shared: bool = True) -> Iterator[list[Axes]]:
    """A figure of as many rows as it takes for labels that can be read."""
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'torch-fxpath[report]'") from error
    ink, ground = ("#e8eaed", "#15191c") if dark else ("#1f2328", "#ffffff")
    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), ink),
        **dict.fromkeys(("xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), ground),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.titlesize": 9,
    }
    with matplotlib.rc_context(style):
        _, axes = pyplot.subplots(
            *(1, columns),
            sharey=shared,
            squeeze=False,
            figsize=(5.5 * columns, 1.3 + ROW * max(3, rows)),
            layout="constrained",
        )
        # The first figure of a session chooses a backend, which may be interactive (a notebook's):
        # that is not to be taken back with the style.
        interactive = matplotlib.is_interactive()
        yield list(axes[0])
    matplotlib.interactive(interactive)


def _label(axes: Axes, names: Sequence[str]) -> None:
    """One label for each row, the first one on top."""
    whole = [shown(name, "text") for name in names]
    short = [ending(name, LETTERS) for name in whole]
    axes.set_yticks(range(len(names)), short, fontsize=POINTS, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _done(axes: list[Axes], across: Literal["x", "y"] = "x") -> list[Axes]:
    for each in axes:
        each.grid(axis=across, alpha=0.25)
        each.set_axisbelow(True)
    return axes
