"""From a model to its signed graph: what every verb does first."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxpath.capture import Captured, Given, Model, capture
from fxpath.errors import UnsupportedModelError
from fxpath.passes.fold import fold_batch_norm
from fxpath.passes.lift import lift

__all__ = ["take_in"]


def take_in(model: Model, given: Given) -> tuple[Captured, fx.GraphModule]:
    """Capture a model, fold its batch norms and write its signed graph.

    Raises:
        UnsupportedModelError: listing every operation without an exact rule.
        ValueError: for inputs that do not fit, an unknown ``until`` or ``outputs``.
    """
    captured = capture(model, given)
    try:
        fold_batch_norm(captured)
        return captured, lift(captured)
    except UnsupportedModelError as error:
        # A refusal says for which input it was made.
        raise UnsupportedModelError(replace(error.report, inputs=captured.inputs)) from error
