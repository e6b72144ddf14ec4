"""How an explicit graph of neurons is built, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxpath.paths.dag import Dag, Layer, followed

#: Source, end, weight and code of some edges; each ``[edges]``.
Edges = tuple[Tensor, Tensor, Tensor, Tensor]

#: Value and code of the bias of each neuron; the code is -1 where there is none.
Bias = tuple[Tensor, Tensor]


class Building:
    """Layers of neurons, in the order in which they are added."""

    def __init__(self) -> None:
        self._made: list[_Made] = []
        self._count = 0
        self._arrays: list[tuple[int, str, tuple[int, ...]]] = []
        self._codes = 1

    def add(
        self,
        kind: str,
        name: str,
        shape: Iterable[int],
        edges: Edges | None = None,
        bias: Bias | None = None,
        detail: Any = None,
    ) -> Tensor:
        """Append a layer; edges as (source, entry of the result, weight, code).

        Returns:
            The numbers of its neurons, int64 of the given shape.
        """
        shape = tuple(shape)
        count = math.prod(shape)
        if edges is None:
            none = torch.zeros(0, dtype=torch.int64)
            edges = (none, none, none.double(), none)
        if bias is None:
            bias = (torch.zeros(count, dtype=torch.float64), torch.full((count,), -1))
        source, end, weight, code = edges
        first, self._count = self._count, self._count + count
        whole = (source, end + first, weight, code)
        bias = bias[0].reshape(-1), bias[1].reshape(-1).long()
        self._made.append(_Made(kind, name, shape, first, whole, bias, detail))
        return torch.arange(first, self._count).reshape(shape)

    def register(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Codes of an array of theta's entries, as float64 of its shape."""
        first = next((start for start, own, _ in self._arrays if own == name), None)
        if first is None:
            first = self._codes
            self._arrays.append((first, name, shape))
            self._codes += math.prod(shape)
        return torch.arange(first, first + math.prod(shape)).double().reshape(shape)

    def finish(self, outputs: Tensor) -> Dag:
        """Join the layers; of sums in sums, or maxima of maxima, that are one operation, one.

        Args:
            outputs: neuron of each output entry.
        """
        kept = torch.ones(self._count, dtype=torch.bool)
        for layer, reading in zip(self._made, self._readers(), strict=True):
            if len(reading) == 1 and reading[0].takes_in(layer) and not layer.holds(outputs):
                reading[0].take_in(layer)
                kept[layer.neurons] = False
        number_of = kept.cumsum(0) - 1
        made = [layer for layer in self._made if bool(kept[layer.neurons].all())]
        layers: list[Layer] = []
        count = edge = 0
        for each in made:
            span = slice(edge, edge := edge + len(each.edges[0]))
            layers.append(Layer(each.kind, each.name, each.shape, count, span, each.detail))
            count += math.prod(each.shape)
        edges = zip(*(each.edges for each in made), strict=True)
        source, target, weight, code = (torch.cat(parts) for parts in edges)
        bias, bias_code = (
            torch.cat(parts) for parts in zip(*(each.bias for each in made), strict=True)
        )
        return Dag(
            layers,
            sum(math.prod(layer.shape) for layer in layers if layer.kind == "input"),
            number_of[outputs],
            number_of[source],
            number_of[target],
            *(weight, code, bias, bias_code),
            self._arrays,
        )

    def _readers(self) -> list[list[_Made]]:
        """For each layer those that read it."""
        firsts = torch.tensor([layer.first for layer in self._made])
        found: list[list[_Made]] = [[] for _ in self._made]
        for layer in self._made:
            read = torch.searchsorted(firsts, layer.edges[0], right=True) - 1
            for number in read.unique().tolist():
                found[number].append(layer)
        return found


@dataclass
class _Made:
    """A layer that is being built; ends of edges are neurons."""

    kind: str
    name: str
    shape: tuple[int, ...]
    first: int
    edges: Edges
    bias: Bias
    detail: Any

    @property
    def neurons(self) -> slice:
        return slice(self.first, self.first + math.prod(self.shape))

    def holds(self, neurons: Tensor) -> bool:
        """Whether any of these neurons is one of the layer's."""
        return bool(self._among(neurons).any())

    def _among(self, neurons: Tensor) -> Tensor:
        return (neurons >= self.first) & (neurons < self.neurons.stop)

    def takes_in(self, layer: _Made) -> bool:
        """Whether edges into a layer, and on from it, can be edges of this one."""
        if layer.kind != self.kind or layer.name != self.name or bool((layer.bias[1] >= 0).any()):
            return False
        if self.kind == "pool":
            ranks = torch.cat([layer.detail, self.detail])
            return bool((ranks == 1).all() or (ranks == -1).all())
        return self.kind == "sum" and not (bool(layer.edges[3].any()) and bool(self.edges[3].any()))

    def take_in(self, layer: _Made) -> None:
        """Lead its edges on to the neurons that read it."""
        inside = layer._among(self.edges[0])
        source, end, weight, code = (part[inside] for part in self.edges)
        order = torch.argsort(layer.edges[1], stable=True)
        degree = torch.bincount(layer.edges[1] - layer.first, minlength=math.prod(layer.shape))
        parent, place = followed(degree, source - layer.first)
        before = [part[order[place]] for part in layer.edges]
        led = before[0], end[parent], before[2] * weight[parent], before[3] + code[parent]
        own = (part[~inside] for part in self.edges)
        source, end, weight, code = (torch.cat(parts) for parts in zip(own, led, strict=True))
        self.edges = source, end, weight, code
