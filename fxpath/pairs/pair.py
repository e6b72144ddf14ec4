"""Two sets of weights for one network: checks, effective parameters, and what is common to both.

A *leaf* is a place where the lifted graph reads effective parameters (``ops.coordinate``) or fixed
numbers (``ops.coefficient``).  Both networks are evaluated leaf by leaf, so that only one layer of
each exists in float64 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath import ops
from fxpath.capture import Captured
from fxpath.errors import module_path
from fxpath.graphs import inputs_first
from fxpath.interpret import Interpretation
from fxpath.schema import arguments, target

__all__ = ["LEAVES", "Pair", "PairInterpretation", "Side", "Weights", "agreement"]

#: What effective parameters and fixed numbers are read by.
LEAVES = (ops.coordinate, ops.coefficient)


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


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Where theta * theta' >= 0, without forming a product that could underflow."""
    return ~(((first > 0) & (second < 0)) | ((first < 0) & (second > 0)))


@dataclass(frozen=True)
class Side:
    """One of the two networks: as captured, its signed graph, its tensors, and leaves in order."""

    captured: Captured
    module: fx.GraphModule
    tensors: Mapping[str, Tensor]
    nodes: list[fx.Node]

    def value(self, leaf: int) -> Tensor:
        """The numbers that a leaf reads, with their signs, in float64."""
        node = self.nodes[leaf]
        value = self._evaluate(node).detach().to(torch.float64)
        # The sum is finite where all entries are, and needs no memory; it may overflow otherwise.
        if not bool(value.sum().isfinite()) and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{self._name(node)}: the effective value is NaN or infinite: look for a running "
                "variance below 0 or a division by 0"
            )
        return value

    def raw(self, leaf: int) -> Tensor | None:
        """The model's own tensor, where a leaf reads one as it is."""
        read = arguments(self.nodes[leaf])[0]
        return self.tensors[str(read.target)] if read.op == "placeholder" else None

    @staticmethod
    def _name(node: fx.Node) -> str:
        return str(arguments(node)[1]) if node.target is ops.coordinate else node.name

    def _evaluate(self, leaf: fx.Node) -> Any:
        """What a leaf reads, each step of it computed once."""
        known: dict[fx.Node, Any] = {}
        for node in inputs_first(leaf, known):
            known[node] = self._step(node, known)
        return known[leaf]

    def _step(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        if node.target in LEAVES:
            return known[arguments(node)[0]]
        if node.op == "placeholder":
            return self.tensors[str(node.target)].detach()
        if node.op == "get_attr":
            buffer: Tensor = getattr(self.module, str(node.target))
            device = next((t.device for t in self.tensors.values()), buffer.device)
            return buffer.to(device)
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.target is ops.folded_weight:
            return in_double(*args)
        return target(node)(*args, **kwargs)


def in_double(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """A folded weight, formed in float64."""
    return ops.folded_weight(weight.to(torch.float64), factor, axis, groups)


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
    """

    lifted: fx.GraphModule
    ours: Side
    theirs: Side
    architecture: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for leaf, node in enumerate(self.ours.nodes):
            if node.meta["fixed"] and not torch.equal(
                self.ours.value(leaf), self.theirs.value(leaf)
            ):
                self.architecture += [n for n in self.names(node) if n not in self.architecture]

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
        return sorted(found) or [f"a number in {module_path(origin) if origin else leaf.name}"]

    def coordinates(self) -> list[tuple[int, str]]:
        """Leaves that are part of theta, with the names of their coordinates."""
        return [
            (leaf, str(arguments(node)[1]))
            for leaf, node in enumerate(self.ours.nodes)
            if node.target is ops.coordinate
        ]

    def values(self, leaf: int) -> tuple[Tensor, Tensor]:
        """Effective parameters of both networks at a leaf, float64; one object if equal."""
        first = self.ours.value(leaf)
        raw = self.ours.raw(leaf), self.theirs.raw(leaf)
        if raw[0] is not None and raw[1] is not None and torch.equal(raw[0], raw[1]):
            return first, first
        return first, self.theirs.value(leaf)


class PairInterpretation(Interpretation):
    """An interpretation of a lifted graph (or of its reduction) for a pair of networks."""

    def __init__(self, module: fx.GraphModule, pair: Pair) -> None:
        """See :class:`~fxpath.interpret.Interpretation`; numbers are float64."""
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
