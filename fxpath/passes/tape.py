"""A derived graph that is being written: steps forward, and the way back."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import products, scaling

Back = Callable[[fx.Node], None]

#: Bits by which entries may have grown since they were measured; then they are again.
SLACK = 24.0


@dataclass(frozen=True, eq=False)
class Value:
    """A lifted tensor in the derived graph.

    Attributes:
        node: its mantissa.
        shape: of that.
        scale: its exponent; ``None`` is zero.
        bits: entries are at most two to this, once they are settled.
        wanted: whether a coordinate is computed into it, so that it has a gradient.
        active: whether it is an activation, not a weight; weights have no scale.
    """

    node: fx.Node
    shape: tuple[int, ...]
    scale: fx.Node | None = None
    bits: float = 0.0
    wanted: bool = False
    active: bool = False


@dataclass(frozen=True)
class Factored:
    """A weight whose factors are multiplied with what it makes instead."""

    weight: Value
    factor: Value


@dataclass(frozen=True)
class Unsettled:
    """Weighted sums and their bias that the sum which reads them settles with its other terms.

    Attributes:
        values: the terms.
        factor: multiplies the first one, if given.
    """

    values: tuple[Value, ...]
    factor: Value | None


@dataclass(frozen=True)
class Fixed:
    """A constant of the graph, and what it holds."""

    node: fx.Node
    tensor: Tensor


@dataclass(frozen=True)
class Outer:
    """A gradient that is a product, and is not formed unless it has to be."""

    grad: fx.Node
    columns: fx.Node


class Tape:
    """A derived graph that is being written: steps forward, and how to go back.

    Attributes:
        graph: the steps.
        root: holds constants.
        backs: for each value that has a gradient, in the order of execution, its transpose, and
            whether that takes a tensor, or an :class:`Outer` as well.
        watch: whether the first witness of range is asked for, see :mod:`fxpath.graph.scaling`.
        smallest: what makes it up.
        zeros: whether tensors of zeros keep their exponents.
        masses: lists of what makes up the second one.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        q: float,
        watch: bool,
        raised: int = 0,
        zeros: bool = False,
    ) -> None:
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.dtype, self.device, self.q = dtype, device, q
        self.watch, self.raised, self.zeros = watch, raised, zeros
        self.backs: list[tuple[Value, Callable[[Any], None], bool]] = []
        self.smallest: list[fx.Node] = []
        self.masses: list[Any] = []
        self._grads: dict[Value, fx.Node | Outer] = {}

    # -- writing ----------------------------------------------------------------------------------

    def emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Append a step."""
        plain = fx.node.map_aggregate(args, lambda a: a.node if isinstance(a, Fixed) else a)
        return self.graph.call_function(function, tuple(plain))

    def item(self, made: fx.Node, index: int) -> fx.Node:
        """One of several results of a step."""
        return self.graph.call_function(operator.getitem, (made, index))

    def hold(self, tensor: Tensor, name: str) -> Fixed:
        """A constant, on the model's device and in the number format of the run."""
        kept = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
        self.root.register_buffer(name, kept)
        return Fixed(self.graph.get_attr(name), tensor)

    def made(self, node: fx.Node, like: Value, back: Back | None = None, **changes: Any) -> Value:
        """What a step made of a value, with the scale of that."""
        value = replace(like, node=node, **changes)
        if value.wanted and back is not None:
            self.backs.append((value, back, True))
        return value

    # -- gradients --------------------------------------------------------------------------------

    def give(self, value: Value, grad: fx.Node | Outer | None) -> None:
        """Add to the gradient of a value."""
        if not value.wanted or grad is None:
            return
        before = self._grads.get(value)
        if before is not None:
            both = self.formed(value, before), self.formed(value, grad)
            grad = self.emit(torch.add, *both)
        self._grads[value] = grad

    def back(self) -> None:
        """Write the way back; what no gradient reaches is passed over."""
        for value, back, formed in reversed(self.backs):
            grad = self._grads.pop(value, None)
            if grad is not None:
                back(self.formed(value, grad) if formed else grad)

    def formed(self, value: Value, grad: fx.Node | Outer) -> fx.Node:
        """The gradient of a value as a tensor."""
        if isinstance(grad, Outer):
            return self.emit(products.outer, grad.grad, grad.columns, value.node)
        return grad

    # -- scales -----------------------------------------------------------------------------------

    def settle(
        self,
        values: Sequence[Value],
        shape: Sequence[int],
        measured: Sequence[bool],
        factor: Value | None = None,
    ) -> Value:
        """The sum of some values at a common scale."""
        nodes, scales = [v.node for v in values], [v.scale for v in values]
        factors = None if factor is None else factor.node
        asked = self.watch, self.zeros
        made = self.emit(scaling.settle, nodes, scales, list(measured), factors, *asked)
        powers, shifts = self.item(made, 2), self.item(made, 3) if self.raised else None
        terms = [*values] if factor is None else [*values, factor]
        wanted = [v.wanted for v in terms]

        def back(grad: fx.Node) -> None:
            largest = self.item(made, 5)
            args = grad, nodes, powers, shifts, factors, wanted, largest
            self._hand_back(self.emit(scaling.settle_back, *args), terms)

        bits = max(1.0 if m else v.bits for v, m in zip(values, measured, strict=True))
        return self._scaled(made, shape, bits + math.log2(len(values)), any(wanted), back)

    def join(self, values: Sequence[Value], dim: int, shape: Sequence[int]) -> Value:
        """Values side by side."""
        nodes, scales = [v.node for v in values], [v.scale for v in values]
        measured = [self.grown(v.bits) for v in values]
        made = self.emit(scaling.join, nodes, scales, measured, dim, self.watch, self.zeros)
        powers, shifts = self.item(made, 2), self.item(made, 3) if self.raised else None

        def back(grad: fx.Node) -> None:
            sizes = [v.shape[dim] for v in values]
            found = self.emit(scaling.join_back, grad, sizes, powers, shifts, dim)
            self._hand_back(found, values)

        bits = max(1.0 if m else v.bits for v, m in zip(values, measured, strict=True))
        return self._scaled(made, shape, bits, any(v.wanted for v in values), back)

    def _hand_back(self, found: fx.Node, values: Sequence[Value]) -> None:
        """Note the masses that a transpose returned, and give its gradients to their values."""
        self.masses.append(self.item(found, 0))
        grads = self.item(found, 1)
        for i, value in enumerate(values):
            if value.wanted:
                self.give(value, self.item(grads, i))

    def grown(self, bits: float) -> bool:
        """Whether entries may have grown so much that they have to be measured."""
        return bits > SLACK

    def fixed(
        self, x: Value, node: fx.Node, shape: Sequence[int], gain: float, back: Back
    ) -> Value:
        """A fixed map of a value, by which entries grow at most ``gain`` times."""
        bits = x.bits + max(0.0, math.log2(gain) if gain else 0.0)
        y = self.made(node, x, back, shape=tuple(shape), bits=bits if x.active else 0.0)
        return self.settle([y], shape, [True]) if self.grown(y.bits) else y

    def _scaled(
        self, made: fx.Node, shape: Sequence[int], bits: float, wanted: bool, back: Back
    ) -> Value:
        if self.watch:
            self.smallest.append(self.item(made, 4))
        node, scale = self.item(made, 0), self.item(made, 1)
        value = Value(node, tuple(shape), scale, bits, wanted, active=True)
        if wanted:
            self.backs.append((value, back, True))
        return value
