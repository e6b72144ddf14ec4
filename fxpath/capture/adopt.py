"""An exported program becomes a functional graph with canonical tensor names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from fxpath.capture import formats
from fxpath.capture.functional import functionalize
from fxpath.capture.sources import overwritten
from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.graph.aten import ZEROS
from fxpath.graph.edit import drop_dead
from fxpath.model.captured import Captured, Model, named_tensors
from fxpath.model.form import attached, form_of, place
from fxpath.model.given import Outputs
from fxpath.private import tree_leaves, tree_unflatten
from fxpath.sample import Sample
from fxpath.sharding import is_sharded_model

_COMPUTED = (
    "it was computed from parameters in an earlier pass, an activation or a weight, and does not "
    "follow them",
    "compute it in forward, or detach it if it is a constant",
)
TENSOR_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def adopt(
    program: ExportedProgram,
    source: Model,
    outputs: Outputs,
    baked: dict[str, Tensor],
    batch_dim: int | None,
    assumed: bool,
) -> Captured:
    """Turn an exported program into a functional graph with canonical tensor names.

    Args:
        program: what torch.export gave.
        source: whose live tensors count.
        outputs: those of the outputs to keep.
        baked: values that the code read as Python numbers.
        batch_dim: axis of the one sample that was traced.
        assumed: whether its shape is a convention.

    Raises:
        ValueError: if ``outputs`` names none.
        UnsupportedModelError: naming tensors in formats that no path-norm is computed in.
    """
    graph, signature = functionalize(program)
    held = {**program.constants, **dict(program.state_dict)}
    live = named_tensors(source)
    canonical: dict[int, str] = {}
    parameters = dict(source.named_parameters())
    for name, tensor in (*parameters.items(), *live.items()):
        canonical.setdefault(id(tensor), name)

    # A parameter that forward reaches by a global is lifted as a constant, and still is one.
    places = {place(tensor): name for name, tensor in parameters.items() if tensor.numel()}

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
            same = places.get(place(held[name]))
            if same is None:
                constants[name] = held[name]
            else:
                name = canonical[id(live[same])]
        if name in first:
            # Tied weights: one placeholder, so that their scores add up under one name.
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
            continue
        first[name] = node
        tensors[node.name] = name
    shapes = {
        spec.arg.name: tuple(node.meta["val"].shape)
        for node, spec in zip(placeholders, signature.input_specs, strict=True)
        if spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), Tensor)
    }
    kept = _keep_outputs(graph, program, signature, outputs)
    # A value's users are then those that count; torch's own pass keeps assertions and dropout.
    drop_dead(graph)
    held_shapes = {node.name: node.meta["val"].shape for node in first.values()}
    captured = Captured(
        fx.GraphModule({}, graph),
        tensors,
        frozenset(parameters),
        source,
        constants,
        Sample(shapes, batch_dim, assumed),
        form_of(source, live, attached(source, constants), held_shapes),
        baked,
        kept,
    )
    _check_formats(captured)
    for node in () if is_sharded_model(source) else overwritten(captured):
        made = node.meta["val"]
        node.target, node.args = ZEROS, (list(made.shape),)
        node.kwargs = {"dtype": made.dtype, "device": made.device}
    captured.graph_module.recompile()
    return captured


def _check_formats(captured: Captured) -> None:
    """Refuse tensors and results that are no dense real numbers."""
    live = captured.live()
    read = {
        captured.tensors[node.name]: live[node.name]
        for node in captured.graph_module.graph.nodes
        if node.name in live and node.users
    }
    problems = formats.of_graph(captured.graph_module.graph, read, captured.parameters)
    problems += [
        Problem(name, name, name.rpartition(".")[0], "unknown", *_COMPUTED)
        for name, tensor in read.items()
        if name in captured.constants and tensor.grad_fn is not None
    ]
    if problems:
        raise UnsupportedModelError(SupportReport(tuple(problems)))


def _keep_outputs(
    graph: fx.Graph, program: ExportedProgram, signature: ExportGraphSignature, outputs: Outputs
) -> tuple[int | str, ...]:
    """Drop outputs that stand for mutated inputs and buffers, and those that nobody asked for.

    Returns the position or key of each that is left.
    """
    output = next(iter(reversed(graph.nodes)))
    users = [
        value
        for value, spec in zip(output.args[0], signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    result = tree_unflatten(users, program.call_spec.out_spec)
    named: Iterable[tuple[int | str, Any]]
    if outputs is not None:
        several: Sequence[int | str]
        several = outputs if not isinstance(outputs, int | str) else [outputs]
        if not several or len(set(several)) < len(several):
            raise ValueError(f"outputs={outputs!r} must name one output or more, each of them once")
        named = [(key, _pick(result, key)) for key in several]
    elif isinstance(result, Mapping):
        named = result.items()
    else:
        named = enumerate(result if isinstance(result, tuple | list) else [result])
    # An fx.Node is a leaf; what is none is no tensor.
    kept = [(key, x) for key, part in named for x in tree_leaves(part) if isinstance(x, fx.Node)]
    output.args = (tuple(node for _, node in kept),)
    return tuple(key for key, _ in kept)


def _pick(result: Any, key: int | str) -> Any:
    """One of several outputs."""
    if isinstance(result, fx.Node):
        if key in (0, -1):
            return result
        names: Any = []
    elif isinstance(result, Mapping):
        names = list(result)
    elif isinstance(result, tuple) and isinstance(key, str):
        names = list(getattr(result, "_fields", ()))
        if key in names:
            return getattr(result, key)
    elif isinstance(result, tuple | list) and isinstance(key, int):
        names = range(-len(result), len(result))
    else:
        names = [name for name in vars(result)] if hasattr(result, "__dict__") else []
    if key not in names:
        known = (
            f"{len(result)} outputs, counted from 0"
            if isinstance(result, tuple | list)
            else f"the outputs {', '.join(map(repr, names))}"
            if names
            else "one output"
        )
        raise ValueError(f"outputs={key!r} names no output: the model has {known}")
    if isinstance(result, Mapping | tuple | list):
        return result[key]  # type: ignore[index]
    return getattr(result, str(key))
