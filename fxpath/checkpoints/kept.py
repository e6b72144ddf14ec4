"""The table on disk: rows are added as they are made, and found again by a later run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fxpath.checkpoints.comparison import COLUMNS, Row
from fxpath.checkpoints.reading import Refused, stamp
from fxpath.report.table import Table

_NAMES = [column.name for column in COLUMNS]
_TEXTS = {column.name for column in COLUMNS if column.kind == "text"}
_ELSEWHERE = "name another file, or remove this one"


class Kept:
    """Rows of one series in a file of comma-separated values.

    Attributes:
        rows: file -> row, of those that hold for the files as they are now.
    """

    def __init__(self, path: Path, files: Sequence[str], setting: str) -> None:
        """Find the rows of an earlier run, if there was one.

        Raises:
            ValueError: if the file is another table, or one of another model, reference or options,
                or of checkpoints that are not in the list.
        """
        self.path = path
        found = _rows(path)
        if any(row["setting"] != setting for row in found):
            raise ValueError(
                f"{path}: holds rows of another model, reference or options, which do not belong "
                f"into one table with these: {_ELSEWHERE}"
            )
        unknown = sorted({str(row["file"]) for row in found} - set(files))
        if unknown:
            raise ValueError(
                f"{path}: holds rows of {', '.join(unknown[:4])}{', ...' * (len(unknown) > 4)}, "
                f"which are not in the list: name them too, or {_ELSEWHERE}"
            )
        self.rows: dict[str, Row] = {}
        for row in found:
            if _holds(row):
                self.rows[row["file"]] = row
        # Without what an interrupted run left half written, and rows of files that have changed.
        self.write(list(self.rows.values()))

    def add(self, row: Row) -> None:
        """Write a row at the end, so that nothing is lost if the process ends now."""
        self.rows[row["file"]] = row
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_text([row], header=False))
            file.flush()

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the whole table at once."""
        beside = self.path.with_name(f"{self.path.name}.part")
        beside.write_text(_text(rows), encoding="utf-8", newline="")
        os.replace(beside, self.path)


def _text(rows: Sequence[Row], header: bool = True) -> str:
    text = Table("", COLUMNS, tuple(rows)).to_csv()
    return text if header else text[text.index("\n") + 1 :]


def _rows(path: Path) -> list[Row]:
    """What an earlier run left; its last line may be torn."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole, newline="")))
    if (not lines and text and not _text([]).startswith(text)) or (lines and lines[0] != _NAMES):
        raise ValueError(f"{path}: holds another table: {_ELSEWHERE}")
    cells = lines[1:]
    if cells and len(cells[-1]) != len(_NAMES):
        cells.pop()  # a line that was torn within a quoted name
    if any(len(each) != len(_NAMES) for each in cells):
        raise ValueError(f"{path}: has rows of another length than its columns: {_ELSEWHERE}")
    try:
        return [_read(dict(zip(_NAMES, each, strict=True))) for each in cells]
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {_ELSEWHERE}") from error


def _read(cells: Mapping[str, str]) -> Row:
    return {
        name: None if cell == "" else cell if name in _TEXTS else float(cell)
        for name, cell in cells.items()
    }


def _holds(row: Row) -> bool:
    """Whether the file of a row, and the one before it, are still what they were."""
    files = [row["file"], *([] if row["previous"] is None else [row["previous"]])]
    try:
        return "-".join(map(stamp, files)) == row["stamp"]
    except Refused:
        return False
