"""Shares of path mass, written into the nodes of an exported program."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any, TypedDict

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxpath.errors import module_path
from fxpath.graph.aten import BATCH_NORMS
from fxpath.graph.compositions import COMPOSITIONS
from fxpath.graph.constants import active_nodes
from fxpath.graph.edit import inputs_first
from fxpath.graph.schema import arguments, target
from fxpath.model import Captured, Given
from fxpath.modes import plain_mode
from fxpath.passes import Setting, fold
from fxpath.program.analysis import Analysis
from fxpath.program.layers import layers_at
from fxpath.program.program import build
from fxpath.rules import RULES

__all__ = ["Annotation", "annotate"]

#: Numbers a program's operations while it is analysed: torch carries a user's notes along.
_NUMBER = "fxpath_number"


class Annotation(TypedDict, total=False):
    """What ``node.meta["fxpath"]`` says.

    Attributes:
        share: of a layer, the part of all path mass that crosses it (its weights and bias), as
            :class:`~fxpath.LayerRow` has it; of a parameter's placeholder, the part that runs
            through its entries.
        layer: name of the layer, or of the module that called an operation that is none.
        rule: by what it was lifted: a function of :mod:`fxpath.rules`, ``fold`` for a frozen batch
            norm, or the function that is registered for an operator of the user's own.
    """

    share: float
    layer: str
    rule: str


@plain_mode()
def annotate(program: ExportedProgram) -> ExportedProgram:
    """Write into each node of a program what part of all path mass crosses it.

    ``node.meta["fxpath"]`` is a dictionary: ``share`` and ``layer`` of each layer (an operation
    that reads weights or biases), ``layer`` and ``rule`` of every other operation on activations,
    ``share`` of each parameter's placeholder.  Shares are those of the l^1 path-norm; a layer that
    is called twice has at both calls the share of both.  What computes a weight, and what no output
    depends on, bears none.

    The same dictionary stands in ``node.meta["custom"]["fxpath"]``, under the one key that torch
    carries along for its users.  Both are there in ``program.module()``.  That in ``custom`` alone
    survives ``torch.export.save`` and ``load``, but at parameters; another export of the module and
    ``run_decompositions``, but at operations in a block of their own (as under
    ``torch.no_grad()``); and ``torch.compile``, whose backends are handed it.

    Args:
        program: of a model, as ``torch.export.export`` returns it; it is not changed.

    Returns:
        A program of the same operations, which shares the tensors of the given one.

    Raises:
        TypeError: for anything else than a program.
        UnsupportedModelError: listing every operation without an exact rule.
        ValueError: for a NaN or infinite parameter, by name; for a program that has to be traced
            again (of a batch, or with dynamic shapes) by a torch that carries no notes along.
        FloatingPointError: if float64 does not suffice.

    Example:
        >>> import torch, fxpath
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> program = fxpath.annotate(torch.export.export(model, (torch.ones(1, 3),)))
        >>> linear, relu = [n for n in program.graph.nodes if n.op == "call_function"]
        >>> note = linear.meta["fxpath"]
        >>> round(note["share"], 4), note["layer"], note["rule"]
        (1.0, '0', 'linear')
        >>> relu.meta["fxpath"]
        {'layer': '1', 'rule': 'relu'}
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"a {type(program).__name__} is no ExportedProgram")
    copied, marked = _copy(program), _copy(program)
    for number, node in enumerate(_calls(marked.graph_module)):
        node.meta["custom"] = {_NUMBER: number}
    built = build(marked, Given())
    analysis = Analysis.of(built)
    notes = _notes(built.captured, built.lifted, analysis)
    for node, found in _placed(notes, list(_calls(copied.graph_module))).items():
        _write(node, found)
    for spec, node in zip(copied.graph_signature.input_specs, copied.graph.nodes, strict=False):
        if spec.kind == InputKind.PARAMETER and spec.target in analysis.scores:
            _write(node, Annotation(share=float(analysis.scores[spec.target].double().sum())))
    return copied


def _copy(program: ExportedProgram) -> ExportedProgram:
    """The same program, with nodes of its own."""
    module = copy.deepcopy(program.graph_module)
    for node, before in zip(module.graph.nodes, program.graph.nodes, strict=True):
        node.name = before.name  # a copy of a graph may have no names of Python's own, as "input"
    return ExportedProgram(
        module,
        module.graph,
        copy.deepcopy(program.graph_signature),
        program.state_dict,
        copy.deepcopy(program.range_constraints),
        copy.deepcopy(program.module_call_graph),
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Operations, also those in blocks that torch.export keeps apart."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from (node for node in part.graph.nodes if node.op == "call_function")


def _write(node: fx.Node, found: Annotation) -> None:
    node.meta["fxpath"] = found
    node.meta["custom"] = {**node.meta.get("custom", {}), "fxpath": dict(found)}


def _notes(
    captured: Captured, lifted: fx.GraphModule, analysis: Analysis
) -> dict[fx.Node, Annotation]:
    """What is to be said of each captured operation on activations."""
    graph = captured.graph_module.graph
    shares = {row["name"]: row["share"] for row in analysis.layers}
    layers = {origin: layer.name for origin, (layer, _) in layers_at(lifted).items()}
    folded = fold(captured.graph_module, Setting(captured)).graph.nodes
    norms = {node.meta["origin"] for node in folded if node.target in BATCH_NORMS}
    active = active_nodes(graph, captured)
    notes: dict[fx.Node, Annotation] = {}
    for node in inputs_first(next(iter(reversed(graph.nodes))), ()):
        if node.op != "call_function" or not (node in active or node in layers):
            continue
        found = Annotation()
        if node in layers:
            found["share"] = shares[layers[node]]
        found["layer"] = layers.get(node, module_path(node))
        called = arguments(node)[0] if node.target is operator.getitem else node
        if called.target in BATCH_NORMS and called not in norms:
            found["rule"] = "fold"
        elif called.target in RULES:
            found["rule"] = RULES[target(called)].__name__.lstrip("_")
        notes[node] = found
    return notes


def _placed(notes: dict[fx.Node, Annotation], calls: list[fx.Node]) -> dict[fx.Node, Annotation]:
    """The same by the program's own nodes; of several operations that one became, a layer's.

    Raises:
        ValueError: if a layer is none of them.
    """
    found: dict[fx.Node, Annotation] = {}
    for node, note in notes.items():
        number = node.meta.get("custom", {}).get(_NUMBER)
        if number is None:
            if "share" in note:
                raise ValueError(
                    f"{note['layer']}: this torch does not say which node of the program became "
                    f"{node.name} when it was traced for one sample: export the model for one"
                )
            continue
        own = calls[number]
        if own.target in COMPOSITIONS:
            function: Any = COMPOSITIONS[target(own)]
            note["rule"] = getattr(function, "__name__", repr(function))
        if own not in found or ("share" in note and "share" not in found[own]):
            found[own] = note
    return found
