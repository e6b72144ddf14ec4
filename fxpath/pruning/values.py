"""What neurons compute: the signed graph run in float64, with inputs of zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.interpret import Interpretation, Weighing

__all__ = ["Reading", "read_values"]


@dataclass(frozen=True)
class Reading:
    """What an operation with a weight reads.

    Attributes:
        x: its activation, float64.
        weight: as the operation sees it, with a batch norm folded in, float64.
        apply: the operation, of an activation and a weight.
    """

    x: Tensor
    weight: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]


def read_values(
    signed: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    chosen: Callable[[str, Tensor], Tensor | None],
) -> dict[str, Reading]:
    """What operations with a weight read where all inputs of the network are zero.

    Args:
        signed: a signed graph.
        tensors: the model's tensors by the names of its placeholders.
        chosen: the entries to keep of what a node (by name) reads; ``None`` for no reading of it.
    """
    values = _Values(signed, chosen)
    with torch.no_grad():
        values.run(tensors)
    return values.readings


@dataclass(frozen=True)
class _Value:
    """An activation, float64."""

    value: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> _Value:
        """Apply a linear map."""
        return _Value(function(self.value))


class _Values(Interpretation):
    """Runs the signed graph: what the model computes, in float64 whatever its own format is."""

    activation = _Value

    def __init__(
        self, signed: fx.GraphModule, chosen: Callable[[str, Tensor], Tensor | None]
    ) -> None:
        super().__init__(signed, torch.float64)
        self._chosen = chosen
        self.readings: dict[str, Reading] = {}

    def lifted(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)

    # -- weighted sums ----------------------------------------------------------------------------

    def source(self, shape: Sequence[int]) -> _Value:
        return _Value(self.filled(shape, 0.0))

    def constant(self, bias: Tensor) -> _Value:
        return _Value(bias)

    def weigh(self, x: _Value, weight: Tensor, bias: Tensor | None, run: Weighing) -> _Value:
        if run.operation is not ops.scale:
            kept = self._chosen(self.node.name, x.value)
            if kept is not None:
                self.readings[self.node.name] = Reading(kept, weight, run)
        y = _Value(run(x.value, weight))
        return y if bias is None else self.shift(y, bias)

    # -- activations and fixed sums ---------------------------------------------------------------

    def relu(self, x: _Value) -> _Value:
        return _Value(x.value.relu())

    def absolute(self, x: _Value) -> _Value:
        return _Value(x.value.abs())

    def negative(self, x: _Value | Tensor) -> _Value | Tensor:
        return -x if isinstance(x, Tensor) else _Value(-x.value)

    def slope(self, x: _Value, a: Tensor | float) -> _Value:
        return _Value(torch.where(x.value > 0, x.value, x.value * a))

    def clamp(self, x: _Value, lo: float | None, hi: float | None) -> _Value:
        return _Value(x.value if lo is hi is None else x.value.clamp(lo, hi))

    def pool(
        self, x: _Value, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]
    ) -> _Value:
        windows = x.value.movedim(dim, -1).index_select(-1, index.flatten())
        windows = windows.unflatten(-1, tuple(index.shape))
        rank = torch.tensor(ranks, device=index.device).expand(len(index))
        unused = torch.where(rank > 0, -torch.inf, torch.inf)[:, None].to(windows.dtype)
        ordered = torch.where(weight != 0, windows, unused).sort(-1, descending=True).values
        # Rank 1 is the first of them, rank -1 the last.
        place = torch.where(rank > 0, rank - 1, rank + index.shape[1])
        picked = ordered.gather(-1, place[:, None].expand(*ordered.shape[:-1], 1))[..., 0]
        return _Value(picked.movedim(-1, dim))

    def add(self, x: _Value, y: _Value) -> _Value:
        return _Value(x.value + y.value)

    def maximum(self, x: _Value, y: _Value) -> _Value:
        return _Value(torch.maximum(x.value, y.value))

    def minimum(self, x: _Value, y: _Value) -> _Value:
        return _Value(torch.minimum(x.value, y.value))

    def join(self, pieces: list[_Value], dim: int) -> _Value:
        return _Value(torch.cat([piece.value for piece in pieces], dim))

    def total(self, outputs: list[_Value]) -> None:
        """Nothing is asked of the outputs."""
