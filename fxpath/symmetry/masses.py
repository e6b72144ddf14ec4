"""Entries of theta summed by the pair of channel groups that each lies between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated
from fxpath.symmetry.balancing import Masses
from fxpath.symmetry.groups import ChannelGroups
from fxpath.symmetry.labels import compressed

#: Entries that are looked at in one go.
CHUNK = 1 << 22
#: Binary exponents of numbers whose squares float64 adds without loss.
BAND = 400


@dataclass(frozen=True)
class Ends:
    """Groups at the ends of the entries of one array.

    ``out`` and ``into`` have its number of axes and broadcast to it; -1 marks unread entries.
    """

    out: Tensor
    into: Tensor

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Those of some positions on the first axis."""
        out, into = (ids if len(ids) == 1 else ids[start:stop] for ids in (self.out, self.into))
        return out, into


def coordinates(lifted: fx.GraphModule) -> list[fx.Node]:
    """All arrays of effective parameters, in order."""
    return [node for node in lifted.graph.nodes if node.target is ops.coordinate]


def ends_of(node: fx.Node, out: Tensor | None, into: Tensor | None) -> Ends:
    """Ends with the axes of an array, at least one; ``None`` stands for group 0."""
    axes = max(1, node.meta["val"].dim())

    def shown(ids: Tensor | None) -> Tensor:
        ids = torch.zeros(1, dtype=torch.int64) if ids is None else ids
        return compressed(ids.reshape(*[1] * (axes - ids.dim()), *ids.shape))

    return Ends(shown(out), shown(into))


def ends_by_group(
    lifted: fx.GraphModule, found: ChannelGroups, free: Tensor
) -> dict[fx.Node, Ends]:
    """Ends of all coordinates of a model; ``free`` is ``[groups]``, and the others are group 0."""
    of = torch.zeros(len(found) + 1, dtype=torch.int64)
    of[:-1] = torch.where(free, torch.arange(1, len(found) + 1), 0)
    ends = {}
    for node in coordinates(lifted):
        sides = found._entries.get(node, (None, None))
        ends[node] = ends_of(node, *(None if x is None else of[x] for x in sides))
    return ends


def squares(
    lifted: fx.GraphModule, live: Mapping[str, Tensor], ends: Mapping[fx.Node, Ends]
) -> Iterator[Masses]:
    """Sums of squares by pairs of groups, for each array of coordinates."""
    for node, value in evaluated(lifted, live, list(ends)):
        if value.numel():
            yield summed(str(arguments(node)[1]), value, ends[node])


def _bands(name: str, value: Tensor) -> range:
    """Which bands of binary exponents the entries are in."""
    least, largest = (float(each) for each in torch.aminmax(value))
    if not math.isfinite(least) or not math.isfinite(largest):
        raise ValueError(
            f"{name}: the effective value is NaN or infinite: look for a division by 0, or a "
            "variance that is not positive"
        )
    if value.dtype != torch.float64:
        return range(1)
    size = value.abs()
    largest = float(size.amax())
    if largest == 0:
        return range(1)
    least = float(torch.where(size == 0, torch.inf, size).amin())
    first, last = (round(math.frexp(x)[1] / BAND) for x in (least, largest))
    return range(first, last + 1)


def summed(name: str, value: Tensor, ends: Ends) -> Masses:
    """Add the squares of the entries of an array that have the same ends."""
    value = value.reshape(1) if value.dim() == 0 else value
    bands = _bands(name, value)
    classes = [_classes(ends, axis, value.device) for axis in range(value.dim())]
    log: Tensor | None = None
    for band in bands:
        total = _added(value, classes, band, len(bands) > 1).cpu().log()
        total += 2 * band * BAND * math.log(2)
        log = total if log is None else torch.logaddexp(log, total)
    assert log is not None
    out, into = ends.out, ends.into
    for axis, (_, places) in enumerate(classes):
        out, into = (x if x.shape[axis] == 1 else x.index_select(axis, places) for x in (out, into))
    if bool((out < 0).any()):
        log = torch.where(out < 0, -torch.inf, log)
        out, into = out.clamp(min=0), into.clamp(min=0)
    rows = [axis for axis in range(log.dim()) if out.shape[axis] > 1]
    columns = [axis for axis in range(log.dim()) if axis not in rows]
    if len(rows) == log.dim() or any(into.shape[axis] > 1 for axis in rows):
        edges = (log, out.expand(log.shape), into.expand(log.shape))
        return Masses(*(each.reshape(-1, 1) for each in edges))
    matrix = log.permute(*rows, *columns).reshape(out.numel(), into.numel())
    if 1 in matrix.shape:
        ends_ = (each.reshape(-1, 1).expand(matrix.numel(), 1) for each in (out, into))
        return Masses(matrix.reshape(-1, 1), *ends_)
    return Masses(matrix, out.reshape(-1, 1), into.reshape(1, -1))


def _classes(ends: Ends, axis: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Number of the class of each position on an axis, and a position of each class.

    Positions of one class have the same ends; ``None`` where all have.
    """
    which: Tensor | None = None
    for ids in (ends.out, ends.into):
        if ids.shape[axis] > 1:
            lines = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
            found = (
                torch.unique(lines[:, 0], return_inverse=True)[1]
                if lines.shape[1] == 1
                else torch.unique(lines, dim=0, return_inverse=True)[1]
            )
            which = found if which is None else which * len(lines) + found
    if which is None:
        return None, torch.zeros(1, dtype=torch.int64)
    kinds, which = torch.unique(which, return_inverse=True)
    places = torch.empty(len(kinds), dtype=torch.int64)
    places[which] = torch.arange(len(which))
    return which.to(device), places


def _added(
    value: Tensor, classes: list[tuple[Tensor | None, Tensor]], band: int, alone: bool
) -> Tensor:
    """Sums of squares by classes; with ``alone`` those of one band of exponents only."""
    total = torch.zeros(
        [len(places) for _, places in classes], dtype=torch.float64, device=value.device
    )
    for start, stop in chunks(value):
        size = value[start:stop].double()
        if alone:
            exponent = (torch.frexp(size)[1] / BAND).round()
            # In two steps: the power alone may be beyond float64.
            half = 2.0 ** (-band * BAND // 2)
            size = torch.where(exponent == band, size * half * half, 0.0)
        square = size.square()
        for axis in range(1, value.dim()):
            which, places = classes[axis]
            if which is None:
                square = square.sum(axis, keepdim=True)
            elif len(places) < len(which):
                shape = [len(places) if d == axis else n for d, n in enumerate(square.shape)]
                square = square.new_zeros(shape).index_add_(axis, which, square)
            else:
                square = square.index_select(axis, places.to(square.device))
        which, places = classes[0]
        if which is None:
            total += square.sum(0, keepdim=True)
        else:
            total.index_add_(0, which[start:stop], square)
    return total


def chunks(value: Tensor) -> Iterator[tuple[int, int]]:
    """Parts of the first axis."""
    step = max(1, CHUNK * len(value) // max(1, value.numel()))
    for start in range(0, len(value), step):
        yield start, min(start + step, len(value))
