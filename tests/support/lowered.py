"""Lowered graphs that are written by hand, one for each word and way to use it, and a slow reading.

Each case writes a graph down and returns its outputs; :class:`Plain` reads any lowered graph by the
vocabulary's own functions, in float64 and without care for range, so that autograd differentiates
it by its leaves.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.aten import CAT, EXPAND, PERMUTE, RESHAPE, SLICE
from fxpath.graph.writer import Writer

aten = torch.ops.aten


class Sketch(Writer):
    """A lowered graph that is being written for an exponent, and numbers for what it reads."""

    def __init__(self, q: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.q = q
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self._start = self.graph.call_function(ops.source)  # placeholders stand before it

    def raw(self, *shape: int, zeros: bool = True) -> fx.Node:
        """A tensor of the model, of both signs; one entry in six is 0."""
        name = f"t{len(self.tensors)}"
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if zeros:
            values *= torch.rand(shape, generator=self.generator) > 1 / 6
        self.tensors[name] = values
        with self.graph.inserting_before(self._start):
            node = self.graph.placeholder(name)
        node.meta["val"] = values.to("meta")
        return node

    def theta(self, *shape: int) -> fx.Node:
        """Effective parameters."""
        raw = self.raw(*shape)
        return self.emit(ops.coordinate, raw, str(raw.target))

    def fixed(self, *shape: int) -> fx.Node:
        """Numbers of the architecture that the model holds."""
        return self.emit(ops.coefficient, self.raw(*shape))

    def matrix(self, *shape: int) -> fx.Node:
        """A constant with entries >= 0, raised to the exponent already."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self.buffer(values * (values > 0.3), "matrix")

    def taps(self, spec: Any) -> fx.Node:
        """A matrix of a given shape, or lists of positions."""
        if isinstance(spec, tuple):
            return self.matrix(*spec)
        return self.buffer(torch.tensor(spec), "positions")

    def source(self, *shape: int) -> fx.Node:
        return self.emit(ops.source, shape)

    def value(self, *shape: int) -> fx.Node:
        """An activation into which coordinates are computed."""
        weight, bias = self.theta(*shape), self.theta(*shape)
        return self.emit(ops.scale, self.source(*shape), weight, bias)

    def end(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        self.graph.output(self.emit(ops.total, list(outputs)))
        if self._start.users == {}:
            self.graph.erase_node(self._start)
        return self.finish()


def setting(q: float = 1.0, effective: bool = False) -> Any:
    """Whose network it is, as far as the last passes ask."""
    return types.SimpleNamespace(q=q, device=torch.device("cpu"), effective=effective)


# -- the slow reading ------------------------------------------------------------------------------


class Plain(fx.Interpreter):
    """The vocabulary's own functions, on leaves raised to q, which are kept for autograd."""

    def __init__(self, module: fx.GraphModule, q: float) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.q = q
        self.leaves: list[Tensor] = []
        self.named: list[tuple[str, Tensor]] = []

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return super().run_node(node)
        args, _ = self.fetch_args_kwargs_from_env(node)
        if node.target is ops.source:
            return torch.ones(args[0], dtype=torch.float64)
        if node.target is ops.coordinate:
            leaf = self._leaf(self._power(args[0]))
            self.named.append((args[1], leaf))
            return leaf
        if node.target is ops.coefficient:
            return self._leaf(self._power(args[0]), node.args[0])
        if node.target is ops.slope:
            steep = self._power(torch.as_tensor(args[1], dtype=torch.float64)).clamp(min=1)
            return args[0] * self._leaf(steep, node.args[1])
        if node.target is ops.clamp:
            return args[0] + sum(abs(bound) ** self.q for bound in args[1:] if bound)
        if node.target in (ops.along, ops.pool):
            return ops.along(*args[:3], self._power(args[3]))
        return super().run_node(node)

    def _power(self, value: Tensor) -> Tensor:
        return torch.where(value == 0, 0.0, value.abs() ** self.q)

    def _leaf(self, value: Tensor, raw: Any = None) -> Tensor:
        """What the norm is differentiated by; constants are not."""
        if raw is not None and not (isinstance(raw, fx.Node) and raw.op != "get_attr"):
            return value
        self.leaves.append(value.detach().requires_grad_())
        return self.leaves[-1]


def plain(
    module: fx.GraphModule, tensors: Mapping[str, Tensor], q: float
) -> tuple[float, list[Tensor], dict[str, Tensor], list[Tensor]]:
    """``||Phi||_q^q``, its log's gradients by each leaf, shares by name, and the leaves."""
    reading = Plain(module, q)
    order = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    norm = reading.run(*(tensors[name].double() for name in order))
    grads: list[Tensor] = [torch.zeros_like(leaf) for leaf in reading.leaves]
    if norm.requires_grad and norm != 0:
        found = torch.autograd.grad(norm.log(), reading.leaves, allow_unused=True)
        pairs = zip(found, grads, strict=True)
        grads = [zero if grad is None else grad for grad, zero in pairs]
    by_leaf = {id(leaf): grad for leaf, grad in zip(reading.leaves, grads, strict=True)}
    shares: dict[str, Tensor] = {}
    for name, leaf in reading.named:
        shares[name] = shares.get(name, 0) + (leaf * by_leaf[id(leaf)]).detach()
    return float(norm.detach()), grads, shares, [leaf.detach() for leaf in reading.leaves]


# -- cases -----------------------------------------------------------------------------------------

Case = Callable[[Sketch], Sequence[fx.Node]]


def _source(s: Sketch) -> Sequence[fx.Node]:
    return [s.source(2, 3), s.value(2)]


def _constant(s: Sketch) -> Sequence[fx.Node]:
    return [s.emit(ops.constant, s.theta(2, 3)), s.emit(ops.constant, s.fixed(4))]


def _conv(*shapes: Any, bias: Any = None, weighed: bool = False, **spec: Any) -> Case:
    def case(s: Sketch) -> Sequence[fx.Node]:
        x, weight = shapes
        axes = len(x) - 2
        told = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0} | spec
        lists = {
            k: [v] * axes if isinstance(v, int) else v for k, v in told.items() if k != "groups"
        }
        groups, transposed = spec.get("groups", 1), spec.get("transposed", False)
        read = s.theta(*weight)
        if weighed:
            read = s.emit(ops.factored, read, s.fixed(weight[0]))
        args = [lists["stride"], lists["padding"], lists["dilation"], transposed]
        added = None if bias is None else s.theta(*bias)
        return [s.emit(ops.conv, s.value(*x), read, added, *args, lists["output_padding"], groups)]

    return case


