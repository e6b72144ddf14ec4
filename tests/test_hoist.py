"""Fixed maps in front of layers: each operation that they move through, alone and in networks.

Graphs are written by hand, of positive numbers, and called as they are: before and after the pass
value and gradients are those of one function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxpath
from fxpath.capture import capture
from fxpath.graph import ops
from fxpath.graph.aten import CAT, PERMUTE, RESHAPE
from fxpath.graph.costs import multiply_adds
from fxpath.graph.edit import form
from fxpath.graph.links import extents, static
from fxpath.graph.writer import Writer
from fxpath.model import Given
from fxpath.passes import Setting, hoist, lower, reduce
from fxpath.program.program import build
from tests.support import zoo
from tests.support.spatial import Dag
from tests.test_reduction import assert_same, run

#: Positions along the axis that is mapped, and how many combinations of them are read.
SIZE, READ = 12, 3


class Net(Writer):
    """A reduced graph that is written by hand; its weights are in (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.draw = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=self.draw)

    def weight(self, *shape: int) -> fx.Node:
        name = f"w{len(self.given)}"
        node = self.graph.placeholder(name)
        self.given.append(self.random(*shape).requires_grad_())
        node.meta["val"] = form(self.given[-1])
        return self.emit(ops.coordinate, node, name)

    def input(self, *shape: int) -> fx.Node:
        return self.emit(ops.constant, self.weight(*shape))

    def conv(
        self, x: fx.Node, kernel: int = 3, bias: tuple[int, ...] | None = (32, 1, 1), **spec: Any
    ) -> fx.Node:
        """32 channels, the same along both axes."""
        numbers = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | spec
        groups = numbers.pop("groups")
        weight = self.weight(32, extents(x)[1] // groups, kernel, kernel)
        axes = [[number, number] for number in numbers.values()]
        held = None if bias is None else self.weight(*bias)
        return self.emit(ops.conv, x, weight, held, *axes, False, [0, 0], groups)

    def mix(self, x: fx.Node, dim: int, rows: int, sums: float | None = None) -> fx.Node:
        """Random coefficients, or rows that add up to a number."""
        matrix = self.random(rows, extents(x)[dim])
        if sums is not None:
            matrix *= sums / matrix.sum(1, keepdim=True)
        return self.emit(ops.mix, x, dim, self.buffer(matrix, "matrix"))

    def read(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(self.emit(ops.total, list(outputs)))
        return self.finish()


SETTING = Setting(capture(nn.ReLU(), Given((1,))))


def outcome(module: fx.GraphModule, given: list[Tensor]) -> list[Tensor]:
    value = module(*given)
    return [value, *torch.autograd.grad(value, given)]


def hoisted(net: Net, *outputs: fx.Node) -> fx.GraphModule:
    """The graph after the pass, in which nothing else may have changed."""
    before = net.read(*outputs)
    after = hoist(before, SETTING)
    assert_equal(outcome(after, net.given), outcome(before, net.given))
    return after


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def shapes(module: fx.GraphModule, target: Any) -> list[tuple[int, ...]]:
    return [extents(n) for n in module.graph.nodes if n.target is target and not static(n)]


def cost(module: fx.GraphModule) -> int:
    return sum(multiply_adds(n) for n in module.graph.nodes if n.op == "call_function")


def test_a_wrong_map_is_noticed() -> None:
    net = Net()
    before = net.read(net.mix(net.conv(net.input(1, 2, 14, 5)), 2, READ))
    after = hoist(before, SETTING)
    name = next(name for name, _ in after.named_buffers())
    setattr(after, name, after.get_buffer(name) * (1 + 1e-11))
    with pytest.raises(AssertionError):
        assert_equal(outcome(after, net.given), outcome(before, net.given))


@pytest.mark.parametrize(
    ("size", "kernel", "spec"),
    [
        (12, 1, {}),
        (14, 3, {}),
        (12, 3, {"padding": 1}),
        (23, 3, {"stride": 2, "padding": 1}),
        (12, 3, {"padding": 2, "dilation": 2, "groups": 2}),
        (36, 3, {"stride": 3}),
        (34, 1, {"stride": 3}),
    ],
)
@pytest.mark.parametrize("bias", [None, (32, 1, 1), (1, 32, 12, 1), (1, 1), (12, 1)])
@pytest.mark.parametrize("sums", [None, 1.0, 2.5])
def test_through_a_convolution(
    size: int,
    kernel: int,
    spec: dict[str, int],
    bias: tuple[int, ...] | None,
    sums: float | None,
) -> None:
    net = Net()
    conv = net.conv(net.input(1, 2, size, size), kernel, bias, **spec)
    assert extents(conv) == (1, 32, SIZE, SIZE)
    after = hoisted(net, net.mix(conv, 2, READ, sums))
    assert shapes(after, ops.conv) == [(1, 32, READ, SIZE)]
    if bias == (32, 1, 1) and sums == 1.0:
        assert not any(static(n) and n.target is ops.mix for n in after.graph.nodes)


#: An operation that treats the positions of axis 2 alike, between a convolution and its map.
BETWEEN: dict[str, Callable[[Net, fx.Node], fx.Node]] = {
    "shift": lambda net, x: net.emit(ops.shift, x, net.weight(32, 1, 1)),
    "shift by position": lambda net, x: net.emit(ops.shift, x, net.weight(SIZE, 1)),
    "shift along the last axis": lambda net, x: net.emit(ops.shift, x, net.weight(5)),
    "scale": lambda net, x: net.emit(ops.scale, x, net.weight(32, 1, 1), net.weight(32, 1, 1)),
    "one weight as factor and bias": lambda net, x: net.emit(
        ops.scale, x, *[net.weight(32, 1, 1)] * 2
    ),
    "slope": lambda net, x: net.emit(ops.slope, x, 2.0),
    "slopes": lambda net, x: net.emit(ops.slope, x, net.buffer(3 * net.random(32, 1, 1), "slope")),
    "clamp": lambda net, x: net.emit(ops.clamp, x, -0.5, 6.0),
    "add": lambda net, x: net.emit(ops.add, x, net.conv(net.input(1, 2, 14, 7))),
    "twice": lambda net, x: net.emit(ops.add, x, x),
    "maximum": lambda net, x: net.emit(ops.maximum, x, net.input(1, 32, SIZE, 5)),
    "cat": lambda net, x: net.emit(CAT, [net.input(1, 1, SIZE, 5), x], 1),
    "another map": lambda net, x: net.mix(x, 3, 4),
    "a map along the axis": lambda net, x: net.mix(x, 2, 4 * SIZE),
    "another convolution": lambda net, x: net.conv(x, padding=1),
    "a convolution of maps": lambda net, x: net.conv(
        net.mix(net.mix(x, 2, 3 * SIZE), 3, 15), stride=3
    ),
}


@pytest.mark.parametrize("kind", BETWEEN)
@pytest.mark.parametrize("sums", [None, 1.0])
def test_through(kind: str, sums: float | None) -> None:
    net = Net()
    between = BETWEEN[kind](net, net.conv(net.input(1, 2, 14, 7), bias=(1, 32, SIZE, 1)))
    after = hoisted(net, net.mix(between, 2, 1, sums))
    for shape in shapes(after, ops.conv)[-1:]:
        assert shape[2] == 1
    assert all(shape[2] < SIZE for shape in shapes(after, ops.conv))


def test_through_operations_that_move_axes() -> None:
    net = Net()
    x = net.emit(PERMUTE, net.conv(net.input(1, 2, 14, 7)), [0, 1, 3, 2])
    x = net.mix(net.emit(RESHAPE, x, [1, 4, 8, 5, SIZE]), 4, READ)
    assert shapes(hoisted(net, x), ops.conv) == [(1, 32, READ, 5)]


def test_through_a_linear_layer_on_tokens() -> None:
    for bias in ((6,), (SIZE, 6), (1, 1, 6)):
        net = Net()
        x = net.emit(
            ops.contract, net.input(1, SIZE, 7), net.weight(6, 7), net.weight(*bias), "abc,dc->abd"
        )
        assert shapes(hoisted(net, net.mix(x, 1, READ)), ops.contract) == [(1, READ, 6)]


def test_a_branch_that_is_read_elsewhere_keeps_its_map() -> None:
    net = Net()
    kept = net.conv(net.input(1, 2, 14, 7))
    x = net.emit(ops.add, kept, net.conv(net.input(1, 2, 14, 7)))
    after = hoisted(net, net.mix(x, 2, READ), kept)
    assert sorted(shapes(after, ops.conv)) == [(1, 32, READ, 5), (1, 32, SIZE, 5)]


def test_a_convolution_that_jumps_over_positions() -> None:
    net = Net()
    x = net.conv(net.conv(net.input(1, 2, 12, 12)), 1, stride=3)
    assert shapes(hoisted(net, x), ops.conv) == [(1, 32, 4, 4)] * 2


def _two_readers(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(conv, 2, READ), conv]


def _own_axis(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(net.emit(CAT, [conv, conv], 2), 2, READ)]


def _varying(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(net.emit(ops.scale, conv, net.weight(SIZE, 1)), 2, READ)]


def _varying_slope(net: Net, conv: fx.Node) -> list[fx.Node]:
    slopes = net.buffer(3 * net.random(SIZE, 1), "slope")
    return [net.mix(net.emit(ops.slope, conv, slopes), 2, READ)]


def _broadcast(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(net.emit(ops.add, conv, net.input(1, 32, 1, 5)), 2, READ)]


def _merged(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(net.emit(RESHAPE, conv, [1, 32, SIZE * 5]), 2, READ)]


def _channels(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(conv, 1, READ)]


def _more(net: Net, conv: fx.Node) -> list[fx.Node]:
    return [net.mix(conv, 2, SIZE)]


def _transposed(net: Net, conv: fx.Node) -> list[fx.Node]:
    spec = [1, 1], [0, 0], [1, 1], True, [0, 0], 1
    return [net.mix(net.emit(ops.conv, conv, net.weight(32, 2, 3, 3), None, *spec), 2, READ)]


@pytest.mark.parametrize(
    "what",
    [
        *(_two_readers, _own_axis, _varying, _varying_slope, _broadcast, _merged, _channels),
        *(_more, _transposed),
    ],
)
def test_maps_that_stay(what: Callable[[Net, fx.Node], list[fx.Node]]) -> None:
    net = Net()
    outputs = what(net, net.conv(net.input(1, 2, 14, 7)))
    before = net.read(*outputs)
    after = hoist(before, SETTING)
    assert [(n.target, extents(n)) for n in after.graph.nodes if n.op == "call_function"] == [
        (n.target, extents(n)) for n in before.graph.nodes if n.op == "call_function"
    ]


@pytest.mark.parametrize(
    ("reads", "stride", "padding", "size"),
    [
        ([[-1, 0, 1], [0, 1, 2], [1, 2, -1]], 1, 1, 3),
        ([[-1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 2], [1, 2, -1]], 1, 1, 5),
        ([[-1, 0, 1], [1, 1, 2], [2, 2, 0]], 2, 0, 7),
        ([[0, 1, 1], [2, 0, 1], [1, 2, 2]], 3, 0, 9),
        ([[-1, -1, -1], [-1, -1, -1]], 1, 0, 4),
    ],
)
def test_what_neighbours_read_is_laid_down_once(
    reads: list[list[int]], stride: int, padding: int, size: int
) -> None:
    net = Net()
    matrix = torch.cat((torch.eye(3), torch.zeros(1, 3))).double()[torch.tensor(reads).flatten()]
    x = net.emit(ops.mix, net.input(1, 2, 3, 3), 2, net.buffer(matrix, "matrix"))
    x = net.emit(ops.mix, x, 3, net.buffer(matrix, "matrix"))
    after = hoisted(net, net.conv(x, stride=3))
    (conv,) = (n for n in after.graph.nodes if n.target is ops.conv)
    assert conv.args[3:6] == ([stride] * 2, [padding] * 2, [1, 1])
    assert extents(conv.args[0])[2:] == (size, size)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    dims=st.sampled_from([1, 1, 2, 2, 3]),
    seed=st.integers(0, 10**6),
    depth=st.integers(2, 9),
    head=st.sampled_from(["dense", "pooled", "flatten"]),
    q=st.sampled_from([1.0, 1.0, 2.0, 0.0, 0.5]),
)
def test_generated_networks(dims: int, seed: int, depth: int, head: str, q: float) -> None:
    model = Dag(dims, seed, depth, head).eval()
    program = build(model, Given((2, *model.extent)), q=q, dtype=torch.float64, reduced=False)
    setting = Setting(program.captured, q)
    expected = run(program, program.lifted)
    reduced = reduce(program.lifted, setting)
    after = hoist(reduced, setting)
    assert cost(after) <= cost(reduced)
    assert_same(run(program, after), expected)
    assert_same(run(program, lower(after, setting)), expected)


@pytest.mark.parametrize(("name", "most"), [("vgg16", 1320), ("alexnet", 200)])
def test_multiply_adds(name: str, most: int) -> None:
    rows = fxpath.compile(zoo.build(name), (3, 224, 224)).sizes()
    assert sum(row["reduced_macs"] for row in rows) <= most * 1e6


def test_every_activation_is_accounted_for() -> None:
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 2))
    program = fxpath.compile(model, (2, 12, 12))
    rows = [(row["operation"], row["reduced"], row["reduced_macs"]) for row in program.sizes()]
    assert [row[:2] for row in rows[:5]] == [
        ("source", (1, 1, 1, 1)),
        ("conv", (1, 8, 3, 3)),
        ("conv", (1, 8, 3, 3)),
        ("pool", (1, 8, 3, 3)),
        ("pool", (1, 8, 3, 3)),
    ]
    assert [row[2] for row in rows[3:5]] == [0, 0]
    total = sum(multiply_adds(n) for n in program.reduced.graph.nodes if n.op == "call_function")
    assert sum(row[2] for row in rows) == total
