"""Which channels paths run through: decided on which weights are zero, not on how large they are.

No path mass is computed, so nothing under- or overflows: edges are there or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fxpath.graph import ops
from fxpath.graph.interpret import Interpretation, Weighing
from fxpath.pruning.channels import Channels


def live_channels(lifted: fx.GraphModule, tensors: Mapping[str, Tensor], found: Channels) -> Tensor:
    """Channels that a path to an output runs through, ``[numbers]``: the others have share 0.

    Such a path starts at an input or at a bias that is not zero, as a clamp's bounds are, and has
    no weight that is zero.
    """
    reach = _Reach(lifted, found, biases=True)
    with torch.enable_grad():
        total = reach.run(tensors)
        torch.autograd.grad(total, reach.leaves, allow_unused=True)
    return reach.noted


def driven_channels(
    lifted: fx.GraphModule, tensors: Mapping[str, Tensor], found: Channels
) -> Tensor:
    """Channels that a path of weights that are not zero leads to from an input, ``[numbers]``.

    All others have constant values.
    """
    reach = _Reach(lifted, found, biases=False)
    with torch.no_grad():
        reach.run(tensors)
    return reach.noted


@dataclass(frozen=True)
class _Flow:
    """An activation: 1 for neurons that are reached, else 0; float32."""

    value: Tensor


class _Settle(Function):
    """1 for each positive count, in both directions; tells which neurons are met in both."""

    @staticmethod
    def forward(ctx: Any, counts: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        """Counts are integers, up to the rounding of a convolution."""
        reached = counts > 0.5
        ctx.save_for_backward(reached)
        ctx.note = note
        return reached.to(counts.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Where the gradient is positive, an output is reached."""
        (reached,) = ctx.saved_tensors
        leads = grad > 0.5
        ctx.note(reached & leads)
        return leads.to(grad.dtype), None


class _Reach(Interpretation):
    """Runs the lifted graph on which weights are zero.

    Attributes:
        noted: flags of channels, ``[numbers]``, the last place for -1.
        leaves: where paths begin.
    """

    activation = _Flow

    def __init__(self, lifted: fx.GraphModule, found: Channels, biases: bool) -> None:
        super().__init__(lifted, torch.float32)
        self._found, self._biases = found, biases
        self.noted = torch.zeros(found.count + 1, dtype=torch.bool)
        self.leaves: list[Tensor] = []

    def _note(self, node: fx.Node, entries: Tensor) -> None:
        channels = self._found.of(node)
        for axis, size in enumerate(channels.shape):
            if size == 1:
                entries = entries.any(axis, keepdim=True)
        self.noted[channels[entries.cpu()]] = True

    def _reached(self, counts: Tensor) -> _Flow:
        note = functools.partial(self._note, self.node)
        if counts.requires_grad:
            return _Flow(_Settle.apply(counts, note))
        note(counts > 0.5)
        return _Flow((counts > 0.5).to(counts.dtype))

    def clamp(self, x: _Flow, lo: float | None, hi: float | None) -> _Flow:
        # However small a bound is, paths begin at it.
        bounded = self._biases and any(ops.bound_sizes(lo, hi))
        return self._reached(x.value + float(bounded))

    def _leaf(self, value: Tensor) -> _Flow:
        value = value.detach().clone()
        if torch.is_grad_enabled() and value.numel():
            value.requires_grad_()
            self.leaves.append(value)
        return self._reached(value)

    # -- where a path begins ----------------------------------------------------------------------

    def source(self, shape: Sequence[int]) -> _Flow:
        return self._leaf(self.filled(shape, 1.0))

    def constant(self, bias: Tensor) -> _Flow:
        return self._leaf(bias if self._biases else torch.zeros_like(bias))

    def shift(self, x: _Flow, bias: Tensor) -> _Flow:
        return self._reached(x.value + bias if self._biases else x.value + 0 * bias)

    # -- edges ------------------------------------------------------------------------------------

    def lifted(self, value: Tensor) -> Tensor:
        return _there(value)

    def normalizer(self, gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
        return torch.ones_like(var) if gamma is None else _there(gamma)

    def folded_weight(self, weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
        # The product itself may underflow.
        return ops.folded_weight(_there(weight), factor, axis, groups)

    def folded_bias(
        self, bias: Tensor | None, factor: Tensor, beta: Tensor | None, mean: Tensor
    ) -> Tensor:
        # What cancels in the sum only up to rounding is taken for a bias.
        centre = mean != 0 if bias is None else bias.double() != mean.double()
        folded = _there(centre) * factor
        return folded if beta is None else folded + _there(beta)

    def weigh(self, x: _Flow, weight: Tensor, bias: Tensor | None, run: Weighing) -> _Flow:
        y = self._reached(run(x.value, weight))
        return y if bias is None else self.shift(y, bias)

    def slope(self, x: _Flow, a: Tensor | float) -> _Flow:
        return x

    def fixed(self, x: _Flow, function: Callable[[Tensor], Tensor]) -> _Flow:
        return self._reached(function(x.value))

    def add(self, x: _Flow, y: _Flow) -> _Flow:
        return self._reached(x.value + y.value)

    def join(self, pieces: list[_Flow], dim: int) -> _Flow:
        return _Flow(torch.cat([piece.value for piece in pieces], dim))

    def total(self, outputs: list[_Flow]) -> Tensor:
        return torch.stack([output.value.sum() for output in outputs]).sum()


def _there(value: Tensor) -> Tensor:
    return (value != 0).float()
