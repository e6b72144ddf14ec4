"""Weights whose gradient is not that of the operations which compute them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import fx
from torch.autograd import Function

from fxpath.errors import Problem, problem
from fxpath.model.captured import Captured


def own_gradients(captured: Captured) -> list[Problem]:
    """Where a weight is computed by an ``autograd.Function``: its own backward is not captured.

    A graph has the operations of a function's forward, and nothing of its backward.  Activations do
    not matter: their derivative plays no part in that of a path-norm.
    """
    bodies = dict(_bodies(Function))
    found: list[Problem] = []
    active: set[fx.Node] = set()
    computed: set[fx.Node] = set()
    for node in captured.graph_module.graph.nodes:
        if node.op == "placeholder":
            if node.name not in captured.tensors:
                active.add(node)
            elif captured.tensors[node.name] in captured.parameters:
                computed.add(node)
        elif any(n in active for n in node.all_input_nodes):
            active.add(node)
        elif any(n in computed for n in node.all_input_nodes):
            computed.add(node)
            name = _function(node, bodies)
            if name is not None:
                found.append(
                    problem(
                        node,
                        f"{name} computes a weight and has a backward of its own, which "
                        "torch.export does not keep: the gradient would be another one",
                        "write it with detach(), as in w + (sign(w) - w).detach(), or use "
                        "log10_path_norm() and scores(), which need no gradient",
                    )
                )
    return found


def _bodies(kind: type[Function]) -> Iterator[tuple[tuple[str, int], str]]:
    """Lines of code of all functions' forward methods: (file, line) -> name."""
    for function in kind.__subclasses__():
        forward = inspect.unwrap(inspect.getattr_static(function, "forward", None) or _nothing)
        code = getattr(getattr(forward, "__func__", forward), "__code__", None)
        if code is not None and code is not _nothing.__code__:
            for _, _, line in code.co_lines():
                if line is not None:
                    yield (code.co_filename, line), function.__qualname__
        yield from _bodies(function)


def _nothing() -> None:
    """Stands for a function without a forward."""


def _function(node: fx.Node, bodies: dict[tuple[str, int], str]) -> str | None:
    """The function in whose forward an operation was called."""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        if line.strip().startswith('File "'):
            _, path, rest = line.split('"', 2)
            number = int(rest.split("line ", 1)[1].split(",", 1)[0])
            if (path, number) in bodies:
                return bodies[path, number]
    return None
