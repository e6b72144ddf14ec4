"""Graphs between two passes as exported programs, in a dialect for each stage.

A program of stage ``s`` has the dialect ``FXPATH/S``: operators of ATen and the vocabulary of
:mod:`fxpath.graph.ops`.  All that the next pass is told is in the program itself:

- the signature says which placeholder is which tensor of the model, under its own name, and whether
  it is a parameter; the tensors stand in the state or among the constants, as in the model's own
  program, which shares them;
- tensors that a pass has made (fixed maps) are constants too, and their placeholders bear the note
  ``made``;
- the notes of :data:`fxpath.graph.spec.NOTES` are kept, and ``baked`` holds a copy of the numbers
  that the graph was made for;
- conversions that let a folded program run in the model's own number format bear the note
  ``format``, and are not there for the next pass.

Such programs live in memory: ``torch.export.save`` takes operators of ATen alone, which is what the
last one, of :func:`~fxpath.toolchain.derive_program`, consists of.
"""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from fxpath.graph import ops
from fxpath.graph.aten import CAST, RESHAPE
from fxpath.graph.edit import written
from fxpath.graph.spec import DIALECT, violations
from fxpath.model import Captured, named_tensors
from fxpath.model.form import form_of
from fxpath.private import OpOverload, SpecViolationError, Verifier, tree_flatten
from fxpath.sample import Sample

#: What fold writes in float64, whatever the model's own format.
_DOUBLE = (ops.normalizer, ops.folded_weight, ops.folded_bias)
_USER_OUTPUT = OutputKind.USER_OUTPUT


class _Stage(Verifier):
    """Operators of ATen and fxpath's own words."""

    dialect = DIALECT

    def allowed_op_types(self) -> tuple[type[Any], ...]:
        return (OpOverload, types.FunctionType)

    def check_valid_op(self, op: Any) -> None:
        if isinstance(op, types.FunctionType) and op.__module__ != ops.__name__:
            raise SpecViolationError(f"{op} is no word of {ops.__name__}")


class _Folded(_Stage):
    dialect = f"{DIALECT}/FOLDED"


class _Lifted(_Stage):
    dialect = f"{DIALECT}/LIFTED"


class _Reduced(_Stage):
    dialect = f"{DIALECT}/REDUCED"


class _Lowered(_Stage):
    dialect = f"{DIALECT}/LOWERED"


_VERIFIERS: dict[str, type[Verifier]] = {
    "folded": _Folded,
    "lifted": _Lifted,
    "reduced": _Reduced,
    "lowered": _Lowered,
}
#: What makes a program of each stage; of the model's own there is one before any of them.
MADE_BY = {
    "the model's own": "torch.export.export",
    "folded": "fold_program",
    "lifted": "lift_program",
    "reduced": "reduce_program",
    "lowered": "lower_program",
}


def stage_of(program: ExportedProgram) -> str:
    """A key of :data:`MADE_BY`."""
    known = {verifier.dialect: stage for stage, verifier in _VERIFIERS.items()}
    return known.get(program.dialect, "the model's own")


def take(program: object, *stages: str) -> ExportedProgram:
    """A program, if it is at one of some stages.

    Raises:
        TypeError: for anything else than a program.
        ValueError: naming the stage that it is at, and what to run first.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"a {type(program).__name__} is no ExportedProgram")
    found = stage_of(program)
    if found in stages:
        return program
    wanted = " or ".join(stages)
    order = list(MADE_BY)
    if order.index(found) > order.index(stages[-1]):
        raise ValueError(f"the program is {found} already, and what is wanted is {wanted}")
    first = order[order.index(found) + 1 : order.index(stages[0]) + 1]
    raise ValueError(
        f"the program is {found}, and what is wanted is {wanted}: run "
        f"{', then '.join(MADE_BY[stage] for stage in first)} on it first"
    )


# -- to a program ----------------------------------------------------------------------------------


def as_program(
    stage: str, module: fx.GraphModule, captured: Captured, before: ExportedProgram
) -> ExportedProgram:
    """A graph at one of the stages as a program, which shares the model's tensors.

    Args:
        stage: what the graph is.
        module: the graph, which is not changed.
        captured: whose tensors it reads.
        before: the program that the pass was given.
    """
    live, known = captured.live(), before.graph_signature
    graph = _with_placeholders(module, captured)
    specs, state, constants = list[InputSpec](), dict[str, Any](), dict[str, Any]()
    inputs = iter([spec for spec in known.input_specs if spec.kind == InputKind.USER_INPUT])
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        argument = TensorArgument(node.name)
        if "made" in node.meta:
            name = _free(f"fxpath_{node.meta['made']}", captured)
            constants[name] = module.get_buffer(node.meta["made"])
            specs.append(InputSpec(InputKind.CONSTANT_TENSOR, argument, name))
        elif node.name in captured.tensors:
            name, tensor = captured.tensors[node.name], live[node.name]
            (state if name in before.state_dict else constants)[name] = tensor
            specs.append(_spec(argument, name, captured, before))
            if node.meta.get("baked"):
                node.meta["baked"] = captured.baked.get(name, tensor).detach().clone()
        else:
            own = next(inputs)
            specs.append(replace(own, arg=replace(own.arg, name=node.name)))
    if stage == "folded":
        _settle_formats(graph)
    made, signature = _call(stage, graph, specs, before)
    return ExportedProgram(
        {},
        graph,
        ExportGraphSignature(specs, made),
        state,
        {},
        [ModuleCallEntry("", signature)],
        None,
        constants,
        verifiers=[_VERIFIERS[stage]],
    )


def _with_placeholders(module: fx.GraphModule, captured: Captured) -> fx.Graph:
    """A copy with placeholders for constants, in the order in which programs have them."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    begins = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    held: dict[str, fx.Node] = {}
    for node in sorted(begins, key=lambda node: _rank(node, captured)):
        if node.op == "placeholder":
            copied[node] = graph.node_copy(node)
            continue
        name = str(node.target)
        if name not in held:
            held[name] = graph.placeholder(f"made_{name}")
            held[name].meta = {**node.meta, "made": name}
        copied[node] = held[name]
    result = graph.graph_copy(module.graph, copied)
    graph.output(result if isinstance(result, tuple) else (result,))
    return graph


