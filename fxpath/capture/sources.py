"""Where numbers come from that are not the model's: random ones, and memory nobody wrote to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.errors import Problem, problem
from fxpath.graph.aten import SOMETIMES_RANDOM, UNWRITTEN
from fxpath.model.captured import Captured
from fxpath.private import tree_leaves

_RANDOM = ("its result is random", "remove the noise in eval mode (if self.training)")
_UNWRITTEN = (
    "it reads memory that was never written to, which may hold anything",
    "fill the tensor first, e.g. with torch.zeros",
)


def unreliable(graph: fx.Graph) -> list[Problem]:
    """Operations whose result is not a function of the model and its inputs."""
    problems = []
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and packet not in SOMETIMES_RANDOM:
            problems.append(problem(node, *_RANDOM))
        if node.target in UNWRITTEN:
            problems.append(problem(node, *_UNWRITTEN))
    return problems


def overwritten(captured: Captured) -> list[fx.Node]:
    """Tensors whose memory is overwritten before it is read."""
    empty = [node for node in captured.graph_module.graph.nodes if node.target in UNWRITTEN]
    return [node for node in empty if not _matters(captured, node)]


def _matters(captured: Captured, empty: fx.Node) -> bool:
    """Whether the outputs change with what the memory happens to hold."""
    results = [_Filled(captured, empty, value).outputs() for value in (math.nan, 3.0, -1e9)]
    first = results[0]
    return any(x.is_floating_point() and bool(x.isnan().any()) for x in first) or any(
        not torch.equal(x, y) for other in results[1:] for x, y in zip(first, other, strict=True)
    )


class _Filled(fx.Interpreter):
    """Runs the captured graph with a value where memory was not written to."""

    def __init__(self, captured: Captured, empty: fx.Node, value: float) -> None:
        super().__init__(captured.graph_module)
        self.empty, self.value, self.live = empty, value, captured.live()

    def outputs(self) -> list[Tensor]:
        """The tensors that come out for one random input."""
        generator = torch.Generator().manual_seed(0)

        def given(node: fx.Node) -> Any:
            value = node.meta.get("val")
            if node.name in self.live or not isinstance(value, Tensor):
                return self.live.get(node.name, value)
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return drawn.to(value.device, value.dtype)

        graph: Any = self.module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [
                x for x in tree_leaves(self.run(*map(given, placeholders))) if isinstance(x, Tensor)
            ]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in UNWRITTEN and isinstance(result, Tensor):
            value = self.value if n is self.empty else 0.0
            if not result.is_floating_point():
                value = float(value > 0)
            return torch.full_like(result, value)
        return result
