"""Tables as data: one description of the columns, and every form that people ask for."""

from __future__ import annotations

import csv
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tabulate import tabulate

from fxpath.report.plain import json_text, written

if TYPE_CHECKING:
    import pandas

#: How values of a column are shown: ``part`` is a share of 1 (as per cent), ``number`` any float.
Kind = Literal["text", "count", "part", "number"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: key of its values, and its name in a data frame and in CSV.
        heading: what stands above it for people.
        kind: ``"text"``, ``"count"``, ``"part"`` (a share of 1) or ``"number"``.
        about: what it means, one sentence without a full stop.
        digits: of a number where people read it.
        shown: whether it is in the text that ``print`` shows; files have every column.
    """

    name: str
    heading: str
    kind: Kind
    about: str
    digits: int = 3
    shown: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of plain values under described columns.

    Attributes:
        title: one line.
        columns: in order; the same for every result of a kind.
        rows: one mapping for each row, column name -> value; ``None`` where there is none.

    Example:
        >>> column = Column("zeros", "zeros", "part", "part of the entries that is zero")
        >>> table = Table("zeros by layer", (column,), ({"zeros": 0.25},))
        >>> print(table)
          zeros
        -------
          25.0%
        >>> table.to_csv().splitlines()
        ['zeros', '0.25']
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame with these columns, in numbers as they are.

        Raises:
            ImportError: if pandas is not installed; the extra ``report`` brings it.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "data frames need pandas: pip install 'torch-fxpath[report]'"
            ) from error
        names = [column.name for column in self.columns]
        return pandas.DataFrame([dict(row) for row in self.rows], columns=names)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Comma-separated values with a line of column names; numbers in full.

        Args:
            path: of a file to write as well.

        Returns:
            The text.
        """
        out = io.StringIO()
        names = [column.name for column in self.columns]
        # Left to itself, the writer does not quote a line end that is none of its own.
        texts = [value for row in self.rows for value in row.values() if isinstance(value, str)]
        foreign = any("\r" in text for text in texts)
        writer = csv.DictWriter(
            *(out, names),
            lineterminator="\n",
            quoting=csv.QUOTE_NONNUMERIC if foreign else csv.QUOTE_MINIMAL,
        )
        writer.writeheader()
        writer.writerows(self.rows)
        return written(out.getvalue(), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """A table in GitHub's Markdown, values as ``print`` shows them, every column.

        Args:
            path: of a file to write as well.

        Returns:
            The text.
        """
        return written(self._laid_out("github", self.columns) + "\n", path)

    def to_html(self) -> str:
        """A ``<table>``, values as ``print`` shows them."""
        return self._laid_out("html", [column for column in self.columns if column.shown])

    def legend(self) -> str:
        """What the shown columns mean, in one line."""
        about = [f"{c.heading}: {c.about}" for c in self.columns if c.shown and c.about]
        return "; ".join(about)

    def __repr__(self) -> str:
        return f"<Table: {self.title}, {len(self.rows)} rows>"

    def __str__(self) -> str:
        return self._laid_out("simple", [column for column in self.columns if column.shown])

    def _laid_out(self, form: str, columns: Sequence[Column]) -> str:
        cells = [[shown(row.get(c.name), c.kind, c.digits) for c in columns] for row in self.rows]
        if form == "github":
            cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        align = ["left" if column.kind == "text" else "right" for column in columns]
        headings = [column.heading for column in columns]
        return tabulate(
            cells, headers=headings, colalign=align, disable_numparse=True, tablefmt=form
        )


class Tabular(ABC):
    """A result that has a table, and its forms for other programs."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result as plain data for JSON; an infinite number becomes ``None``."""

    @abstractmethod
    def _table(self, **options: Any) -> Table:
        """What the public ``table`` of the class returns."""

    def to_pandas(self, **options: Any) -> pandas.DataFrame:
        """The table as a data frame, numbers in full.

        Args:
            options: as for ``table``.

        Raises:
            ImportError: if pandas is not installed; the extra ``report`` brings it.
        """
        return self._table(**options).to_pandas()

    def to_csv(self, path: str | Path | None = None, **options: Any) -> str:
        """The table as comma-separated values, numbers in full.

        Args:
            path: of a file to write as well.
            options: as for ``table``.
        """
        return self._table(**options).to_csv(path)

    def to_markdown(self, path: str | Path | None = None, **options: Any) -> str:
        """The table in Markdown, with every column.

        Args:
            path: of a file to write as well.
            options: as for ``table``.
        """
        return self._table(**options).to_markdown(path)

    def to_json(self, path: str | Path | None = None) -> str:
        """All of ``to_dict`` as JSON.

        Args:
            path: of a file to write as well.
        """
        return written(json_text(self.to_dict()), path)


def shown(value: Any, kind: Kind, digits: int = 3) -> str:
    """One value as people read it.

    Example:
        >>> shown(0.123, "part"), shown(12345, "count"), shown(1.5e-7, "number")
        ('12.3%', '12,345', '1.5e-07')
        >>> shown(7081.4, "number")
        '7,081'
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if kind == "part":
        return f"{value:.1%}"
    if kind == "count":
        return f"{value:,}"
    if kind != "number":
        # A line end or a terminal's code in a name would break what it stands in.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return f"{value:,.0f}" if digits == 3 and 1e3 <= value < 1e12 else f"{value:.{digits}g}"