def _window(
    shape: Any,
    weight: Any,
    matrices: Sequence[Any],
    extents: Any,
    groups: int = 1,
    bias: Any = None,
    weighed: bool = False,
    inner: bool = True,
) -> Case:
    def case(s: Sketch) -> Sequence[fx.Node]:
        read = s.theta(*weight)
        if weighed:
            read = s.emit(ops.factored, read, s.theta(weight[0]))
        x = s.value(*shape) if inner else s.source(*shape)
        held = [m if m is None else s.taps(m) for m in matrices]
        added = None if bias is None else s.theta(*bias)
        return [s.emit(ops.window, x, read, added, held, list(extents), groups)]

    return case


def _contract(equation: str, x: Any, weight: Any, bias: Any = None, weighed: bool = False) -> Case:
    def case(s: Sketch) -> Sequence[fx.Node]:
        read = s.theta(*weight)
        if weighed:
            read = s.emit(ops.factored, read, s.fixed(weight[0]))
        added = None if bias is None else s.theta(*bias)
        return [s.emit(ops.contract, s.value(*x), read, added, equation)]

    return case


def _scale(s: Sketch) -> Sequence[fx.Node]:
    x = s.value(2, 3, 4)
    both = s.emit(ops.scale, x, s.theta(3, 1), s.theta(4))
    weight = s.emit(ops.scale, s.theta(3, 4), s.fixed(3, 1))
    weight = s.emit(ops.scale, weight, s.theta(4))
    wide = s.emit(ops.scale, s.value(2, 1, 4), weight, s.theta())
    return [both, wide, s.emit(ops.scale, s.source(2, 3), s.fixed(3))]


