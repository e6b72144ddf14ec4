"""Model -> flat functional ATen graph, without touching the model.

``torch.export`` does the tracing; what it is given is a stand-in of the model and one sample (the
rule is in :mod:`fxpath.capture.inputs`), and what comes back is tidied: one placeholder per tensor,
no in-place operations, no training leftovers.

Two things can keep a model from being traced on one sample of a batch.  If its rows depend on each
other (the nodes of a graph), the axis was no batch axis, and the inputs are taken whole; the result
says so.  If they do not, the batch size is written into the model, and that is an error.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxpath.capture import formats
from fxpath.capture.adopt import adopt
from fxpath.capture.inputs import Call, batch_size, first_sample, from_shapes, from_values
from fxpath.capture.programs import from_program
from fxpath.capture.rows import rows_meet, same_row
from fxpath.capture.shapes import guess_input_shape
from fxpath.capture.sharded import shard_problems
from fxpath.capture.trace import run, trace
from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.model.captured import Captured, Model
from fxpath.model.given import Given
from fxpath.modes import TRACING
from fxpath.sharding import is_sharded_model


def capture(model: Model, given: Given) -> Captured:
    """Trace a model into a flat ATen graph.

    Raises:
        TypeError: for something that is no model.
        ValueError: for inputs that do not fit, if no input shape is given and none can be inferred,
            or if ``until`` or ``outputs`` name nothing.
        UnsupportedModelError: if the model cannot be captured as one graph.
    """
    with TRACING:
        if isinstance(model, ExportedProgram):
            return replace(from_program(model, given), gates=bool(given.gates))
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}: pass an nn.Module or an ExportedProgram"
            )
        _refuse_scripted(model)
        problems = shard_problems(model)
        if problems:
            raise UnsupportedModelError(SupportReport(tuple(problems)))
        return replace(_from_module(model, given), gates=bool(given.gates))


def _refuse_scripted(model: nn.Module) -> None:
    problems = [
        Problem(
            type(module).__name__,
            "(capture)",
            path,
            "unknown",
            "a TorchScript module has no Python code left that could be traced",
            "pass the nn.Module that it was made from",
        )
        for path, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
    ]
    if problems:
        # The parts of a scripted part are scripted too.
        raise UnsupportedModelError(SupportReport((problems[0],)))


def _from_module(model: nn.Module, given: Given) -> Captured:
    assumed = False
    if (given.input_shape, given.example_inputs, given.example_kwargs) == (None, None, None):
        shape, assumed = guess_input_shape(model)
        # A shape that was inferred has no batch axis, whatever else is said.
        given = replace(given, input_shape=shape, batch_dim=0)
    if given.input_shape is None or given.example_inputs is not None or given.example_kwargs:
        call = from_values(given)
    else:
        call = from_shapes(model, given)
    _check_signature(model, call)
    number = batch_size(call, given.batch_dim)
    if number > 1 and is_sharded_model(model):
        raise ValueError(
            f"the inputs hold {number} samples, and whether one of them stands by itself is found "
            "by running the model, which a sharded one is not: pass input_shape=, or the inputs of "
            "one sample"
        )
    sample = first_sample(call, given.batch_dim)
    batch_dim = given.batch_dim
    failure: UnsupportedModelError | None = None
    try:
        traced = trace(model, sample, given.until)
    except UnsupportedModelError as error:
        if error.report.problems[0].operation != "torch.export.export":
            raise
        _explain(model, given, error)
        if number == 1 or _runs(model, sample) or not _runs(model, call):
            raise
        failure = error
    if failure is not None or (number > 1 and not _stands_alone(model, call, sample, batch_dim)):
        assert batch_dim is not None
        if not rows_meet(lambda inputs: run(model, inputs), call, batch_dim):
            raise ValueError(
                f"the model does not run on one of the {number} samples given, although they do "
                "not depend on each other: the batch size is written into its code; pass "
                "batch_dim=None to count all of them"
            ) from failure
        traced, batch_dim = trace(model, call, given.until), None
    return adopt(traced.program, model, given.outputs, traced.baked, batch_dim, assumed)


def _stands_alone(model: nn.Module, call: Call, sample: Call, batch_dim: int | None) -> bool:
    """Whether one sample gives by itself what it gives among the others.

    A trace does not tell: positions beyond an axis, and means over samples, go through unnoticed.
    """
    assert batch_dim is not None
    if not _runs(model, call):
        return True
    return _runs(model, sample) and same_row(lambda inputs: run(model, inputs), call, batch_dim)


def _check_signature(model: nn.Module, call: Call) -> None:
    args, kwargs = call
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # a callable without a signature takes what it takes
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the inputs do not fit forward{signature}: {error}; pass input_shape={{name: shape}} "
            "or example_kwargs={name: tensor} for keyword inputs"
        ) from error


def _refuse_batch_axis(shape: Any) -> None:
    raise ValueError(
        f"input_shape={tuple(shape)} has the batch axis in it: pass {tuple(shape[1:])}, or "
        "batch_dim=None to take the shape as it is"
    )


def _explain(model: nn.Module, given: Given, error: UnsupportedModelError) -> None:
    """Raise what is known better than torch.export's own message, if anything is."""
    shape: Any = given.input_shape
    if given.batch_dim is not None and isinstance(shape, tuple | list) and len(shape) > 1:
        whole = replace(given, batch_dim=None)
        if all(isinstance(n, int) for n in shape) and not _runs(model, from_shapes(model, given)):
            if _runs(model, from_shapes(model, whole)):
                _refuse_batch_axis(shape)
    problems = formats.of_model(model)
    if problems:
        raise UnsupportedModelError(SupportReport(tuple(problems))) from error


def _runs(model: nn.Module, call: Call) -> bool:
    try:
        run(model, call)
    # Whatever a forward raises, it does not run.
    except Exception:
        return False
    return True
