"""Values that are computed without activations, where no parameter is involved."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph.aten import MADE_FROM_SHAPE
from fxpath.graph.edit import inputs_first
from fxpath.graph.made import fill_of, read_by
from fxpath.graph.schema import target
from fxpath.model import Captured
from fxpath.sharding import whole


def active_nodes(graph: fx.Graph, captured: Captured) -> set[fx.Node]:
    """Nodes of a captured graph whose values depend on the network's inputs."""
    active: set[fx.Node] = set()
    for node in graph.nodes:
        fed = node.op == "placeholder" and node.name not in captured.tensors
        if fed or (node.op == "call_function" and any(n in active for n in read_by(node))):
            active.add(node)
    return active


class Constants:
    """Evaluates constants of a captured graph, each step once.

    Attributes:
        baked: placeholders of those tensors of the model whose numbers were asked for.
    """

    def __init__(self, graph: fx.Graph, captured: Captured) -> None:
        """Nothing is evaluated before it is asked for."""
        self.captured = captured
        self.baked: dict[fx.Node, None] = {}
        self._active = active_nodes(graph, captured)
        self._constants: dict[fx.Node, Any] = {}
        self._asked: set[fx.Node] = set()

    def is_active(self, value: Any) -> bool:
        """Whether a value of the captured graph depends on the network's inputs."""
        return isinstance(value, fx.Node) and value in self._active

    def is_zero(self, value: Any) -> bool:
        """Whether a value is zero whatever the parameters are."""
        if not isinstance(value, fx.Node):
            return bool(value == 0)
        known = None if value in self._active else self.peek(value)
        if known is None or bool(known.any()):
            return False
        self.constant(value)
        return True

    def constant(self, value: Any) -> Tensor | None:
        """The value of a constant expression, or ``None`` if it depends on tensors of the model."""
        if not isinstance(value, fx.Node):
            return torch.tensor(value)
        found = self.peek(value)
        if found is not None and value not in self._asked:
            self._asked.add(value)
            # The graph is made for what these hold.
            read = inputs_first(value, (), read_by)
            self.baked.update(dict.fromkeys(n for n in read if n.op == "placeholder"))
        return found

    def peek(self, value: fx.Node) -> Tensor | None:
        """:meth:`constant` for a check on which the graph does not depend."""
        for node in inputs_first(value, self._constants, self._read_by_constant):
            self._constants[node] = self._evaluated(node)
        found = self._constants[value]
        return found if isinstance(found, Tensor) else None

    def _read_by_constant(self, node: fx.Node) -> list[fx.Node]:
        return [] if node in self._active else read_by(node)

    def _evaluated(self, node: fx.Node) -> Any:
        """The value of a node, those of its inputs being known; ``None`` if it has none."""
        if node.op == "placeholder":
            name = self.captured.tensors.get(node.name)
            if name is None or name in self.captured.parameters:
                return None
            return whole(self._live[node.name].detach())
        if node.op != "call_function" or node in self._active:
            return None
        if any(self._constants[n] is None for n in read_by(node)):
            return None
        if node.target in MADE_FROM_SHAPE:
            made, number = node.meta["val"], fill_of(node)
            number = self._constants[number] if isinstance(number, fx.Node) else number
            return torch.full(tuple(made.shape), float(number), dtype=made.dtype)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._constants.__getitem__)
        return target(node)(*args, **kwargs)

    @functools.cached_property
    def _live(self) -> dict[str, Tensor]:
        return self.captured.live()
