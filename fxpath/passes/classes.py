"""Which positions along an axis are equal, and in which of two senses.

*Reachable*: two positions hold the same value for every theta.  *Observable*: the path-norm depends
on them in the same way.  Both are found by labels, axis by axis: forward from the inputs, which
have one class, and backward from the path-norm, which sums everything.

A label is what a position reads (or is read by): one column for each tap, that says which classes,
with which sums of coefficients.  Columns are arrays of integers, and equal rows of them are equal
labels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.exact import Rows, exact_sums, numbered
from fxpath.graph.links import Link, Taps, extents, links, on_paths, seen_through, static
from fxpath.graph.schema import bias_of
from fxpath.graph.stencil import Stencil

#: What a node reads: each argument, with the axes that are read through stencils.
Reads = Sequence[tuple[fx.Node, Sequence[Link]]]

#: Stencils that end (or begin) at an axis, each with the classes at its other side.
Meetings = list[tuple[Taps, "Partition"]]

#: Labels in ``[0, count)``, their count, and the positions that have one, rising.
Labelled = tuple[Tensor, int, Tensor]
Column = Callable[[Stencil, "Partition"], Labelled]

#: Up to this length axes are compared with all others.
SHORT = 1024


@dataclass(frozen=True, eq=False)
class Partition:
    """Positions of an axis by class; classes are numbered in the order in which they appear.

    Attributes:
        of: the class of each position; int64 ``[positions]``.
        representatives: the first position of each class; int64 ``[classes]``.
    """

    of: Tensor
    representatives: Tensor

    @classmethod
    def by(cls, keys: Tensor) -> Partition:
        """Put positions with equal keys (int64) into one class."""
        return cls(*numbered(keys))

    @classmethod
    def trivial(cls, size: int) -> Partition:
        """Every position for itself."""
        every = torch.arange(size)
        return cls(every, every)

    @classmethod
    def one(cls, size: int) -> Partition:
        """One class."""
        return cls(torch.zeros(size, dtype=torch.int64), torch.arange(min(size, 1)))

    @functools.cached_property
    def sizes(self) -> Tensor:
        """How many positions each class has; int64 ``[classes]``."""
        return torch.bincount(self.of, minlength=len(self))

    @functools.cached_property
    def represents(self) -> Tensor:
        """Whether each position is the representative of its class; bool ``[positions]``."""
        return torch.zeros(len(self.of), dtype=torch.bool).index_fill(0, self.representatives, True)

    @property
    def is_trivial(self) -> bool:
        """Whether no two positions are equal."""
        return len(self.representatives) == len(self.of)

    def __len__(self) -> int:
        return len(self.representatives)


@dataclass
class Classes:
    """Reachable and observable classes of every axis of every activation, for exponent ``q``."""

    q: float
    reads: dict[fx.Node, Reads] = field(default_factory=dict)
    reachable: dict[fx.Node, list[Partition]] = field(default_factory=dict)
    observable: dict[fx.Node, list[Partition]] = field(default_factory=dict)


def find_classes(graph: fx.Graph, q: float = 1.0) -> Classes:
    """Label all activations of a lifted graph."""
    found, label = Classes(q), _Labelling()
    counted = on_paths(graph)
    active = [
        n
        for n in graph.nodes
        if n.op == "call_function" and n in counted and not static(n) and seen_through(n) is n
    ]
    for node in active:
        found.reads[node] = [(seen_through(read), axes) for read, axes in links(node, q)]
        found.reachable[node] = _reachable(node, found, label)
    # How the positions of each axis are read; None where it is not through stencils.
    seen: dict[fx.Node, list[Meetings | None]] = {
        node: [[] for _ in extents(node)] for node in active
    }
    for node in reversed(active):
        sizes, fences = extents(node), _fences(node, found.reads[node])
        found.observable[node] = [
            label.trivial(n)
            if meetings is None or dim in fences
            else label.positions(n, meetings, _written)
            for dim, (n, meetings) in enumerate(zip(sizes, seen[node], strict=True))
        ]
        for argument, axes in found.reads[node]:
            linked = {link.source_dim: link for link in axes}
            for dim, meetings in enumerate(seen[argument]):
                link = linked.get(dim)
                if link is None or meetings is None:
                    seen[argument][dim] = None
                elif node.target is ops.total:
                    meetings.append((link.taps, label.one(extents(argument)[dim])))
                else:
                    meetings.append((link.taps, found.observable[node][link.dim]))
    return found


def _fences(node: fx.Node, reads: Reads) -> set[int]:
    """Axes of a result that its operation makes from others: they come out whole."""
    every = range(len(extents(node)))
    return {dim for _, axes in reads for dim in {*every} - {link.dim for link in axes}}


def _reachable(node: fx.Node, known: Classes, label: _Labelling) -> list[Partition]:
    sizes, reads = extents(node), known.reads[node]
    if node.target is ops.source:
        return [label.one(n) for n in sizes]
    if node.target is ops.total:
        return []
    whole = _bias_axes(node) | _fences(node, reads)
    meetings: list[Meetings] = [[] for _ in sizes]
    for argument, axes in reads:
        for link in axes:
            meetings[link.dim].append((link.taps, known.reachable[argument][link.source_dim]))
    return [
        label.trivial(n) if dim in whole or not reads else label.positions(n, meetings[dim], _read)
        for dim, n in enumerate(sizes)
    ]


def _bias_axes(node: fx.Node) -> set[int]:
    """Axes along which a bias differs from position to position."""
    bias = bias_of(node)
    if bias is None:
        return set()
    shape = extents(bias)
    offset = len(extents(node)) - len(shape)
    return {d + offset for d, n in enumerate(shape) if n > 1}


class _Labelling:
    """Finds partitions; what was found once for the same stencils and classes is not again."""

    def __init__(self) -> None:
        self._found: dict[Any, Partition] = {}
        self._equal: dict[tuple[int, ...], Partition] = {}
        self.trivial = functools.cache(Partition.trivial)
        self.one = functools.cache(Partition.one)

    def positions(self, size: int, meetings: Meetings, column: Column) -> Partition:
        """The classes of an axis whose positions differ by what they meet."""
        if not meetings:
            return self.one(size)
        first = meetings[0][1]
        if all(_plain(taps) and partition is first for taps, partition in meetings):
            return first
        key = (size, column, *meetings)
        if key not in self._found:
            rows = Rows(size)
            for taps, partition in meetings:
                for tap in taps:
                    rows.add(*column(tap, partition))
            self._found[key] = self._one_object(Partition.by(rows.keys))
        return self._found[key]

    def _one_object(self, partition: Partition) -> Partition:
        """Equal partitions of short axes as one, so that they are recognized."""
        if len(partition.of) > SHORT:
            return partition
        return self._equal.setdefault(tuple(partition.of.tolist()), partition)


def _plain(taps: Taps) -> bool:
    return len(taps) == 1 and taps[0].is_identity


def _read(tap: Stencil, below: Partition) -> Labelled:
    """What each output position reads through one tap, from axes with known classes."""
    return _column(tap, tap.row, below.of[tap.position], len(below))


def _written(tap: Stencil, above: Partition) -> Labelled:
    """How each input position is read through one tap, by axes with known classes."""
    return _column(tap, tap.position, above.of[tap.row], len(above))


def _column(tap: Stencil, at: Tensor, classes: Tensor, count: int) -> Labelled:
    """A label for each position that has entries: {class: sum of coefficients}, exactly.

    Positions of one class add up where no weights lie between them: within each tap.
    """
    code, table = tap.code, tap.table
    if not _rising(at):
        places, code, table = exact_sums(at * count + classes, code, table)
        at, classes = places // count, places % count
    label = classes * len(table) + code
    count *= len(table)
    if _rising(at):
        return label, count, at
    at, lengths = at.unique_consecutive(return_counts=True)
    ends, pieces = lengths.cumsum(0).tolist(), label.tolist()
    number: dict[tuple[int, ...], int] = {}
    labels = [
        number.setdefault(tuple(pieces[start:end]), len(number))
        for start, end in itertools.pairwise((0, *ends))
    ]
    return torch.tensor(labels, dtype=torch.int64), len(number), at


def _rising(at: Tensor) -> bool:
    return bool((at[1:] > at[:-1]).all())
