"""torch.export, and what it says where it cannot trace a model."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxpath.capture.inputs import Call
from fxpath.errors import Problem, SupportReport, UnsupportedModelError

__all__ = ["export", "stop_at"]


def export(model: nn.Module, call: Call) -> ExportedProgram:
    """One run of torch.export.

    Raises:
        UnsupportedModelError: with the user's own line, if the model cannot be traced.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, *call, strict=False)
    except Exception as error:
        raise UnsupportedModelError(SupportReport((_capture_problem(error),))) from error


def _capture_problem(error: Exception) -> Problem:
    """What torch.export could not trace, with the user's own line."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        frames.append((path, trace.tb_lineno))
        trace = trace.tb_next
    package = __file__.rsplit("/", 1)[0]
    ours = [f for f in frames if "/torch/" not in f[0] and not f[0].startswith((package, "<"))]
    text = next(iter(str(error).strip().splitlines()), "")
    if "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        reason = f"control flow that depends on the values of activations ({text})"
        remedy = "replace the branch by tensor operations, or cut the model before it with until="
    else:
        reason = f"torch.export cannot trace the model: {type(error).__name__}: {text}"
        remedy = "check input_shape/example_inputs against a plain call of the model"
    where = f"{ours[-1][0]}:{ours[-1][1]}" if ours else "unknown"
    return Problem("torch.export.export", "(capture)", "", where, reason, remedy)


def stop_at(model: nn.Module, until: str) -> None:
    """Make ``model`` return the last output of its submodule; later operations are dead."""
    try:
        stop = model.get_submodule(until)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"until={until!r} names no module; the last ones are {', '.join(known[-5:])}"
        ) from error
    outputs: list[Any] = []
    stop.register_forward_hook(lambda module, args, output: outputs.append(output))
    forward = model.forward

    @functools.wraps(forward)
    def truncated(*args: Any, **kwargs: Any) -> Any:
        outputs.clear()
        forward(*args, **kwargs)
        if not outputs:
            raise ValueError(f"until={until!r}: this module is not called by the model's forward")
        return outputs[-1]

    model.forward = truncated
