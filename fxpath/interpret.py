"""Interpretations of a lifted graph: what each of its operations does to a value.

:class:`Interpretation` walks the graph and names what has to be said; :class:`PathNorm` says it for
the path-norm with a running scale, :class:`Support` for the pattern of non-zero entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpath import ops

__all__ = ["Interpretation", "PathNorm", "Scaled", "Support", "Total", "power"]


def power(value: Tensor, q: float) -> Tensor:
    """``|value| ** q`` with 0 ** 0 = 0, which counts non-zero paths for q = 0."""
    if q == 1:
        return value.abs()
    if q == 0:
        return (value != 0).to(value.dtype)
    return value.abs().pow(q)


class Interpretation:
    """Runs a lifted graph; subclasses implement one method per operation of the vocabulary.

    A method is called like the function of :mod:`fxpath.ops` whose name it bears.  Activations are
    of whatever type :meth:`is_activation` recognizes; weights, and all that is computed from the
    model's tensors alone, are plain tensors.  Operations outside the vocabulary only move entries,
    and go to :meth:`move`.
    """

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
        for node in self.module.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "placeholder":
                env[node] = tensors[node.target]
            elif node.op == "get_attr":
                env[node] = self._constants[node.target].to(self.device)
            elif node.op == "output":
                return args[0]
            else:
                self.node = node
                env[node] = self._call(node.target, args, kwargs)
            for done in self._last_use.get(node, ()):
                del env[done]
        raise AssertionError("a graph ends with its output")

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = target.__name__
        method = getattr(self, name, None) if getattr(ops, name, None) is target else None
        if method is not None:
            return method(*args, **kwargs)
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if any(self.is_activation(a) for a in flat):
            return self.move(target, *args)
        return target(*args, **kwargs)

    def is_activation(self, value: Any) -> bool:
        """Whether a value is an activation of this interpretation."""
        raise NotImplementedError

    def move(self, target: Callable[..., Tensor], *args: Any) -> Any:
        """An operation that only moves entries."""
        raise NotImplementedError


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


@dataclass(frozen=True)
class Scaled:
    """The tensor ``mantissa * 2 ** exponent``; ``exponent`` is a 0-d int32 tensor."""

    mantissa: Tensor
    exponent: Tensor


@dataclass(frozen=True)
class Total:
    """``||Phi||_q^q = mantissa * 2 ** exponent``; 0-d tensors, float64 and int32."""

    mantissa: Tensor
    exponent: Tensor

    def log(self) -> Tensor:
        """Natural logarithm, 0-d float64; -inf with gradient 0 where the norm is 0."""
        # The logarithm of 0 is replaced before it is taken, so that its gradient is not NaN.
        empty = self.mantissa == 0
        log = torch.where(empty, torch.ones_like(self.mantissa), self.mantissa).log()
        log = log + self.exponent.double() * math.log(2)
        return torch.where(empty, torch.full_like(log, -math.inf), log)


@dataclass
class Range:
    """What a run saw of its own range, to tell whether a number format sufficed."""

    smallest: list[Tensor] = field(default_factory=list)
    zeros: list[Tensor] = field(default_factory=list)


class PathNorm(Interpretation):
    """log ||Phi(theta)||_q^q, with a running power-of-two scale in every tensor.

    The scales are constants for differentiation.  With ``leaves`` the entries of theta are
    collected as leaves of the autograd graph, so that ``leaf * grad(log norm, leaf)`` are the
    shares (14).
    """

    def __init__(
        self, module: fx.GraphModule, dtype: torch.dtype, q: float = 1.0, leaves: bool = False
    ) -> None:
        """See :class:`Interpretation`; ``leaves`` asks for leaves instead of live parameters."""
        super().__init__(module, dtype, q)
        self.leaves: dict[str, list[Tensor]] | None = {} if leaves else None
        self.range = Range()

    def is_activation(self, value: Any) -> bool:
        return isinstance(value, Scaled)

    # -- weights ----------------------------------------------------------------------------------

    def power(self, value: Tensor) -> Tensor:
        """``|value| ** q`` in the number format of this run."""
        return power(value.to(self.dtype), self.q)

    def folded_weight(self, weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
        return ops.folded_weight(weight.to(self.dtype), factor, axis, groups)

    def coordinate(self, value: Tensor, name: str) -> Tensor:
        """Entries of theta."""
        lifted = self.power(value)
        if self.leaves is not None:
            lifted = lifted.detach().requires_grad_()
            self.leaves.setdefault(name, []).append(lifted)
        return lifted

    def coefficient(self, value: Tensor) -> Tensor:
        """Architecture: no leaf."""
        return self.power(value)

    # -- activations ------------------------------------------------------------------------------

    def rescale(self, mantissa: Tensor, exponent: Tensor) -> Scaled:
        """Bring the largest entry of a new tensor into [0.5, 1), and note its range."""
        values = mantissa.detach()
        largest = values.amax()
        occupied = torch.where(values > 0, values, torch.inf)
        self.range.smallest.append((occupied.amin() / largest).double())
        self.range.zeros.append((values <= 0).sum())
        step = self._magnitude(largest)
        return Scaled(mantissa * torch.exp2(-step.to(self.dtype)), exponent + step)

    def _magnitude(self, largest: Tensor) -> Tensor:
        """Exponent of a number, as far as one power of two in this format can undo it."""
        limit = 1000 if self.dtype == torch.float64 else 120
        return torch.frexp(largest)[1].clamp(-limit, limit)

    def align(self, values: list[Scaled]) -> tuple[list[Tensor], Tensor]:
        """Mantissas of several tensors at their largest common exponent; all-zero ones adapt."""
        largest = [v.mantissa.detach().amax() for v in values]
        tops = torch.stack(
            [v.exponent + self._magnitude(a) for v, a in zip(values, largest, strict=True)]
        )
        occupied = torch.stack(largest) > 0
        common = torch.where(occupied, tops, torch.full_like(tops, -(1 << 30))).amax()
        common = torch.where(occupied.any(), common, torch.zeros_like(common))
        exponents = torch.stack([v.exponent for v in values])
        limit = 1000 if self.dtype == torch.float64 else 120
        factors = torch.exp2((exponents - common).clamp(-2 * limit, limit).to(self.dtype))
        return [v.mantissa * factors[i] for i, v in enumerate(values)], common

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32, device=self.device)

    def _weighed(self, mantissa: Tensor, exponent: Tensor) -> Scaled:
        """A new weighted sum; where only biases are added next, the scale is taken after them."""
        if all(user.target is ops.shift for user in self.node.users):
            return Scaled(mantissa, exponent)
        return self.rescale(mantissa, exponent)

    def source(self, shape: list[int]) -> Scaled:
        return Scaled(torch.ones(tuple(shape), dtype=self.dtype, device=self.device), self._zero())

    def constant(self, bias: Tensor) -> Scaled:
        return self.rescale(bias, self._zero())

    def conv(self, x: Scaled, weight: Tensor, *spec: Any) -> Scaled:
        return self._weighed(ops.conv(x.mantissa, weight, *spec), x.exponent)

    def linear(self, x: Scaled, weight: Tensor) -> Scaled:
        return self._weighed(ops.linear(x.mantissa, weight), x.exponent)

    def matmul(self, x: Scaled, weight: Tensor, weight_first: bool) -> Scaled:
        return self._weighed(ops.matmul(x.mantissa, weight, weight_first), x.exponent)

    def einsum(self, x: Scaled, weight: Tensor, equation: str) -> Scaled:
        return self._weighed(ops.einsum(x.mantissa, weight, equation), x.exponent)

    def scale(self, x: Scaled | Tensor, weight: Tensor) -> Scaled | Tensor:
        if isinstance(x, Tensor):  # a coefficient in front of a weight
            return x * weight
        return self._weighed(x.mantissa * weight, x.exponent)

    def shift(self, x: Scaled, bias: Tensor) -> Scaled:
        return self.add(x, Scaled(bias, self._zero()))

    def slope(self, x: Scaled, a: Tensor | float) -> Scaled:
        if not isinstance(a, Tensor):
            return Scaled(x.mantissa * max(1.0, abs(a)) ** self.q, x.exponent)
        factor = a.to(self.dtype).abs().clamp(min=1) ** self.q
        return self.rescale(x.mantissa * factor, x.exponent)

    def along(self, x: Scaled, dim: int, index: Tensor, weight: Tensor) -> Scaled:
        return Scaled(ops.along(x.mantissa, dim, index, power(weight, self.q)), x.exponent)

    def pool(self, x: Scaled, dim: int, index: Tensor, weight: Tensor) -> Scaled:
        return self.along(x, dim, index, weight)

    def mix(self, x: Scaled | Tensor, dim: int, matrix: Tensor) -> Scaled | Tensor:
        if isinstance(x, Tensor):  # a bias
            return ops.mix(x, dim, matrix)
        return Scaled(ops.mix(x.mantissa, dim, matrix), x.exponent)

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        (a, b), exponent = self.align([x, y])
        return self.rescale(a + b, exponent)

    def maximum(self, x: Scaled, y: Scaled) -> Scaled:
        return self.add(x, y)

    def clamp(self, x: Scaled, lo: float, hi: float) -> Scaled:
        bounds = sum(float(b != 0) if self.q == 0 else abs(b) ** self.q for b in (lo, hi))
        return self.shift(x, torch.full((), bounds, dtype=self.dtype, device=self.device))

    def move(self, target: Callable[..., Tensor], *args: Any) -> Scaled:
        if isinstance(args[0], Scaled):
            return Scaled(target(args[0].mantissa, *args[1:]), args[0].exponent)
        pieces, exponent = self.align(list(args[0]))
        return self.rescale(target(pieces, *args[1:]), exponent)

    def total(self, outputs: list[Scaled]) -> Total:
        """The sum over all output neurons."""
        sums = [self.rescale(x.mantissa.sum(), x.exponent) for x in outputs]
        mantissas, exponent = self.align(sums)
        return Total(torch.stack(mantissas).double().sum(), exponent)

    # -- range ------------------------------------------------------------------------------------

    def smallest(self) -> Tensor:
        """Smallest ratio of a non-zero entry to the largest one in its tensor; 0-d float64."""
        return torch.stack(self.range.smallest).amin()

    def zeros(self) -> Tensor:
        """Number of entries that came out as zero, over all tensors; 0-d int64."""
        return torch.stack(self.range.zeros).sum()


class Support(PathNorm):
    """The pattern of non-zero entries: which neurons some non-zero path reaches.

    Its count of zeros is the one that exact arithmetic has, so that a larger count in a run of
    :class:`PathNorm` tells that something underflowed.
    """

    def power(self, value: Tensor) -> Tensor:
        return (value != 0).to(self.dtype)

    def rescale(self, mantissa: Tensor, exponent: Tensor) -> Scaled:
        self.range.smallest.append(torch.ones((), dtype=torch.float64, device=self.device))
        self.range.zeros.append((mantissa <= 0).sum())
        return Scaled((mantissa > 0).to(self.dtype), self._zero())

    def align(self, values: list[Scaled]) -> tuple[list[Tensor], Tensor]:
        return [value.mantissa for value in values], self._zero()
