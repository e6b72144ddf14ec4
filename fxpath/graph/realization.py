"""The realization R_theta: what the network computes, read off its lifted graph in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph.interpret import Interpretation, Weighing
from fxpath.graph.refusal import UnfollowedGate
from fxpath.graph.squashes import squash_of


def realization(
    lifted: fx.GraphModule, tensors: Mapping[str, Tensor]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """R_theta as a function: inputs as captured, in the order of the sources -> outputs in a row.

    Args:
        lifted: a lifted graph.
        tensors: the model's tensors by the names of its placeholders.
    """
    double = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}

    def run(inputs: Sequence[Tensor]) -> Tensor:
        outputs: list[Tensor] = Realization(lifted, inputs).run(double)
        return torch.cat([y.flatten() for y in outputs])

    return run


class Realization(Interpretation):
    """Runs a lifted graph: its values are those of the neurons, whatever the model's own format.

    They differentiate, and run under ``torch.func.vmap``.
    """

    activation = Tensor

    def __init__(self, lifted: fx.GraphModule, inputs: Sequence[Tensor] | None = None) -> None:
        """Feed ``inputs`` to the sources of ``lifted`` in their order; zeros by default."""
        super().__init__(lifted, torch.float64)
        self._inputs = None if inputs is None else iter(inputs)

    def outside(self, target: Any, args: Any, kwargs: Any) -> Any:
        # What only moves entries does so with values, of weights and activations alike.
        return target(*args, **kwargs)

    def source(self, shape: Sequence[int]) -> Tensor:
        return self.filled(shape, 0.0) if self._inputs is None else next(self._inputs)

    def constant(self, bias: Tensor) -> Tensor:
        return bias

    def lifted(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)

    def weigh(self, x: Tensor, weight: Tensor, bias: Tensor | None, run: Weighing) -> Tensor:
        y = run(x, weight)
        return y if bias is None else y + bias

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def total(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def absolute(self, x: Tensor) -> Tensor:
        return x.abs()

    def negative(self, x: Tensor) -> Tensor:
        return -x

    def squash(self, x: Tensor, name: str, numbers: Sequence[float], size: float) -> Tensor:
        found = squash_of(name, tuple(numbers))
        assert found is not None
        return found.function(x / size)

    def gate(self, x: Tensor, factor: Tensor | None, size: float) -> Tensor:
        if factor is None:
            raise UnfollowedGate(self.node)
        return x * (factor / size)

    def slope(self, x: Tensor, a: Tensor | float) -> Tensor:
        return torch.where(x > 0, x, x * a)

    def clamp(self, x: Tensor, lo: float | None, hi: float | None) -> Tensor:
        return x if lo is hi is None else x.clamp(lo, hi)

    def maximum(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, y)

    def minimum(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x, y)

    def pool(
        self, x: Tensor, dim: int, index: Tensor, weight: Tensor, ranks: Sequence[int]
    ) -> Tensor:
        windows = x.movedim(dim, -1).index_select(-1, index.flatten())
        found = picked(windows.unflatten(-1, tuple(index.shape)), weight != 0, ranks)
        return found.movedim(-1, dim)


def picked(windows: Tensor, used: Tensor, ranks: Sequence[int]) -> Tensor:
    """The entries of given ranks: 1 is the largest of a window, -1 the smallest.

    Args:
        windows: ``[..., windows, taps]``.
        used: which taps there are, ``[windows, taps]``.
        ranks: of each window, or one for all.
    """
    rank = torch.tensor(ranks, device=used.device).expand(len(used))
    unused = torch.where(rank > 0, -torch.inf, torch.inf)[:, None].to(windows.dtype)
    there = torch.where(used, windows, unused)
    if set(ranks) == {1} or set(ranks) == {-1}:
        return (there.max(-1) if ranks[0] == 1 else there.min(-1)).values
    ordered = there.sort(-1, descending=True).values
    place = torch.where(rank > 0, rank - 1, rank + used.shape[1])
    return ordered.gather(-1, place[:, None].expand(*ordered.shape[:-1], 1))[..., 0]
