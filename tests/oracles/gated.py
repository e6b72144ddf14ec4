"""A brute-force oracle for networks with gates: paths one by one, the gates read off a run.

Everything here is written from the definition: a neuron passes ``a v`` on, with ``a`` its
activation at the input in question, of size at most c.  `Paths.phi` multiplies weights and each c
along a path, `Paths.activations` the numbers ``a / c`` in [-1, 1], and <Phi, A (x, 1)> is the
output.
Nothing is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

Entry = tuple[str, tuple[int, ...]]
"""One entry of a parameter: its name and its index."""
Edge = tuple[int, float, Entry | None]
"""Where an edge starts, its weight, and the entry that this is, if it is one."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _elu(alpha: float) -> Callable[[float], float]:
    return lambda x: x if x > 0 else alpha * math.expm1(x)


#: Activations and their sizes, by the names of their modules in torch.
SQUASHES: dict[str, tuple[Callable[[float], float], float]] = {
    "SiLU": (lambda x: x * sigmoid(x), 1.0),
    "GELU": (lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2, 1.0),
    "Hardswish": (lambda x: x * min(max(x + 3, 0.0), 6.0) / 6, 1.0),
    "Mish": (lambda x: x * math.tanh(softplus(x)), 1.0),
    "Tanh": (math.tanh, 1.0),
    "Softshrink": (lambda x: math.copysign(max(abs(x) - 0.5, 0.0), x), 1.0),
    "Hardshrink": (lambda x: x if abs(x) > 0.5 else 0.0, 1.0),
    "ELU": (_elu(1.75), 1.75),
    "CELU": (_elu(1.0), 1.0),
    "SELU": (
        lambda x: 1.0507009873554805 * _elu(1.6732632423543772)(x),
        1.0507009873554805 * 1.6732632423543772,
    ),
}


@dataclass(frozen=True)
class Neuron:
    """What a neuron reads, and how its activation comes about.

    Attributes:
        edges: what paths come from.
        bias: an edge of its own, from nothing.
        function: of what it sums up; ``None`` for the sum.
        size: the largest size of its activations.
        factors: neurons whose values multiply: one for all edges, or one for each.
        inside: whether it only serves a gate, so that no path ends here.
    """

    edges: tuple[Edge, ...] = ()
    bias: tuple[float, Entry] | None = None
    function: Callable[[float], float] | None = None
    size: float = 1.0
    factors: tuple[int, ...] = ()
    inside: bool = False


@dataclass
class Paths:
    """A network of single neurons, each of which reads earlier ones."""

    neurons: list[Neuron] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def add(self, edges: Iterable[Edge] = (), **options: object) -> int:
        """Append a neuron and return its number."""
        self.neurons.append(Neuron(tuple(edges), **options))  # type: ignore[arg-type]
        return len(self.neurons) - 1

    def add_input(self) -> int:
        self.inputs.append(self.add())
        return self.inputs[-1]

    # A run -----------------------------------------------------------------------------

    def run(self, x: Sequence[float]) -> tuple[list[float], list[list[float]]]:
        """Values of all neurons, and for each edge of each (and its bias) the activation over c."""
        given = dict(zip(self.inputs, x, strict=True))
        values: list[float] = []
        activations: list[list[float]] = []
        for number, neuron in enumerate(self.neurons):
            if number in given:
                values.append(float(given[number]))
                activations.append([])
                continue
            terms = [values[source] * weight for source, weight, _ in neuron.edges]
            terms += [neuron.bias[0]] if neuron.bias else []
            if neuron.function is None:
                gates = [values[k] for k in neuron.factors] or [1.0]
                each = gates * len(terms) if len(gates) == 1 else gates
                values.append(math.fsum(a * b for a, b in zip(each, terms, strict=True)))
            else:
                total = math.fsum(terms)
                values.append(neuron.function(total))
                each = [values[-1] / total if total else 0.0] * len(terms)
            activations.append([a / neuron.size for a in each])
        return values, activations

    def forward(self, x: Sequence[float]) -> np.ndarray:
        values, _ = self.run(x)
        return np.array([values[k] for k in self.outputs])

    # Paths -----------------------------------------------------------------------------

    def count(self) -> int:
        """How many paths there are, without listing them."""
        counts: list[int] = []
        for number, neuron in enumerate(self.neurons):
            starts = int(number in self.inputs) + int(neuron.bias is not None)
            below = sum(counts[source] for source, _, _ in neuron.edges)
            counts.append(0 if neuron.inside else starts + below)
        return sum(counts[k] for k in self.outputs)

    def listed(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """All paths: the output they end at, and (neuron, position of the edge) along them."""
        ending: list[list[list[tuple[int, int]]]] = []
        for number, neuron in enumerate(self.neurons):
            here: list[list[tuple[int, int]]] = [[(number, -1)]] if number in self.inputs else []
            if not neuron.inside:
                for position, (source, _, _) in enumerate(neuron.edges):
                    here += [[*path, (number, position)] for path in ending[source]]
                if neuron.bias is not None:
                    here.append([(number, len(neuron.edges))])
            ending.append(here)
        return [(i, path) for i, k in enumerate(self.outputs) for path in ending[k]]

    def phi(self, paths: list, without: Entry | None = None) -> np.ndarray:
        """The lifted vector, each c multiplied in; perhaps with one entry set to zero."""
        found = []
        for _, path in paths:
            product = 1.0
            for number, position in path:
                if position >= 0:
                    weight, entry = self._weight(number, position)
                    gone = entry is not None and entry == without
                    product *= 0.0 if gone else weight * self.neurons[number].size
            found.append(product)
        return np.array(found)

    def activations(self, paths: list, x: Sequence[float]) -> np.ndarray:
        """A(theta, x): a row for each path, a column for each input and one for the biases."""
        _, each = self.run(x)
        matrix = np.zeros((len(paths), len(self.inputs) + 1))
        for row, (_, path) in enumerate(paths):
            first = path[0][0]
            column = self.inputs.index(first) if path[0][1] < 0 else len(self.inputs)
            matrix[row, column] = math.prod(each[n][p] for n, p in path if p >= 0)
        return matrix

    def _weight(self, number: int, position: int) -> tuple[float, Entry | None]:
        neuron = self.neurons[number]
        if position < len(neuron.edges):
            return neuron.edges[position][1:]
        assert neuron.bias is not None
        return neuron.bias
