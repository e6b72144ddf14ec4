"""The representative of least l^2 norm among all rescalings of a network.

Every entry w of the effective parameters, from a channel of group j to one of group i, becomes
``w exp(a_i - a_j)``, and a bias ``b exp(a_i)``; :mod:`fxpath.symmetry.balancing` finds the a of the
least sum of squares.  The weights are summed once, into one number for each pair of groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated
from fxpath.model import Captured
from fxpath.program.evaluation import fitted
from fxpath.symmetry.balancing import Balance, Masses, balance, bounded
from fxpath.symmetry.effective import EffectiveLabelling
from fxpath.symmetry.groups import ChannelGroups
from fxpath.symmetry.labels import FIXED, compressed

#: Entries that are looked at in one go.
CHUNK = 1 << 22
#: Binary exponents of numbers whose squares float64 adds without loss.
BAND = 400


@dataclass(frozen=True)
class _Ends:
    """Groups at the ends of the entries of one array.

    ``out`` and ``into`` have its number of axes and broadcast to it; -1 marks unread entries.
    """

    out: Tensor
    into: Tensor

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Those of some positions on the first axis."""
        out, into = (ids if len(ids) == 1 else ids[start:stop] for ids in (self.out, self.into))
        return out, into


class Canonical:
    """Sizes of all entries of theta at the representative of least norm.

    What depends on the lifted graph alone is found once; the weights may change between calls.
    """

    def __init__(self, captured: Captured, lifted: fx.GraphModule) -> None:
        """Label the network."""
        self.captured, self.lifted = captured, lifted
        labelling = EffectiveLabelling(captured, lifted)
        roots = labelling.forest.roots()
        stays = roots == FIXED
        for labels in labelling.rigid:
            stays[roots[labels[labels >= 0]]] = True
        stays = stays[roots]
        free, numbers = torch.unique(roots[~stays], return_inverse=True)
        # -1, the last place of the table, is for what nothing reads.
        of = torch.zeros(len(roots) + 1, dtype=torch.int64)
        of[:-1][~stays] = 1 + numbers
        of[-1] = -1
        self._groups = 1 + len(free)
        self._ends: dict[fx.Node, _Ends] = {}
        for node in _coordinates(lifted):
            carried = labelling.entries.get(node)
            sides = (None, None) if carried is None else (carried.out, carried.into)
            self._ends[node] = _of(node, *(None if x is None else of[x] for x in sides))

    def scores(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Coordinate name -> sizes, in ``dtype``, or in float64 where it does not hold them.

        Raises:
            ValueError: for an effective value that is no number, by name.
            FloatingPointError: if float64 does not suffice.
        """
        live = self.captured.live()
        found = balance(list(_masses(self.lifted, live, self._ends)), self._groups)
        scores: dict[str, Tensor] = {}
        for node, value in evaluated(self.lifted, live, list(self._ends)):
            name = str(arguments(node)[1])
            score = _sizes(value, self._ends[node], found, dtype)
            if name in scores:  # one parameter that two batch norms make two arrays of
                score = fitted(torch.hypot(scores[name].double(), score.double()), dtype)
            scores[name] = score
        return scores


def least_norm_factors(captured: Captured, lifted: fx.GraphModule, found: ChannelGroups) -> Tensor:
    """Factors of channel groups for which the effective parameters have the least l^2 norm.

    Where no factors attain the minimum (channels that no input reaches, or that reach no output),
    they stay 1 but for what keeps the norm from growing.

    Returns:
        Tensor ``[groups]`` float64; 0 or inf where float64 does not hold a factor.

    Raises:
        ValueError: for an effective value that is no number, by name.
        FloatingPointError: if float64 does not suffice.
    """
    of = torch.zeros(len(found) + 1, dtype=torch.int64)
    for number, group in enumerate(found.groups):
        of[number] = number + 1 if group.rescalable else 0
    ends = {}
    for node in _coordinates(lifted):
        sides = found._entries.get(node, (None, None))
        ends[node] = _of(node, *(None if x is None else of[x] for x in sides))
    masses = list(_masses(lifted, captured.live(), ends))
    return bounded(masses, balance(masses, len(of)))[1:].exp()


def _coordinates(lifted: fx.GraphModule) -> list[fx.Node]:
    return [node for node in lifted.graph.nodes if node.target is ops.coordinate]


def _of(node: fx.Node, out: Tensor | None, into: Tensor | None) -> _Ends:
    """Ends with the axes of an array, at least one; ``None`` stands for group 0."""
    axes = max(1, node.meta["val"].dim())

    def shown(ids: Tensor | None) -> Tensor:
        ids = torch.zeros(1, dtype=torch.int64) if ids is None else ids
        return compressed(ids.reshape(*[1] * (axes - ids.dim()), *ids.shape))

    return _Ends(shown(out), shown(into))


# -- from weights to masses ------------------------------------------------------------------------


def _masses(
    lifted: fx.GraphModule, live: Mapping[str, Tensor], ends: Mapping[fx.Node, _Ends]
) -> Iterator[Masses]:
    """Sums of squares by pairs of groups, for each array of coordinates."""
    for node, value in evaluated(lifted, live, list(ends)):
        if value.numel():
            value = value.reshape(1) if value.dim() == 0 else value
            bands = _bands(str(arguments(node)[1]), value)
            yield _summed(value, ends[node], bands)


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


def _summed(value: Tensor, ends: _Ends, bands: range) -> Masses:
    """Add the squares of entries with the same ends."""
    classes = [_classes(ends, axis, value.device) for axis in range(value.dim())]
    log: Tensor | None = None
    for band in bands:
        total = _squares(value, classes, band, len(bands) > 1).cpu().log()
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


def _classes(ends: _Ends, axis: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
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


def _squares(
    value: Tensor, classes: list[tuple[Tensor | None, Tensor]], band: int, alone: bool
) -> Tensor:
    """Sums of squares by classes; with ``alone`` those of one band of exponents only."""
    total = torch.zeros(
        [len(places) for _, places in classes], dtype=torch.float64, device=value.device
    )
    for start, stop in _chunks(value):
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


def _chunks(value: Tensor) -> Iterator[tuple[int, int]]:
    """Parts of the first axis."""
    step = max(1, CHUNK * len(value) // max(1, value.numel()))
    for start in range(0, len(value), step):
        yield start, min(start + step, len(value))


# -- from factors to scores ------------------------------------------------------------------------


def _sizes(value: Tensor, ends: _Ends, found: Balance, dtype: torch.dtype) -> Tensor:
    """``|w| exp(a_out - a_in)``, and 0 between two components."""
    rows = value.reshape(1) if value.dim() == 0 else value
    sizes = torch.empty(rows.shape, dtype=dtype, device=value.device)
    limits = torch.finfo(dtype)
    for start, stop in _chunks(rows):
        out, into = ends.rows(start, stop)
        # Half of the factor, twice: it may be beyond float64 where the product is not.
        half = ((found.logs[out] - found.logs[into]) / 2).exp()
        inner = (found.component[out] == found.component[into]) & (out >= 0)
        half = torch.where(inner, half, 0.0).to(value.device)
        size = rows[start:stop].abs().double() * half * half
        if dtype != torch.float64 and bool(
            (((size > 0) & (size < limits.tiny)) | (size > limits.max)).any()
        ):
            return _sizes(value, ends, found, torch.float64)
        if not bool(size.isfinite().all()):
            raise FloatingPointError("a size at the least norm does not fit into float64")
        sizes[start:stop] = size
    return sizes.reshape(value.shape)
