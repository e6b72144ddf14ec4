"""What holds after each pass: operations, shapes, names, notes.

A pass may rely on it, and whoever writes one checks it with :func:`violations`; the tests do after
every pass.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import aten, ops, products, scaling, shapes
from fxpath.graph.aten import BATCH_NORMS, MOVES, SLICE
from fxpath.graph.constants import active_nodes
from fxpath.graph.edit import Forms, form
from fxpath.graph.leaves import LEAVES
from fxpath.graph.links import static
from fxpath.graph.schema import arguments, target
from fxpath.graph.values import frozen
from fxpath.model import Captured
from fxpath.private import OpOverload, schema

#: Of exported programs between two passes: the dialect is this, a slash, and the stage.
DIALECT = "FXPATH"

#: Every key of ``node.meta`` that is fxpath's own, and what it says.  ``val`` is torch's: shape and
#: format of the result.
NOTES = {
    "origin": "the captured operation that a node stands for, or a part of it",
    "coordinate": "folded graphs: the name under which an effective parameter is scored",
    "input": "sources: position of the input",
    "baked": "placeholders: the graph was made for the numbers that the tensor held",
    "stencil": "fixed maps: axis, and the map along it in exact coefficients",
    "leaf": "number of an effective parameter or fixed number, in the order of their use",
    "fixed": "leaves: whether it is architecture",
    "static": "whether a node depends on the model's tensors alone",
    "full": "reduced graphs: the nodes at full resolution that it stands for",
    "whole": "convolutions that are kept at full resolution",
    "unfollowed": "gates: why their values are not known",
}

#: Where the steps of derived graphs are.
_STEPS = {aten.__name__, ops.__name__, products.__name__, scaling.__name__, shapes.__name__}

_EFFECTIVE = {ops.normalizer, ops.folded_weight, ops.folded_bias}
_SUMS = {
    *(ops.source, ops.constant, ops.conv, ops.contract, ops.scale, ops.shift, ops.slope),
    *(ops.add, ops.maximum, ops.clamp, ops.total),
}

#: What the activations of a graph are made by, after each pass; weights may be computed by any ATen
#: operation, and are read through ``ops.coordinate`` and ``ops.coefficient``.
STAGES: dict[str, set[Any]] = {
    "lifted": {*_SUMS, *MOVES, ops.along, ops.pool, ops.minimum, *ops.IGNORED},
    "reduced": {*_SUMS, *MOVES, ops.mix},
    # Without the reduction, fixed maps stay as they are.
    "lowered": {*_SUMS, *MOVES, ops.mix, ops.window, ops.along, ops.pool, ops.minimum},
}


def violations(
    module: fx.GraphModule, stage: str, captured: Captured, made: Forms | None = None
) -> list[str]:
    """What does not hold of a graph after a pass; empty if all does.

    Args:
        module: what the pass returned.
        stage: ``"captured"``, ``"folded"``, ``"derived"``, or one of :data:`STAGES`.
        captured: the captured model.
        made: what operations are known to return, for whoever checks many graphs.
    """
    module.graph.lint()
    made = made or Forms()
    if stage == "captured":
        return list(_captured(module.graph))
    if stage == "derived":
        return list(_derived(module, captured))
    bare = [
        f"{node.name}: it has no note {key!r}"
        for node in module.graph.nodes
        for key in (("val",) if stage == "folded" else ("val", "static"))
        if node.op != "output" and key not in node.meta
    ]
    if bare:
        return bare  # nothing else can be looked at
    if stage == "folded":
        return list(_folded(module.graph, captured, made))
    found = list(_coordinates(module.graph))
    for node in module.graph.nodes:
        found += [f"{node.name}: {what}" for what in _node(module, node, STAGES[stage], made)]
    return found


def _captured(graph: fx.Graph) -> Iterator[str]:
    """Operators alone, none of which writes to a tensor."""
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            yield f"{node.name}: a {node.op} node"
        elif node.op == "call_function" and not _is_aten(node):
            yield f"{node.name}: {target(node)} is no ATen operation"
        elif isinstance(node.target, OpOverload) and schema(node.target).is_mutable:
            yield f"{node.name}: {node.target} writes to a tensor"


def _coordinates(graph: fx.Graph) -> Iterator[str]:
    """Effective parameters of one name have one shape: their scores are added up."""
    shapes: dict[str, torch.Size] = {}
    for node in graph.nodes:
        if node.target is ops.coordinate:
            name, shape = arguments(node)[1], node.meta["val"].shape
            if shapes.setdefault(name, shape) != shape:
                yield f"{node.name}: {name} has another shape elsewhere"


def _folded(graph: fx.Graph, captured: Captured, made: Forms) -> Iterator[str]:
    """No norm is left that is an affine map of its input alone."""
    active = active_nodes(graph, captured)
    known = {node.name for node in captured.graph_module.graph.nodes}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.name not in known:
            # The model's own number formats may be mixed here, which is settled later.
            forms = fx.map_arg(arguments(node), lambda n: form(n.meta["val"]).double())
            if made(target(node), forms).shape != node.meta["val"].shape:
                yield f"{node.name}: its shape is not that of its operation"
        if node.target not in _EFFECTIVE and not _is_aten(node):
            yield f"{node.name}: {node.target} is no ATen operation"
        if node.target in BATCH_NORMS and frozen(node):
            x, *weights = node.all_input_nodes
            statistics = [n for n in node.users if n.target is operator.getitem and n.args[1] != 0]
            if x in active and not statistics and not any(n in active for n in weights):
                yield f"{node.name}: a frozen norm is left"


def _derived(module: fx.GraphModule, captured: Captured) -> Iterator[str]:
    """Steps alone, on tensors of one device and the model's."""
    devices = {tensor.device for tensor in captured.live().values()}
    for name, held in module.named_buffers():
        if held.device not in devices and devices:
            yield f"{name}: it is on {held.device}"
    for node in module.graph.nodes:
        if node.op == "call_function" and not _is_aten(node):
            home = getattr(target(node), "__module__", None)
            if home not in _STEPS and getattr(torch, target(node).__name__, None) is not target(
                node
            ):
                yield f"{node.name}: {home} has no steps"
        if node.op == "placeholder" and node.target not in captured.tensors:
            yield f"{node.name}: it is no tensor of the model's"


