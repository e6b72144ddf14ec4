"""Which positions along an axis are equal, and in which of two senses.

*Reachable*: two positions hold the same value for every theta.  *Observable*: the path-norm depends
on them in the same way.  Both are found by labels, axis by axis: forward from the inputs, which
have one class, and backward from the path-norm, which sums everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch import fx

from fxpath import ops
from fxpath.passes.links import Link, extents, links, static
from fxpath.schema import arguments
from fxpath.stencil import Coefficient, Stencil

__all__ = ["Classes", "Partition", "find_classes"]


@dataclass(frozen=True)
class Partition:
    """Positions of an axis by class; classes are numbered in the order in which they appear."""

    of: tuple[int, ...]
    representatives: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def by(cls, labels: Iterable[Hashable]) -> Partition:
        """Put positions with equal labels into one class."""
        number: dict[Hashable, int] = {}
        of, first, sizes = [], [], []
        for position, label in enumerate(labels):
            if label not in number:
                number[label] = len(number)
                first.append(position)
                sizes.append(0)
            of.append(number[label])
            sizes[number[label]] += 1
        return cls(tuple(of), tuple(first), tuple(sizes))

    @classmethod
    def trivial(cls, size: int) -> Partition:
        """Every position for itself."""
        return cls(tuple(range(size)), tuple(range(size)), (1,) * size)

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
    reachable: dict[fx.Node, list[Partition]] = field(default_factory=dict)
    observable: dict[fx.Node, list[Partition]] = field(default_factory=dict)


def find_classes(graph: fx.Graph, q: float = 1.0) -> Classes:
    """Label all activations of a lifted graph."""
    found = Classes(q)
    active = [n for n in graph.nodes if n.op == "call_function" and not static(n)]
    for node in active:
        found.reachable[node] = _reachable(node, found)
    seen: dict[fx.Node, list[list[list[Hashable]] | None]] = {
        node: [[[] for _ in range(n)] for n in extents(node)] for node in active
    }
    for node in reversed(active):
        fences = _fences(node, q)
        found.observable[node] = [
            Partition.trivial(n)
            if labels is None or dim in fences
            else Partition.by(map(_multiset, labels))
            for dim, (n, labels) in enumerate(zip(extents(node), seen[node], strict=True))
        ]
        _observe(node, found.observable[node], seen, q)
    return found


def _fences(node: fx.Node, q: float) -> set[int]:
    """Axes of a result that its operation makes from others: they come out whole."""
    return {
        dim
        for _, axes in links(node, q)
        for dim in set(range(len(extents(node)))) - {link.dim for link in axes}
    }


def _multiset(labels: list[Hashable]) -> Hashable:
    if len(labels) == 1:
        return labels[0]
    return frozenset(Counter(labels).items())


def _reachable(node: fx.Node, known: Classes) -> list[Partition]:
    sizes = extents(node)
    if node.target is ops.source:
        return [Partition.by([0] * n) for n in sizes]
    if node.target is ops.total:
        return []
    labels: list[list[list[Hashable]] | None] = [[[] for _ in range(n)] for n in sizes]
    read = list(links(node, known.q))
    for index, (argument, axes) in enumerate(read):
        linked = {link.dim: link for link in axes}
        for dim in range(len(sizes)):
            link = linked.get(dim)
            here = labels[dim]
            if link is None or here is None:
                labels[dim] = None
                continue
            below = known.reachable[argument][link.source_dim].of
            for o, label in enumerate(_reads(link, below)):
                if label is not None:  # of a hundred pieces side by side each position reads one
                    here[o].append((index, label))
    bias = _bias_axes(node)
    return [
        Partition.trivial(n)
        if here is None or dim in bias or not read
        else Partition.by(map(tuple, here))
        for dim, (n, here) in enumerate(zip(sizes, labels, strict=True))
    ]


def _bias_axes(node: fx.Node) -> set[int]:
    """Axes along which a bias differs from position to position."""
    if node.target is not ops.shift:
        return set()
    shape = extents(arguments(node)[1])
    offset = len(extents(node)) - len(shape)
    return {d + offset for d, n in enumerate(shape) if n > 1}


def _reads(link: Link, below: tuple[int, ...]) -> list[Hashable]:
    """What each output position reads, ``None`` for nothing.

    Positions of one class add up where no weights lie between them: within each tap.
    """
    if len(link.taps) == 1 and link.taps[0].is_identity:
        return list(below)
    columns = [_column(tap, below) for tap in link.taps]
    if len(columns) == 1:
        return columns[0]
    return [tuple(column) for column in zip(*columns, strict=True)]


def _column(tap: Stencil, below: tuple[int, ...]) -> list[Hashable]:
    """What each output position reads through one tap."""
    if tap.picks is not None:
        return [None if p is None else below[p] for p in tap.picks]
    return [_sums(row, below) for row in tap.rows]


def _sums(row: Iterable[tuple[int, Coefficient]], of: tuple[int, ...]) -> Hashable:
    total: dict[int, Coefficient] = {}
    for position, c in row:
        total[of[position]] = total.get(of[position], 0) + c
    return frozenset(total.items())


def _observe(
    node: fx.Node,
    partitions: list[Partition],
    seen: dict[fx.Node, list[list[list[Hashable]] | None]],
    q: float,
) -> None:
    """Tell the arguments of an operation how their positions are read."""
    for index, (argument, axes) in enumerate(links(node, q)):
        linked = {link.source_dim: link for link in axes}
        for dim in range(len(extents(argument))):
            link, labels = linked.get(dim), seen[argument][dim]
            if link is None or labels is None:
                seen[argument][dim] = None
                continue
            of = partitions[link.dim].of if partitions else (0,) * extents(argument)[dim]
            if len(link.taps) == 1 and link.taps[0].is_identity:
                for position, label in enumerate(of):
                    labels[position].append((node, index, label))
                continue
            for k, tap in enumerate(link.taps):
                for position, reads in enumerate(_transposed(tap, of)):
                    # A position that no tap reads has the same (empty) label everywhere.
                    if reads:
                        labels[position].append((node, index, k, frozenset(reads.items())))


def _transposed(tap: Stencil, of: tuple[int, ...]) -> list[dict[int, Coefficient]]:
    """For each input position the coefficients with which output classes read it."""
    reads: list[dict[int, Coefficient]] = [{} for _ in range(tap.size)]
    for o, row in enumerate(tap.rows):
        for position, c in row:
            reads[position][of[o]] = reads[position].get(of[o], 0) + c
    return reads
