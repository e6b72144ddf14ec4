"""A search for inputs on which two networks differ most, and the check of a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fxpath


def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """All outputs of a batch, ``[batch, outputs]``."""
    result = model(*inputs)
    tensors = result if isinstance(result, tuple) else (result,)
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


def attack(
    model: nn.Module,
    other: nn.Module,
    shapes: Sequence[Sequence[int]],
    radius: float,
    norm: float,
    seed: int,
    check: Callable[[Tensor], None],
) -> None:
    """Call ``check`` with differences of outputs: random inputs, corners, gradient ascent."""
    generator = torch.Generator().manual_seed(seed)
    points = [
        torch.rand((8, *shape), generator=generator, dtype=torch.float64) * 2 - 1
        for shape in shapes
    ]
    for x in points:
        x[:4].sign_()
    points = [(x * radius).requires_grad_() for x in points]
    for _ in range(12):
        gap = outputs(model, points) - outputs(other, points)
        check(gap.detach())
        size = torch.linalg.vector_norm(gap, norm, dim=1).sum()
        gradients = torch.autograd.grad(size, points, allow_unused=True)
        with torch.no_grad():
            for x, gradient in zip(points, gradients, strict=True):
                if gradient is not None:
                    x.add_(gradient.sign() * radius / 4).clamp_(-radius, radius)


def assert_never_above(bound: fxpath.Bound, gap: Tensor) -> None:
    """A difference of outputs, ``[batch, outputs]``, is within every bound up to rounding."""
    size = torch.linalg.vector_norm(gap, bound.norm, dim=1).max().item()
    for name, value in bound.bounds.items():
        assert size <= value * (1 + 1e-9) + 1e-10, name
    assert bool((gap.abs().amax(0) <= bound.per_output * (1 + 1e-9) + 1e-10).all())
