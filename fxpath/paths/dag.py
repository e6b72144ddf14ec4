"""A network as an explicit graph of neurons (Def. A.2), entry by entry.

Only for small networks, whose paths are to be listed one by one: every entry of every activation
is a neuron here, and every edge is kept.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: One entry of theta: its name, as in the scores, and its index.
Entry = tuple[str, tuple[int, ...]]


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


@dataclass(frozen=True, eq=False)
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
        arrays: first code, name and shape of each array of theta's entries.
    """

    layers: list[Layer]
    inputs: int
    outputs: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    code: Tensor
    bias: Tensor
    bias_code: Tensor
    arrays: list[tuple[int, str, tuple[int, ...]]]

    def entry(self, code: int) -> Entry:
        """The entry of theta behind a code."""
        at = bisect.bisect_right([start for start, _, _ in self.arrays], code) - 1
        start, name, shape = self.arrays[at]
        return name, _index(code - start, shape)

    def code_of(self, name: str, index: tuple[int, ...]) -> int:
        """The code of an entry of theta.

        Raises:
            KeyError: if theta has no such entry.
        """
        for start, own, shape in self.arrays:
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
