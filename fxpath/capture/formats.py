"""Number formats and layouts that a path-norm cannot be computed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, fx, nn

from fxpath.errors import Problem, problem
from fxpath.graph.aten import ONE_FORMAT

_FORMATS = (
    "a path-norm is defined for real weights",
    "pass a real model, e.g. with real and imaginary parts as channels",
)


def _format(tensor: Tensor) -> tuple[str, str] | None:
    """Why a tensor of this kind is refused, and what to do."""
    if tensor.is_complex():
        return f"it is complex, and {_FORMATS[0]}", _FORMATS[1]
    if tensor.is_quantized:
        return "it is quantized, and what a path-norm needs are its values", "dequantize the model"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}", "store it densely (tensor.to_dense())"
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        return f"{tensor.dtype} has no arithmetic of its own", "convert the model, e.g. by .float()"
    return None


def of_model(model: nn.Module) -> list[Problem]:
    """Parameters that are no dense real numbers."""
    return _named(model.named_parameters())


def of_graph(graph: fx.Graph, tensors: Mapping[str, Tensor], parameters: Set[str]) -> list[Problem]:
    """The same for what a graph reads, and operations that make complex numbers of real ones.

    Args:
        graph: a captured graph.
        tensors: name -> tensor of the model that the graph reads.
        parameters: those of them that are parameters.
    """
    read = [(name, x) for name, x in tensors.items() if name in parameters or x.is_complex()]
    found = _named(read)
    for node in graph.nodes:
        kinds = {str(x.dtype) for x in _sources(node) if x.is_floating_point()}
        if len(kinds) > 1 and getattr(node.target, "overloadpacket", None) in ONE_FORMAT:
            reason = f"it reads {' and '.join(sorted(kinds))} at once, which torch does not compute"
            found.append(problem(node, reason, "convert the model to one number format"))
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_complex():
            continue
        made = not any(x.is_complex() for x in _sources(node))
        if made and (node.op == "call_function" or node.name not in tensors) and not found:
            found.append(problem(node, f"its result is complex, and {_FORMATS[0]}", _FORMATS[1]))
    return found


def _sources(node: fx.Node) -> list[Tensor]:
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return [x for x in values if isinstance(x, Tensor)]


def _named(tensors: Iterable[tuple[str, Tensor]]) -> list[Problem]:
    found = []
    for name, tensor in tensors:
        why = _format(tensor)
        if why is not None:
            path = name.rpartition(".")[0]
            found.append(Problem(name, name, path, "unknown", *why))
    return found
