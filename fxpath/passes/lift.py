"""Pass: ATen graph -> lifted graph in the vocabulary of :mod:`fxpath.ops`.

Requires a functional ATen graph with static shapes.  Ensures that every operation between the
inputs and the outputs was claimed by a rule (or is listed in the report), that every intermediate
shape is the one of the original network, and that every coordinate of theta has a name of its own.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fxpath import ops
from fxpath.capture import Captured
from fxpath.errors import SupportReport, UnsupportedModelError, problem
from fxpath.naming import RELABELLING, SAME, SPLITTING, coordinate_name, depends_on_parameter
from fxpath.passes.unwritten import UNWRITTEN, reads_unwritten, unwritten
from fxpath.rules import RULES, Refusal, refusal
from fxpath.rules.refused import ORDER, RANDOM, READ_OUT
from fxpath.schema import arguments, bind, target
from fxpath.stencil import Stencil

__all__ = ["Lift", "lift"]

aten = torch.ops.aten

SPARSE = (
    "its weights are stored sparsely, and scores have an entry for each weight",
    "store them as a dense tensor (weight.to_dense())",
)
UNKNOWN_SHAPE = (
    "the number of entries that it returns depends on values, so torch.export does not know it",
    "select by a list of positions (mask.nonzero()) that is kept in a buffer",
)
INFINITE = (
    "it reads a constant with infinite or NaN entries",
    "use finite constants (a mask of -inf belongs to a softmax, which no path-norm covers)",
)
NEVER_WRITTEN = (
    "it reads memory of torch.empty that nothing was written to, so its values are undefined",
    "allocate it by torch.zeros",
)
#: Weights are lifted by value: what a view needs to know of memory may not hold for them.
BY_VALUE = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
FORMATS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
}

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
        self._active: set[fx.Node] = set()
        self._constants: dict[fx.Node, Any] = {}
        self._baked: set[fx.Node] = set()
        self._unwritten: dict[fx.Node, Tensor] = {}
        self._scratch = fx.Graph()
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
            if node.op != "call_function":
                continue
            self._note_unwritten(node)
            if any(n in self._active for n in _read(node)):
                self._active.add(node)
                if node in needed:
                    self._env[node] = self._apply(node)
                    if self._shapeless:
                        return fx.GraphModule(self.root, fx.Graph())
        outputs = [self._output(value) for value in output.args[0] if _is_float(value)]
        if not outputs and not self.problems:
            raise ValueError("the model has no floating-point output, so it has no paths")
        self.graph.output(self.emit(ops.total, outputs or [self.emit(ops.source, (1,))]))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.captured.tensors:
            self._copied[node] = self.graph.placeholder(node.name)
            self._copied[node].meta["val"] = _meta(node.meta["val"])
        else:
            self._active.add(node)
            if isinstance(node.meta.get("val"), Tensor):
                self._env[node] = self.emit(ops.source, tuple(node.meta["val"].shape))

    def _note_unwritten(self, node: fx.Node) -> None:
        """Keep track of memory that was allocated, and not written yet."""
        mask = unwritten(node, self._unwritten, self.constant)
        if mask is not None:
            self._unwritten[node] = mask

    def _apply(self, node: fx.Node) -> fx.Node | list[fx.Node | None]:
        self._current = node
        try:
            if node.target is operator.getitem:
                return self._item(node)
            if node.target not in MADE_FROM_SHAPE and reads_unwritten(node, self._unwritten):
                raise Refusal(*NEVER_WRITTEN)
            rule = RULES.get(target(node))
            if rule is None:
                raise refusal(node)
            node.meta["val"] = fx.node.map_aggregate(node.meta.get("val"), _settled)
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
            if value in self._unwritten:
                raise Refusal(*NEVER_WRITTEN)
            return self.node(value)
        except Refusal as why:
            self.problems.append(problem(value, why.reason, why.remedy))
            return self.emit(ops.source, tuple(value.meta["val"].shape))

    # -- what rules use ---------------------------------------------------------------------------

    def emit(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Append a lifted node; its shape is found by running it on the meta device."""
        node = self.graph.call_function(function, args)
        node.meta["origin"] = self._current
        on_meta = fx.map_arg(args, lambda n: n.meta["val"])
        result = function(*on_meta)
        node.meta["val"] = _meta(result)
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

    def is_zero(self, value: Any) -> bool:
        """Whether a value is zero whatever the parameters are; unwritten memory counts as zero."""
        if not isinstance(value, fx.Node):
            return bool(value == 0)
        if value.target in UNWRITTEN:
            return True
        known = None if value in self._active else self.peek(value)
        if known is None or bool(known.any()):
            return False
        self.constant(value)
        return True

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
        node.meta["val"] = function(*fx.map_arg(args, lambda n: _meta(n.meta["val"])))
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
        if value not in self._weights:
            self._weights[value] = self._weight(value, user, suffix)
        return self._weights[value]

    def number(self, value: Any) -> fx.Node:
        """A coefficient of the architecture."""
        held = torch.tensor(_real(value), dtype=torch.float64)
        return self.emit(ops.coefficient, self.buffer(held, "number"))

    def _weight(self, value: fx.Node, user: fx.Node, suffix: str) -> fx.Node:
        if value.target in SAME:
            return self.weight(value.args[0], user, suffix)
        if value.target in RELABELLING and isinstance(value.args[0], fx.Node):
            inner = self.weight(value.args[0], user, suffix)
            return self.emit(BY_VALUE.get(value.target, value.target), inner, *value.args[1:])
        if value.target is operator.getitem and arguments(value)[0].target in SPLITTING:
            return self._piece(value, user, suffix)
        _check_format(value)
        if _is_sparse(value) and depends_on_parameter(self.captured, value):
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
        if _is_sparse(value):
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
        sizes = [
            piece.shape[dim] if piece.dim() == len(self.shape(whole)) else 1
            for piece in split.meta["val"]
        ]
        start = sum(sizes[:index])
        piece = self.emit(aten.slice.Tensor, whole, dim, start, start + sizes[index])
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
        if value in self._unwritten:
            raise Refusal(*NEVER_WRITTEN)
        # Not by recursion: a weight may take thousands of steps.
        stack = [value]
        while stack:
            here = stack[-1]
            missing = [n for n in _read(here) if n not in self._copied]
            if here in self._copied or not missing:
                stack.pop()
                self._copied.setdefault(here, self._copied.get(here) or self._copy(here))
            else:
                stack += missing
        return self._copied[value]

    def _copy(self, value: fx.Node) -> fx.Node:
        """Copy one step of a computation on parameters and constants."""
        if value.op != "call_function" or value in self._active:
            raise AssertionError(f"{value.name} is no constant expression")
        if value.target in MADE_FROM_SHAPE:
            copied = self._filled(value)
        else:
            if reads_unwritten(value, self._unwritten):
                raise Refusal(*NEVER_WRITTEN)
            if torch.Tag.nondeterministic_seeded in getattr(value.target, "tags", ()):
                self.problems.append(problem(value, *RANDOM))
            args, kwargs = fx.map_arg((value.args, value.kwargs), self._copied.__getitem__)
            called = BY_VALUE.get(target(value), target(value))
            key = (called, repr(args), repr(kwargs))
            if key not in self._expressions:
                self._expressions[key] = self.graph.call_function(called, args, kwargs)
            copied = self._expressions[key]
        copied.meta.setdefault("val", fx.node.map_aggregate(value.meta.get("val"), _meta))
        return copied

    def _filled(self, value: fx.Node) -> fx.Node:
        made, fill = value.meta["val"], MADE_FROM_SHAPE[value.target]
        number = bind(value)[fill] if isinstance(fill, str) else fill
        if isinstance(number, fx.Node):
            return self.emit(aten.expand.default, self.static(number), list(made.shape))
        return self.buffer(torch.full(tuple(made.shape), number, dtype=made.dtype), "filled")

    def constant(self, value: Any) -> Tensor | None:
        """The value of a constant expression, or ``None`` if it depends on tensors of the model."""
        if not isinstance(value, fx.Node):
            return torch.tensor(value)
        found = self.peek(value)
        if found is not None and value not in self._baked:
            # The graph is made for it.
            for node in _placeholders(value):
                name = self.captured.tensors[node.name]
                self.captured.baked.setdefault(name, self._live[node.name].detach().clone())
            self._baked.add(value)
        return found

    def peek(self, value: fx.Node) -> Tensor | None:
        """:meth:`constant` for a check on which the graph does not depend."""
        # Not by recursion, and each step once: a mask may take thousands of them.
        stack = [value]
        while stack:
            here = stack[-1]
            missing = [n for n in here.all_input_nodes if n not in self._constants]
            if here in self._constants or not missing:
                stack.pop()
                if here not in self._constants:
                    self._constants[here] = self._evaluated(here)
            else:
                stack += missing
        found = self._constants[value]
        return found if isinstance(found, Tensor) else None

    def _evaluated(self, node: fx.Node) -> Any:
        """The value of a node, those of its inputs being known; ``None`` if it has none."""
        if node.op == "placeholder":
            name = self.captured.tensors.get(node.name)
            if name is None or name in self.captured.parameters:
                return None
            return self._live[node.name].detach()
        if node.op != "call_function" or node in self._active:
            return None
        if any(self._constants[n] is None for n in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._constants.__getitem__)
        return target(node)(*args, **kwargs)

    @functools.cached_property
    def _live(self) -> dict[str, Tensor]:
        return self.captured.live()

    def buffer(self, tensor: Tensor, name: str) -> fx.Node:
        """A constant of the lifted graph."""
        count = sum(1 for key, _ in self.root.named_buffers() if key.startswith(name))
        self.root.register_buffer(f"{name}_{count}", tensor)
        node = self.graph.get_attr(f"{name}_{count}")
        node.meta["val"] = _meta(tensor)
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


