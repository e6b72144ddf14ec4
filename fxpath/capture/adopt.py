"""An exported program becomes a functional graph with canonical tensor names."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from fxpath.capture.form import attached, form_of
from fxpath.capture.functional import functionalize
from fxpath.capture.model import Captured, Model, named_tensors

__all__ = ["adopt"]

TENSOR_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def adopt(program: ExportedProgram, model: nn.Module | None = None) -> Captured:
    """Turn an exported program into a functional graph with canonical tensor names."""
    graph, signature = functionalize(program)
    source: Model = program if model is None else model
    held = {**program.constants, **dict(program.state_dict)}
    live = named_tensors(source)
    canonical: dict[int, str] = {}
    parameters = dict(program.named_parameters() if model is None else model.named_parameters())
    for name, tensor in (*parameters.items(), *live.items()):
        canonical.setdefault(id(tensor), name)

    tensors: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    first: dict[str, fx.Node] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind not in TENSOR_KINDS or spec.target is None:
            continue
        name = spec.target
        if name in live:
            name = canonical[id(live[name])]
        elif isinstance(held.get(name), Tensor):
            constants[name] = held[name]
        if name in first:
            # Tied weights: one placeholder, so that their scores add up under one name.
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
            continue
        first[name] = node
        tensors[node.name] = name
    _keep_outputs(graph, signature)
    _drop_dead(graph)
    shapes = {node.name: node.meta["val"].shape for node in first.values()}
    form = form_of(source, live, attached(source, constants), shapes)
    module = fx.GraphModule({}, graph)
    return Captured(module, tensors, frozenset(parameters), source, constants, form)


def _keep_outputs(graph: fx.Graph, signature: ExportGraphSignature) -> None:
    """Drop outputs that stand for mutated inputs and buffers, and those that are no tensors."""
    output = next(iter(reversed(graph.nodes)))
    users = [
        value
        for value, spec in zip(output.args[0], signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(value, fx.Node)
    ]
    output.args = (tuple(users),)


def _drop_dead(graph: fx.Graph) -> None:
    """Erase what no output depends on, so that a value's users are those that count.

    torch's own pass keeps assertions and dropout; after functionalization nothing has side effects.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
