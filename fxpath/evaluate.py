"""One run of a lifted graph: the norm, its range, and its gradient; eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import make_fx

from fxpath.interpret import PathNorm, Total

__all__ = ["Compiled", "Run", "evaluate"]


#: Entries from which on a gradient's memory is worth being used again.
LARGE = 1 << 16


@dataclass
class Run:
    """Results of one run.

    Attributes:
        total: ||Phi||_q^q.
        smallest: smallest ratio of a non-zero entry to the largest one of its tensor, 0-d float64.
        zeros: entries that came out as zero, 0-d int64.
        shares: share of path mass through each coordinate, by name.
        leaves: |theta|^q as it was used, by name, one for each use.
    """

    total: Total
    smallest: Tensor
    zeros: Tensor
    shares: dict[str, Tensor]
    leaves: dict[str, list[Tensor]]

    def finite(self) -> bool:
        """Whether every share is a number: a gradient through a dead neuron can overflow."""
        return all(bool(share.sum().isfinite()) for share in self.shares.values())


def evaluate(
    module: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    q: float,
    scores: bool,
) -> Run:
    """Run a lifted graph eagerly, with shares if ``scores``."""
    # Only the leaves are differentiated: nothing has to be recorded between them and the model.
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return _evaluate(PathNorm(module, dtype, q, leaves=True), detached, scores)


def _evaluate(run: PathNorm, tensors: Mapping[str, Tensor], scores: bool) -> Run:
    with torch.set_grad_enabled(scores):
        total: Total = run.run(tensors)
        log = total.log()
        leaves = run.leaves or {}
        shares = _shares(log, leaves) if scores else {}
    detached = Total(total.mantissa.detach(), total.exponent)
    return Run(detached, run.smallest(), run.zeros(), shares, leaves)


def _shares(log: Tensor, leaves: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Leaf * d log / d leaf (14), summed over the uses of a coordinate."""
    flat = [leaf for uses in leaves.values() for leaf in uses]
    if not log.requires_grad:
        return {name: torch.zeros_like(uses[0]) for name, uses in leaves.items()}
    grads = iter(torch.autograd.grad(log, flat, allow_unused=True))
    shares: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, uses in leaves.items():
        for leaf in uses:
            grad = next(grads)
            share = torch.zeros_like(leaf) if grad is None else _times(grad, leaf, written)
            shares[name] = shares[name] + share if name in shares else share
    return shares


def _times(grad: Tensor, leaf: Tensor, written: set[int]) -> Tensor:
    """``grad * leaf``, in the gradient's own memory where that is large and nobody else's."""
    # Autograd hands the same tensor to both terms of a sum; while tracing there is no memory.
    if grad.numel() < LARGE or not grad.is_contiguous() or is_fake(grad):
        return grad * leaf.detach()
    address = grad.untyped_storage().data_ptr()
    if address in written or grad.untyped_storage().nbytes() != grad.nbytes:
        return grad * leaf.detach()
    written.add(address)
    return grad.mul_(leaf.detach())


class Compiled:
    """The same run through ``torch.compile``: traced once into one flat graph, then compiled."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, q: float) -> None:
        """Nothing is compiled before the first call."""
        self._module, self._dtype, self._q = module, dtype, q
        self._compiled: dict[bool, tuple[Callable[..., Any], list[str]]] = {}

    def __call__(self, tensors: Mapping[str, Tensor], scores: bool) -> Run:
        """Run, with shares if ``scores``."""
        values = [tensor.detach() for tensor in tensors.values()]
        if scores not in self._compiled:
            self._compiled[scores] = self._trace(list(tensors), values, scores)
        function, names = self._compiled[scores]
        mantissa, exponent, smallest, zeros, *shares = function(*values)
        return Run(
            Total(mantissa, exponent), smallest, zeros, dict(zip(names, shares, strict=True)), {}
        )

    def _trace(
        self, keys: list[str], values: list[Tensor], scores: bool
    ) -> tuple[Callable[..., Any], list[str]]:
        names: list[str] = []
        # Made before tracing, so that its constants are the graph's, in their final number format.
        norm = PathNorm(self._module, self._dtype, self._q, leaves=True)

        def flat(*arguments: Tensor) -> list[Tensor]:
            run = _evaluate(norm, dict(zip(keys, arguments, strict=True)), scores)
            names[:] = list(run.shares)
            total = [run.total.mantissa, run.total.exponent]
            return [*total, run.smallest, run.zeros, *run.shares.values()]

        traced = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*values)
        return torch.compile(traced, fullgraph=True, dynamic=False), names