def _shift(s: Sketch) -> Sequence[fx.Node]:
    bias = s.emit(ops.shift, s.theta(3, 4), s.theta(4))
    bias = s.emit(ops.shift, bias, s.fixed(3, 1))
    x = s.emit(ops.shift, s.value(2, 3, 4), bias)
    wide = s.emit(ops.shift, s.theta(1, 4), s.theta(3, 1))
    return [s.emit(ops.shift, x, wide), s.emit(ops.shift, s.value(3, 4), s.theta())]


def _sums(s: Sketch) -> Sequence[fx.Node]:
    x, y = s.value(2, 3), s.value(1, 3)
    made = s.emit(ops.add, x, y)
    made = s.emit(ops.maximum, made, s.value(2, 1))
    made = s.emit(ops.minimum, s.value(3), made)
    return [s.emit(ops.add, made, made), s.emit(ops.maximum, s.source(2, 3), x)]


def _layers_in_sums(s: Sketch) -> Sequence[fx.Node]:
    """What settles with the sum that reads it: with and without factors, and what does not."""

    def layer(x: fx.Node, factor: fx.Node | None, bias: fx.Node | None) -> fx.Node:
        weight = s.theta(3, 3)
        read = weight if factor is None else s.emit(ops.factored, weight, factor)
        return s.emit(ops.contract, x, read, bias, "bi,oi->bo")

    x = s.value(2, 3)
    two = s.emit(ops.add, layer(x, s.fixed(3), s.theta(3)), layer(x, s.theta(3), None))
    one = s.emit(ops.add, x, layer(two, s.theta(3), s.theta(3)))
    none = s.emit(ops.add, layer(one, None, None), layer(one, None, s.theta(3)))
    wide = s.emit(ops.add, layer(none, s.fixed(3), None), layer(s.value(1, 3), None, s.theta(3)))
    same = layer(wide, s.fixed(3), None)
    return [s.emit(ops.add, same, same), s.emit(ops.add, s.source(2, 3), layer(one, None, None))]


def _clamp(s: Sketch) -> Sequence[fx.Node]:
    x = s.emit(ops.clamp, s.value(2, 3), -0.5, 6.0)
    y = s.emit(ops.clamp, s.value(2, 3), None, -2.0)
    return [x, y, s.emit(ops.clamp, s.value(2), 0.0, None), s.emit(ops.clamp, x, 0.25, 0.0)]


def _slope(s: Sketch) -> Sequence[fx.Node]:
    x = s.emit(ops.slope, s.value(2, 3, 4), -2.5)
    x = s.emit(ops.slope, x, 0.25)
    raw = s.raw(3, 1, zeros=False)
    s.tensors[str(raw.target)] *= 3
    number = s.buffer(torch.tensor([1.5, -0.5, 0.0, 4.0], dtype=torch.float64), "slopes")
    return [s.emit(ops.slope, s.emit(ops.slope, x, raw), number), s.emit(ops.slope, x, raw)]


def _mix(s: Sketch) -> Sequence[fx.Node]:
    x = s.emit(ops.mix, s.value(2, 3, 4), 2, s.matrix(5, 4))
    x = s.emit(ops.mix, x, 0, s.matrix(3, 2))
    x = s.emit(ops.mix, x, 1, s.matrix(2, 3))
    bias = s.emit(ops.mix, s.theta(2, 3), 1, s.matrix(5, 3))
    return [s.emit(ops.shift, x, bias)]


def _along(s: Sketch) -> Sequence[fx.Node]:
    index = s.buffer(torch.tensor([[0, 2], [1, 1], [3, 0], [2, 3], [0, 0]]), "index")
    signed = torch.tensor([[1.0, -2.0], [0.5, 0.5], [0.0, 3.0], [1.0, 1.0], [0.25, 0.0]])
    taps = s.buffer(signed.double(), "taps")
    one = s.buffer(torch.tensor([[3], [0], [0]]), "index")
    ones = s.buffer(torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64), "taps")
    x = s.value(2, 4, 3)
    y = s.emit(ops.along, x, 1, index, taps)
    return [y, s.emit(ops.pool, x, 1, one, ones, (1,)), s.emit(ops.pool, y, 1, one, ones, (1,))]


