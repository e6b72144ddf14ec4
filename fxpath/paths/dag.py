"""A network as an explicit graph of neurons (Def. A.2), entry by entry.

Only for small networks, whose paths are to be listed one by one: every entry of every activation
is a neuron here, and every edge is kept.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bias", "Dag", "Edges", "Entry", "Layer"]

#: One entry of theta: its name, as in the scores, and its index.
Entry = tuple[str, tuple[int, ...]]

#: Source, end, weight and code of some edges; each ``[edges]``.
Edges = tuple[Tensor, Tensor, Tensor, Tensor]

#: Value and code of the bias of each neuron; the code is -1 where there is none.
Bias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """Neurons of one operation, numbered from ``first``.

    Attributes:
        kind: ``input``, ``sum`` (identity neurons), ``relu``, ``slope``, ``abs``, ``pool``
            (k-max-pooling) or ``clamp``.
        name: of the operation in the exported graph.
        shape: of its result.
        first: number of the first neuron; the others follow in row-major order.
        edges: range of the edges that end here.
        detail: slopes or ranks, one for each neuron; or the bounds of a clamp.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    first: int
    edges: slice
    detail: Any = None

    @property
    def neurons(self) -> slice:
        """Range of the neurons."""
        return slice(self.first, self.first + math.prod(self.shape))


class Dag:
    """Neurons in topological order, and edges grouped by layer.

    Attributes:
        layers: in order of execution; the inputs come first.
        inputs: number of input neurons.
        outputs: neuron of each output entry, ``[outputs]``; one neuron may be several outputs.
        source: where each edge begins, ``[edges]``.
        target: where it ends.
        weight: its value, float64.
        code: entry of theta that it carries, 0 for a coefficient of the architecture.
        bias: of each neuron, float64, ``[neurons]``.
        bias_code: entry of theta that it is; 0 for a constant, -1 for no bias at all.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.inputs = 0
        self.outputs = torch.zeros(0, dtype=torch.int64)
        self._made: list[_Made] = []
        self._count = 0
        self._arrays: list[tuple[int, str, tuple[int, ...]]] = []
        self._codes = 1

    # -- building ---------------------------------------------------------------------------------

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

    def finish(self, outputs: Tensor) -> None:
        """Join the layers; of sums in sums, or maxima of maxima, that are one operation, one."""
        kept = torch.ones(self._count, dtype=torch.bool)
        for layer, reading in zip(self._made, self._readers(), strict=True):
            if len(reading) == 1 and reading[0].takes_in(layer) and not layer.holds(outputs):
                reading[0].take_in(layer)
                kept[layer.neurons] = False
        number_of = kept.cumsum(0) - 1
        made = [layer for layer in self._made if bool(kept[layer.neurons].all())]
        count = edge = 0
        for layer in made:
            span = slice(edge, edge := edge + len(layer.edges[0]))
            given = layer.kind, layer.name, layer.shape, count, span, layer.detail
            self.layers.append(Layer(*given))
            count += math.prod(layer.shape)
        self.outputs = number_of[outputs]
        joined = [torch.cat(parts) for parts in zip(*(each.edges for each in made), strict=True)]
        self.source, self.target = number_of[joined[0]], number_of[joined[1]]
        self.weight, self.code = joined[2:]
        biases = (each.bias for each in made)
        self.bias, self.bias_code = (torch.cat(parts) for parts in zip(*biases, strict=True))
        self.inputs = sum(math.prod(x.shape) for x in self.layers if x.kind == "input")

    def _readers(self) -> list[list[_Made]]:
        """For each layer those that read it."""
        firsts = torch.tensor([layer.first for layer in self._made])
        found: list[list[_Made]] = [[] for _ in self._made]
        for layer in self._made:
            read = torch.searchsorted(firsts, layer.edges[0], right=True) - 1
            for number in read.unique().tolist():
                found[number].append(layer)
        return found

    # -- reading ----------------------------------------------------------------------------------

    def entry(self, code: int) -> Entry:
        """The entry of theta behind a code."""
        at = bisect.bisect_right([start for start, _, _ in self._arrays], code) - 1
        start, name, shape = self._arrays[at]
        return name, _index(code - start, shape)

    def code_of(self, name: str, index: tuple[int, ...]) -> int:
        """The code of an entry of theta.

        Raises:
            KeyError: if theta has no such entry.
        """
        for start, own, shape in self._arrays:
            if own != name or len(index) != len(shape):
                continue
            if all(0 <= i < n for i, n in zip(index, shape, strict=True)):
                return start + _flat(index, shape)
        raise KeyError(f"{name}{list(index)} is no entry of theta")

    def count_paths(self) -> int:
        """Number of paths that end at an output."""
        counts = (self.bias_code >= 0).double()
        counts[: self.inputs] = 1
        for layer in self.layers:
            span = layer.edges
            counts.index_add_(0, self.target[span], counts[self.source[span]])
        return round(counts[self.outputs].sum().item())

    def name(self, neuron: int) -> str:
        """Operation and position, e.g. ``relu[3]``; a batch axis of length 1 is left out."""
        at = bisect.bisect_right([layer.first for layer in self.layers], neuron) - 1
        layer = self.layers[at]
        index = _index(neuron - layer.first, layer.shape)
        if len(index) > 1 and layer.shape[0] == 1:
            index = index[1:]
        return f"{layer.name}[{', '.join(map(str, index))}]"

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on one input.

        Args:
            x: all inputs, flattened and joined, ``[inputs]``.

        Returns:
            v(theta, x) of each neuron, and the activation of each edge, both float64.
        """
        values = self.bias.clone()
        values[: self.inputs] = x.double()
        active = torch.ones_like(self.weight)
        for layer in self.layers:
            span, own = layer.edges, layer.neurons
            terms = values[self.source[span]] * self.weight[span]
            end = self.target[span] - layer.first
            if layer.kind == "sum":
                values[own] += values.new_zeros(own.stop - own.start).index_add(0, end, terms)
            elif layer.kind != "input":
                values[own], active[span] = _activate(layer, terms, end)
        return values, active


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


