"""Pass: ATen graph -> lifted graph in the vocabulary of :mod:`fxpath.ops`.

Requires a functional ATen graph with static shapes.  Ensures that every operation between the
inputs and the outputs was claimed by a rule (or is listed in the report), that every intermediate
shape is the one of the original network, and that every coordinate of theta has a name of its own.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath import ops
from fxpath.capture import Captured
from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.graphs import Forms, drop_dead, form, inputs_first, written
from fxpath.naming import RELABELLING, SAME, SPLITTING, coordinate_name, depends_on_parameter
from fxpath.rules import RULES, Refusal, refusal
from fxpath.rules.refused import ORDER, RANDOM
from fxpath.schema import arguments, bind, target
from fxpath.stencil import Stencil

__all__ = ["Lift", "lift"]

aten = torch.ops.aten

#: Tensors made from the shape of another one: the fill value, or the argument that holds it.
MADE_FROM_SHAPE: dict[Any, float | str] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.zero.default: 0.0,
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.fill.Scalar: "value",
    aten.fill.Tensor: "value",
}


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


class Lift:
    """The state of the pass; rules call its methods to emit lifted nodes."""

    def __init__(self, captured: Captured) -> None:
        """Prepare an empty lifted graph."""
        self.captured = captured
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.problems: list[Any] = []
        self._env: dict[fx.Node, fx.Node | list[fx.Node | None]] = {}
        self._copied: dict[fx.Node, fx.Node] = {}
        self._expressions: dict[Any, fx.Node] = {}
        self._weights: dict[fx.Node, fx.Node] = {}
        self._owners: dict[str, fx.Node] = {}
        self._constants: dict[fx.Node, Tensor | None] = {}
        self._starts: dict[fx.Node, list[int]] = {}
        self._buffers: Counter[str] = Counter()
        self._forms = Forms()
        self._active: set[fx.Node] = set()
        self._current: fx.Node | None = None
        self._shapeless = False

    # -- the walk ---------------------------------------------------------------------------------

    def run(self) -> fx.GraphModule:
        """Lift node by node; problems are collected, not raised."""
        original = self.captured.graph_module.graph
        output = next(iter(reversed(original.nodes)))
        needed = _ancestors(output)
        for node in original.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for node in original.nodes:
            if node.op != "call_function" or node.target in MADE_FROM_SHAPE:
                continue
            if any(n in self._active for n in node.all_input_nodes):
                self._active.add(node)
                if node in needed:
                    self._env[node] = self._apply(node)
                    if self._shapeless:
                        return fx.GraphModule(self.root, fx.Graph())
        outputs = [self._output(value) for value in output.args[0] if _is_float(value)]
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
            self._active.add(node)
            if isinstance(node.meta.get("val"), Tensor):
                self._env[node] = self.emit(ops.source, tuple(node.meta["val"].shape))

    def _apply(self, node: fx.Node) -> fx.Node | list[fx.Node | None]:
        self._current = node
        try:
            if node.target is operator.getitem:
                return self._item(node)
            rule = RULES.get(target(node))
            if rule is None:
                name = getattr(node.target, "_schema", None)
                raise refusal(name.name.split("::")[1] if name else str(node.target))
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
        if value in self._active:
            lifted = self._env[value]
            assert isinstance(lifted, fx.Node)
            return lifted
        return self.emit(ops.constant, self.weight(value, value, "bias"))

    # -- what rules use ---------------------------------------------------------------------------

    def emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Append a lifted node; its shape is found by running it on the meta device."""
        node = self.graph.call_function(function, args)
        node.meta["origin"] = self._current
        node.meta["val"] = self._forms(function, args)
        return node

    def is_active(self, value: Any) -> bool:
        """Whether a value of the original graph depends on the network's inputs."""
        return isinstance(value, fx.Node) and value in self._active

    def node(self, value: fx.Node) -> fx.Node:
        """The lifted counterpart of an activation; constants become neurons with a bias only."""
        if value not in self._active:
            return self.emit(ops.constant, self.weight(value, value, "bias"))
        lifted = self._env[value]
        assert isinstance(lifted, fx.Node)
        return lifted

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
            return self.emit(
                ops.coefficient,
                self.buffer(torch.tensor(float(value), dtype=torch.float64), "number"),
            )
        views: list[fx.Node] = []
        while value not in self._weights and (value.target in RELABELLING or value.target in SAME):
            views.append(value)
            value = value.args[0]
        if value not in self._weights:
            self._weights[value] = self._weight(value, user, suffix)
        lifted = self._weights[value]
        for view in reversed(views):
            if view.target in RELABELLING:
                lifted = self.emit(target(view), lifted, *view.args[1:])
            self._weights[view] = lifted
        return lifted

    def _weight(self, value: fx.Node, user: fx.Node, suffix: str) -> fx.Node:
        if value.target is operator.getitem and arguments(value)[0].target in SPLITTING:
            return self._piece(value, user, suffix)
        name = value.meta.get("coordinate")
        if name is None and depends_on_parameter(self.captured, value):
            name = coordinate_name(self.captured, value, user, suffix)
        static = self.static(value)
        if not static.meta["val"].is_floating_point():
            static = self.emit(aten.to.dtype, static, torch.float32)
        if name is None:
            return self.emit(ops.coefficient, static)
        return self.emit(ops.coordinate, static, self._own(name, value, static))

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
        for node in inputs_first(value, self._copied, _read_by_copy):
            self._copied[node] = self._copy(node)
        return self._copied[value]

    def _copy(self, node: fx.Node) -> fx.Node:
        """Copy one operation whose inputs were copied."""
        if node.op != "call_function" or node in self._active:
            raise AssertionError(f"{node.name} is no constant expression")
        if node.target in MADE_FROM_SHAPE:
            copied = self._filled(node)
        else:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                self.problems.append(problem(node, *RANDOM))
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._copied.__getitem__)
            key = (node.target, repr(args), repr(kwargs))
            if key not in self._expressions:
                self._expressions[key] = self.graph.call_function(target(node), args, kwargs)
            copied = self._expressions[key]
        copied.meta.setdefault("val", fx.node.map_aggregate(node.meta.get("val"), form))
        return copied

    def _filled(self, value: fx.Node) -> fx.Node:
        made, number = value.meta["val"], _fill(value)
        if isinstance(number, fx.Node):
            return self.emit(aten.expand.default, self._copied[number], list(made.shape))
        return self.buffer(torch.full(tuple(made.shape), number, dtype=made.dtype), "filled")

    def constant(self, value: Any) -> Tensor | None:
        """The value of a constant expression, or ``None`` if it depends on tensors of the model."""
        if not isinstance(value, fx.Node):
            return torch.tensor(value)
        for node in inputs_first(value, self._constants, self._read_by_constant):
            self._constants[node] = self._constant(node)
        return self._constants[value]

    def _read_by_constant(self, node: fx.Node) -> list[fx.Node]:
        return [] if node in self._active else node.all_input_nodes

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node whose inputs' values are known."""
        if node.op == "placeholder":
            name = self.captured.tensors.get(node.name)
            if name is None or name in self.captured.parameters:
                return None
            number = self._live[node.name].detach()
            # The graph is made for it.
            self.captured.baked.setdefault(name, number.clone())
            return number
        if node in self._active or node.op != "call_function":
            return None
        if any(self._constants[n] is None for n in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._constants.__getitem__)
        result = target(node)(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    @functools.cached_property
    def _live(self) -> dict[str, Tensor]:
        return self.captured.live()

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
        dim %= len(self.shape(x))
        if stencil.size != self.shape(x)[dim]:
            raise AssertionError(f"a stencil over {stencil.size} meets {self.shape(x)}")
        if stencil.is_identity:
            return x
        plain = None if ranks else _as_slice(stencil)
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


def _fill(made: fx.Node) -> Any:
    """What a tensor that is made from the shape of another one is filled with."""
    fill = MADE_FROM_SHAPE[made.target]
    return bind(made)[fill] if isinstance(fill, str) else fill


def _read_by_copy(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values count."""
    if node.target not in MADE_FROM_SHAPE:
        return node.all_input_nodes
    fill = _fill(node)
    return [fill] if isinstance(fill, fx.Node) else []


def _as_slice(stencil: Stencil) -> tuple[int, int, int] | None:
    """Start, end and step, if the stencil picks positions at a constant step."""
    if not stencil.out or len(stencil.row) != stencil.out or not stencil.is_selection:
        return None
    picked = stencil.position
    start, end = int(picked[0]), int(picked[-1]) + 1
    step = int(picked[1]) - start if len(picked) > 1 else 1
    if step < 1 or not torch.equal(picked, torch.arange(start, end, step)):
        return None
    return start, end, step


def _is_float(value: fx.Node) -> bool:
    tensor = value.meta.get("val")
    return isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _ancestors(output: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [output]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack.extend(new)
    return found
