"""What is known of many checkpoints: a row for each, and why others have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fxpath.report import plots
from fxpath.report.table import Column, Table, Tabular

if TYPE_CHECKING:
    from fxpath.report.plots import Axes

#: One row: column name -> value.
Row = dict[str, Any]


def _columns() -> tuple[Column, ...]:
    found = [
        Column("file", "file", "text", ""),
        Column(
            *("log10_path_norm", "log10", "number"),
            "decimal logarithm of the path-norm",
            digits=6,
        ),
    ]
    for name, short, other in (
        ("reference", "ref.", "the reference"),
        ("previous", "prev.", "the file before"),
    ):
        if name == "previous":
            about = "the file before, of those that were not refused"
            found.append(Column("previous", "previous", "text", about, shown=False))
        about = f"path-metric to {other}, or an upper bound of it"
        found += [
            Column(f"{name}_metric", f"metric to {short}", "number", about, shown=False),
            Column(
                *(f"{name}_relative", f"to {short}", "part"),
                f"the path-metric to {other}, as a part of the path-norm of that",
            ),
            Column(f"{name}_kind", "is", "text", ""),
            Column(
                *(f"{name}_bound", "outputs", "number"),
                f"how far outputs can be from those of {other} in the l^1 norm (Theorem 3.1)",
            ),
        ]
    found += [
        Column("changed", "changed most", "text", "what changed most since the file before"),
        Column(
            *("change", "by", "part"),
            "l^1 distance of its effective entries, as a part of the larger l^1 norm",
        ),
        Column("changes", "changes", "text", "the five largest of these changes", shown=False),
        Column("stamp", "stamp", "text", "tells one state of a file from another", shown=False),
        Column("setting", "setting", "text", "model, reference and options", shown=False),
    ]
    return tuple(found)


#: Columns of every table of checkpoints.
COLUMNS = _columns()


class Comparison(Tabular):
    """Many checkpoints of one model: a row for each, in their order.

    Attributes:
        rows: one for each file that was read, column name -> value, ``None`` where there is none;
            the columns are described in ``table().columns``.
        refused: file -> why it has no row.
        reference: the file that all others are compared with.
        radius: inputs are bounded by ``||x||_inf <= radius`` for the bounds of outputs.
    """

    def __init__(
        self, rows: Sequence[Row], refused: Mapping[str, str], reference: str, radius: float
    ) -> None:
        """Comparisons are made by :func:`fxpath.compare`."""
        self.rows = tuple(rows)
        self.refused = dict(refused)
        self.reference = reference
        self.radius = radius

    def table(self) -> Table:
        """The rows under described columns."""
        return Table(self._headline(), COLUMNS, self.rows)

    def _table(self, **options: Any) -> Table:
        return self.table(**options)

    def to_dict(self) -> dict[str, Any]:
        """All rows and refusals as plain data."""
        return {
            "reference": self.reference,
            "radius": self.radius,
            "rows": [dict(row) for row in self.rows],
            "refused": dict(self.refused),
        }

    def plot(self, *, dark: bool = False) -> list[Axes]:
        """Draw the path-norm, and the metrics as parts of it, checkpoint by checkpoint.

        Args:
            dark: light lines on a dark ground.

        Returns:
            The matplotlib axes, two.

        Raises:
            ImportError: if matplotlib is not installed; the extra ``report`` brings it.
        """
        return plots.checkpoints(self.rows, self._headline(), dark)

    def _headline(self) -> str:
        return f"{len(self.rows)} checkpoints, compared with {self.reference}"

    def __repr__(self) -> str:
        refused = f", {len(self.refused)} refused" if self.refused else ""
        return f"<Comparison: {self._headline()[:120]}{refused}>"

    def __str__(self) -> str:
        text = f"{self._headline()}\n\n{self.table()}"
        return "\n".join([text, *(f"refused: {reason}" for reason in self.refused.values())])