def _moves(s: Sketch) -> Sequence[fx.Node]:
    x = s.emit(PERMUTE, s.value(2, 3, 4), [2, 0, -2])
    x = s.emit(RESHAPE, x, [4, 6])
    x = s.emit(SLICE, x, 1, 1, 9, 2)
    x = s.emit(EXPAND, s.emit(RESHAPE, x, [4, 1, 3]), [2, -1, 5, 3])
    y = s.emit(CAT, [x, s.value(2, 4, 1, 3), x], 2)
    return [y, s.emit(CAT, [s.source(2), s.value(3)])]


def _moved_weights(s: Sketch) -> Sequence[fx.Node]:
    raw = s.raw(4, 3)
    turned = s.emit(ops.coordinate, s.emit(PERMUTE, raw, [1, 0]), "turned")
    x = s.emit(ops.contract, s.value(2, 4), turned, None, "bi,oi->bo")
    wide = s.emit(EXPAND, s.theta(1, 3), [2, 3])
    joined = s.emit(CAT, [wide, s.theta(2, 3)], 0)
    weight = s.emit(PERMUTE, s.emit(SLICE, joined, 0, 0, 3), [1, 0])
    bias = s.emit(CAT, [s.theta(1), s.fixed(1), s.emit(RESHAPE, s.theta(1, 1), [1])])
    y = s.emit(ops.contract, x, weight, bias, "bi,oi->bo")
    return [s.emit(ops.scale, y, s.emit(RESHAPE, s.theta(3, 1), [3]))]


def _selections(s: Sketch) -> Sequence[fx.Node]:
    x = s.value(2, 3, 4, 4)
    return [
        s.emit(aten.diagonal.default, x, 1, 2, 3),
        s.emit(aten.diagonal.default, x),
        s.emit(aten.unfold.default, x, 3, 2, 1),
        s.emit(aten.im2col.default, x, [2, 2], [1, 1], [1, 0], [2, 1]),
        s.emit(aten.tril.default, x),
        s.emit(aten.triu.default, x, 1),
        s.emit(SLICE, x, 2, -3, 100, 2),
        s.emit(ops.scale, s.value(3, 3), s.emit(aten.tril.default, s.theta(3, 3), -1)),
    ]


def _tied(s: Sketch) -> Sequence[fx.Node]:
    """One tensor under one name, three times: once in a product, once moved, once as a bias."""
    raw = s.raw(3, 3)
    first, second, third = (s.emit(ops.coordinate, raw, "w") for _ in range(3))
    x = s.emit(ops.contract, s.value(2, 3), first, None, "bi,oi->bo")
    x = s.emit(ops.contract, x, s.emit(PERMUTE, second, [1, 0]), None, "bi,oi->bo")
    return [x, s.emit(ops.constant, third)]


def _read_twice(s: Sketch) -> Sequence[fx.Node]:
    weight, bias = s.theta(3, 3), s.theta(3)
    x = s.value(1, 3)
    for _ in range(2):
        x = s.emit(ops.contract, x, weight, bias, "bi,oi->bo")
    return [x, x, s.emit(ops.scale, x, weight)]


def _products_one_and_many(s: Sketch) -> Sequence[fx.Node]:
    """One weight that reads one column, and many; and one that is scored alone."""
    weight = s.theta(16, 3)
    x, y = s.value(1, 3), s.value(20, 3)
    alone = s.emit(ops.contract, s.source(1, 3), s.theta(8, 3), None, "bi,oi->bo")
    return [*(s.emit(ops.contract, v, weight, None, "bi,oi->bo") for v in (x, y)), alone]


