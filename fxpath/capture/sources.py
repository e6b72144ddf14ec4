"""Where numbers come from that are not the model's: random ones, and memory nobody wrote to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxpath.errors import Problem, problem
from fxpath.model.captured import Captured

__all__ = ["unreliable"]

aten = torch.ops.aten

_RANDOM = ("its result is random", "remove the noise in eval mode (if self.training)")
_UNWRITTEN = (
    "it reads memory that was never written to, which may hold anything",
    "fill the tensor first, e.g. with torch.zeros",
)
#: Random in training mode only, or by another argument: rules say more about these.
_CONDITIONAL = {
    *(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout),
    *(aten.native_dropout, aten.rrelu, aten.rrelu_with_noise, aten.scaled_dot_product_attention),
    *(aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention),
    *(aten.rnn_relu, aten.rnn_tanh, aten.lstm, aten.gru),
}
_EMPTY: set[Any] = {
    *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default),
    *(aten.empty_strided.default, aten.empty_permuted.default, aten.new_empty_strided.default),
}


def unreliable(captured: Captured) -> list[Problem]:
    """Operations whose result is not a function of the model and its inputs.

    Memory that is overwritten before it is read becomes zeros in the graph.
    """
    graph = captured.graph_module.graph
    problems = []
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and packet not in _CONDITIONAL:
            problems.append(problem(node, *_RANDOM))
    empty = [node for node in graph.nodes if node.target in _EMPTY]
    read = {node for node in empty if _matters(captured, node)}
    for node in empty:
        if node in read:
            problems.append(problem(node, *_UNWRITTEN))
        else:
            _zeros(node)
    captured.graph_module.recompile()
    return problems


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
        if n.target in _EMPTY and isinstance(result, Tensor):
            value = self.value if n is self.empty else 0.0
            if not result.is_floating_point():
                value = float(value > 0)
            return torch.full_like(result, value)
        return result


def _zeros(node: fx.Node) -> None:
    """Turn a tensor whose memory is overwritten into zeros."""
    made = node.meta["val"]
    node.target, node.args = aten.zeros.default, (list(made.shape),)
    node.kwargs = {"dtype": made.dtype, "device": made.device}
