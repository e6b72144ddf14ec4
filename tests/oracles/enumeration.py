"""A brute-force oracle: ReLU networks as explicit graphs whose paths are listed one by one.

Everything here follows the definitions of Gonon et al. (2025) to the letter, and nothing is shared
with the package: a `Dag` holds neurons and edges (Def. A.2), `Dag.paths` lists the paths that end
at an output (Def. A.3), `Dag.phi` multiplies the weights along each (Def. A.5), and
`Dag.path_magnitude` sets one coordinate to zero and compares the two lifted vectors (10).

A `Net` is a small declarative description of a network. `Net.module` makes a `torch.nn.Module` of
it and `Net.dag` an explicit graph; the two are wired independently, the graph by loops over
positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Coordinate = tuple[str, tuple[int, ...]]
"""One entry of a parameter: its name and its index."""


@dataclass(frozen=True)
class Weight:
    """The value of an edge or of a bias, and the coordinate it belongs to (None: a constant)."""

    value: float
    coordinate: Coordinate | None = None


ONE = Weight(1.0)


@dataclass(frozen=True)
class Neuron:
    """A neuron: what it applies, what it reads, its bias; pool takes the `k`-th largest."""

    kind: str
    edges: tuple[tuple[int, Weight], ...] = ()
    bias: Weight | None = None
    k: int = 1


@dataclass(frozen=True)
class Path:
    """A path p_0 -> ... -> p_d: its neurons, and the position of the edge that each step takes."""

    neurons: tuple[int, ...]
    steps: tuple[int, ...]


class Dag:
    """A ReLU network in the sense of Def. A.2; neurons are numbered in topological order."""

    def __init__(self) -> None:
        self.neurons: list[Neuron] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._table: tuple[list[Path], np.ndarray] | None = None

    def add_input(self) -> int:
        """Append an input neuron and return its number."""
        self.neurons.append(Neuron("input"))
        self.inputs.append(len(self.neurons) - 1)
        return self.inputs[-1]

    def add(
        self,
        kind: str,
        edges: Iterable[tuple[int, Weight]],
        bias: Weight | None = None,
        k: int = 1,
    ) -> int:
        """Append an identity, relu or pool neuron that reads earlier neurons; return its number.

        Two edges may join the same neurons: a path is told by its edges.
        """
        edges = tuple(edges)
        if kind not in ("identity", "relu", "pool"):
            raise ValueError(f"no such kind of neuron: {kind}")
        if any(not 0 <= source < len(self.neurons) for source, _ in edges):
            raise ValueError("an edge must start at an earlier neuron")
        if any(source in self.outputs for source, _ in edges):
            raise ValueError("an output neuron has no successors")
        if kind == "pool":
            if bias is not None or any(weight != ONE for _, weight in edges):
                raise ValueError("a pool neuron has edges of weight 1 and no bias")
            if not 1 <= k <= len(edges):
                raise ValueError(f"no {k}-th largest among {len(edges)}")
        self._table = None
        self.neurons.append(Neuron(kind, edges, bias, k))
        return len(self.neurons) - 1

    def add_output(self, neuron: int) -> int:
        """Append an output neuron, an identity by Def. A.2, that passes `neuron` on."""
        output = self.add("identity", [(neuron, ONE)])
        self.outputs.append(output)
        return output

    def coordinates(self) -> Iterator[Coordinate]:
        """Every entry of every parameter, whether or not a path runs through it."""
        for name, shape in self.shapes.items():
            for index in np.ndindex(*shape):
                yield name, index

    # Realization -----------------------------------------------------------------------

    def values(self, x: Sequence[float]) -> list[float]:
        """v(theta, x) for every neuron v."""
        if len(x) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} inputs, {len(x)} values")
        given = dict(zip(self.inputs, x, strict=True))
        values: list[float] = []
        for number, neuron in enumerate(self.neurons):
            if neuron.kind == "input":
                values.append(float(given[number]))
                continue
            terms = [values[source] * weight.value for source, weight in neuron.edges]
            if neuron.kind == "pool":
                values.append(sorted(terms, reverse=True)[neuron.k - 1])
                continue
            total = math.fsum([*terms, neuron.bias.value if neuron.bias else 0.0])
            values.append(max(total, 0.0) if neuron.kind == "relu" else total)
        return values

    def forward(self, x: Sequence[float]) -> np.ndarray:
        """R_theta(x), one entry per output neuron."""
        values = self.values(x)
        return np.array([values[output] for output in self.outputs])

    # Paths -----------------------------------------------------------------------------

    def count_paths(self) -> int:
        """The number of paths, without listing them."""
        counts: list[int] = []
        for neuron in self.neurons:
            starts = neuron.kind == "input" or neuron.bias is not None
            counts.append(int(starts) + sum(counts[source] for source, _ in neuron.edges))
        return sum(counts[output] for output in self.outputs)

    def paths(self) -> list[Path]:
        """All paths that end at an output neuron.

        A path starts at an input or at a neuron with a bias. The others of Def. A.3 start at a
        neuron without one and their coordinate of Phi is 0 whatever the weights are.
        """
        return self._enumerated()[0]

    def phi(self, without: Coordinate | None = None) -> np.ndarray:
        """Phi(theta) (Def. A.5), or Phi of theta with one coordinate set to zero."""
        weights = self._weights()
        values = [0.0 if without and w.coordinate == without else w.value for w in weights]
        return np.prod(np.array(values)[self._enumerated()[1]], axis=1)

    def ends(self) -> np.ndarray:
        """For each path the position of its last neuron among the outputs."""
        position = {output: i for i, output in enumerate(self.outputs)}
        return np.array([position[path.neurons[-1]] for path in self.paths()], dtype=int)

    def activations(self, x: Sequence[float]) -> np.ndarray:
        """The path-activation matrix A(theta, x) (Def. A.5): paths by (inputs, bias)."""
        values = self.values(x)
        column = {neuron: i for i, neuron in enumerate(self.inputs)}
        matrix = np.zeros((len(self.paths()), len(self.inputs) + 1))
        for row, path in enumerate(self.paths()):
            start = path.neurons[0]
            active = self.neurons[start].kind != "relu" or values[start] > 0
            for target, step in zip(path.neurons[1:], path.steps, strict=True):
                active = active and self._edge_is_active(target, step, values)
            matrix[row, column.get(start, len(self.inputs))] = float(active)
        return matrix

    def _edge_is_active(self, target: int, step: int, values: Sequence[float]) -> bool:
        neuron = self.neurons[target]
        if neuron.kind == "relu":
            return values[target] > 0
        if neuron.kind == "pool":
            attained = [values[source] == values[target] for source, _ in neuron.edges]
            return attained.index(True) == step
        return True

    def _weights(self) -> list[Weight]:
        """All edges and biases in a row, after a constant 1 that fills up short paths."""
        row = [ONE]
        for neuron in self.neurons:
            row += [weight for _, weight in neuron.edges]
            row += [neuron.bias] if neuron.bias else []
        return row

    def _enumerated(self) -> tuple[list[Path], np.ndarray]:
        """The paths, and the positions of their weights in `_weights`, one row per path."""
        if self._table is not None:
            return self._table
        ending: list[list[tuple[Path, tuple[int, ...]]]] = []
        position = 1
        useful = self._reach_an_output()
        for number, neuron in enumerate(self.neurons):
            here: list[tuple[Path, tuple[int, ...]]] = []
            if neuron.kind == "input":
                here.append((Path((number,), ()), ()))
            if neuron.bias is not None:
                here.append((Path((number,), ()), (position + len(neuron.edges),)))
            for step, (source, _) in enumerate(neuron.edges):
                for path, row in ending[source] if number in useful else ():
                    longer = Path((*path.neurons, number), (*path.steps, step))
                    here.append((longer, (*row, position + step)))
            position += len(neuron.edges) + (neuron.bias is not None)
            ending.append(here)
        found = [entry for output in self.outputs for entry in ending[output]]
        width = max((len(row) for _, row in found), default=0)
        rows = [(*row, *[0] * (width - len(row))) for _, row in found]
        table = np.array(rows, dtype=int).reshape(len(rows), width)
        self._table = [path for path, _ in found], table
        return self._table

    def _reach_an_output(self) -> set[int]:
        useful = set(self.outputs)
        for number in reversed(range(len(self.neurons))):
            if number in useful:
                useful.update(source for source, _ in self.neurons[number].edges)
        return useful

    # Norms and scores ------------------------------------------------------------------

    def path_norm(self, q: float = 1) -> float:
        """||Phi(theta)||_q; for q = 0 the number of paths whose coordinate is not zero."""
        sizes = np.abs(self.phi())
        if q == 0:
            return float(np.count_nonzero(sizes))
        return math.fsum(sizes**q) ** (1 / q)

    def path_magnitude(self, coordinate: Coordinate) -> float:
        """Path-Mag (10): ||Phi(theta) - Phi(theta with the coordinate set to zero)||_1."""
        return math.fsum(np.abs(self.phi() - self.phi(without=coordinate)))

    def weighted_magnitude(self, coordinate: Coordinate) -> float:
        """The right-hand side of (14): every path counts as often as it takes the coordinate."""
        takes = np.array([weight.coordinate == coordinate for weight in self._weights()])
        times = takes[self._enumerated()[1]].sum(axis=1)
        return math.fsum(times * np.abs(self.phi()))

    def takes_a_coordinate_twice(self) -> bool:
        """Whether a path runs through one coordinate more than once, so that (14) exceeds (10)."""
        weights = self._weights()
        for row in self._enumerated()[1]:
            taken = [weights[i].coordinate for i in row if weights[i].coordinate is not None]
            if len(set(taken)) < len(taken):
                return True
        return False

    def shares(self, weighted: bool = False) -> dict[str, np.ndarray]:
        """Path-Mag over path-norm for all coordinates, as arrays named like the parameters."""
        norm = self.path_norm()
        shares = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        for name, index in self.coordinates():
            magnitude = self.weighted_magnitude if weighted else self.path_magnitude
            shares[name][index] = magnitude((name, index)) / norm if norm else 0.0
        return shares


def assert_same_shares(
    actual: Mapping[str, Tensor], expected: Mapping[str, np.ndarray], rtol: float = 1e-9
) -> None:
    """Raise unless both have the same names, shapes and entries; a zero has to be a zero."""
    assert set(actual) == set(expected), f"names differ: {sorted(set(actual) ^ set(expected))}"
    for name, wanted in expected.items():
        got = actual[name].detach().to(torch.float64).cpu().numpy()
        assert got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}"
        wrong = ~(np.abs(got - wanted) <= rtol * np.abs(wanted))
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(f"{name}{list(index)}: {got[index]!r}, expected {wanted[index]!r}")
