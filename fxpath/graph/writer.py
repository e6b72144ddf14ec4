"""Writing a lifted graph: nodes that know their shape, constants that are kept once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.graph.aten import RESHAPE
from fxpath.graph.edit import Forms, drop_dead, form, written
from fxpath.graph.links import mark_static


class Writer:
    """A graph that is being written, and the constants that it holds."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._forms = Forms()
        self._alike: dict[tuple[Any, ...], list[str]] = {}

    def emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Append an operation; its shape is found by running it on the meta device."""
        node = self.graph.call_function(function, args)
        node.meta["val"] = self._forms(function, args)
        return node

    def buffer(self, tensor: Tensor, name: str) -> fx.Node:
        """A constant of the graph; equal ones are kept once."""
        alike = self._alike.setdefault(_look(tensor), [])
        held = next((h for h in alike if torch.equal(self.root.get_buffer(h), tensor)), None)
        if held is None:
            held = f"{name}_{len(self.root._buffers)}"
            self.root.register_buffer(held, tensor)
            alike.append(held)
        node = self.graph.get_attr(held)
        node.meta["val"] = form(tensor)
        return node

    def copy(self, module: fx.GraphModule) -> None:
        """Take over a whole graph, to change the copy."""
        copied = {
            node: self.buffer(module.get_buffer(str(node.target)), "constant")
            for node in module.graph.nodes
            if node.op == "get_attr"
        }
        self.graph.output(self.graph.graph_copy(module.graph, copied))

    def held(self, node: fx.Node) -> Tensor:
        """The tensor of a constant."""
        return self.root.get_buffer(str(node.target))

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """The same entries in another shape."""
        if tuple(x.meta["val"].shape) == tuple(shape):
            return x
        return self.emit(RESHAPE, x, list(shape))

    def finish(self) -> fx.GraphModule:
        """The graph without what no output depends on."""
        drop_dead(self.graph)
        mark_static(self.graph)
        return written(self.root, self.graph)


def _look(tensor: Tensor) -> tuple[Any, ...]:
    """What equal tensors have in common; few others do, and these are compared entry by entry."""
    flat = tensor.detach().flatten().double()
    ramp = torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device)
    return tensor.dtype, tensor.device, *tensor.shape, float(flat.sum()), float(flat @ ramp)
