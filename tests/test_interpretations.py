"""The vocabulary as interpretations see it: its table, contractions, and neurons with a bias."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fxpath
from fxpath.graph import equations, ops
from fxpath.graph.costs import mapping
from fxpath.graph.interpret import Interpretation, Map, Weighing
from fxpath.graph.power import power, power_into, power_of_number
from fxpath.graph.schema import bias_of
from fxpath.graph.static import evaluated
from fxpath.model import Given
from fxpath.passes import take_in
from fxpath.program.layers import find_layers
from fxpath.program.program import build


@dataclass(frozen=True)
class Mass:
    """Path mass of some neurons."""

    value: Tensor

    def map(self, function: Map) -> Mass:
        return Mass(function(self.value))


class Plain(Interpretation):
    """The path-norm by the methods that have no default, without care for range."""

    activation = Mass

    def source(self, shape: Sequence[int]) -> Mass:
        return Mass(self.filled(shape, 1.0))

    def constant(self, bias: Tensor) -> Mass:
        return Mass(bias)

    def weigh(self, x: Mass, weight: Tensor, bias: Tensor | None, run: Weighing) -> Mass:
        y = run(x.value, weight)
        return Mass(y if bias is None else y + bias)

    def add(self, x: Mass, y: Mass) -> Mass:
        return Mass(x.value + y.value)

    def join(self, pieces: list[Mass], dim: int) -> Mass:
        return Mass(torch.cat([piece.value for piece in pieces], dim))

    def total(self, outputs: list[Mass]) -> float:
        return sum(float(output.value.sum()) for output in outputs)


class Everything(nn.Module):
    """Operations of every algebraic class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.turn = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.slope, self.gain = nn.PReLU(4), nn.Parameter(torch.randn(4, 1, 1))
        self.matrix, self.stacked = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).relu()) * self.gain
        x = torch.cat([x.clamp(-1, 2), self.slope(self.turn(x))[:, :, ::2, ::2]], 2)
        x = functional.interpolate(functional.max_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.einsum("bchw,dc->bdhw", x, self.matrix).abs() + 0.5
        x = torch.maximum(x, -2 * x).mean((2, 3)).reshape(-1, 3)
        return self.head(functional.pad(x, (0, 1)) @ self.stacked)


@pytest.mark.parametrize("q", [1.0, 2.0, 0.0])
def test_six_methods_make_an_interpretation(q: float) -> None:
    torch.manual_seed(0)
    model = Everything().double().eval()
    model.norm.running_var.uniform_(0.5, 2)
    program = build(model, Given((2, 4, 4)), q=q, dtype=torch.float64)
    for graph in (program.lifted, program.reduced, program.graph_module):
        with torch.no_grad():
            plain = Plain(graph, torch.float64, q).run(program.captured.live())
        assert plain == pytest.approx(program.path_norm() ** (q or 1), rel=1e-12)


def test_every_word_has_a_method() -> None:
    table = Plain(fx.GraphModule({}, fx.Graph()), torch.float64).methods()
    # Lowered graphs are derived from, not interpreted.
    lowered = {ops.window, ops.factored}
    assert {getattr(ops, name) for name in ops.__all__} - lowered == table.keys()
    # What a word is called with, its method takes; a signature without names takes anything.
    for word, method in table.items():
        given = len(inspect.signature(word).parameters)
        inspect.signature(method).bind(*range(given))


def test_a_word_without_a_method_is_no_move() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(ops.total, ([graph.call_function(ops.source, ((2,),))],)))
    with pytest.raises(NotImplementedError):
        Interpretation(fx.GraphModule({}, graph), torch.float64).run({})


# Contractions


