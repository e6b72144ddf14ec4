"""The verb: a row for each checkpoint of a list."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from fxpath.checkpoints.comparison import Comparison, Row
from fxpath.checkpoints.kept import Kept
from fxpath.checkpoints.ranks import Ranks
from fxpath.checkpoints.reading import Refused
from fxpath.checkpoints.series import Series
from fxpath.model import Given, Model, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.common import CommonPart
from fxpath.program.program import build

#: Told of each file when it is done: how many are, of how many, and which it was.
Progress = Callable[[int, int, str], None]


@plain_mode()
def compare(
    model: Model,
    checkpoints: Sequence[str | Path],
    input_shape: Shapes = None,
    *,
    reference: str | Path | None = None,
    radius: float = 1.0,
    csv: str | Path | None = None,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> Comparison:
    """Path-norms of many checkpoints of one model, and how far they are apart.

    The model is captured once.  Files are read one at a time; the reference, one file and the one
    before it are all that is in memory.  A row has the path-norm, and to the reference and to the
    file before the l^1 path-metric: exact where signs agree and one network dominates the other
    (7), elsewhere at most the sum of both path-norms less twice that of the common part, the bound
    ``"m"`` of :class:`~fxpath.PathMetric`, which changes when a network is rescaled.  The metric
    times ``max(radius, 1)`` bounds how far the l^1 norm of the outputs can change (Theorem 3.1);
    :func:`lipschitz_bound` finds smaller bounds of one pair, and takes longer.

    Args:
        model: as for :func:`analyze`; its own weights do not count.
        checkpoints: files of its weights, in the order to compare them: ``.safetensors``, the
            ``.index.json`` of sharded ones, or what ``torch.save`` wrote, of which nothing is
            executed.  A file that is named twice counts once.
        input_shape: as for :func:`analyze`.
        reference: the file that all are compared with; the first one by default.
        radius: bound of ``||x||_inf`` for the bounds of outputs, >= 0.
        csv: a file for the rows, written as they are made.  Rows that stand there already are not
            made again, if the files have the size and the time of change that they had, and model,
            reference and options are the same.
        progress: called after each file: how many are done, how many there are, and its name.
        group: processes of ``torch.distributed`` that share the list, with a backend for tensors
            on CPUs (gloo); each calls this with the same arguments.
        example_inputs: as for :func:`analyze`.
        example_kwargs: as for :func:`analyze`.
        batch_dim: as for :func:`analyze`.
        until: as for :func:`analyze`.
        outputs: as for :func:`analyze`.

    Returns:
        A :class:`~fxpath.Comparison`.  Files that do not hold exactly the model's tensors have no
        row, but the reason in ``refused``; the next one is compared with the one before them.  In a
        group rank 0 has all rows, and any other rank none.

    Raises:
        UnsupportedModelError: as :func:`analyze`.
        ValueError: for no checkpoints, a reference that is refused, a ``radius`` below 0, or a
            ``csv`` that holds another table or rows of another model, reference or options.
        RuntimeError: if a process of the group ended before all was done; what is in ``csv`` stays.

    Example:
        >>> import tempfile, torch, fxpath
        >>> model, folder = torch.nn.Linear(2, 1), tempfile.mkdtemp()
        >>> for step in range(3):
        ...     torch.save(model.state_dict(), f"{folder}/{step}.pt")
        ...     _ = model.weight.data.mul_(0.5)
        >>> found = fxpath.compare(model, [f"{folder}/{step}.pt" for step in range(3)])
        >>> [row["reference_kind"] for row in found.rows]
        ['exact', 'exact', 'exact']
    """
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius}: the bound of |x| must be a finite number >= 0")
    files = list(dict.fromkeys(os.fspath(each) for each in checkpoints))
    if not files:
        raise ValueError("no checkpoints: name files of weights")
    first = files[0] if reference is None else os.fspath(reference)
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    common = CommonPart(build(model, given))
    try:
        series = Series(common, files, first, float(radius))
    except Refused as refusal:
        raise ValueError(f"the reference is refused: {refusal}") from refusal
    ranks = Ranks(group)
    kept = Kept(Path(csv), files, series.setting) if csv is not None and not ranks.rank else None
    rows = dict(kept.rows) if kept is not None else {}
    told = _Told(rows, len(files), kept, progress)
    todo = ranks.told(lambda: [i for i, file in enumerate(files) if file not in rows])
    told.take(ranks.gathered(_made(series, todo)))
    if ranks.rank:
        return Comparison((), {}, first, radius)
    # A file that was refused in an earlier run, and is none now, stands before rows of that run.
    while stale := _stale(files, rows):
        told.take(_made(series, stale))
    found = [rows[file] for file in files if file in rows]
    if kept is not None:
        kept.write(found)
    refused = {file: told.refused[file] for file in files if file in told.refused}
    return Comparison(found, refused, first, radius)


#: A file, its row, or why there is none.
_Made = tuple[str, Row | None, str]


def _made(series: Series, todo: Sequence[int]) -> Iterator[_Made]:
    for position, row in series.rows(todo):
        file = series.files[position]
        yield file, row, series.refused.get(file, "")


class _Told:
    """Rows and refusals as they come in."""

    def __init__(
        self, rows: dict[str, Row], count: int, kept: Kept | None, progress: Progress | None
    ) -> None:
        self.rows, self.refused = rows, dict[str, str]()
        self._count, self._kept, self._progress = count, kept, progress

    def take(self, made: Iterator[_Made]) -> None:
        """Note what is made, and keep it on disk."""
        for file, row, reason in made:
            if row is None:
                self.refused[file] = reason
                self.rows.pop(file, None)
            else:
                self.rows[file] = row
                if self._kept is not None:
                    self._kept.add(row)
            if self._progress is not None:
                self._progress(len(self.rows) + len(self.refused), self._count, file)


def _stale(files: Sequence[str], rows: Mapping[str, Row]) -> list[int]:
    """Rows that are about another file before them than the one that has a row now."""
    found, before = [], None
    for position, file in enumerate(files):
        if file in rows:
            if rows[file]["previous"] != before:
                found.append(position)
            before = file
    return found
