"""What passes are told besides the graph that they rewrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from fxpath.model import Captured


@dataclass(frozen=True)
class Setting:
    """Whose network it is, and for which norm.

    Attributes:
        captured: the model as captured: names of tensors, and what they hold.
        q: exponent of the path-norm.
        effective: whether gradients by effective parameters are asked for, those that are 0
            included: a batch norm that is folded into a weight stays a part of it, where a factor
            behind it would be faster.
    """

    captured: Captured
    q: float = 1.0
    effective: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model's tensors are."""
        return next((t.device for t in self.captured.live().values()), torch.device("cpu"))


#: Every pass takes a graph module, which it leaves as it is, and returns another one.
Pass = Callable[[fx.GraphModule, Setting], fx.GraphModule]
