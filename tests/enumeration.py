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

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


# From a description to a module and to a graph ----------------------------------------


@dataclass(frozen=True)
class Layer:
    """One operation: its name, the tensors it reads (by number), and its options.

    ============ ==================================================================================
    ``linear``   ``out, bias``; on the last axis
    ``conv``     ``out, kernel, stride, padding, dilation, groups, bias``; one or two spatial axes
    ``batchnorm``  ``affine``; over the first axis
    ``relu``     no options
    ``maxpool``  ``kernel, stride, padding, dilation, ceil``
    ``avgpool``  ``kernel, stride, padding, ceil, include_pad``
    ``flatten``  no options
    ``add``, ``sub``, ``maximum``  two tensors of one shape
    ``cat``      any number of tensors, along the first axis
    ============ ==================================================================================

    ``use=j`` in the options of a layer with parameters takes the module of layer j again.
    """

    op: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Net:
    """A network: shapes of its inputs (no batch axis), layers, and the tensors it returns.

    Tensors are numbered: the inputs first, then the result of each layer.
    """

    input_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    seed: int = 0

    def module(self) -> NetModule:
        """The network as a float64 `nn.Module` in eval mode, some of whose weights are 0."""
        return NetModule(self)

    def dag(self, module: NetModule) -> Dag:
        """The network as an explicit graph, with the parameters of `module`."""
        return _Expansion(self, module).dag


def parameter_owner(net: Net, number: int) -> int:
    """The number of the tensor that the module of layer `number` is named after."""
    return net.layers[number - len(net.input_shapes)].options.get("use", number)


