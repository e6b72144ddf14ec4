"""Interpretations of a lifted graph: what each of its operations does to a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops

__all__ = ["Interpretation", "power"]


def power(value: Tensor, q: float) -> Tensor:
    """``|value| ** q`` with 0 ** 0 = 0, which counts non-zero paths for q = 0."""
    if q == 1:
        return value.abs()
    if q == 0:
        return value * 0 + (value != 0)  # NaN stays NaN
    if q > 1:
        return value.abs().pow(q)
    # The derivative at 0 is infinite: no gradient there, as for the absolute value itself.
    empty = value == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, value).abs().pow(q))


class Interpretation:
    """Runs a lifted graph; subclasses implement one method per operation of the vocabulary.

    A method is called like the function of :mod:`fxpath.graph.ops` whose name it bears.
    Activations are of whatever type :meth:`is_activation` recognizes; weights, and all that is
    computed from the model's tensors alone, are plain tensors.  Operations outside the vocabulary
    only move entries, and go to :meth:`move`.
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, q: float = 1.0) -> None:
        """Interpret ``module`` in ``dtype`` for the l^q path-norm."""
        self.module = module
        self.dtype = dtype
        self.q = q
        self._last_use = _last_uses(module.graph)
        self._constants = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in module.named_buffers()
        }

    def run(self, tensors: Mapping[str, Tensor]) -> Any:
        """Evaluate on the model's tensors, by the names of the graph's placeholders."""
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        env: dict[fx.Node, Any] = {}
        for node in self.module.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "placeholder":
                env[node] = tensors[node.target]
            elif node.op == "get_attr":
                env[node] = self._constants[node.target].to(self.device)
            elif node.op == "output":
                return args[0]
            else:
                self.node = node
                env[node] = self._call(node.target, args, kwargs)
            for done in self._last_use.get(node, ()):
                del env[done]
        raise AssertionError("a graph ends with its output")

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = target.__name__
        method = getattr(self, name, None) if getattr(ops, name, None) is target else None
        if method is not None:
            return method(*args, **kwargs)
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if any(self.is_activation(a) for a in flat):
            return self.move(target, *args)
        return target(*args, **kwargs)

    def is_activation(self, value: Any) -> bool:
        """Whether a value is an activation of this interpretation."""
        raise NotImplementedError

    def move(self, target: Callable[..., Tensor], *args: Any) -> Any:
        """An operation that only moves entries."""
        raise NotImplementedError


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nothing after it reads: they are freed there."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for read in node.all_input_nodes:
            last[read] = node
        last.setdefault(node, node)
    freed: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        if node.op != "output":
            freed.setdefault(node, []).append(read)
    return freed
