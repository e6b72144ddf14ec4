"""Interpretations of a pair neuron by neuron, with the edges laid out one by one.

They run on a :class:`Network`: at full resolution, or by value, with one neuron for each class of
equal ones, since what belongs to a neuron (its normalized weights, its ratio between two networks)
is the same for all neurons of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.interpret import Weighing
from fxpath.graph.links import seen_through
from fxpath.graph.schema import arguments, bias_of
from fxpath.pairs import edges
from fxpath.pairs.edges import Unrolled
from fxpath.pairs.pair import Pair, PairInterpretation
from fxpath.passes.classes import Classes
from fxpath.passes.reduce import reduce
from fxpath.passes.setting import Setting
from fxpath.private import OpOverload

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """A lifted graph to walk, and how its outputs are laid out.

    Attributes:
        module: the graph.
        expansions: for each output, axes that hold one value for each class of equal positions,
            with the class of each position.
    """

    module: fx.GraphModule
    expansions: list[list[tuple[int, Tensor]]]

    @classmethod
    def by_value(cls, lifted: fx.GraphModule, setting: Setting) -> Network:
        """One value for each class of equal positions."""
        found: list[Classes] = []

        def choose(classes: Classes) -> dict[fx.Node, bool]:
            found.append(classes)
            return dict.fromkeys(classes.reachable, False)

        module = reduce(lifted, setting, choose)
        full, total = _total(lifted), _total(module)
        expansions = []
        outputs: list[fx.Node] = list(arguments(total)[0])
        for i, output in enumerate(arguments(full)[0]):
            partitions = enumerate(found[0].reachable[seen_through(output)])
            merged = [(dim, p.of) for dim, p in partitions if not p.is_trivial]
            # The reduction sums equal outputs before it adds them up; here they stay apart.
            for _ in merged:
                outputs[i] = arguments(outputs[i])[0]
            expansions.append(merged)
        total.args = (outputs,)
        module.graph.eliminate_dead_code()
        return cls(module, expansions)

    @classmethod
    def whole(cls, lifted: fx.GraphModule) -> Network:
        """Full resolution."""
        return cls(lifted, [[] for _ in arguments(_total(lifted))[0]])

    def flatten(self, output: int, value: Tensor) -> Tensor:
        """What belongs to the neurons of one output, in their order."""
        for dim, of in self.expansions[output]:
            value = value.index_select(dim, of.to(value.device))
        return value.flatten()


def _total(module: fx.GraphModule) -> fx.Node:
    (node,) = [n for n in module.graph.nodes if n.target is ops.total]
    return node


@dataclass(frozen=True)
class Signed:
    """Effective parameters of both networks, with their signs; ``fixed`` ones are architecture."""

    first: Tensor
    second: Tensor
    fixed: bool = False

    def map(self, function: Map) -> Signed:
        """Apply the same map to both."""
        return Signed(function(self.first), function(self.second), self.fixed)


@dataclass(frozen=True)
class Part:
    """Some paths: what the inputs hold (``None``: ones), and whether those from biases count."""

    inputs: Sequence[Tensor] | None = None
    biases: bool = True


class Values:
    """What an interpretation knows of the neurons of one tensor; subclasses say what that is."""


S = TypeVar("S", bound=Values)


@dataclass(frozen=True)
class Pending(Generic[S]):
    """Neurons whose edges are known.

    Attributes:
        terms: edges, what they read, and their weights (``None``: 1).
        run: the weighted sum itself, for activations and absolute weights of one network.
        shape: shape of the result.
    """

    terms: list[tuple[Unrolled, S, Signed | None]]
    run: Callable[[list[Tensor], int], Tensor]
    shape: tuple[int, ...]


class Neurons(PairInterpretation, Generic[S]):
    """Walks the graph neuron by neuron; subclasses say what a neuron makes of its edges."""

    activation = Values
    weight = Signed

    def __init__(self, network: Network, pair: Pair, parts: Sequence[Part]) -> None:
        """Walk ``network`` for some sets of paths."""
        super().__init__(network.module, pair)
        self.network = network
        self.parts = parts
        self._given = [None if p.inputs is None else iter(p.inputs) for p in parts]
        self._final = _final(network.module.graph)

    # -- to be said by a subclass -----------------------------------------------------------------

    def begin(self, values: list[Tensor], ones: Tensor) -> S:
        """Input neurons: what each part feeds, and ones of the same shape."""
        raise NotImplementedError

    def settle(self, pending: Pending[S], bias: Signed | None, final: bool) -> S:
        """New neurons; ``final`` ones are outputs of the network."""
        raise NotImplementedError

    def through(self, x: S, function: Map, scaled: Map) -> S:
        """A selection of neurons; ``scaled`` also has the coefficients of the selecting edges."""
        raise NotImplementedError

    def gather(self, x: S, matrix: Tensor, dim: int) -> S:
        """Fixed weighted sums of output neurons."""
        raise NotImplementedError

    def joined(self, pieces: list[S], function: Callable[[list[Tensor]], Tensor]) -> S:
        """Neurons of several tensors side by side."""
        raise NotImplementedError

    # -- the vocabulary ---------------------------------------------------------------------------

    def coordinate(self, value: Tensor, name: str) -> Signed:
        return Signed(*self.other(self.node))

    def known(self, value: Tensor) -> Signed:
        return Signed(value, value, fixed=True)

    def times(self, weight: Signed, factor: Signed) -> Signed:
        return weight.map(lambda value: value * factor.first)

    def source(self, shape: Sequence[int]) -> S:
        ones = self.filled(shape, 1.0)
        values = [
            ones if given is None else next(given).to(self.dtype).abs() for given in self._given
        ]
        return self.begin(values, ones)

    def constant(self, bias: Signed) -> S:
        shape = tuple(bias.first.shape)
        zeros = self.filled(shape, 0.0)
        return self.settle(Pending([], lambda x, side: zeros, shape), bias, self._is_final())

    def weigh(self, x: S, weight: Signed, bias: Signed | None, run: Weighing) -> Any:
        shapes = self._shape(0), self._shape(1)
        if run.operation is ops.conv:
            unrolled = edges.convolution(*shapes, tuple(self.node.meta["val"].shape), *run.spec)
        elif run.operation is ops.contract:
            unrolled = edges.contraction(*shapes, *run.spec)
        else:
            unrolled = edges.pointwise(self.node.meta["val"].shape)
        return self._edges(x, weight, bias, unrolled, run)

    def _edges(
        self,
        x: S,
        weight: Signed,
        bias: Signed | None,
        unrolled: Unrolled,
        run: Callable[[Tensor, Tensor], Tensor],
    ) -> Any:
        pending: Pending[S] = Pending(
            [(unrolled, x, weight)],
            lambda values, side: run(values[0], (weight.first, weight.second)[side].abs()),
            tuple(self.node.meta["val"].shape),
        )
        if bias is None and all(user.target is ops.shift for user in _readers(self.node)):
            return pending  # the bias that is added belongs to the same neurons
        return self.settle(pending, bias, self._is_final())

    def scale(self, x: Any, weight: Signed, bias: Signed | None = None) -> Any:
        if not isinstance(x, Signed) and weight.fixed and bias is None:
            shape = tuple(self.node.meta["val"].shape)
            return self.through(x, lambda v: v.expand(shape), lambda v: v * weight.first)
        return super().scale(x, weight, bias)

    def slope(self, x: S, a: Tensor | float) -> S:
        return self.through(x, lambda v: v, lambda v: ops.slope(v, a))

    def shift(self, x: Any, bias: Signed) -> S:
        if isinstance(x, Pending) and x.shape != tuple(self.node.meta["val"].shape):
            x = self.settle(x, None, False)  # the bias makes more neurons of them
        pending = x if isinstance(x, Pending) else self._copies([x])
        return self.settle(pending, bias, self._is_final())

    def add(self, x: S, y: S) -> S:
        return self.settle(self._copies([x, y]), None, self._is_final())

    def _copies(self, values: list[S]) -> Pending[S]:
        """Edges of weight 1 from each of several tensors."""
        shape = tuple(self.node.meta["val"].shape)
        unrolled = edges.identity(shape)
        terms: list[tuple[Unrolled, S, Signed | None]] = [(unrolled, v, None) for v in values]
        return Pending(terms, lambda x, side: sum(x[1:], x[0]), shape)

    def mix(self, x: Any, dim: int, matrix: Tensor) -> Any:
        if isinstance(x, Signed):  # one entry of a bias for each class
            return x.map(lambda value: ops.mix(value, dim, matrix))
        if self._is_final():
            return self.gather(x, matrix, dim)
        if int((matrix != 0).sum(1).max()) <= 1:
            pattern = (matrix != 0).to(self.dtype)
            return self.through(
                x, lambda v: ops.mix(v, dim, pattern), lambda v: ops.mix(v, dim, matrix)
            )
        matrix = matrix.to(self.dtype)
        weight = Signed(matrix, matrix, fixed=True)
        unrolled = edges.linear(self._shape(0), tuple(matrix.shape), dim)
        return self._edges(x, weight, None, unrolled, lambda a, w: ops.mix(a, dim, w))

    def along(self, x: S, dim: int, index: Tensor, weight: Tensor) -> S:
        size = self._shape(0)[dim]
        matrix = weight.new_zeros(index.shape[0], size).scatter_add(1, index, weight.abs())
        return self.mix(x, dim, matrix)

    def fixed(self, x: Any, function: Map) -> Any:
        return x.map(function) if isinstance(x, Signed) else self.through(x, function, function)

    def join(self, pieces: list[S], dim: int) -> S:
        return self.joined(pieces, lambda parts: torch.cat(parts, dim))

    def _flatten(self, outputs: list[Tensor]) -> Tensor:
        """What belongs to each output neuron, one after the other."""
        return torch.cat([self.network.flatten(i, y) for i, y in enumerate(outputs)])

    # -- what is known of the graph ---------------------------------------------------------------

    def _shape(self, index: int) -> tuple[int, ...]:
        return tuple(arguments(self.node)[index].meta["val"].shape)

    def _is_final(self) -> bool:
        return self.node in self._final


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads an activation, through words that path mass ignores."""
    readers: list[fx.Node] = []
    for user in node.users:
        readers += [user] if seen_through(user) is user else _readers(user)
    return readers


def _final(graph: fx.Graph) -> set[fx.Node]:
    """Tensors of output neurons: read by the sum over outputs alone, but for what passes on."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        users = list(node.users)
        if users and all(u.target is ops.total or (u in found and _passes(u)) for u in users):
            found.add(node)
    return found


def _passes(node: fx.Node) -> bool:
    """Whether an operation has no parameters and reads nothing else than what it passes on."""
    if seen_through(node) is not node:
        return True
    if node.target is ops.scale:
        return bias_of(node) is None and arguments(node)[1].target is ops.coefficient
    fixed = node.target in (ops.mix, ops.along, ops.pool, ops.slope)
    return fixed or isinstance(node.target, OpOverload)