def followed(degree: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The edges into some neurons, of edges that are sorted by the neuron that they end at.

    Args:
        degree: number of edges into each neuron.
        at: neurons, ``[n]``.

    Returns:
        For each edge into one of them its position in ``at``, and its own place.
    """
    begin, count = degree.cumsum(0) - degree, degree[at]
    parent = torch.repeat_interleave(torch.arange(len(at)), count)
    within = torch.arange(len(parent)) - (count.cumsum(0) - count)[parent]
    return parent, begin[at[parent]] + within


def _activate(layer: Layer, terms: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Values of a layer's neurons, and activations of its edges."""
    count = math.prod(layer.shape)
    if layer.kind == "pool":
        falling = torch.argsort(terms, descending=True, stable=True)
        order = falling[torch.argsort(end[falling], stable=True)]
        degree, rank = torch.bincount(end, minlength=count), layer.detail
        place = degree.cumsum(0) - degree + torch.where(rank > 0, rank - 1, degree + rank)
        value = terms[order[place]]
        attained = (terms == value[end]).nonzero()[:, 0]
        # The first antecedent that attains it, in the order of the edges.
        first = torch.full((count,), len(terms)).scatter_reduce(0, end[attained], attained, "amin")
        return value, (first[end] == torch.arange(len(terms))).double()
    x = terms.new_zeros(count).index_add(0, end, terms) if layer.kind != "clamp" else terms[:count]
    if layer.kind == "relu":
        return x.clamp(min=0), (x > 0).double()[end]
    if layer.kind == "abs":
        return x.abs(), x.sign()[end]
    if layer.kind == "slope":
        # The edge holds the largest size of the slope, its activation what is taken of it.
        most = layer.detail.abs().clamp(min=1)
        taken = torch.where(x > 0, 1 / most, layer.detail / most)
        return x * taken, taken[end]
    lo, hi = layer.detail
    clamped = x.clamp(lo, hi)
    active = [clamped == x]
    for bound in (lo, hi):
        if bound:
            active.append((clamped == bound) & ~torch.stack(active).any(0))
    return clamped, torch.cat(active).double()


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape)) if shape else ()


def _flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat
