"""Interpretations of a lifted graph: what each of its operations does to a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.power import power, power_of_number
from fxpath.sharding import whole

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weighing:
    """How an operation weighs: ``run(x, weight)``, without its bias.

    Attributes:
        operation: of the vocabulary.
        spec: its arguments behind activations, weights and bias.
    """

    operation: Callable[..., Tensor]
    spec: tuple[Any, ...] = ()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The weighted sums."""
        return self.operation(x, weight, None, *self.spec)


class Interpretation:
    """Runs a lifted graph on values of some kind; a subclass says what operations do to them.

    Six methods are enough: :meth:`source`, :meth:`constant`, :meth:`weigh`, :meth:`add`,
    :meth:`join` and :meth:`total`, and mostly :meth:`known` and :meth:`coordinate` too, if values
    have a method ``map`` that applies a linear map with non-negative coefficients.  All others have
    defaults in terms of these: a bias is one more neuron that is added, a maximum is a sum.

    What is computed from the model's tensors alone are plain tensors until ``coordinate`` or
    ``coefficient`` makes a weight of them.

    Attributes:
        activation: the type of activations.
        weight: the type of weights.
        node: the node that is evaluated.
    """

    activation: type
    weight: type = Tensor
    node: fx.Node

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, q: float = 1.0) -> None:
        """Interpret ``module`` in ``dtype`` for the l^q path-norm."""
        self.module = module
        self.dtype = dtype
        self.q = q
        self._last_use = _last_uses(module.graph)
        self._constants = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in module.named_buffers()
        }

    def run(self, tensors: Mapping[str, Tensor]) -> Any:
        """Evaluate on the model's tensors, by the names of the graph's placeholders."""
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        env: dict[fx.Node, Any] = {}
        methods = self.methods()
        for node in self.module.graph.nodes:
            # What is sharded is gathered for each operation that reads it.
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: whole(env[n]))
            if node.op == "placeholder":
                env[node] = tensors[node.target]
            elif node.op == "get_attr":
                env[node] = self._constants[node.target].to(self.device)
            elif node.op == "output":
                return args[0]
            else:
                self.node = node
                method = methods.get(node.target)
                found = method(*args) if method else self.outside(node.target, args, kwargs)
                env[node] = self.made(found)
            for done in self._last_use.get(node, ()):
                del env[done]
        raise AssertionError("a graph ends with its output")

    def methods(self) -> Mapping[Any, Callable[..., Any]]:
        """Operation -> the method that interprets it."""
        return {
            ops.source: self.source,
            ops.constant: self.constant,
            ops.coordinate: self.coordinate,
            ops.coefficient: self.coefficient,
            ops.normalizer: self.normalizer,
            ops.folded_weight: self.folded_weight,
            ops.folded_bias: self.folded_bias,
            ops.conv: self.conv,
            ops.contract: self.contract,
            ops.scale: self.scale,
            ops.shift: self.shift,
            ops.along: self.along,
            ops.pool: self.pool,
            ops.mix: self.mix,
            ops.slope: self.slope,
            ops.add: self.add,
            ops.maximum: self.maximum,
            ops.minimum: self.minimum,
            ops.clamp: self.clamp,
            ops.relu: self.relu,
            ops.absolute: self.absolute,
            ops.negative: self.negative,
            ops.squash: self.squash,
            ops.gate: self.gate,
            ops.total: self.total,
        }

    def made(self, value: Any) -> Any:
        """What an operation made, for those who want to note it."""
        return value

    def outside(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation outside the vocabulary."""
        first = args[0] if args else None
        if isinstance(first, (list, tuple)) and first and isinstance(first[0], self.activation):
            return self.join(list(first), args[1] % len(self.node.meta["val"].shape))
        if isinstance(first, (self.activation, self.weight)) and not isinstance(first, Tensor):
            return self.move(target, *args)
        return target(*args, **kwargs)

    # -- to be said by a subclass -----------------------------------------------------------------

    def source(self, shape: Sequence[int]) -> Any:
        """Input neurons."""
        raise NotImplementedError

    def constant(self, bias: Any) -> Any:
        """Neurons with a bias alone."""
        raise NotImplementedError

    def weigh(self, x: Any, weight: Any, bias: Any, run: Weighing) -> Any:
        """Weighted sums, and their bias if it is not ``None``."""
        raise NotImplementedError

    def add(self, x: Any, y: Any) -> Any:
        """Sums of two activations."""
        raise NotImplementedError

    def join(self, pieces: list[Any], dim: int) -> Any:
        """Activations side by side."""
        raise NotImplementedError

    def total(self, outputs: list[Any]) -> Any:
        """What becomes of the output neurons."""
        raise NotImplementedError

    # -- weights ----------------------------------------------------------------------------------

    def lifted(self, value: Tensor) -> Tensor:
        """What numbers count on a path: ``|value| ** q``."""
        return power(value.to(self.dtype), self.q)

    def known(self, value: Tensor) -> Any:
        """A weight of numbers that are lifted already."""
        return value

    def coordinate(self, value: Any, name: str) -> Any:
        """Entries of theta."""
        return self.known(self.lifted(value))

    def coefficient(self, value: Tensor) -> Any:
        """Numbers of the architecture."""
        return self.known(self.lifted(value))

    def normalizer(self, gamma: Any, var: Any, eps: float) -> Any:
        """Gamma / sigma of a frozen batch norm."""
        return ops.normalizer(gamma, var, eps)

    def folded_weight(self, weight: Any, factor: Any, axis: int, groups: int) -> Any:
        """A weight in front of a frozen batch norm."""
        return ops.folded_weight(weight, factor, axis, groups)

    def folded_bias(self, bias: Any, factor: Any, beta: Any, mean: Any) -> Any:
        """A bias in front of a frozen batch norm."""
        return ops.folded_bias(bias, factor, beta, mean)

    def times(self, weight: Any, factor: Any) -> Any:
        """A coefficient in front of a weight."""
        return weight * factor

    # -- weighted sums ----------------------------------------------------------------------------

    def conv(self, x: Any, weight: Any, bias: Any, *spec: Any) -> Any:
        """By default :meth:`weigh`."""
        return self.weigh(x, weight, bias, Weighing(ops.conv, spec))

    def contract(self, x: Any, weight: Any, bias: Any, equation: str) -> Any:
        """By default :meth:`weigh`."""
        return self.weigh(x, weight, bias, Weighing(ops.contract, (equation,)))

    def scale(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """By default :meth:`weigh`, or :meth:`times` for a weight."""
        if not isinstance(x, self.activation):
            return self.times(x, weight)
        return self.weigh(x, weight, bias, Weighing(ops.scale))

    def shift(self, x: Any, bias: Any) -> Any:
        """Biases: by default neurons that are added."""
        return self.add(x, self.constant(bias))

    # -- fixed maps -------------------------------------------------------------------------------

    def fixed(self, x: Any, function: Map) -> Any:
        """A linear map with coefficients >= 0, of an activation or a weight."""
        return function(x) if isinstance(x, Tensor) else x.map(function)

    def move(self, target: Callable[..., Tensor], x: Any, *args: Any) -> Any:
        """An operation that only moves entries."""
        return self.fixed(x, lambda value: target(value, *args))

    def along(self, x: Any, dim: int, index: Tensor, weight: Tensor) -> Any:
        """Weighted sums of positions."""
        taps = self.lifted(weight)
        return self.fixed(x, lambda value: ops.along(value, dim, index, taps))

    def mix(self, x: Any, dim: int, matrix: Tensor) -> Any:
        """The same as a matrix."""
        return self.fixed(x, lambda value: ops.mix(value, dim, matrix))

    def pool(self, x: Any, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]) -> Any:
        """k-max-pooling: by default the sum over each window."""
        return self.along(x, dim, index, weight)

    def slope(self, x: Any, a: Tensor | float) -> Any:
        """Activations 1 or a: by default the larger one of their sizes."""
        factor = ops.steepness(a, self.dtype) ** self.q
        if not isinstance(factor, Tensor) and factor == 1:
            return x
        return self.fixed(x, lambda value: value * factor)

    # -- neurons ----------------------------------------------------------------------------------

    def maximum(self, x: Any, y: Any) -> Any:
        """2-max-pooling: by default the sum."""
        return self.add(x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        """The other rank: by default the same."""
        return self.maximum(x, y)

    def clamp(self, x: Any, lo: float | None, hi: float | None) -> Any:
        """2-max-pooling against two numbers: by default biases of their sizes."""
        bounds = [Fraction(bound) for bound in ops.bound_sizes(lo, hi)]
        if not any(bounds):
            return self.relu(x)
        sizes = sum(power_of_number(bound, self.q) for bound in bounds)
        return self.shift(x, self.known(self.filled((), float(sizes))))

    def filled(self, shape: Sequence[int], value: float) -> Tensor:
        """One number everywhere."""
        return torch.full(tuple(shape), value, dtype=self.dtype, device=self.device)

    def relu(self, x: Any) -> Any:
        """Path mass ignores it."""
        return x

    def absolute(self, x: Any) -> Any:
        """Path mass ignores it."""
        return x

    def negative(self, x: Any) -> Any:
        """Path mass ignores it."""
        return x

    def squash(self, x: Any, name: str, numbers: Sequence[float], size: float) -> Any:
        """Path mass ignores it."""
        return x

    def gate(self, x: Any, factor: Any, size: float) -> Any:
        """Path mass ignores it."""
        return x


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nothing after it reads: they are freed there."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for read in node.all_input_nodes:
            last[read] = node
        last.setdefault(node, node)
    freed: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        if node.op != "output":
            freed.setdefault(node, []).append(read)
    return freed
