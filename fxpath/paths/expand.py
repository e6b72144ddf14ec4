"""Captured graph -> explicit graph of neurons.

The graph is read off the captured operations themselves: what is linear in its activation is fed
with basis vectors in float64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graph.aten import (
    CASTS,
    CONVOLUTIONS,
    DROPOUTS,
    RELABELLING,
    SAME,
    SPLITTING,
    TRANSPOSED,
)
from fxpath.graph.naming import coordinate_name, depends_on_parameter
from fxpath.graph.schema import arguments, bind, target
from fxpath.model import Captured
from fxpath.paths.dag import Dag, Edges

__all__ = ["expand"]

aten = torch.ops.aten

#: What only moves entries, applied to the numbers of the neurons.
MOVES = {
    *RELABELLING,
    *SAME,
    *SPLITTING,
    *(aten.cat.default, aten.stack.default, aten.repeat.default, aten.roll.default),
    *(aten.narrow.default, aten.index_select.default, aten.positive.default),
    *(aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default),
    *(aten.squeeze.dims, aten.expand_as.default, aten.pixel_shuffle.default),
    *(aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.lift_fresh_copy.default),
}
#: Linear maps with coefficients of the architecture, some with a constant (padding by a value).
FIXED = {
    *(getattr(aten, f"avg_pool{n}d").default for n in (1, 2, 3)),
    *(getattr(aten, f"adaptive_avg_pool{n}d").default for n in (1, 2, 3)),
    *(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default),
    *(aten.pad.default, aten.constant_pad_nd.default, aten.neg.default, aten.cumsum.default),
    *(aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec),
}
MAXIMA = {
    *(getattr(aten, f"max_pool{n}d").default for n in (1, 2, 3)),
    *(getattr(aten, f"max_pool{n}d_with_indices").default for n in (1, 2, 3)),
    *(getattr(aten, f"adaptive_max_pool{n}d").default for n in (1, 2, 3)),
    *(aten.amax.default, aten.max.dim, aten.max.default),
}


def expand(captured: Captured) -> Dag:
    """Expand a captured model, batch norms folded, into its neurons.

    Raises:
        UnsupportedModelError: listing every operation that is not enumerated.
    """
    return _Expansion(captured).run()


class _Expansion:
    """State of the expansion: the numbers of the neurons that each activation consists of."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.dag = captured, Dag()
        self.live = {key: tensor.detach().cpu() for key, tensor in captured.live().items()}
        self.env: dict[fx.Node, Any] = {}
        self.known: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def run(self) -> Dag:
        graph = self.captured.graph_module.graph
        problems = []
        for node in graph.nodes:
            if node.op == "placeholder" and node.name not in self.captured.tensors:
                if isinstance(node.meta.get("val"), Tensor):
                    self.env[node] = self.dag.add("input", node.name, node.meta["val"].shape)
        for node in list(graph.nodes):
            if node.op == "call_function" and any(n in self.env for n in node.all_input_nodes):
                handler = self._handler(node)
                if handler is None:
                    reason = "its paths are not enumerated"
                    remedy = "use fxpath.analyze, which has a rule for it, or replace it"
                    problems.append(problem(node, reason, remedy))
                self.env[node] = None if handler is None or problems else handler(node, _bind(node))
        if problems:
            raise UnsupportedModelError(SupportReport(tuple(problems)))
        (results,) = next(iter(reversed(graph.nodes))).args
        outputs = [self.ids(value, value, "bias").reshape(-1) for value in results]
        self.dag.finish(torch.cat(outputs))
        return self.dag

    def _handler(self, node: fx.Node) -> Callable[[fx.Node, dict[str, Any]], Any] | None:
        called = target(node)
        if called is operator.getitem:
            return lambda node, _: self.env[arguments(node)[0]][arguments(node)[1]]
        kinds: list[tuple[Any, Callable[[fx.Node, dict[str, Any]], Any]]] = [
            ({*CASTS, *DROPOUTS}, lambda node, args: next(iter(self._active(node)))),
            (MOVES, self._move),
            (FIXED, self._fixed),
            (MAXIMA, self._maximum_over),
            ({*CONVOLUTIONS, *TRANSPOSED, aten.linear.default}, self._weighted),
            ({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}, self._scale),
            ({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}, self._add),
            ({aten.rsub.Tensor, aten.rsub.Scalar}, self._add),
            ({aten.relu.default, aten.abs.default}, self._activation),
            ({aten.leaky_relu.default, aten.prelu.default}, self._slope),
            ({aten.relu6.default, aten.hardtanh.default, aten.clamp.default}, self._clamp),
            ({aten.clamp_min.default, aten.clamp_max.default}, self._clamp),
            ({aten.maximum.default, aten.minimum.default}, self._maximum),
        ]
        return next((handler for targets, handler in kinds if called in targets), None)

    # -- values without paths ---------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        """Evaluate an expression of the model's tensors."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self.known:
            if node.op == "placeholder":
                self.known[node] = self.live[node.name]
            else:
                args, kwargs = fx.map_arg((arguments(node), node.kwargs), self.value)
                self.known[node] = target(node)(*args, **kwargs)
        return self.known[node]

    def weight(self, node: Any, user: fx.Node, suffix: str) -> tuple[Tensor, Tensor]:
        """Values, and codes of the entries of theta that they are; both float64, of one shape."""
        value = _double(self.value(node))
        return value, self._code(node, user, suffix, value)

    def _code(self, node: Any, user: fx.Node, suffix: str, value: Tensor) -> Tensor:
        if not isinstance(node, fx.Node):
            return torch.zeros_like(value)
        name = node.meta.get("coordinate")
        if name is None and node.target in {*RELABELLING, *SAME, *SPLITTING, operator.getitem}:
            args = arguments(node)
            inner = self.value(args[0])
            if not isinstance(inner, Tensor):  # an item of a split
                split = args[0]
                whole = self._code(arguments(split)[0], user, suffix, self.value(split.args[0]))
                return target(split)(whole, *split.args[1:], **split.kwargs)[args[1]]
            return target(node)(self._code(args[0], user, suffix, inner), *args[1:], **node.kwargs)
        name = name or coordinate_name(self.captured, node, user, suffix)
        if name is None:
            return torch.zeros_like(value, dtype=torch.float64)
        return self.dag.register(name, tuple(value.shape))

    def ids(self, node: fx.Node, user: fx.Node, suffix: str) -> Tensor:
        """Neurons of an activation; a constant becomes neurons that have only a bias."""
        if node in self.env:
            return self.env[node]
        bias = self.weight(node, user, suffix)
        return self.dag.add("sum", node.name, bias[0].shape, bias=bias)

    def _active(self, node: fx.Node) -> list[Tensor]:
        return [self.env[n] for n in node.all_input_nodes if n in self.env]

    # -- moves and sums ---------------------------------------------------------------------------

    def _move(self, node: fx.Node, args: dict[str, Any]) -> Any:
        def moved(argument: fx.Node) -> Any:
            if argument not in self.env and not argument.meta["val"].is_floating_point():
                return self.value(argument)  # positions to pick
            return self.ids(argument, node, "bias")

        given, named = fx.map_arg((node.args, node.kwargs), moved)
        return target(node)(*given, **named)

    def _fixed(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        (ids,) = self._active(node)

        def run(x: Tensor) -> Tensor:
            return target(node)(x, *node.args[1:], **node.kwargs)

        shape = node.meta["val"].shape
        offset = run(torch.zeros(ids.shape, dtype=torch.float64))
        edges = self._probe(ids, lambda x: run(x) - offset, None)
        code = torch.where(offset == 0, -1, 0)
        return self.dag.add("sum", node.name, shape, edges, (offset, code))

    def _weighted(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        ids = self.env[args["input"]]
        value, code = self.weight(args["weight"], node, "weight")

        def run(weight: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: target(node)(**{**args, "input": x, "weight": weight, "bias": None})

        named = depends_on_parameter(self.captured, args["weight"])
        edges = self._probe(ids, run(value), run(code) if named else None)
        shape = node.meta["val"].shape
        if args["bias"] is None:
            return self.dag.add("sum", node.name, shape, edges)
        axis = -1 if node.target is aten.linear.default else value.dim() - 2
        return self.dag.add("sum", node.name, shape, edges, self._bias(args["bias"], node, axis))

    def _bias(self, bias: fx.Node, node: fx.Node, trailing: int) -> tuple[Tensor, Tensor]:
        """A bias along the last axis (-1), or along the one before ``trailing`` spatial axes."""
        shape = node.meta["val"].shape
        spread = [-1] + [1] * max(trailing, 0)
        value, code = (v.reshape(spread).expand(shape) for v in self.weight(bias, node, "bias"))
        return value, code

    def _probe(
        self,
        ids: Tensor,
        run: Callable[[Tensor], Tensor],
        run_codes: Callable[[Tensor], Tensor] | None,
    ) -> Edges:
        """Edges of a map that is linear in its activation, from its values on basis vectors.

        With codes in place of the weights the map returns the code of each edge, also where the
        weight is zero; without codes an edge is where the coefficient is not zero.
        """
        found: list[Edges] = []
        for number, neuron in enumerate(ids.reshape(-1).tolist()):
            unit = torch.zeros(ids.numel(), dtype=torch.float64)
            unit[number] = 1
            values = run(unit.reshape(ids.shape)).reshape(-1)
            codes = values if run_codes is None else run_codes(unit.reshape(ids.shape)).reshape(-1)
            ends = codes.nonzero()[:, 0]
            code = torch.zeros_like(ends) if run_codes is None else codes[ends].round().long()
            found.append((torch.full_like(ends, neuron), ends, values[ends], code))
        source, end, weight, code = (torch.cat(parts) for parts in zip(*found, strict=True))
        return source, end, weight, code

    # -- one edge per entry -----------------------------------------------------------------------

    def _each(
        self, kind: str, node: fx.Node, terms: list[tuple[Tensor, Any, Any]], **options: Any
    ) -> Tensor:
        """A layer whose neurons read one entry of each term (neurons, weight, code)."""
        shape = node.meta["val"].shape
        count = math.prod(shape)
        edges = []
        for ids, weight, code in terms:
            spread = [_double(v).expand(shape).reshape(-1) for v in (ids, weight, code)]
            edges.append((spread[0].long(), torch.arange(count), spread[1], spread[2].long()))
        source, end, weights, codes = (torch.cat(parts) for parts in zip(*edges, strict=True))
        present = (weights != 0) | (codes > 0)
        picked = (source[present], end[present], weights[present], codes[present])
        return self.dag.add(kind, node.name, shape, picked, **options)

    def _scale(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        x, factor = args["self"], args["other"]
        if x not in self.env:
            x, factor = factor, x
        value, code = self.weight(factor, node, "weight")
        if node.target in (aten.div.Tensor, aten.div.Scalar):
            value = value.reciprocal()
        return self._each("sum", node, [(self.env[x], value, code)])

    def _add(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        alpha = args["alpha"]
        factors = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}
        kind = target(node)._schema.name.split("::")[1]
        terms, bias = [], None
        for value, factor in zip((args["self"], args["other"]), factors[kind], strict=True):
            if isinstance(value, fx.Node) and value in self.env:
                terms.append((self.env[value], factor, 0))
            else:
                constant, code = self.weight(value, node, "bias")
                shape = node.meta["val"].shape
                bias = ((factor * constant).expand(shape), code.expand(shape))
        return self._each("sum", node, terms, bias=bias)

    def _activation(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        kind = "relu" if node.target is aten.relu.default else "abs"
        return self._each(kind, node, [(self.env[args["self"]], 1, 0)])

    def _slope(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        ids = self.env[args["self"]]
        given = args["weight" if "weight" in args else "negative_slope"]
        slopes = _double(self.value(given))
        if slopes.numel() > 1:
            slopes = slopes.reshape(-1, *[1] * (ids.dim() - 2))
        most = slopes.abs().clamp(min=1)
        detail = slopes.reshape(slopes.shape or (1,)).expand(ids.shape).reshape(-1)
        return self._each("slope", node, [(ids, most, 0)], detail=detail)

    def _clamp(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        bounds = {aten.relu6.default: (0.0, 6.0)}.get(target(node))
        if bounds is None:
            low = args.get("min_val", args.get("min"))
            high = args.get("max_val", args.get("max"))
            bounds = (
                -math.inf if low is None else float(low),
                math.inf if high is None else float(high),
            )
        terms = [(self.env[args["self"]], 1, 0)]
        for bound in bounds:
            if bound and math.isfinite(bound):
                constant = (torch.full((1,), bound, dtype=torch.float64), torch.zeros(1))
                terms.append((self.dag.add("sum", f"{node.name}_bound", (1,), bias=constant), 1, 0))
        return self._each("clamp", node, terms, detail=bounds)

    def _maximum(self, node: fx.Node, args: dict[str, Any]) -> Tensor:
        kind = "max" if node.target is aten.maximum.default else "min"
        both = [(self.ids(args[key], node, "bias"), 1, 0) for key in ("self", "other")]
        return self._each(kind, node, both)

    def _maximum_over(self, node: fx.Node, args: dict[str, Any]) -> Any:
        """Windows: an entry above all others shows in the maxima that it takes part in."""
        ids = self.env[args["self"]]
        paired = not isinstance(node.meta["val"], Tensor)

        def run(x: Tensor) -> Tensor:
            result = target(node)(x - 1, *node.args[1:], **node.kwargs)
            return (result[0] if paired else result) + 1

        edges = self._probe(ids, run, None)
        shape = (node.meta["val"][0] if paired else node.meta["val"]).shape
        y = self.dag.add("max", node.name, shape, edges)
        return [y, None] if paired else y


def _double(value: Any) -> Tensor:
    """A tensor or a number in float64, without passing through float32."""
    return torch.as_tensor(value, dtype=torch.float64)


def _bind(node: fx.Node) -> dict[str, Any]:
    return {} if node.target is operator.getitem else bind(node)
