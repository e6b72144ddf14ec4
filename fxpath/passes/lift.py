"""Pass: ATen graph -> lifted graph in the vocabulary of :mod:`fxpath.graph.ops`.

Requires a functional ATen graph with static shapes.  Ensures that every operation between the
inputs and the outputs was claimed by a rule (or is listed in the report), that every intermediate
shape is the one of the original network, and that every coordinate of theta has a name of its own.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graph import ops
from fxpath.graph.edit import Forms, drop_dead, form, inputs_first, written
from fxpath.graph.made import MADE_FROM_SHAPE, fill_of, read_by
from fxpath.graph.naming import (
    PICKING,
    RELABELLING,
    SAME,
    SPLITTING,
    coordinate_name,
    depends_on_parameter,
)
from fxpath.graph.schema import arguments, bind, target
from fxpath.graph.stencil import Stencil
from fxpath.model import Captured
from fxpath.passes.constants import Constants
from fxpath.passes.values import (
    BY_VALUE,
    SPARSE,
    ancestors,
    as_slice,
    check_format,
    is_float,
    is_sparse,
    real,
    settled,
)
from fxpath.rules import RULES, Refusal, refusal
from fxpath.rules.refused import INFINITE, ORDER, RANDOM

__all__ = ["Lift", "lift"]

aten = torch.ops.aten


def lift(captured: Captured) -> fx.GraphModule:
    """Lift a captured model.

    Returns:
        A signed graph module that takes the model's tensors (placeholders named as in ``captured``)
        and returns the path-norm, without care for range; see :mod:`fxpath.passes.unsign`.

    Raises:
        UnsupportedModelError: listing every operation without an exact rule.
    """
    lifting = Lift(captured)
    module = lifting.run()
    if lifting.problems:
        raise UnsupportedModelError(SupportReport(tuple(lifting.problems)))
    return module


class Lift(Constants):
    """The state of the pass; rules call its methods to emit lifted nodes."""

    def __init__(self, captured: Captured) -> None:
        """Prepare an empty lifted graph."""
        super().__init__(captured)
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.problems: list[Any] = []
        self._env: dict[fx.Node, fx.Node | list[fx.Node | None]] = {}
        self._copied: dict[fx.Node, fx.Node] = {}
        self._expressions: dict[Any, fx.Node] = {}
        self._weights: dict[fx.Node, fx.Node] = {}
        self._owners: dict[str, fx.Node] = {}
        self._starts: dict[fx.Node, list[int]] = {}
        self._buffers: Counter[str] = Counter()
        self._forms = Forms()
        self._scratch = fx.Graph()
        self._current: fx.Node | None = None
        self._shapeless = False

    # -- the walk ---------------------------------------------------------------------------------

    def run(self) -> fx.GraphModule:
        """Lift node by node; problems are collected, not raised."""
        original = self.captured.graph_module.graph
        output = next(iter(reversed(original.nodes)))
        needed = ancestors(output)
        for node in original.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for node in original.nodes:
            if node.op != "call_function":
                continue
            if any(n in self._active for n in read_by(node)):
                self._active.add(node)
                if node in needed:
                    self._env[node] = self._apply(node)
                    if self._shapeless:
                        return fx.GraphModule(self.root, fx.Graph())
        outputs = [self._output(value) for value in output.args[0] if is_float(value)]
        if not outputs and not self.problems:
            raise ValueError("the model has no floating-point output, so it has no paths")
        self.graph.output(self.emit(ops.total, outputs or [self.emit(ops.source, (1,))]))
        drop_dead(self.graph)
        return written(self.root, self.graph)

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.captured.tensors:
            self._copied[node] = self.graph.placeholder(node.name)
            self._copied[node].meta["val"] = form(node.meta["val"])
        else:
            position = len(self._active)
            self._active.add(node)
            if isinstance(node.meta.get("val"), Tensor):
                source = self.emit(ops.source, tuple(node.meta["val"].shape))
                source.meta["input"] = position
                self._env[node] = source

    def _apply(self, node: fx.Node) -> fx.Node | list[fx.Node | None]:
        self._current = node
        try:
            if node.target is operator.getitem:
                return self._item(node)
            rule = RULES.get(target(node))
            if rule is None:
                raise refusal(node)
            node.meta["val"] = fx.node.map_aggregate(node.meta.get("val"), settled)
            lifted = rule(self, node, bind(node))
        except Refusal as why:
            self.problems.append(problem(node, why.reason, why.remedy))
            return self._stand_in(node.meta.get("val"))
        if isinstance(lifted, fx.Node):
            expected, found = tuple(node.meta["val"].shape), self.shape(lifted)
            if expected != found:
                raise AssertionError(f"{node.name}: lifted to {found}, but it is {expected}")
        return lifted

    def _item(self, node: fx.Node) -> fx.Node:
        source, index = arguments(node)
        pieces = self._env[source]
        piece = pieces[index] if isinstance(pieces, list) else None
        if piece is None:
            raise Refusal(*ORDER)
        return piece

    def _stand_in(self, value: Any) -> Any:
        """A value of the right shape, so that later operations are checked as well."""
        if isinstance(value, Tensor):
            if not all(isinstance(n, int) for n in value.shape):
                # Its shape depends on values: nothing after it can be looked at.
                self._shapeless = True
                return None
            return self.emit(ops.source, tuple(value.shape))
        return [self._stand_in(v) for v in value] if isinstance(value, (list, tuple)) else []

    def _output(self, value: fx.Node) -> fx.Node:
        try:
            return self.node(value)
        except Refusal as why:
            self.problems.append(problem(value, why.reason, why.remedy))
            return self.emit(ops.source, tuple(value.meta["val"].shape))

    # -- what rules use ---------------------------------------------------------------------------

    def emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Append a lifted node; its shape is found by running it on the meta device."""
        node = self.graph.call_function(function, args)
        node.meta["origin"] = self._current
        node.meta["val"] = self._forms(function, args)
        return node

    def node(self, value: fx.Node) -> fx.Node:
        """The lifted counterpart of an activation; constants become neurons with a bias only."""
        if value not in self._active:
            return self.emit(ops.constant, self.weight(value, value, "bias"))
        lifted = self._env[value]
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
        return self.emit(aten.expand.default, self.reshape(x, full), list(shape))

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
        shown = {*RELABELLING, *SAME}
        while value not in self._weights and (value.target in shown or self._picks(value)):
            views.append(value)
            value = value.args[0]
        if value not in self._weights:
            self._weights[value] = self._weight(value, user, suffix)
        lifted = self._weights[value]
        for view in reversed(views):
            if view.target not in SAME:
                called = BY_VALUE.get(target(view), target(view))
                rest = fx.map_arg(view.args[1:], self._positions)
                lifted = self.emit(called, lifted, *rest)
            self._weights[view] = lifted
        return lifted

    def _picks(self, value: fx.Node) -> bool:
        """Whether a value is a choice of a parameter's entries, which stay the parameter's own."""
        if value.target not in PICKING or not depends_on_parameter(self.captured, value):
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
        if value.target is operator.getitem and arguments(value)[0].target in SPLITTING:
            return self._piece(value, user, suffix)
        if (
            value.meta.get("val") is None
        ):  # torch.export does not note conversions of sparse tensors
            value.meta["val"] = self.peek(value)
        check_format(value)
        if is_sparse(value) and depends_on_parameter(self.captured, value):
            raise Refusal(*SPARSE)
        name = value.meta.get("coordinate")
        if name is None and depends_on_parameter(self.captured, value):
            name = coordinate_name(self.captured, value, user, suffix)
        if name is None:
            return self.emit(ops.coefficient, self._fixed(value))
        static = self.static(value)
        if not static.meta["val"].is_floating_point():
            static = self.emit(aten.to.dtype, static, torch.float32)
        return self.emit(ops.coordinate, static, self._own(name, value, static))

    def _fixed(self, value: fx.Node) -> fx.Node:
        """Numbers of the architecture; they must be finite."""
        if is_sparse(value):
            dense = self.constant(value)
            assert dense is not None
            return self.buffer(dense.to_dense().double(), "dense")
        static = self.static(value)
        known = self.peek(value) if static.meta["val"].is_floating_point() else None
        if known is not None and not bool(torch.isfinite(known).all()):
            raise Refusal(*INFINITE)
        if not static.meta["val"].is_floating_point():
            static = self.emit(aten.to.dtype, static, torch.float32)
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
        piece = self.emit(aten.slice.Tensor, whole, dim, start, end)
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
        if value.target in MADE_FROM_SHAPE:
            copied = self._filled(value)
        else:
            if torch.Tag.nondeterministic_seeded in getattr(value.target, "tags", ()):
                self.problems.append(problem(value, *RANDOM))
            args, kwargs = fx.map_arg((value.args, value.kwargs), self._copied.__getitem__)
            called = BY_VALUE.get(target(value), target(value))
            key = (called, repr(args), repr(kwargs))
            if key not in self._expressions:
                self._expressions[key] = self.graph.call_function(called, args, kwargs)
            copied = self._expressions[key]
        copied.meta.setdefault("val", fx.node.map_aggregate(value.meta.get("val"), form))
        return copied

    def _filled(self, value: fx.Node) -> fx.Node:
        made, number = value.meta["val"], fill_of(value)
        if isinstance(number, fx.Node):
            return self.emit(aten.expand.default, self._copied[number], list(made.shape))
        return self.buffer(torch.full(tuple(made.shape), number, dtype=made.dtype), "filled")

    def buffer(self, tensor: Tensor, name: str) -> fx.Node:
        """A constant of the lifted graph."""
        held = f"{name}_{self._buffers[name]}"
        self._buffers[name] += 1
        self.root.register_buffer(held, tensor)
        node = self.graph.get_attr(held)
        node.meta["val"] = form(tensor)
        return node

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
            node = self.emit(aten.slice.Tensor, x, dim, *plain)
        else:
            index, weight = stencil.tensors()
            read = self.buffer(index, "index"), self.buffer(weight, "taps")
            if ranks:
                node = self.emit(ops.pool, x, dim, *read, list(ranks))
            else:
                node = self.emit(ops.along, x, dim, *read)
        node.meta["stencil"] = (dim, stencil)
        return node

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """The same entries in another shape."""
        if self.shape(x) == tuple(shape):
            return x
        return self.emit(aten.reshape.default, x, list(shape))