@pytest.mark.parametrize(("x", "weight"), list(itertools.product(range(1, 5), range(1, 5))))
@pytest.mark.parametrize("weight_first", [False, True])
def test_products_are_those_of_torch(x: int, weight: int, weight_first: bool) -> None:
    shapes = {1: (2,), 2: (2, 2), 3: (3, 2, 2), 4: (4, 1, 2, 2)}
    a, b = torch.randn(shapes[x]), torch.randn(shapes[weight])
    expected = torch.matmul(b, a) if weight_first else torch.matmul(a, b)
    equation = equations.product(x, weight, weight_first)
    torch.testing.assert_close(ops.contract(a, b, None, equation), expected)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_linear_layers_are_those_of_torch(rank: int) -> None:
    x, weight, bias = torch.randn((2,) * (rank - 1) + (3,)), torch.randn(4, 3), torch.randn(4)
    equation = equations.linear(rank)
    assert equations.letters(equation).dense
    y = ops.contract(x, weight, bias, equation)
    torch.testing.assert_close(y, functional.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("...i,oi->...o", (2, 3, 4), (5, 4)),
        ("b...,...->b...", (2, 3, 4), (4,)),
        ("...i,...io->...o", (3, 4), (2, 3, 4, 5)),
        ("i...,...->...", (2, 3, 4), (3, 4)),
    ],
)
def test_an_ellipsis_stands_for_letters(
    equation: str, x: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    a, b = torch.randn(x), torch.randn(weight)
    spelled = equations.spelled(equation, len(x), len(weight))
    assert "." not in spelled
    torch.testing.assert_close(torch.einsum(spelled, a, b), torch.einsum(equation, a, b))


@pytest.mark.parametrize(
    ("equation", "matrix", "dense"),
    [
        ("abc,dc->abd", ("c", "d"), True),
        ("abc,cd->abd", ("c", "d"), False),
        ("abc,db->adc", ("b", "d"), False),
        ("ab,ab->ab", None, False),
        ("abc,db->acd", None, False),
        ("ab,cab->c", None, False),
        ("aab,cb->ac", None, False),
        ("abc,bcd->abd", None, False),
        ("ab,bb->ab", None, False),
    ],
)
def test_matrices_are_told_from_other_weights(
    equation: str, matrix: tuple[str, str] | None, dense: bool
) -> None:
    assert equations.letters(equation).matrix == matrix
    assert equations.letters(equation).dense == dense


class Between(nn.Module):
    """A contraction over channels between two convolutions."""

    def __init__(self, equation: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.equation, self.matrix = equation, nn.Parameter(torch.randn(shape))
        self.first, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.einsum(self.equation, self.first(x).relu(), self.matrix).relu())


@pytest.mark.parametrize(
    ("equation", "shape", "kept"),
    [
        ("bchw,dc->bdhw", (4, 3), (3, 3)),
        ("bchw,...cd->bd...hw", (3, 4), (3, 3)),
        # Each row of positions has its own weights.
        ("bchw,hdc->bdhw", (12, 4, 3), (12, 3)),
        ("bchw,hcd->bdhw", (1, 3, 4), (3, 3)),
    ],
)
def test_positions_are_reduced_through_a_contraction(
    equation: str, shape: tuple[int, ...], kept: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = Between(equation, shape).double()
    reduced, whole = (build(model, Given((2, 12, 12)), reduced=r) for r in (True, False))
    by_value = [row["reduced"] for row in reduced.sizes() if row["operation"] == "contract"]
    assert by_value == [(1, 4, *kept)]
    assert reduced.path_norm() == pytest.approx(whole.path_norm(), rel=1e-12)
    for name, share in whole.scores().items():
        torch.testing.assert_close(reduced.scores()[name], share, rtol=1e-10, atol=0)


# Biases


def biased(graph: fx.Graph) -> list[tuple[str, bool]]:
    """Operations with weights or biases, in order, and whether they have a bias."""
    words = (ops.conv, ops.contract, ops.scale, ops.shift)
    return [(n.target.__name__, bias_of(n) is not None) for n in graph.nodes if n.target in words]


class Adding(nn.Module):
    """Biases in several places."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.matrix = kind, nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        self.bias = nn.Parameter(torch.tensor([5.0, -6.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix
        return {
            "own": lambda: y + self.bias,
            "call": lambda: torch.addmm(self.bias, x, self.matrix),
            "behind": lambda: y.relu() + self.bias,
            "twice": lambda: (y + self.bias) + y,
            "wider": lambda: y[:, :1] + self.bias,
        }[self.kind]()


@pytest.mark.parametrize(
    ("kind", "words", "norm"),
    [
        ("own", [("contract", True)], 10 + 11),
        ("call", [("contract", True)], 10 + 11),
        ("behind", [("contract", False), ("shift", True)], 10 + 11),
        ("twice", [("contract", False), ("shift", True)], 2 * 10 + 11),
        ("wider", [("contract", False), ("shift", True)], 2 * 4 + 11),
    ],
)
def test_a_bias_belongs_to_the_sums_that_it_alone_is_added_to(
    kind: str, words: list[Any], norm: float
) -> None:
    model = Adding(kind)
    _, lifted = take_in(model, Given((2,)))
    assert biased(lifted.graph) == words
    assert fxpath.path_norm(model, (2,)) == norm
    shares = build(model, Given((2,))).scores()
    assert float(shares["bias"].sum()) == pytest.approx(11 / norm)


def test_biases_of_their_own_are_layers_of_their_own() -> None:
    layers = find_layers(build(Adding("own"), Given((2,))).lifted)
    named = [(layer.name, layer.operation, layer.bias) for layer in layers]
    assert named == [("matrix", "matmul", None), ("bias", "add", "bias")]


# Said once


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_the_power_is_one_for_tensors_and_numbers(q: float) -> None:
    values = torch.tensor([0.0, -0.0, 2.0, -0.25, 3.0], dtype=torch.float64)
    expected = [0.0 if x == 0 else abs(x) ** q for x in values.tolist()]
    assert power(values, q).tolist() == pytest.approx(expected, rel=1e-15, abs=0)
    for dtype in (torch.float64, torch.float32):
        found = power_into(torch.empty(5, dtype=dtype), values, q)
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    numbers = [float(power_of_number(Fraction(x), q)) for x in values.tolist()]
    assert numbers == pytest.approx(expected, rel=1e-15, abs=0)
    assert power(torch.tensor(math.nan), q).isnan()


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_the_power_has_no_gradient_at_zero(q: float) -> None:
    x = torch.tensor([0.0, -2.0], dtype=torch.float64, requires_grad=True)
    power(x, q).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0.0, -q * 2 ** (q - 1)])


def test_maps_along_axes_cost_what_their_products_do() -> None:
    # 3 to 5 positions in each of 2 x 4 places, then 4 to 6 in each of 2 x 5.
    assert mapping((2, 3, 4), {1: 5, 2: 6}) == 2 * 4 * (5 * 3) + 2 * 5 * (6 * 4)
    assert mapping((2, 3, 4), {}) == 0


def test_weights_are_evaluated_with_their_signs_and_each_step_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).eval()
    captured, lifted = take_in(model, Given((1, 2, 2)))
    wanted = [n for n in lifted.graph.nodes if n.target is ops.coordinate]
    counted: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, *rest: Any) -> Any:
            counted.append(str(function))
            return function(*rest[1], **(rest[2] or {}))

    with Counting():
        found = dict(evaluated(lifted, captured.live(), wanted))
    conv, norm, last = model
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    folded = [conv.weight * factor[:, None, None, None], conv.bias.double() * factor]
    for value, expected in zip(found.values(), [*folded, last.weight, last.bias], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0, check_dtype=False)
    assert counted.count("aten.rsqrt.default") == 1
