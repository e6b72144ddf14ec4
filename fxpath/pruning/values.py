"""What operations with a weight read where all inputs of the network are zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.interpret import Weighing
from fxpath.graph.realization import Realization


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
    lifted: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    chosen: Callable[[str, Tensor], Tensor | None],
) -> dict[str, Reading]:
    """What they read.

    Args:
        lifted: a lifted graph.
        tensors: the model's tensors by the names of its placeholders.
        chosen: the entries to keep of what a node (by name) reads; ``None`` for no reading of it.
    """
    values = _Values(lifted, chosen)
    with torch.no_grad():
        values.run(tensors)
    return values.readings


class _Values(Realization):
    """Notes what weights meet on the way."""

    def __init__(
        self, lifted: fx.GraphModule, chosen: Callable[[str, Tensor], Tensor | None]
    ) -> None:
        super().__init__(lifted)
        self._chosen = chosen
        self.readings: dict[str, Reading] = {}

    def weigh(self, x: Tensor, weight: Tensor, bias: Tensor | None, run: Weighing) -> Tensor:
        if run.operation is not ops.scale:
            kept = self._chosen(self.node.name, x)
            if kept is not None:
                self.readings[self.node.name] = Reading(kept, weight, run)
        return super().weigh(x, weight, bias, run)