def _relabelled_weights(s: Sketch) -> Sequence[fx.Node]:
    """Weights whose entries are shown in another order or shape, or picked by position."""
    rows = s.buffer(torch.tensor([2, 0, 2]), "rows")
    wide = s.emit(aten.unsqueeze.default, s.theta(2, 3), 1)
    weights = [
        s.emit(aten.movedim.int, s.theta(2, 3, 4), 0, 2),
        s.emit(aten.transpose.int, s.theta(2, 1, 3), 0, 2),
        s.emit(aten.swapaxes.default, s.theta(2, 3), 0, 1),
        s.emit(aten.flip.default, s.theta(2, 3), [0, 1]),
        s.emit(aten.mT.default, s.theta(2, 3, 4)),
        s.emit(aten.t.default, s.theta(2, 3)),
        s.emit(aten.numpy_T.default, s.theta(2, 3)),
        s.emit(aten.view.default, s.theta(4, 3), [2, 6]),
        s.emit(aten.flatten.using_ints, s.theta(2, 3), 0, -1),
        s.emit(aten.unflatten.int, s.theta(6), 0, [2, 3]),
        s.emit(aten.squeeze.default, s.theta(1, 3, 1)),
        s.emit(aten.squeeze.dim, wide, 1),
        s.emit(aten.squeeze.dims, s.theta(1, 3, 1), [0, 2]),
        s.emit(aten.select.int, s.theta(3, 4), 1, -1),
        s.emit(aten.index_select.default, s.theta(3, 4), 0, rows),
        s.emit(aten.index.Tensor, s.theta(4, 3), [None, rows]),
        s.emit(aten.embedding.default, s.theta(4, 3), rows),
    ]
    return [s.emit(ops.scale, s.value(*w.meta["val"].shape), w) for w in weights]


def _dead(s: Sketch) -> Sequence[fx.Node]:
    raw = s.raw(2, 3)
    s.tensors[str(raw.target)].zero_()
    weight = s.emit(ops.coordinate, raw, "zero")
    return [s.emit(ops.contract, s.value(1, 3), weight, None, "bi,oi->bo")]


def _half_dead(s: Sketch) -> Sequence[fx.Node]:
    return [*_dead(s), s.value(2)]


def _unread(s: Sketch) -> Sequence[fx.Node]:
    """A coordinate of which a slice that is empty alone is read."""
    x = s.emit(SLICE, s.value(2, 3), 1, 0, 0)
    return [x, s.value(2)]


def _empty(s: Sketch) -> Sequence[fx.Node]:
    """Axes of length 0."""
    none = s.emit(ops.contract, s.value(1, 0), s.theta(3, 0), s.theta(3), "bi,oi->bo")
    nothing = s.emit(ops.contract, s.value(1, 3), s.theta(0, 3), s.theta(0), "bi,oi->bo")
    joined = s.emit(CAT, [none, nothing], 1)
    window = s.emit(ops.window, s.value(0, 2, 3), s.theta(2, 2), s.theta(2, 1), [None], [3], 1)
    mixed = s.emit(ops.mix, s.value(2, 0), 1, s.matrix(3, 0))
    return [joined, window, s.emit(ops.add, mixed, s.value(2, 3)), s.emit(ops.add, none, none)]


def _ignored(s: Sketch) -> Sequence[fx.Node]:
    """Words of graphs that are not lowered."""
    x = s.emit(ops.relu, s.value(2, 3))
    x = s.emit(ops.gate, s.emit(ops.squash, x, "silu", [], 1.0), None, 1.0)
    return [s.emit(ops.negative, s.emit(ops.absolute, x))]


def _deep(s: Sketch) -> Sequence[fx.Node]:
    """So many sums that entries are measured again."""
    x = s.value(2, 3)
    for _ in range(40):
        x = s.emit(ops.add, x, x)
    y = s.emit(ops.mix, x, 1, s.buffer(torch.full((2, 3), 1e9, dtype=torch.float64), "big"))
    return [s.emit(ops.clamp, y, 0.0, 1e12), s.emit(CAT, [x, s.value(2, 1)], 1)]


