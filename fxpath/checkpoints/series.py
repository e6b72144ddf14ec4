"""Rows of a table of checkpoints, one file at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fxpath.checkpoints.comparison import Row
from fxpath.checkpoints.reading import Checkpoint, Refused, read, setting
from fxpath.pairs.common import Apart, CommonPart, Effective

#: Changes that a row has.
CHANGES = 5

_NOTHING = {"metric": 0.0, "relative": 0.0, "kind": "exact", "bound": 0.0}


class Series:
    """A list of files of one captured model.

    At most three of them are in memory: the reference, the one that is looked at, and the one
    before it.

    Attributes:
        files: all of them.
        reference: the one that all are compared with.
        setting: what tells rows of this series from those of another one.
        refused: file -> why it was refused, of those that were tried.
    """

    def __init__(
        self, common: CommonPart, files: Sequence[str], reference: str, radius: float
    ) -> None:
        """Read the reference.

        Raises:
            Refused: if the reference is no checkpoint of the model.
        """
        self.common, self.files, self.radius = common, files, radius
        self.refused: dict[str, str] = {}
        self.reference = read(common, reference)
        self.setting = setting(common, f"{reference} {self.reference.stamp}", radius)
        self._last: Checkpoint | None = None
        self._spare: Effective | None = None

    def rows(self, positions: Iterable[int]) -> Iterator[tuple[int, Row | None]]:
        """Position and row of some files; ``None`` for one that is refused."""
        for position in positions:
            if self.files[position] in self.refused:
                yield position, None
                continue
            before = self._before(position)
            now = self._read_file(self.files[position])
            if now is None:
                yield position, None
                continue
            row = self._row(now, before)
            self._give_back(self._last, but=now)
            self._last = now
            yield position, row

    def _before(self, position: int) -> Checkpoint | None:
        """The closest file before that is not refused; read again where it is not at hand."""
        for file in reversed(self.files[:position]):
            if file in self.refused:
                continue
            if self._last is not None and self._last.file == file:
                return self._last
            found = self._read_file(file)
            if found is not None:
                self._give_back(self._last, but=found)
                self._last = found
                return found
        return None

    def _read_file(self, file: str) -> Checkpoint | None:
        if file == self.reference.file:
            return self.reference
        spare, self._spare = self._spare, None
        try:
            return read(self.common, file, spare)
        except Refused as refusal:
            self.refused[file] = str(refusal)
            return None

    def _give_back(self, done: Checkpoint | None, but: Checkpoint) -> None:
        """Let the arrays of a file that is no longer needed be written over."""
        if done is not None and done is not but and done is not self.reference:
            self._spare = done.effective

    # -- one row ----------------------------------------------------------------------------------

    def _row(self, now: Checkpoint, before: Checkpoint | None) -> Row:
        row: Row = {"file": now.file, "log10_path_norm": now.effective.log10_path_norm}
        since: Apart | None = None
        if before is not None:
            since = self._apart(before, now, changes=True)
        if now is self.reference:
            told = dict(_NOTHING)
        elif before is self.reference and since is not None:
            told = _told(since)
        else:
            told = _told(self._apart(self.reference, now, changes=False))
        row |= {f"reference_{key}": value for key, value in told.items()}
        row["previous"] = None if before is None else before.file
        row |= {f"previous_{key}": value for key, value in _told(since).items()}
        changes = [] if since is None else _largest(since.changes)
        row["changed"], row["change"] = changes[0] if changes else (None, None)
        row["changes"] = "; ".join(f"{name} {part:.4g}" for name, part in changes) or None
        stamps = [now.stamp, *([] if before is None else [before.stamp])]
        return row | {"stamp": "-".join(stamps), "setting": self.setting}

    def _apart(self, first: Checkpoint, second: Checkpoint, changes: bool) -> Apart:
        return self.common.apart(first.effective, second.effective, self.radius, changes)


def _told(apart: Apart | None) -> dict[str, Any]:
    """The part of a row that is about one pair."""
    if apart is None:
        return dict.fromkeys(_NOTHING)
    kind = None if apart.metric is None else "exact" if apart.exact else "at most"
    return {
        "metric": apart.metric,
        "relative": apart.relative,
        "kind": kind,
        "bound": apart.bound,
    }


def _largest(changes: dict[str, float]) -> list[tuple[str, float]]:
    found = [item for item in changes.items() if item[1] > 0]
    return sorted(found, key=lambda item: -item[1])[:CHANGES]
