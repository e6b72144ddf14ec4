"""Derivatives of the opaque operators, for autograd.

The lifted network is linear in each weight, so that every derivative is a product of the same kind.
A weight's own derivative is never returned: multiplied by the weight, it goes where its scores are
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# The operators are registered by being imported.
from fxpath.program import kernels as kernels

run: Any = torch.ops.fxpath


class Settle(Function):
    """Tensors at a common scale, added up or joined along an axis.

    Notes the mass of each gradient, which bounds what underflow may have lost (see
    :class:`fxpath.program.path_norm.Watch`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        masses: list[Tensor],
        scales: list[Tensor],
        weight: Tensor | None,
        axis: int,
        dim: int | None,
        *values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Result and scale: see :func:`fxpath.program.kernels.settle`."""
        settled, scale = run.settle(values, scales, weight, axis, dim)
        ctx.save_for_backward(scale, *values)
        ctx.masses, ctx.spec = masses, (weight, axis, dim)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return settled, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        """The same factors, the other way."""
        scale, *values = ctx.saved_tensors
        *grads, mass = run.settle_backward(grad, scale, values, *ctx.spec)
        ctx.masses.append(mass)
        return None, None, None, None, None, *grads


class Sum(Function):
    """The sum of all entries of several tensors."""

    @staticmethod
    def forward(ctx: Any, scales: list[Tensor], *values: Tensor) -> tuple[Tensor, Tensor]:
        """Mantissa and scale: see :func:`fxpath.program.kernels.total`."""
        mantissa, scale = run.total(values, scales)
        ctx.save_for_backward(scale, *values)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return mantissa, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        """One factor for all entries of a tensor."""
        scale, *values = ctx.saved_tensors
        return None, *run.total_backward(grad, scale, values)


class Mix(Function):
    """A fixed map along one axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, matrix: Tensor) -> Tensor:
        """See :func:`fxpath.graph.ops.mix`."""
        ctx.save_for_backward(matrix)
        ctx.dim = dim
        mixed: Tensor = run.mix(x, dim, matrix, False)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The transposed map."""
        (matrix,) = ctx.saved_tensors
        return run.mix(grad, ctx.dim, matrix, True), None, None


class Scaled(Function):
    """One edge per entry: a product with broadcasting."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``x * weight``."""
        ctx.save_for_backward(x, weight)
        product: Tensor = run.scaled(x, weight)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The other factor, summed over what was broadcast."""
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return (
            run.scaled_backward(grad, x, weight) if for_x else None,
            run.scaled_backward(grad, weight, x) if for_weight else None,
        )


class Dense(Function):
    """A linear map that streams its weight; the scores go to ``out``."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None,
        q: float,
        generated: bool,
    ) -> Tensor:
        """``x @ (|weight| ** q).T``; ``anchor`` makes it part of what is differentiated."""
        ctx.save_for_backward(x)
        ctx.weight, ctx.out, ctx.spec = weight, out, (q, generated)
        y: Tensor = run.dense(x, weight, q, generated)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradient of ``x``; scores as a side effect."""
        (x,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        gx = run.dense_backward(grad, x, ctx.weight, ctx.out, *ctx.spec, needed)
        return None, gx if needed else None, *(None,) * 4


class Window(Function):
    """A convolution that streams its weight; the scores go to ``out``."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None,
        matrices: Sequence[Tensor | None],
        extents: Sequence[int],
        groups: int,
        q: float,
        generated: bool,
    ) -> Tensor:
        """See :func:`fxpath.graph.ops.window`, with ``|weight| ** q`` for the weight."""
        y, columns = run.window(x, weight, matrices, extents, groups, q, generated)
        ctx.save_for_backward(columns)
        ctx.weight, ctx.out = weight, out
        ctx.spec = (list(matrices), list(x.shape), groups, q, generated)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradient of ``x``; scores as a side effect."""
        (columns,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        gx = run.window_backward(grad, columns, ctx.weight, ctx.out, *ctx.spec, needed)
        return None, gx if needed else None, *(None,) * 7
