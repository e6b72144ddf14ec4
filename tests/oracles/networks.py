"""A declarative network, as an `nn.Module` and as an explicit graph of neurons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracles.enumeration import ONE, Dag, Weight
from tests.oracles.layers import Layer, module_of


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
            made = module_of(layer, tensors[layer.inputs[0]].shape[1:])
            if made is not None:
                self.add_module(f"op{len(tensors)}", made.double().eval())
            tensors.append(self._run(layer, len(tensors), [tensors[i] for i in layer.inputs]))
        self.tensor_shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        self._draw(np.random.default_rng(net.seed))
        self.eval()

    def _draw(self, rng: np.random.Generator) -> None:
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