class NetModule(nn.Module):
    """The `nn.Module` of a `Net`; the module that makes tensor i is called ``op<i>``."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        tensors = [torch.zeros(1, *shape, dtype=torch.float64) for shape in net.input_shapes]
        for layer in net.layers:
            made = self._make(layer, [tensors[i] for i in layer.inputs])
            if made is not None:
                self.add_module(f"op{len(tensors)}", made.double().eval())
            tensors.append(self._run(layer, len(tensors), [tensors[i] for i in layer.inputs]))
        self.tensor_shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        self._randomize(np.random.default_rng(net.seed))
        self.eval()

    def _randomize(self, rng: np.random.Generator) -> None:
        for parameter in self.parameters():
            shape = tuple(parameter.shape)
            values = rng.uniform(0.3, 1.6, shape) * rng.choice([-1, 1], shape)
            # The zeros: a share of 0 must come out as 0 and not as 0/0.
            values *= rng.random(shape) > 0.15
            parameter.data = torch.tensor(values, dtype=torch.float64)
        for name, buffer in self.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.tensor(rng.uniform(-1, 1, tuple(buffer.shape))))
            elif name.endswith("running_var"):
                buffer.copy_(torch.tensor(rng.uniform(0.3, 2, tuple(buffer.shape))))

    @staticmethod
    def _make(layer: Layer, inputs: Sequence[Tensor]) -> nn.Module | None:
        options = dict(layer.options)
        if "use" in options:
            return None
        shape = inputs[0].shape[1:]
        rank = len(shape) - 1
        if layer.op == "linear":
            return nn.Linear(shape[-1], options["out"], bias=options["bias"])
        if layer.op == "conv":
            convolution = (nn.Conv1d, nn.Conv2d)[rank - 1]
            return convolution(
                shape[0],
                options["out"],
                options["kernel"],
                stride=options.get("stride", 1),
                padding=options.get("padding", 0),
                dilation=options.get("dilation", 1),
                groups=options.get("groups", 1),
                bias=options["bias"],
            )
        if layer.op == "batchnorm":
            normalization = nn.BatchNorm2d if rank == 2 else nn.BatchNorm1d
            return normalization(shape[0], affine=options.get("affine", True))
        if layer.op == "relu":
            return nn.ReLU()
        if layer.op == "maxpool":
            pooling = (nn.MaxPool1d, nn.MaxPool2d)[rank - 1]
            return pooling(
                options["kernel"],
                stride=options.get("stride", 1),
                padding=options.get("padding", 0),
                dilation=options.get("dilation", 1),
                ceil_mode=options.get("ceil", False),
            )
        if layer.op == "avgpool":
            averaging = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1]
            return averaging(
                options["kernel"],
                stride=options.get("stride", 1),
                padding=options.get("padding", 0),
                ceil_mode=options.get("ceil", False),
                count_include_pad=options.get("include_pad", True),
            )
        return None

    def _run(self, layer: Layer, number: int, inputs: Sequence[Tensor]) -> Tensor:
        if layer.op == "flatten":
            return torch.flatten(inputs[0], 1)
        if layer.op == "add":
            return inputs[0] + inputs[1]
        if layer.op == "sub":
            return inputs[0] - inputs[1]
        if layer.op == "maximum":
            return torch.maximum(inputs[0], inputs[1])
        if layer.op == "cat":
            return torch.cat(list(inputs), dim=1)
        return self.get_submodule(f"op{layer.options.get('use', number)}")(inputs[0])

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs of the net: a tensor, or a tuple if there are several."""
        tensors = list(inputs)
        for layer in self.net.layers:
            tensors.append(self._run(layer, len(tensors), [tensors[i] for i in layer.inputs]))
        outputs = tuple(tensors[i] for i in self.net.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


class _Expansion:
    """Builds the graph of a net neuron by neuron; a tensor is an array of neuron numbers."""

    def __init__(self, net: Net, module: NetModule) -> None:
        self.net = net
        self.dag = Dag()
        self.state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
        self.eps = {
            name: part.eps
            for name, part in module.named_modules()
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))
        }
        self.tensors: list[np.ndarray] = []
        for shape in net.input_shapes:
            tensor = np.empty(shape, dtype=int)
            for position in np.ndindex(*shape):
                tensor[position] = self.dag.add_input()
            self.tensors.append(tensor)
        for layer in net.layers:
            inputs = [self.tensors[i] for i in layer.inputs]
            self.tensors.append(getattr(self, layer.op)(layer, *inputs))
        for number in net.outputs:
            for neuron in self.tensors[number].ravel():
                self.dag.add_output(int(neuron))

    # Maps with parameters. What an edge carries is the value after folding.

    def linear(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """y[..., o] = sum_i w[o, i] x[..., i] + b[o]."""
        weight, scale, bias = self._folded_map(foldable=x.ndim == 1)
        out = np.empty((*x.shape[:-1], len(weight)), dtype=int)
        for position in np.ndindex(*out.shape):
            *lead, o = position
            edges = [
                (int(x[(*lead, i)]), self._named("weight", (o, i), weight[o, i] * scale[o]))
                for i in range(x.shape[-1])
            ]
            out[position] = self.dag.add("identity", edges, bias[o])
        return out

    def conv(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """y[o, p] = sum_{i, t} w[o, i, t] x[i, stride p + dilation t - padding] + b[o]."""
        weight, scale, bias = self._folded_map(foldable=True)
        options = layer.options
        rank = x.ndim - 1
        groups = options.get("groups", 1)
        kernel = _tuple(options["kernel"], rank)
        windows = [
            _windows(size, *axis, ceil=False)
            for size, axis in zip(
                x.shape[1:],
                zip(
                    kernel,
                    _tuple(options.get("stride", 1), rank),
                    _tuple(options.get("padding", 0), rank),
                    _tuple(options.get("dilation", 1), rank),
                    strict=True,
                ),
                strict=True,
            )
        ]
        out = np.empty((len(weight), *[len(axis) for axis in windows]), dtype=int)
        per_group_in, per_group_out = x.shape[0] // groups, len(weight) // groups
        for position in np.ndindex(*out.shape):
            o, place = position[0], position[1:]
            edges = []
            for i in range(per_group_in):
                channel = (o // per_group_out) * per_group_in + i
                for tap in np.ndindex(*kernel):
                    source = tuple(
                        axis[p][t] for axis, p, t in zip(windows, place, tap, strict=True)
                    )
                    if all(0 <= s < size for s, size in zip(source, x.shape[1:], strict=True)):
                        index = (o, i, *tap)
                        value = weight[index] * scale[o]
                        edges.append(
                            (int(x[(channel, *source)]), self._named("weight", index, value))
                        )
            out[position] = self.dag.add("identity", edges, bias[o])
        return out

    def batchnorm(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """y[c] = gamma[c] / sigma[c] (x[c] - mu[c]) + beta[c]; nothing if it is folded."""
        if self._folds_into_its_input(len(self.tensors)):
            return x
        number = len(self.tensors)
        name = f"op{parameter_owner(self.net, number)}"
        scale, shift = self._normalization(number)
        self.dag.shapes[f"{name}.weight"] = self.dag.shapes[f"{name}.bias"] = scale.shape
        out = np.empty_like(x)
        for position in np.ndindex(*x.shape):
            c = position[0]
            edge = Weight(float(scale[c]), (f"{name}.weight", (c,)))
            bias = Weight(float(shift[c]), (f"{name}.bias", (c,)))
            out[position] = self.dag.add("identity", [(int(x[position]), edge)], bias)
        return out

    def _folded_map(
        self, foldable: bool
    ) -> tuple[np.ndarray, np.ndarray, list[Weight] | list[None]]:
        """Weight, scale and biases per output channel of the map that makes the next tensor."""
        number = len(self.tensors)
        name = f"op{parameter_owner(self.net, number)}"
        weight = self.state[f"{name}.weight"]
        own_bias = self.state.get(f"{name}.bias")
        self.dag.shapes[f"{name}.weight"] = weight.shape
        channels = range(len(weight))
        reader = self._only_reader(number)
        if foldable and reader is not None and self._folds_into_its_input(reader):
            scale, shift = self._normalization(reader)
            total = shift + (scale * own_bias if own_bias is not None else 0.0)
            bias_name = f"op{parameter_owner(self.net, reader)}.bias"
            self.dag.shapes[bias_name] = scale.shape
            return weight, scale, [Weight(float(total[c]), (bias_name, (c,))) for c in channels]
        scale = np.ones(len(weight))
        if own_bias is None:
            return weight, scale, [None for _ in channels]
        self.dag.shapes[f"{name}.bias"] = own_bias.shape
        return weight, scale, [Weight(float(own_bias[c]), (f"{name}.bias", (c,))) for c in channels]

    def _named(self, kind: str, index: tuple[int, ...], value: float) -> Weight:
        owner = parameter_owner(self.net, len(self.tensors))
        return Weight(float(value), (f"op{owner}.{kind}", index))

    def _normalization(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        name = f"op{parameter_owner(self.net, number)}"
        sigma = np.sqrt(self.state[f"{name}.running_var"] + self.eps[name])
        scale = self.state.get(f"{name}.weight", 1.0) / sigma
        shift = self.state.get(f"{name}.bias", 0.0) - scale * self.state[f"{name}.running_mean"]
        return scale, shift

    def _only_reader(self, number: int) -> int | None:
        readers = [
            len(self.net.input_shapes) + i
            for i, layer in enumerate(self.net.layers)
            for source in layer.inputs
            if source == number
        ]
        return readers[0] if len(readers) == 1 and number not in self.net.outputs else None

    def _folds_into_its_input(self, number: int) -> bool:
        layer = self.net.layers[number - len(self.net.input_shapes)]
        if layer.op != "batchnorm" or self._only_reader(layer.inputs[0]) != number:
            return False
        source = layer.inputs[0] - len(self.net.input_shapes)
        if source < 0:
            return False
        producer = self.net.layers[source]
        # Channels of a linear map are its last axis, those of batch norm the first.
        on_a_vector = producer.op == "linear" and self.tensors[producer.inputs[0]].ndim == 1
        return producer.op == "conv" or on_a_vector

    # Operations without parameters.

    def relu(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """A ReLU neuron per entry."""
        return self._each(x.shape, lambda p: self.dag.add("relu", [(int(x[p]), ONE)]))

    def maxpool(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """A 1-max-pool neuron per window; padding is not an antecedent."""

        def pool(inside: list[int], _: int) -> int:
            return self.dag.add("pool", [(neuron, ONE) for neuron in inside])

        return self._pool(layer, x, pool)

    def avgpool(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """An identity neuron per window, with constant edges."""

        def average(inside: list[int], padded: int) -> int:
            count = padded if layer.options.get("include_pad", True) else len(inside)
            return self.dag.add("identity", [(neuron, Weight(1 / count)) for neuron in inside])

        return self._pool(layer, x, average)

    def _pool(self, layer: Layer, x: np.ndarray, make: Any) -> np.ndarray:
        options = layer.options
        rank = x.ndim - 1
        padding = _tuple(options.get("padding", 0), rank)
        windows = [
            _windows(
                x.shape[1 + axis],
                _tuple(options["kernel"], rank)[axis],
                _tuple(options.get("stride", 1), rank)[axis],
                padding[axis],
                _tuple(options.get("dilation", 1), rank)[axis],
                ceil=options.get("ceil", False),
            )
            for axis in range(rank)
        ]
        out = np.empty((x.shape[0], *[len(axis) for axis in windows]), dtype=int)
        for position in np.ndindex(*out.shape):
            axes = [axis[p] for axis, p in zip(windows, position[1:], strict=True)]
            inside, padded = [], 0
            for source in itertools.product(*axes):
                sizes = list(zip(source, x.shape[1:], padding, strict=True))
                # A window of ceil mode may hang over the padding; what hangs over isn't counted.
                padded += all(s < size + pad for s, size, pad in sizes)
                if all(0 <= s < size for s, size, _ in sizes):
                    inside.append(int(x[(position[0], *source)]))
            out[position] = make(inside, padded)
        return out

    def flatten(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """The same neurons in a row."""
        return x.reshape(-1)

    def add(self, layer: Layer, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """An identity neuron per entry."""
        return self._each(
            x.shape, lambda p: self.dag.add("identity", [(int(x[p]), ONE), (int(y[p]), ONE)])
        )

    def sub(self, layer: Layer, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """An identity neuron per entry, with an edge of -1."""
        edges = (ONE, Weight(-1.0))
        return self._each(
            x.shape,
            lambda p: self.dag.add("identity", zip((int(x[p]), int(y[p])), edges, strict=True)),
        )

    def maximum(self, layer: Layer, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """A 1-max-pool neuron per entry."""
        return self._each(
            x.shape, lambda p: self.dag.add("pool", [(int(x[p]), ONE), (int(y[p]), ONE)])
        )

    def cat(self, layer: Layer, *tensors: np.ndarray) -> np.ndarray:
        """The same neurons side by side."""
        return np.concatenate(tensors, axis=0)

    @staticmethod
    def _each(shape: tuple[int, ...], make: Any) -> np.ndarray:
        out = np.empty(shape, dtype=int)
        for position in np.ndindex(*shape):
            out[position] = make(position)
        return out


def _tuple(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _windows(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool
) -> list[list[int]]:
    """The positions that each window covers along one axis; padding lies outside the axis."""
    windows: list[list[int]] = []
    for start in itertools.count(-padding, stride):
        last = start + (kernel - 1) * dilation
        fits = last < size + padding
        # Ceil mode adds a window that starts inside if the one before leaves something over.
        hangs_over = ceil and start < size and last - stride < size + padding - 1
        if not fits and not hangs_over:
            return windows
        windows.append([start + tap * dilation for tap in range(kernel)])
        if not fits:
            return windows
    raise AssertionError("unreachable")