CASES: dict[str, Case] = {
    "source": _source,
    "constant": _constant,
    "conv 1d": _conv((2, 2, 5), (3, 2, 2), bias=(3, 1), stride=2, padding=1),
    "conv 2d": _conv((1, 4, 5, 4), (2, 2, 2, 3), bias=(2, 3, 1), groups=2, dilation=[2, 1]),
    "conv 3d": _conv((2, 1, 3, 3, 2), (2, 1, 2, 1, 2), weighed=True, bias=(2, 1, 1, 1)),
    "conv transposed": _conv(
        (1, 4, 3, 3), (4, 2, 2, 2), groups=2, stride=2, output_padding=1, transposed=True
    ),
    "window": _window((2, 2, 4), (3, 2, 2), [(2, 3, 4)], (3,), bias=(3, 1)),
    "window of two axes": _window(
        (1, 2, 3, 4), (4, 2, 2, 1), [(2, 2, 3), None], (2, 4), weighed=True
    ),
    "window of all positions": _window((2, 2, 3, 2), (4, 2, 6), [(6, 1, 6)], (1, 1), bias=()),
    "window in groups": _window((2, 4, 3), (6, 2, 2), [(2, 2, 3)], (2,), groups=2, bias=(2,)),
    "window in groups of a source": _window(
        (1, 2, 3), (4, 1, 3), [(3, 1, 3)], (1,), groups=2, weighed=True, inner=False
    ),
    # Position 0 is read three times, 1 never, and twice nothing is.
    "window of positions": _window(
        (2, 2, 4), (3, 2, 2), [[[0, 4, 2], [0, 0, 4]]], (3,), bias=(3, 1), weighed=True
    ),
    "window of positions of two axes": _window(
        (2, 4, 2, 2), (6, 2, 2), [[[3, 1, 4, 0], [1, 1, 2, 3]]], (2, 2), groups=2
    ),
    "window of positions of a source": _window(
        (1, 2, 3), (3, 2, 2), [[[0, 3], [2, 2]]], (2,), inner=False
    ),
    "window of one column": _window((1, 2, 3), (8, 2, 3), [(3, 1, 3)], (1,), weighed=True),
    "window of a source": _window((1, 2, 3), (3, 2), [None], (3,), inner=False, bias=(3, 1)),
    "contract dense": _contract("bi,oi->bo", (2, 3), (4, 3), bias=(4,), weighed=True),
    "contract one row": _contract("i,oi->o", (3,), (8, 3), bias=(8,)),
    "contract one row of odd": _contract("bi,oi->bo", (1, 3), (5, 3), bias=()),
    "contract many": _contract("abi,oi->abo", (4, 5, 3), (2, 3), bias=(5, 1)),
    "contract channels": _contract("bchw,dc->bdhw", (2, 3, 2, 2), (4, 3), weighed=True),
    "contract batches": _contract("bij,bjk->bik", (2, 3, 2), (2, 2, 4), bias=(3, 1)),
    "contract repeated": _contract("bii,oi->bo", (2, 3, 3), (4, 3)),
    "contract repeated in weight": _contract("bi,iio->bo", (2, 3), (3, 3, 2), bias=(2,)),
    "contract all repeated": _contract("iii,ii->i", (2, 2, 2), (2, 2)),
    "contract broadcast": _contract("bij,bjk->bik", (2, 3, 1), (1, 4, 2)),
    "contract broadcast both": _contract("ij,ij->ij", (1, 3), (4, 1), bias=(4, 1)),
    "contract summed alone": _contract("bij,ok->bo", (2, 3, 2), (4, 5)),
    "contract to nothing": _contract("i,i->", (3,), (3,), bias=()),
    "scale": _scale,
    "shift": _shift,
    "sums": _sums,
    "layers in sums": _layers_in_sums,
    "clamp": _clamp,
    "slope": _slope,
    "mix": _mix,
    "along": _along,
    "moves": _moves,
    "moved weights": _moved_weights,
    "relabelled weights": _relabelled_weights,
    "selections": _selections,
    "tied": _tied,
    "read twice": _read_twice,
    "one and many": _products_one_and_many,
    "dead": _dead,
    "half dead": _half_dead,
    "unread": _unread,
    "empty": _empty,
    "ignored": _ignored,
    "deep": _deep,
}


def drawn(name: str, q: float = 1.0) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A case as a graph, and the tensors that it reads."""
    sketch = Sketch(q)
    outputs = CASES[name](sketch)
    return sketch.end(outputs), sketch.tensors
