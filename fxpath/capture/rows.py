"""Whether the first axis of some inputs is a batch: whether rows keep apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxpath.capture.inputs import Call, batch_size, first_sample
from fxpath.private import tree_leaves, tree_map_only


def rows_meet(model: Callable[[Call], Any], call: Call, batch_dim: int) -> bool:
    """Whether the output for the first row depends on the others, or has no row of its own."""
    generator = torch.Generator().manual_seed(0)
    number = batch_size(call, batch_dim)

    def other(x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.dim() or x.shape[batch_dim] == 1:
            return x
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return torch.cat(
            [x.narrow(batch_dim, 0, 1), drawn.narrow(batch_dim, 1, number - 1)], batch_dim
        )

    results = [_outputs(model(tree_map_only(Tensor, other, call))) for _ in range(2)]
    for one, two in zip(*results, strict=True):
        if not one.dim() or one.shape[batch_dim] != number:
            return True
        first, second = (y.narrow(batch_dim, 0, 1) for y in (one, two))
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True):
            return True
    return False


def same_row(model: Callable[[Call], Any], call: Call, batch_dim: int) -> bool:
    """Whether one sample alone gives what it gives within its batch."""
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    batch = tree_map_only(Tensor, drawn, call)
    number = batch_size(call, batch_dim)
    together, alone = _outputs(model(batch)), _outputs(model(first_sample(batch, batch_dim)))
    return all(
        many.dim() > 0
        and many.shape[batch_dim] == number
        and many.narrow(batch_dim, 0, 1).shape == one.shape
        and torch.allclose(many.narrow(batch_dim, 0, 1), one, rtol=1e-4, atol=1e-6, equal_nan=True)
        for many, one in zip(together, alone, strict=True)
    )


def _outputs(result: Any) -> list[Tensor]:
    return [y for y in tree_leaves(result) if isinstance(y, Tensor)]
