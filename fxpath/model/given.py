"""What a caller says about a model's inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxpath.model.captured import Shape

Shapes = Shape | Sequence[Shape] | Mapping[str, Shape] | None
Inputs = Tensor | Sequence[Any] | None
Outputs = int | str | Sequence[int | str] | None


@dataclass(frozen=True)
class Given:
    """Inputs to trace a model with, and the part of it to take.

    Attributes:
        input_shape: shape of one sample, without the batch axis; a list of shapes for several
            inputs, a dict for inputs that have names.
        example_inputs: positional inputs instead of shapes; a tensor is one input.
        example_kwargs: keyword inputs, by name.
        batch_dim: the batch axis of every input, ``None`` if there is none.
        until: name of a submodule at whose output to stop.
        outputs: which outputs count, by position or key; ``None`` for all.
        gates: whether gates are taken in, for the generalised path-norm; ``None`` where that is not
            offered.
    """

    input_shape: Shapes = None
    example_inputs: Inputs = None
    example_kwargs: Mapping[str, Any] | None = None
    batch_dim: int | None = 0
    until: str | None = None
    outputs: Outputs = None
    gates: bool | None = None

    def told(self) -> dict[str, Any]:
        """The arguments for another verb; ``gates`` only if they are taken in."""
        found = dict(vars(self))
        if not self.gates:
            del found["gates"]
        return found
