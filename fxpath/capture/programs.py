"""Exported programs: they know their inputs, and most of them no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxpath.capture.adopt import adopt
from fxpath.capture.inputs import Call, batch_size, first_sample, from_shapes, from_values
from fxpath.capture.rows import rows_meet, same_row
from fxpath.capture.trace import run, trace
from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.graph.aten import SIZELESS
from fxpath.graph.spec import DIALECT
from fxpath.model.captured import Captured
from fxpath.model.given import Given
from fxpath.private import FakeTensor, tree_leaves, tree_unflatten


def from_program(program: ExportedProgram, given: Given) -> Captured:
    """Capture a program: as it is for one sample, else traced once more.

    A program with fixed shapes takes inputs of these shapes only; its own batch is cut to one
    sample where the program runs on one.

    Raises:
        ValueError: for inputs of other shapes, or a batch that cannot be cut; for a program that
            passes have made of a model's.
        UnsupportedModelError: if it cannot be traced once more.
    """
    if program.dialect.startswith(DIALECT):
        raise ValueError(
            f"this is no model's program, but of the dialect {program.dialect}, which passes have "
            "made of one: pass the one that they were given"
        )
    if given.until is not None:
        raise ValueError(
            "until needs a module to stop at, and an ExportedProgram has none: "
            "export the model up to there, or pass the nn.Module itself"
        )
    _refuse_without_values(program)
    own = _own_call(program)
    asked = _asked(program, given)
    call = own if asked is None else asked
    number = batch_size(call, given.batch_dim)
    sample = first_sample(call, given.batch_dim)
    if _is_dynamic(program):
        if not _allows(program, sample):
            return _other_shape(program, sample, own, given)
        # Shapes must be numbers; tracing the program once more makes them so.
        return _traced_again(program, sample, given)
    if _shapes(call) != _shapes(own) and _shapes(sample) != _shapes(_sample(own, given)):
        return _other_shape(program, sample, own, given)
    number = batch_size(own, given.batch_dim)
    if number == 1:
        return adopt(program, program, given.outputs, {}, given.batch_dim, False)
    assert given.batch_dim is not None
    inner = program.module(check_guards=False)

    def evaluate(inputs: Call) -> Any:
        return run(inner, inputs)

    try:
        if same_row(evaluate, own, given.batch_dim):
            return _traced_again(program, _sample(own, given), given)
    # Whatever an operation raises that has the batch size written into it.
    except (RuntimeError, UnsupportedModelError) as error:
        failure: Exception | None = error
    else:
        failure = None
    if rows_meet(evaluate, own, given.batch_dim):
        return adopt(program, program, given.outputs, {}, None, False)
    raise ValueError(
        f"the program was exported for a batch of {number}, which is written into it: export it "
        "for one sample or with a dynamic batch axis, or pass batch_dim=None to count all of them"
    ) from failure


def _refuse_without_values(program: ExportedProgram) -> None:
    """A strict export of ``x.data`` holds that activation as a constant that has no values."""
    problems = tuple(
        Problem(
            name,
            name,
            name.rpartition(".")[0],
            "unknown",
            "the exported program holds a tensor without values, an activation that torch.export "
            "took for a constant (as it does with x.data)",
            "write x.detach() instead and export again, or pass the nn.Module itself",
        )
        for name, value in {**program.state_dict, **program.constants}.items()
        if isinstance(value, FakeTensor)
    )
    if problems:
        raise UnsupportedModelError(SupportReport(problems))


def _other_shape(program: ExportedProgram, sample: Call, own: Call, given: Given) -> Captured:
    """Trace a program of fixed shapes on others, if no operation has a size written into it."""
    fixed = sorted(
        {
            str(node.target)
            for node in program.graph.nodes
            if node.op == "call_function" and _packet(node.target) not in SIZELESS
        }
    )
    failure: Exception | None = None
    try:
        if not fixed:
            return _traced_again(program, sample, given)
    except UnsupportedModelError as error:
        failure = error
    reason = f"; {', '.join(fixed)} may have its sizes written into it" if fixed else ""
    raise ValueError(
        f"the program was exported for inputs of the shapes {_shapes(own)} and takes no other, "
        f"such as {_shapes(sample)}{reason}: export it with dynamic shapes, or pass the nn.Module "
        "itself"
    ) from failure


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)


def _sample(own: Call, given: Given) -> Call:
    return first_sample(own, given.batch_dim)


def _asked(program: ExportedProgram, given: Given) -> Call | None:
    """The inputs that the caller names, if any."""
    if given.example_inputs is not None or given.example_kwargs:
        return from_values(given)
    if given.input_shape is not None:
        return from_shapes(program.module(check_guards=False), given)
    return None


def _traced_again(program: ExportedProgram, sample: Call, given: Given) -> Captured:
    traced = trace(program.module(check_guards=False), sample)
    return adopt(traced.program, program, given.outputs, traced.baked, given.batch_dim, False)


def _own_call(program: ExportedProgram) -> Call:
    """Zeros in the shapes that the program was exported with."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            value = values.get(spec.arg.name)
            if isinstance(value, Tensor):
                shape = [n if isinstance(n, int) else int(n.node.hint) for n in value.shape]
                value = torch.zeros(shape, dtype=value.dtype, device=value.device)
            leaves.append(value)
    args, kwargs = tree_unflatten(leaves, program.call_spec.in_spec)
    return args, kwargs


def _shapes(call: Call) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in tree_leaves(call) if isinstance(x, Tensor)]


def _allows(program: ExportedProgram, call: Call) -> bool:
    """Whether the lengths that are fixed in a program with dynamic shapes are those of a call."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    own = [
        values.get(spec.arg.name)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    ]
    tensors = [x for x in own if isinstance(x, Tensor)]
    return all(
        len(mine) == len(asked)
        and all(n == m for n, m in zip(mine, asked, strict=True) if isinstance(n, int))
        for mine, asked in zip([x.shape for x in tensors], _shapes(call), strict=False)
    )


def _is_dynamic(program: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(
        isinstance(v, Tensor) and any(not isinstance(n, int) for n in v.shape) for v in values
    )
