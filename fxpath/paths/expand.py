"""Signed graph -> explicit graph of neurons: an interpretation whose values are their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.equations import letters
from fxpath.graph.interpret import Interpretation, Map, Weighing
from fxpath.model import Captured
from fxpath.paths.building import Bias, Building, Edges
from fxpath.paths.dag import Dag


def expand(captured: Captured, lifted: fx.GraphModule) -> Dag:
    """Write out the neurons of a lifted graph, and their edges."""
    live = {key: tensor.detach().cpu() for key, tensor in captured.live().items()}
    with torch.no_grad():
        dag: Dag = _Expansion(captured, lifted).run(live)
    return dag


@dataclass(frozen=True)
class _Neurons:
    """The number of the neuron that each entry of an activation is, int64."""

    ids: Tensor

    def map(self, move: Map) -> _Neurons:
        """Move entries."""
        return _Neurons(move(self.ids))


@dataclass(frozen=True)
class _Entries:
    """Values of weights, and the codes of the entries of theta that they are; float64."""

    value: Tensor
    code: Tensor

    def map(self, move: Map) -> _Entries:
        """Move entries."""
        return _Entries(move(self.value), move(self.code))


class _Expansion(Interpretation):
    """Each operation appends the neurons that it makes, and returns their numbers."""

    activation = _Neurons
    weight = _Entries

    def __init__(self, captured: Captured, lifted: fx.GraphModule) -> None:
        super().__init__(lifted, torch.float64)
        self.building = Building()
        # All inputs are there, also those that nothing reads.
        every = [n for n in captured.graph_module.graph.nodes if n.op == "placeholder"]
        given = [node for node in every if node.name not in captured.tensors]
        self._inputs = {
            position: _Neurons(self.building.add("input", node.name, node.meta["val"].shape))
            for position, node in enumerate(given)
            if isinstance(node.meta.get("val"), Tensor)
        }

    def _layer(
        self, kind: str, edges: Sequence[Edges], bias: Bias | None = None, detail: Any = None
    ) -> _Neurons:
        """Neurons of the shape of the operation's result, named by the one that it stands for."""
        shape, name = self.node.meta["val"].shape, self.node.meta["origin"].name
        if not edges:
            return _Neurons(self.building.add(kind, name, shape, None, bias, detail))
        source, end, weight, code = (torch.cat(parts) for parts in zip(*edges, strict=True))
        there = (weight != 0) | (code > 0)
        present = source[there], end[there], weight[there], code[there]
        return _Neurons(self.building.add(kind, name, shape, present, bias, detail))

    def _edges(self, ids: Tensor, weight: Any, code: Any, end: Tensor) -> Edges:
        """Edges, all broadcast to one shape."""
        parts = torch.broadcast_tensors(ids, end, *map(_double, (weight, code)))
        source, end, weight, code = (part.reshape(-1) for part in parts)
        return source, end, weight, code.long()

    def _each(self, ids: Tensor, weight: Any = 1, code: Any = 0) -> Edges:
        """One edge to each entry of the result."""
        return self._edges(ids, weight, code, self._ends())

    def _ends(self) -> Tensor:
        shape = self.node.meta["val"].shape
        return torch.arange(math.prod(shape)).reshape(shape)

    # -- weights ----------------------------------------------------------------------------------

    def lifted(self, value: Tensor) -> Tensor:
        return _double(value)

    def known(self, value: Tensor) -> _Entries:
        return _Entries(value, torch.zeros_like(value))

    def coordinate(self, value: Tensor, name: str) -> _Entries:
        return _Entries(_double(value), self.building.register(name, tuple(value.shape)))

    def times(self, weight: _Entries, factor: _Entries) -> _Entries:
        value = weight.value * factor.value
        return _Entries(value, (weight.code + factor.code).expand(value.shape))

    # -- neurons with weights ---------------------------------------------------------------------

    def source(self, shape: Sequence[int]) -> _Neurons:
        return self._inputs[self.node.meta["input"]]

    def constant(self, bias: _Entries) -> _Neurons:
        return self._layer("sum", [], self._bias(bias))

    def shift(self, x: _Neurons, bias: _Entries) -> _Neurons:
        return self._layer("sum", [self._each(x.ids)], self._bias(bias))

    def weigh(
        self, x: _Neurons, weight: _Entries, bias: _Entries | None, run: Weighing
    ) -> _Neurons:
        if run.operation is ops.scale:
            edges = self._each(x.ids, weight.value, weight.code)
        elif run.operation is ops.contract:
            edges = self._contracted(x.ids, weight, *run.spec)
        else:
            edges = _probed(x.ids, weight, run)
        return self._layer("sum", [edges], None if bias is None else self._bias(bias))

    def _contracted(self, ids: Tensor, weight: _Entries, equation: str) -> Edges:
        """An edge for each choice of all letters."""
        terms = letters(equation)
        sizes = terms.sizes(ids.shape, weight.value.shape)
        grid = torch.ones(tuple(sizes.values()), dtype=torch.float64)

        def spread(value: Tensor, term: str) -> Tensor:
            every = "".join(sizes)
            return torch.einsum(f"{term},{every}->{every}", value.double(), grid)

        source = spread(ids, terms.x).long()
        end = spread(self._ends(), terms.out).long()
        value, code = (spread(v, terms.weight) for v in (weight.value, weight.code))
        return self._edges(source, value, code, end)

    def _bias(self, bias: _Entries) -> Bias:
        """A bias for each neuron; a number that is 0 is none."""
        shape = self.node.meta["val"].shape
        value, code = bias.value.expand(shape), bias.code.expand(shape)
        return value, torch.where((value == 0) & (code == 0), -1, code)

    # -- neurons without --------------------------------------------------------------------------

    def add(self, x: _Neurons, y: _Neurons) -> _Neurons:
        return self._layer("sum", [self._each(x.ids), self._each(y.ids)])

    def negative(self, x: Any) -> Any:
        if isinstance(x, _Entries):
            return _Entries(-x.value, x.code)
        return self._layer("sum", [self._each(x.ids, -1)])

    def along(self, x: _Neurons, dim: int, index: Tensor, weight: Tensor) -> _Neurons:
        if index.shape[1] == 1 and bool((weight == 1).all()):
            return x.map(lambda ids: ids.index_select(dim, index[:, 0]))
        return self._layer("sum", [self._windows(x, dim, index, weight)])

    def pool(
        self, x: _Neurons, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]
    ) -> _Neurons:
        shape = [-1 if d == dim else 1 for d in range(x.ids.dim())]
        rank = torch.tensor(ranks).expand(len(index)).reshape(shape)
        rank = rank.expand(self.node.meta["val"].shape).reshape(-1)
        return self._layer("pool", [self._windows(x, dim, index, weight != 0)], detail=rank)

    def _windows(self, x: _Neurons, dim: int, index: Tensor, weight: Tensor) -> Edges:
        """Edges from the positions of an axis to those that read them."""
        read = x.ids.movedim(dim, -1).index_select(-1, index.flatten())
        ends = self._ends().movedim(dim, -1)[..., None]
        return self._edges(read.unflatten(-1, tuple(index.shape)), weight, 0, ends)

    def maximum(self, x: _Neurons, y: _Neurons) -> _Neurons:
        return self._larger(x, y, 1)

    def minimum(self, x: _Neurons, y: _Neurons) -> _Neurons:
        return self._larger(x, y, -1)

    def _larger(self, x: _Neurons, y: _Neurons, rank: int) -> _Neurons:
        ranks = torch.full((self._ends().numel(),), rank)
        return self._layer("pool", [self._each(x.ids), self._each(y.ids)], detail=ranks)

    def relu(self, x: _Neurons) -> _Neurons:
        return self._layer("relu", [self._each(x.ids)])

    def absolute(self, x: _Neurons) -> _Neurons:
        return self._layer("abs", [self._each(x.ids)])

    def slope(self, x: _Neurons, a: Tensor | float) -> _Neurons:
        slopes = _double(a).expand(x.ids.shape)
        edges = self._each(x.ids, slopes.abs().clamp(min=1))
        return self._layer("slope", [edges], detail=slopes.reshape(-1))

    def clamp(self, x: _Neurons, lo: float | None, hi: float | None) -> _Neurons:
        if lo is hi is None:
            return x
        edges = [self._each(x.ids)]
        name = f"{self.node.meta['origin'].name}_bound"
        for bound in (lo, hi):
            if bound:
                held = torch.full((1,), bound, dtype=torch.float64), torch.zeros(1)
                edges.append(self._each(self.building.add("sum", name, (1,), bias=held)))
        return self._layer("clamp", edges, detail=(lo, hi))

    # -- moves and ends ---------------------------------------------------------------------------

    def move(self, target: Callable[..., Tensor], x: Any, *args: Any) -> Any:
        if isinstance(x, _Entries):
            return super().move(target, x, *args)
        ids = target(_double(x.ids + 1), *args).long() - 1
        if bool((ids >= 0).all()):
            return _Neurons(ids)
        # Zeros that it puts in are neurons that nothing reaches.
        return self._layer("sum", [self._each(ids.clamp(min=0), ids >= 0)])

    def join(self, pieces: list[_Neurons], dim: int) -> _Neurons:
        return _Neurons(torch.cat([piece.ids for piece in pieces], dim))

    def total(self, outputs: list[_Neurons]) -> Dag:
        return self.building.finish(torch.cat([y.ids.reshape(-1) for y in outputs]))


def _probed(ids: Tensor, weight: _Entries, run: Callable[[Tensor, Tensor], Tensor]) -> Edges:
    """Edges of a map in which each pair of neurons shares one weight, by basis vectors.

    With codes in place of the weights the map returns the code of each edge; without codes an edge
    is where the coefficient is not zero.
    """
    found: list[Edges] = []
    named = bool(weight.code.any())
    for number, neuron in enumerate(ids.reshape(-1).tolist()):
        unit = torch.zeros(ids.numel(), dtype=torch.float64)
        unit[number] = 1
        values, codes = (
            run(unit.reshape(ids.shape), w).reshape(-1) for w in (weight.value, weight.code)
        )
        ends = (codes if named else values).nonzero()[:, 0]
        found.append(
            (torch.full_like(ends, neuron), ends, values[ends], codes[ends].round().long())
        )
    source, end, value, code = (torch.cat(parts) for parts in zip(*found, strict=True))
    return source, end, value, code


def _double(value: Any) -> Tensor:
    """A tensor or a number in float64, without passing through float32."""
    return torch.as_tensor(value, dtype=torch.float64)