def _as_slice(stencil: Stencil) -> tuple[int, int, int] | None:
    """Start, end and step, if the stencil picks positions at a constant step."""
    if not stencil.rows or any(len(row) != 1 or row[0][1] != 1 for row in stencil.rows):
        return None
    positions = [row[0][0] for row in stencil.rows]
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if step < 1 or positions != list(range(positions[0], positions[-1] + 1, step)):
        return None
    return positions[0], positions[-1] + 1, step


def _read(node: fx.Node) -> list[fx.Node]:
    """What an operation takes values from, not only a shape."""
    if node.target in UNWRITTEN:
        return []
    if node.target not in MADE_FROM_SHAPE:
        return node.all_input_nodes
    fill = MADE_FROM_SHAPE[node.target]
    value = bind(node)[fill] if isinstance(fill, str) else None
    return [value] if isinstance(value, fx.Node) else []


def _settled(value: Any) -> Any:
    """A tensor whose extents are numbers, also where they were counted during the export."""
    if not isinstance(value, Tensor) or all(isinstance(n, int) for n in value.shape):
        return value
    if any(not is_concrete_int(n) for n in value.shape):
        raise Refusal(*UNKNOWN_SHAPE)
    return value.new_empty([int(n) for n in value.shape], device="meta")


def _real(value: Any) -> float:
    """A number of the forward code as a coefficient."""
    if isinstance(value, complex) or not math.isfinite(value):
        raise Refusal(f"it uses the number {value}", "use a finite real number")
    return float(value)


def _is_sparse(value: fx.Node) -> bool:
    held = value.meta.get("val")
    return isinstance(held, Tensor) and held.layout != torch.strided


def _check_format(value: fx.Node) -> None:
    """Refuse weights that are no plain real numbers."""
    held = value.meta.get("val")
    if not isinstance(held, Tensor):
        raise Refusal(*READ_OUT)
    dtype = held.dtype
    if dtype not in FORMATS:
        raise Refusal(
            f"it reads a weight of dtype {dtype}, which is no plain number format",
            "convert the weights to float32 or float64",
        )


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
    return value


def _is_float(value: fx.Node) -> bool:
    tensor = value.meta.get("val")
    return isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _placeholders(value: fx.Node) -> list[fx.Node]:
    """The tensors that a value is computed from."""
    return [n for n in {value, *_ancestors(value)} if n.op == "placeholder"]


def _ancestors(output: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [output]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack.extend(new)
    return found
