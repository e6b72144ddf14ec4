"""Model -> flat functional ATen graph, without touching the model.

``torch.export`` does the tracing; this module prepares what it is given (an eval-mode skeleton that
shares every tensor, example inputs of batch size 1, a cut at ``until``), and tidies what comes
back: one placeholder per tensor, no in-place operations, no training leftovers.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.export import ExportedProgram

from fxpath.capture.adopt import adopt
from fxpath.capture.copies import skeleton
from fxpath.capture.given import Given
from fxpath.capture.inputs import Call, batch_size, first_sample, from_shapes, from_values
from fxpath.capture.model import Captured, Model
from fxpath.capture.shapes import infer_input_shape
from fxpath.capture.trace import export, stop_at

__all__ = ["capture"]


def capture(
    model: Model,
    given: Given,
) -> Captured:
    """Trace a model into a flat ATen graph.

    Raises:
        ValueError: if no input shape is given and none can be inferred, or ``until`` names no
            module.
        UnsupportedModelError: if the model cannot be captured as one graph.
    """
    if isinstance(model, ExportedProgram):
        if given.until is not None:
            raise ValueError(
                "until needs a module to stop at, and an ExportedProgram has none: "
                "export the model up to there, or pass the nn.Module itself"
            )
        if _is_dynamic(model):
            # Shapes must be numbers; tracing the program once more with given inputs makes them so.
            inner = model.module()
            return adopt(export(inner, _call(inner, given)))
        return adopt(model)
    copied = skeleton(model)
    given = _with_shape(model, given)
    call = _call(copied, given)
    if given.until is not None:
        stop_at(copied, given.until)
    return adopt(export(copied, call), model)


def _with_shape(model: nn.Module, given: Given) -> Given:
    """Infer the input shape where nothing else says what the inputs are."""
    if (given.input_shape, given.example_inputs, given.example_kwargs) != (None, None, None):
        return given
    return replace(given, input_shape=infer_input_shape(model))


def _call(model: nn.Module, given: Given) -> Call:
    if given.input_shape is not None and not given.example_kwargs and given.example_inputs is None:
        return from_shapes(model, given)
    call = from_values(given)
    batch_size(call, given.batch_dim)
    return first_sample(call, given.batch_dim)


def _is_dynamic(program: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(
        isinstance(v, Tensor) and any(not isinstance(n, int) for n in v.shape) for v in values
    )
