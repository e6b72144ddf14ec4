"""The logarithm of the path-norm as one autograd function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxpath.graph.static import evaluated
from fxpath.passes.derive import leaves
from fxpath.program.flat import Flat


class _Log(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, log: Tensor, gradients: Sequence[Tensor], *lifted: Tensor) -> Tensor:
        """``log``; ``gradients`` are those by each of ``lifted``."""
        ctx.save_for_backward(*gradients)
        return log.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The reverse half of the graph has run already."""
        return None, None, *(g * grad.to(g.dtype) for g in ctx.saved_tensors)


def log_of(
    flat: Flat,
    live: Mapping[str, Tensor],
    dtype: torch.dtype,
    log: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """``log ||Phi||_q^q``, differentiable by the tensors in ``live``.

    Args:
        flat: the graph that found it.
        live: the model's tensors by placeholder.
        dtype: number format of the gradients.
        log: the number itself.
        gradients: by each leaf of the graph.
    """
    found = leaves(flat.module)
    values = dict(evaluated(flat.module, live, [raw for _, raw, _ in found], attached=True))
    lifted = [lift(values[raw], dtype, flat.setting.q) for _, raw, lift in found]
    result: Tensor = _Log.apply(log, gradients, *lifted)
    return result