def _rank(node: fx.Node, captured: Captured) -> int:
    """The model's tensors, then what passes have made, then inputs."""
    return 1 if node.op == "get_attr" else 0 if node.name in captured.tensors else 2


def _free(name: str, captured: Captured) -> str:
    """A name that no tensor of the model has."""
    return name if name not in captured.tensors.values() else _free(f"{name}_", captured)


def _spec(
    argument: TensorArgument, name: str, captured: Captured, before: ExportedProgram
) -> InputSpec:
    if name in captured.parameters:
        return InputSpec(InputKind.PARAMETER, argument, name)
    if name in before.state_dict:
        return InputSpec(InputKind.BUFFER, argument, name, persistent=True)
    if name in before.graph_signature.non_persistent_buffers:
        return InputSpec(InputKind.BUFFER, argument, name, persistent=False)
    return InputSpec(InputKind.CONSTANT_TENSOR, argument, name)


def _settle_formats(graph: fx.Graph) -> None:
    """Convert what fold has written to the format of the operation that reads it."""
    double: set[fx.Node] = set()
    for node in list(graph.nodes):
        read = [each for each in node.all_input_nodes if each in double]
        if node.target in _DOUBLE or (read and node.target is RESHAPE):
            double.add(node)
            continue
        for each in read if node.op == "call_function" else []:
            dtype = node.meta["val"].dtype
            if dtype != torch.float64:
                with graph.inserting_before(node):
                    converted = graph.call_function(CAST, (each, dtype))
                converted.meta = {"val": each.meta["val"].to(dtype), "format": True}
                node.replace_input_with(each, converted)


def _call(
    stage: str, graph: fx.Graph, specs: list[InputSpec], before: ExportedProgram
) -> tuple[list[OutputSpec], ModuleCallSignature]:
    """What the program returns, and how it is called: a folded one as the model is."""
    output = next(iter(reversed(graph.nodes)))
    results: list[Any] = list(output.args[0])
    _, in_spec = tree_flatten(((), {}))
    _, out_spec = tree_flatten(0)
    if stage == "folded":
        in_spec, out_spec = before.call_spec.in_spec, before.call_spec.out_spec
        found = iter(results)
        known = [s.arg for s in before.graph_signature.output_specs if s.kind == _USER_OUTPUT]
        # An output that is a Python number is none of the graph's.
        results = [arg.value if isinstance(arg, ConstantArgument) else next(found) for arg in known]
        output.args = (tuple(results),)
    made = [
        OutputSpec(
            _USER_OUTPUT,
            TensorArgument(r.name) if isinstance(r, fx.Node) else ConstantArgument("", r),
            None,
        )
        for r in results
    ]
    inputs = [spec.arg for spec in specs if spec.kind == InputKind.USER_INPUT]
    return made, ModuleCallSignature(inputs, [spec.arg for spec in made], in_spec, out_spec)


# -- from a program --------------------------------------------------------------------------------


def from_program(program: ExportedProgram) -> tuple[fx.GraphModule, Captured]:
    """The graph of a program at one of the stages, and whose tensors it reads.

    Raises:
        ValueError: if the program does not hold to its stage.
    """
    stage, signature = stage_of(program), program.graph_signature
    targets = {spec.arg.name: spec.target for spec in signature.input_specs}
    graph, root = fx.Graph(), nn.Module()
    copied: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, str] = {}
    baked: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        name = targets.get(node.name) if node.op == "placeholder" else None
        if "made" in node.meta:
            assert name is not None
            root.register_buffer(node.meta["made"], program.constants[name])
            copied[node] = graph.get_attr(node.meta["made"])
            copied[node].meta = {k: v for k, v in node.meta.items() if k != "made"}
        elif node.meta.get("format"):
            copied[node] = copied[node.args[0]]
        elif node.op == "output":
            results = [copied[each] for each in node.args[0] if isinstance(each, fx.Node)]
            graph.output(tuple(results) if stage == "folded" else results[0])
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        if name is not None and "made" not in node.meta:
            tensors[node.name] = name
            if "baked" in node.meta:
                baked[name] = node.meta["baked"]
                copied[node].meta["baked"] = True
    module = written(root, graph)
    captured = _captured(program, module, tensors, baked)
    wrong = violations(module, stage, captured)
    if wrong:
        raise ValueError(f"the program is no {stage} one: {'; '.join(wrong)}")
    return module, captured


def _captured(
    program: ExportedProgram,
    module: fx.GraphModule,
    tensors: dict[str, str],
    baked: dict[str, Tensor],
) -> Captured:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = {node.name: node.meta.get("val") for node in placeholders}
    shapes = {name: value.shape for name, value in values.items() if isinstance(value, Tensor)}
    own = {name: shape for name, shape in shapes.items() if name in tensors}
    return Captured(
        module,
        tensors,
        frozenset(program.graph_signature.parameters),
        program,
        {k: v for k, v in program.constants.items() if k in tensors.values()},
        Sample({name: tuple(shape) for name, shape in shapes.items() if name not in tensors}),
        form_of(program, named_tensors(program), {}, own),
        baked,
        tuple(range(len(program.graph_signature.user_outputs))),
    )
