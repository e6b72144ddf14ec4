"""What a rule may ask for while it writes the lifted counterpart of an operation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxpath.errors import Problem, problem
from fxpath.graph import aten, ops
from fxpath.graph.constants import Constants
from fxpath.graph.edit import form, inputs_first
from fxpath.graph.gating import find_gates
from fxpath.graph.made import fill_of, read_by
from fxpath.graph.naming import coordinate_name, depends_on_parameter
from fxpath.graph.refusal import INFINITE, RANDOM, SPARSE, Refusal
from fxpath.graph.schema import arguments, bind, target
from fxpath.graph.stencil import Stencil
from fxpath.graph.values import as_slice, check_format, is_sparse, real
from fxpath.graph.writer import Writer
from fxpath.model import Captured


class Builder(Constants, Writer):
    """Writes a lifted graph, operation by operation of a captured one, which it only reads.

    Attributes:
        lifted: what stands for an activation of the captured graph; several results are a list.
        problems: every operation without an exact rule, so far.
        current: the operation whose counterpart is written.
        gating: which factors are gates, if they are taken in.
        unfollowed: what only gates read and has no rule, or reads such a thing, with the reason.
    """

    def __init__(self, graph: fx.Graph, captured: Captured) -> None:
        """Begin with the tensors of the model, and no operation."""
        Constants.__init__(self, graph, captured)
        Writer.__init__(self)
        self.lifted: dict[fx.Node, Any] = {}
        self.problems: list[Problem] = []
        self.current: fx.Node | None = None
        self._copied: dict[fx.Node, fx.Node] = {}
        self._expressions: dict[Any, fx.Node] = {}
        self._weights: dict[fx.Node, fx.Node] = {}
        self._owners: dict[str, fx.Node] = {}
        self._starts: dict[fx.Node, list[int]] = {}
        self._scratch = fx.Graph()
        self.gating = find_gates(graph, self.is_active) if captured.gates else None
        self.unfollowed: dict[fx.Node, Refusal] = {}
        for node in graph.nodes:
            if node.op == "placeholder" and node.name in captured.tensors:
                self._copied[node] = self.graph.placeholder(node.name)
                self._copied[node].meta["val"] = form(node.meta["val"])

    def refuse(self, node: fx.Node, why: Refusal) -> None:
        """Note why an operation has no rule, once for each."""
        if all(known.node != node.name for known in self.problems):
            self.problems.append(problem(node, why.reason, why.remedy))

    def is_signal(self, node: fx.Node) -> bool:
        """Whether paths run through a node; if not, only gates read it."""
        return self.gating is None or node in self.gating.signals

    def release(self) -> None:
        """Let go of the captured graph: what was computed of its nodes counts as their reader."""
        for node in reversed(self._scratch.nodes):
            self._scratch.erase_node(node)

    def finish(self) -> fx.GraphModule:
        """The lifted graph; placeholders say whether it was made for what they hold."""
        for node in self.baked:
            self._copied[node].meta["baked"] = True
        return super().finish()

    # -- activations ------------------------------------------------------------------------------

    def emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Append a lifted node; its shape is found by running it on the meta device."""
        node = super().emit(function, *args)
        if self.current is not None:
            node.meta["origin"] = self.current.meta.get("origin", self.current)
        return node

    def node(self, value: fx.Node) -> fx.Node:
        """The lifted counterpart of an activation; constants become neurons with a bias only."""
        if value not in self._active:
            return self.emit(ops.constant, self.weight(value, value, "bias"))
        lifted = self.lifted[value]
        assert isinstance(lifted, fx.Node)
        return lifted

    def zeros(self, shape: Sequence[int]) -> fx.Node:
        """Neurons that nothing reaches."""
        return self.expand(self.emit(ops.constant, self.number(0.0)), shape)

    def expand(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Repeat entries by broadcasting; missing axes are made first."""
        if self.shape(x) == tuple(shape):
            return x
        full = (*(1,) * (len(shape) - len(self.shape(x))), *self.shape(x))
        return self.emit(aten.EXPAND, self.reshape(x, full), list(shape))

    def add(self, terms: Sequence[fx.Node], shape: Sequence[int]) -> fx.Node:
        """The sum of any number of lifted values, of one shape."""
        if not terms:
            return self.zeros(shape)
        total, *rest = terms
        for term in rest:
            total = self.emit(ops.add, total, term)
        return total

    def times(self, x: fx.Node, factor: Any) -> fx.Node:
        """A coefficient such as ``alpha``, of an activation or of a weight."""
        if factor == 1:
            return x
        if factor == -1:
            return self.emit(ops.negative, x)
        return self.emit(ops.scale, x, self.weight(factor, x))

    def compute(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """An expression of the model's tensors that the original graph does not write out."""
        node = self._scratch.call_function(function, args)
        node.meta["val"] = function(*fx.map_arg(args, lambda n: form(n.meta["val"])))
        return node

    @staticmethod
    def shape(lifted: fx.Node) -> tuple[int, ...]:
        """Shape of a lifted value."""
        return tuple(lifted.meta["val"].shape)

    def along(
        self, x: fx.Node, dim: int, stencil: Stencil, ranks: Sequence[int] | None = None
    ) -> fx.Node:
        """Apply a stencil along one axis; with ``ranks`` its windows are k-max-pooled."""
        shape = self.shape(x)
        dim %= len(shape)
        if 0 in shape:  # nothing is there to be read
            return self.zeros((*shape[:dim], stencil.out, *shape[dim + 1 :]))
        if stencil.size != self.shape(x)[dim]:
            raise AssertionError(f"a stencil over {stencil.size} meets {self.shape(x)}")
        if stencil.is_identity:
            return x
        plain = None if ranks else as_slice(stencil)
        if plain is not None:
            node = self.emit(aten.SLICE, x, dim, *plain)
        else:
            index, weight = stencil.tensors()
            read = self.buffer(index, "index"), self.buffer(weight, "taps")
            if ranks:
                node = self.emit(ops.pool, x, dim, *read, list(ranks))
            else:
                node = self.emit(ops.along, x, dim, *read)
        node.meta["stencil"] = (dim, stencil)
        return node

    # -- weights ----------------------------------------------------------------------------------

    def weight(self, value: Any, user: fx.Node, suffix: str = "weight") -> fx.Node:
        """Absolute value of a weight: coordinates of theta, or coefficients of the architecture.

        Args:
            value: a node of the original graph that depends on no input, or a number.
            user: the operation that reads it; its module names a computed weight.
            suffix: ``weight`` or ``bias``.
        """
        if not isinstance(value, fx.Node):
            return self.number(value)
        views: list[fx.Node] = []
        shown = {*aten.RELABELLING, *aten.SAME}
        while value not in self._weights and (value.target in shown or self._picks(value)):
            views.append(value)
            value = value.args[0]
        if value not in self._weights:
            self._weights[value] = self._weight(value, user, suffix)
        lifted = self._weights[value]
        for view in reversed(views):
            if view.target not in aten.SAME:
                called = aten.BY_VALUE.get(target(view), target(view))
                rest = fx.map_arg(view.args[1:], self._positions)
                lifted = self.emit(called, lifted, *rest)
            self._weights[view] = lifted
        return lifted

    def _picks(self, value: fx.Node) -> bool:
        """Whether a value is a choice of a parameter's entries, which stay the parameter's own."""
        if value.target not in aten.PICKING or not depends_on_parameter(self.captured, value):
            return False
        known = [self.peek(n) for n in value.all_input_nodes[1:]]
        return all(k is not None and k.dtype in (torch.int64, torch.int32) for k in known)

    def _positions(self, value: fx.Node) -> fx.Node:
        known = self.constant(value)
        assert known is not None
        return self.buffer(known, "positions")

    def number(self, value: Any) -> fx.Node:
        """A coefficient of the architecture."""
        held = torch.tensor(real(value), dtype=torch.float64)
        return self.emit(ops.coefficient, self.buffer(held, "number"))

    def _weight(self, value: fx.Node, user: fx.Node, suffix: str) -> fx.Node:
        if value.target is operator.getitem and arguments(value)[0].target in aten.SPLITTING:
            return self._piece(value, user, suffix)
        held = self._form(value)
        check_format(held)
        if is_sparse(held) and depends_on_parameter(self.captured, value):
            raise Refusal(*SPARSE)
        name = value.meta.get("coordinate")
        if name is None and depends_on_parameter(self.captured, value):
            name = coordinate_name(self.captured, value, user, suffix)
        if name is None:
            return self.emit(ops.coefficient, self._fixed(value))
        static = self.static(value)
        if not static.meta["val"].is_floating_point():
            static = self.emit(aten.CAST, static, torch.float32)
        return self.emit(ops.coordinate, static, self._own(name, value, static))

    def _form(self, value: fx.Node) -> Any:
        """What is known of a value; torch.export does not note conversions of sparse tensors."""
        noted = value.meta.get("val")
        return self.peek(value) if noted is None else noted

    def _fixed(self, value: fx.Node) -> fx.Node:
        """Numbers of the architecture; they must be finite."""
        if is_sparse(self._form(value)):
            dense = self.constant(value)
            assert dense is not None
            return self.buffer(dense.to_dense().double(), "dense")
        static = self.static(value)
        known = self.peek(value) if static.meta["val"].is_floating_point() else None
        if known is not None and not bool(torch.isfinite(known).all()):
            raise Refusal(*INFINITE)
        if not static.meta["val"].is_floating_point():
            static = self.emit(aten.CAST, static, torch.float32)
        return static

    def _piece(self, value: fx.Node, user: fx.Node, suffix: str) -> fx.Node:
        """One piece of a parameter that is split: its entries stay the parameter's own."""
        split, index = arguments(value)
        bound = bind(split)
        whole = self.weight(bound["self"], user, suffix)
        dim = bound["dim"] % len(self.shape(whole))
        if split not in self._starts:
            sizes = [
                piece.shape[dim] if piece.dim() == len(self.shape(whole)) else 1
                for piece in split.meta["val"]
            ]
            self._starts[split] = [*itertools.accumulate(sizes, initial=0)]
        start, end = self._starts[split][index], self._starts[split][index + 1]
        piece = self.emit(aten.SLICE, whole, dim, start, end)
        return self.reshape(piece, tuple(split.meta["val"][index].shape))

    def _own(self, name: str, value: fx.Node, static: fx.Node) -> str:
        """Keep a name for one coordinate array; scores of several uses of one weight add up."""
        array = self._holder(value, static)
        if self._owners.setdefault(name, array) is array:
            return name
        return self._own(f"{name}:{value.name}", value, static)

    def _holder(self, value: fx.Node, static: fx.Node) -> fx.Node:
        """What a coordinate array stands for: a folded one for the parameter that names it."""
        position = {ops.folded_weight: (0,), ops.folded_bias: (2, 3), ops.normalizer: (0, 1)}
        for index in position.get(target(value), ()):
            if arguments(value)[index] is not None:
                return self.static(arguments(value)[index])
        return static

    def static(self, value: fx.Node) -> fx.Node:
        """Copy a computation on parameters and constants; equal expressions become one."""
        for node in inputs_first(value, self._copied, read_by):
            self._copied[node] = self._copy(node)
        return self._copied[value]

    def _copy(self, value: fx.Node) -> fx.Node:
        """Copy one step of a computation on parameters and constants."""
        if value.op != "call_function" or value in self._active:
            raise AssertionError(f"{value.name} is no constant expression")
        if value.target in aten.MADE_FROM_SHAPE:
            copied = self._filled(value)
        else:
            if torch.Tag.nondeterministic_seeded in getattr(value.target, "tags", ()):
                self.refuse(value, Refusal(*RANDOM))
            args, kwargs = fx.map_arg((value.args, value.kwargs), self._copied.__getitem__)
            called = aten.BY_VALUE.get(target(value), target(value))
            key = (called, repr(args), repr(kwargs))
            if key not in self._expressions:
                self._expressions[key] = self.graph.call_function(called, args, kwargs)
            copied = self._expressions[key]
        copied.meta.setdefault("val", fx.node.map_aggregate(self._form(value), form))
        return copied

    def _filled(self, value: fx.Node) -> fx.Node:
        made, number = value.meta["val"], fill_of(value)
        if isinstance(number, fx.Node):
            return self.emit(aten.EXPAND, self._copied[number], list(made.shape))
        return self.buffer(torch.full(tuple(made.shape), number, dtype=made.dtype), "filled")