def _is_aten(node: fx.Node) -> bool:
    return node.target is operator.getitem or isinstance(node.target, OpOverload)


def _node(module: fx.GraphModule, node: fx.Node, allowed: set[Any], made: Forms) -> Iterator[str]:
    unknown = node.meta.keys() - NOTES.keys() - {"val"}
    if unknown:
        yield f"notes that are not declared: {', '.join(sorted(unknown))}"
    if node.op == "get_attr":
        held = module.get_buffer(str(node.target))
        if not _alike(form(held), node.meta["val"]):
            yield "its shape is not that of its tensor"
    if node.op != "call_function":
        return
    if static(node):
        if node.target not in {*_EFFECTIVE, *LEAVES, *_WEIGHTS} and not _is_aten(node):
            yield f"a weight is computed by {getattr(node.target, '__name__', node.target)}"
    elif node.target not in allowed:
        yield f"{getattr(node.target, '__name__', node.target)} is no operation of this stage"
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _without_device)
    called = functools.partial(target(node), **kwargs) if kwargs else target(node)
    if not _alike(made(called, args), node.meta["val"]):
        yield "its shape is not that of its operation"
    if "stencil" in node.meta:
        yield from _stencil(module, node)


#: What is done with effective parameters after their absolute value.
_WEIGHTS = {ops.scale, ops.shift, ops.mix, ops.negative, ops.factored}


def _without_device(argument: Any) -> Any:
    """Shapes are found on the meta device, to which nothing is copied from elsewhere."""
    return torch.device("meta") if isinstance(argument, torch.device) else argument


def _alike(made: Any, noted: Any) -> bool:
    if isinstance(made, (list, tuple)):
        return len(made) == len(noted) and all(map(_alike, made, noted))
    if not isinstance(made, Tensor) or not isinstance(noted, Tensor):
        return isinstance(made, Tensor) == isinstance(noted, Tensor)
    return made.shape == noted.shape and made.dtype == noted.dtype


def _stencil(module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    """The tensors of a fixed map are those of its exact description."""
    dim, stencil = node.meta["stencil"]
    if node.target is SLICE:
        read = torch.arange(stencil.size)[slice(*arguments(node)[2:])]
        if not torch.equal(read, stencil.position) or not stencil.is_selection:
            yield "it picks other positions than its stencil"
        return
    made = [x.to(torch.float64) for x in stencil.tensors()]
    held = [module.get_buffer(str(a.target)).to(torch.float64) for a in arguments(node)[2:4]]
    if dim != arguments(node)[1] or not all(map(torch.equal, made, held)):
        yield "its tensors are not those of its stencil"
