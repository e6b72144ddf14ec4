"""Two sets of weights for one network: checks, effective parameters, and what is common to both.

A *leaf* is a place where the lifted graph reads effective parameters (``ops.coordinate``) or fixed
numbers (``ops.coefficient``).  Both networks are evaluated leaf by leaf, so that only one layer of
each exists in float64 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.errors import module_path
from fxpath.graph import ops
from fxpath.graph.interpret import Interpretation
from fxpath.graph.schema import arguments
from fxpath.graph.static import evaluated
from fxpath.model import Captured
from fxpath.passes.setting import Setting
from fxpath.sharding import local, refuse_sharded, whole


@dataclass(frozen=True)
class Weights:
    """Absolute values at one leaf: theta, theta', and m, the smaller one where the signs agree.

    Attributes:
        first: ``|theta|``.
        second: ``|theta'|``; the same object as ``first`` where nothing differs.
        common: ``|m|``: min(|theta|, |theta'|) where theta * theta' >= 0, else 0.
        excess: ``|theta| - |m|``, formed entry by entry; ``None`` if it is zero everywhere.
        other_excess: ``|theta'| - |m|``, likewise.
        signs_agree: whether theta * theta' >= 0 everywhere.
    """

    first: Tensor
    second: Tensor
    common: Tensor
    excess: Tensor | None = None
    other_excess: Tensor | None = None
    signs_agree: bool = True

    @classmethod
    def equal(cls, value: Tensor) -> Weights:
        """The same absolute values on both sides."""
        return cls(value, value, value)

    @classmethod
    def erased(cls, first: Tensor, second: Tensor) -> Weights:
        """Effective parameters, and the same with some of them set to zero."""
        a, b = first.abs(), second.abs()
        return cls(a, b, b, excess=a - b)

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Weights:
        """Compare two arrays of effective parameters."""
        if first is second or torch.equal(first, second):
            return cls.equal(first.abs())
        opposite = ~agreement(first, second)
        a, b = first.abs(), second.abs()
        common = torch.minimum(a, b)
        agree = not bool(opposite.any())
        if not agree:
            common.masked_fill_(opposite, 0.0)
        return cls(a, b, common, _excess(a, common), _excess(b, common), agree)

    def times(self, other: Weights) -> Weights:
        """The product of two of them, entry by entry."""
        common = self.common * other.common
        return Weights(
            self.first * other.first,
            self.second * other.second,
            common,
            _added(_product(self.excess, other.first), _product(self.common, other.excess)),
            _added(
                _product(self.other_excess, other.second),
                _product(self.common, other.other_excess),
            ),
            self.signs_agree and other.signs_agree,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Apply a linear map with non-negative coefficients to every part."""
        done: dict[int, Tensor] = {}

        def once(value: Tensor) -> Tensor:
            if id(value) not in done:
                done[id(value)] = function(value)
            return done[id(value)]

        return Weights(
            once(self.first),
            once(self.second),
            once(self.common),
            None if self.excess is None else once(self.excess),
            None if self.other_excess is None else once(self.other_excess),
            self.signs_agree,
        )


def _excess(value: Tensor, common: Tensor) -> Tensor | None:
    excess = value - common
    return excess if bool(excess.any()) else None


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def same_entries(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever format."""
    return first.shape == second.shape and torch.equal(first, second)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Where theta * theta' >= 0, without forming a product that could underflow."""
    return ~(((first > 0) & (second < 0)) | ((first < 0) & (second > 0)))


@dataclass(frozen=True)
class Side:
    """One of the two networks: as captured, its lifted graph, its tensors, and leaves in order."""

    captured: Captured
    module: fx.GraphModule
    tensors: Mapping[str, Tensor]
    nodes: list[fx.Node]

    def value(self, leaf: int) -> Tensor:
        """The numbers that a leaf reads, with their signs, in float64."""
        return self.checked(leaf, self.evaluate(self.nodes[leaf]))

    def checked(self, leaf: int, found: Tensor) -> Tensor:
        """Numbers of a leaf in float64, if they are numbers."""
        value = found.detach().to(torch.float64)
        # The sum is finite where all entries are, and needs no memory; it may overflow otherwise.
        if not bool(value.sum().isfinite()) and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{self._name(self.nodes[leaf])}: the effective value is NaN or infinite: look for "
                "a running variance below 0 or a division by 0"
            )
        return value

    def raw(self, leaf: int) -> Tensor | None:
        """The model's own tensor, where a leaf reads one as it is."""
        read = arguments(self.nodes[leaf])[0]
        return whole(self.tensors[str(read.target)]) if read.op == "placeholder" else None

    def stored(self, leaf: int) -> Tensor:
        """What a leaf reads before a batch norm's factor is folded in: zero at the same entries."""
        read = arguments(self.nodes[leaf])[0]
        found: Tensor = self.evaluate(
            arguments(read)[0] if read.target is ops.folded_weight else read
        )
        return found

    @staticmethod
    def _name(node: fx.Node) -> str:
        return str(arguments(node)[1]) if node.target is ops.coordinate else node.name

    def evaluate(self, node: fx.Node) -> Any:
        """What a leaf reads, or a step before it, as the model computes it."""
        ((_, found),) = evaluated(self.module, self.tensors, [node])
        return found


@dataclass
class Pair:
    """Two sets of weights for one lifted graph.

    Attributes:
        lifted: its lifted graph at full resolution; leaves are numbered in ``meta["leaf"]``, and
            the slopes of a ``ops.slope`` node count as one.
        ours: the first network.
        theirs: the second one; its leaves correspond to those of the first.
        architecture: what differs although it is no part of theta, by name: slopes, clamp bounds,
            fixed coefficients.
        erased: whether the second network is the first one with entries of some weights set to
            zero, and the same tensors otherwise.
    """

    lifted: fx.GraphModule
    ours: Side
    theirs: Side
    architecture: list[str] = field(default_factory=list)
    erased: bool = False

    def __post_init__(self) -> None:
        self._marks: list[dict[str, int]] = []
        if self.erased:
            return
        for leaf, node in enumerate(self.ours.nodes):
            if node.meta["fixed"] and not torch.equal(
                self.ours.value(leaf), self.theirs.value(leaf)
            ):
                self.architecture += [n for n in self.names(node) if n not in self.architecture]

    @property
    def setting(self) -> Setting:
        """What passes over its lifted graph are told."""
        return Setting(self.ours.captured)

    def remember(self) -> Pair:
        """Note what the tensors hold, for :meth:`check_unchanged`."""
        self._marks = [_marks(side) for side in (self.ours, self.theirs)]
        return self

    def names(self, leaf: fx.Node) -> list[str]:
        """Names of the tensors that a leaf is computed from, or of the operation of a literal."""
        found: list[str] = []
        stack, seen = [leaf], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                found.append(self.ours.captured.tensors[str(node.target)])
            stack += node.all_input_nodes
        origin = leaf.meta.get("origin")
        if origin is None:
            return sorted(found) or [f"a number in {leaf.name}"]
        place = module_path(origin) or "the model's own forward"
        return sorted(found) or [f"a number of {origin.target} in {place}"]

    def check_architecture(self) -> None:
        """Refuse to go on where more than theta differs.

        Raises:
            ValueError: naming the slopes, clamp bounds and fixed coefficients that differ.
        """
        if self.architecture:
            raise ValueError(
                f"{', '.join(self.architecture)} differ: slopes, clamp bounds and fixed "
                "coefficients are architecture, and a path-metric compares weights and biases of "
                "one architecture; fxpath.lipschitz_bound covers such a pair"
            )

    def coordinates(self) -> list[tuple[int, str]]:
        """Leaves that are part of theta, with the names of their coordinates."""
        return [
            (leaf, str(arguments(node)[1]))
            for leaf, node in enumerate(self.ours.nodes)
            if node.target is ops.coordinate
        ]

    def check_unchanged(self) -> None:
        """Refuse to go on where a network's tensors are no longer what they were.

        A pair reads the tensors of both networks and copies none: that would take as much memory
        as the networks themselves.

        Raises:
            RuntimeError: naming what has changed.
            ValueError: for a sharded network: all is read then, by this rank alone as it may be.
        """
        refuse_sharded(self.ours.captured.source, "what is evaluated on demand")
        sides = ("the model", self.ours), ("the other", self.theirs)
        for (which, side), marks in zip(sides, self._marks, strict=True):
            now = _marks(side)
            changed = [
                side.captured.tensors[key] for key, mark in marks.items() if now[key] != mark
            ]
            if changed:
                raise RuntimeError(
                    f"{', '.join(changed)} of {which} changed after the two were compared, so what "
                    "was not evaluated before is lost: compare again, or compare copies "
                    "(copy.deepcopy)"
                )

    def values(self, leaf: int) -> tuple[Tensor, Tensor]:
        """Effective parameters of both networks at a leaf, float64; one object if equal."""
        first = self.ours.value(leaf)
        if self.erased:
            stored = self.ours.stored(leaf), self.theirs.stored(leaf)
            same = stored[0] is stored[1]
            return first, first if same else first.masked_fill(stored[1] == 0, 0.0)
        raw = self.ours.raw(leaf), self.theirs.raw(leaf)
        if raw[0] is not None and raw[1] is not None and torch.equal(raw[0], raw[1]):
            return first, first
        return first, self.theirs.value(leaf)

    def rows(self, leaf: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, a few rows at a time; only those are converted where both are tensors."""
        raw = self.ours.raw(leaf), self.theirs.raw(leaf)
        whole = raw if raw[0] is not None and raw[1] is not None else self.values(leaf)
        assert whole[0] is not None and whole[1] is not None
        step = max(1, BLOCK * len(whole[0]) // max(1, whole[0].numel()))
        for a, b in zip(whole[0].split(step), whole[1].split(step), strict=True):
            first = self.ours.checked(leaf, a)
            if self.erased:
                yield first, b.to(torch.float64)
                continue
            alike = torch.equal(a, b.to(a.dtype)) and a.dtype == b.dtype
            yield first, first if alike else self.theirs.checked(leaf, b)


#: Entries from which on a matrix is compared a few rows at a time.
ROWS = 1 << 20

#: Entries that are compared at once: there are five copies of them, which a cache holds.
BLOCK = 1 << 17


def _marks(side: Side) -> dict[str, int]:
    return {key: fingerprint(local(tensor)) for key, tensor in side.tensors.items()}


#: Entries that are summed at once.
_BLOCK = 1 << 17


def fingerprint(tensor: Tensor) -> int:
    """A number that another content has with a probability of about 2^-60 only; copies nothing."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    entries = tensor.reshape(-1).view(kind)
    odd = torch.arange(min(len(entries), _BLOCK), device=tensor.device) * _MULTIPLIER
    odd = (odd ^ (odd >> 29)) | 1
    sums = [(block * odd[: len(block)]).sum() for block in entries.split(_BLOCK)]
    found = hash((tensor.dtype, tuple(tensor.shape)))
    for part in torch.stack(sums).tolist() if sums else []:
        found = hash((found, part))
    return found


#: Makes odd numbers without a pattern, which entries are multiplied with.
_MULTIPLIER = 0x1E3779B97F4A7C15


class PairInterpretation(Interpretation):
    """An interpretation of a lifted graph (or of its reduction) for a pair of networks."""

    def __init__(self, module: fx.GraphModule, pair: Pair) -> None:
        """See :class:`~fxpath.graph.interpret.Interpretation`; numbers are float64."""
        super().__init__(module, torch.float64)
        self.pair = pair

    def outcome(self) -> Any:
        """What the graph's last operation returns."""
        with torch.no_grad():
            return self.run(self.pair.ours.tensors)

    def folded_weight(self, weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
        # Evaluated for each network where it is read, see Side.
        return weight

    def other(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """Values of both networks at a leaf."""
        return self.pair.values(node.meta["leaf"])
