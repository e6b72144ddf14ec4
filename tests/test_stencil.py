"""Stencils, exact sums, and the classes of positions, each against its definition."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Hashable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import fxpath
from fxpath.graph import ops, stencil
from fxpath.graph.costs import multiply_adds
from fxpath.graph.exact import Coefficient, Rows, exact_sums, numbered
from fxpath.graph.links import Kernel, extents, links, mark_static, row_power, seen_through, static
from fxpath.graph.schema import bias_of
from fxpath.graph.stencil import Stencil
from fxpath.model import Given
from fxpath.passes.classes import find_classes
from fxpath.program.program import build
from tests.support.spatial import Dag

VALUES: list[Coefficient] = [
    *(0, 1, 2, -1, Fraction(1, 3), Fraction(2, 3), Fraction(-1, 7)),
    *(Fraction(0.1), Fraction(-0.3), Fraction(2) ** -80, Fraction(10) ** 30),
]


def at_random(rng: random.Random, size: int, out: int) -> list[list[tuple[int, Coefficient]]]:
    return [
        [(rng.randrange(size), rng.choice(VALUES)) for _ in range(rng.randrange(5))]
        for _ in range(out)
    ]


def dense(size: int, rows: list[list[tuple[int, Coefficient]]]) -> list[list[Fraction]]:
    """A stencil as a matrix of fractions."""
    matrix = [[Fraction(0)] * size for _ in rows]
    for line, row in zip(matrix, rows, strict=True):
        for p, c in row:
            line[p] += c
    return matrix


def matrix_of(found: Stencil) -> list[list[Fraction]]:
    return dense(found.size, [list(row) for row in found.rows])


@pytest.mark.parametrize("seed", range(40))
def test_stencils_are_the_matrices_that_they_are_built_from(seed: int) -> None:
    rng = random.Random(seed)
    a, b, c = (rng.randrange(1, 7) for _ in range(3))
    first, second = at_random(rng, a, b), at_random(rng, b, c)
    one, two = dense(a, first), dense(b, second)
    built, other = Stencil.of(a, first), Stencil.of(b, second)
    assert matrix_of(built) == one and matrix_of(other) == two
    assert all(c for row in built.rows for _, c in row)
    product = [
        [sum(x * m[p] for x, m in zip(row, one, strict=True)) for p in range(a)] for row in two
    ]
    assert matrix_of(other.after(built)) == product
    index, weight = built.tensors()
    read = torch.zeros(b, a, dtype=torch.float64).scatter_add(1, index, weight)
    assert read.tolist() == [[float(x) for x in row] for row in one]
    assert matrix_of(row_power(built, 2.0)) == [[x * x for x in row] for row in one]
    assert matrix_of(row_power(built, 1.0)) == [[abs(x) for x in row] for row in one]
    assert matrix_of(row_power(built, 0.0)) == [[Fraction(x != 0) for x in row] for row in one]


@pytest.mark.parametrize("seed", range(40))
def test_sums_are_those_of_fractions(seed: int) -> None:
    rng = random.Random(seed)
    keys = [rng.randrange(6) for _ in range(rng.randrange(30))]
    codes = [rng.randrange(len(VALUES)) for _ in keys]
    expected: dict[int, Fraction] = {}
    for key, code in zip(keys, codes, strict=True):
        expected[key] = expected.get(key, Fraction(0)) + VALUES[code]
    columns = (torch.tensor(x, dtype=torch.int64) for x in (keys, codes))
    places, found, table = exact_sums(*columns, VALUES)
    sums = {p: table[c] for p, c in zip(places.tolist(), found.tolist(), strict=True)}
    assert sums == {key: total for key, total in expected.items() if total}
    assert places.tolist() == sorted(sums) and len(set(table)) == len(table)


def test_rows_are_told_apart_however_many_columns_they_have() -> None:
    rng = random.Random(0)
    size, columns = 60, [[rng.choice([0, 0, 0, 1, 1000]) for _ in range(60)] for _ in range(30)]
    rows, seen = Rows(size), [[-1] * 30 for _ in range(size)]
    for k, column in enumerate(columns):
        at = [o for o in range(size) if k % 3 == 0 or rng.random() < 0.2]
        rows.add(torch.tensor([column[o] for o in at]), 1001, torch.tensor(at))
        for o in at:
            seen[o][k] = column[o]
    for a, b in itertools.combinations(range(size), 2):
        assert (rows.keys[a] == rows.keys[b]) == (seen[a] == seen[b])


def test_keys_are_numbered_as_they_appear() -> None:
    number, first = numbered(torch.tensor([7, 7, -2, 7, 1 << 60, -2]))
    assert number.tolist() == [0, 0, 1, 0, 2, 1] and first.tolist() == [0, 2, 4]
    assert [len(x) for x in numbered(torch.tensor([], dtype=torch.int64))] == [0, 0]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [(9, 3, 1, 1, 1), (9, 3, 2, 0, 1), (10, 4, 3, 2, 2), (5, 2, 2, 0, 1), (5, 3, 1, 4, 3)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_taps_of_a_kernel(
    size: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool
) -> None:
    conv = nn.functional.conv_transpose1d if transposed else nn.functional.conv1d
    eye = torch.eye(size, dtype=torch.float64)[:, None]
    for tap, found in enumerate(_taps(size, kernel, stride, padding, dilation, transposed)):
        weight = torch.zeros(1, 1, kernel, dtype=torch.float64)
        weight[0, 0, tap] = 1
        expected = conv(eye, weight, stride=stride, padding=padding, dilation=dilation)[:, 0].T
        index, coefficients = found.tensors()
        read = torch.zeros(found.out, size, dtype=torch.float64).scatter_add(1, index, coefficients)
        assert torch.equal(read, expected)


def _taps(
    size: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool
) -> Kernel:
    span = dilation * (kernel - 1)
    out = (size - 1) * stride - 2 * padding + span + 1
    if not transposed:
        out = (size + 2 * padding - span - 1) // stride + 1
    return Kernel(size, out, kernel, stride, padding, dilation, transposed)


def test_windows_without_lists() -> None:
    """Pooling windows, one by one as PyTorch's documentation defines them."""
    spec = itertools.product(range(1, 9), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True))
    checked = 0
    for size, kernel, stride, padding, dilation, ceil_mode in spec:
        span = dilation * (kernel - 1) + 1
        if 2 * padding > kernel or size + 2 * padding < span:
            continue
        x = torch.arange(1.0, size + 1)[None, None]
        y = nn.functional.max_pool1d(x, kernel, stride, padding, dilation, ceil_mode)
        found = stencil.max_pool(size, kernel, stride, padding, dilation, ceil_mode)
        largest = [max((p + 1.0 for p, _ in row), default=-math.inf) for row in found.rows]
        assert largest == y.flatten().tolist()
        assert all(c == 1 for row in found.rows for _, c in row)
        checked += 1
    assert checked > 200


# Classes, by their definition


def slow_partition(labels: list[Hashable]) -> list[int]:
    number: dict[Hashable, int] = {}
    return [number.setdefault(label, len(number)) for label in labels]


def slow_sums(row: list[tuple[int, Coefficient]]) -> Hashable:
    """{class: sum of coefficients}"""
    total: dict[int, Coefficient] = {}
    for label, c in row:
        total[label] = total.get(label, 0) + c
    return frozenset(total.items())


def slow_classes(graph: fx.Graph, q: float) -> tuple[dict[fx.Node, list[list[int]]], ...]:
    """Reachable and observable classes: tuples of what is read, multisets of how it is read."""
    active = [n for n in graph.nodes if n.op == "call_function" and not static(n)]
    read = {node: list(links(node, q)) for node in active}
    reachable: dict[fx.Node, list[list[int]]] = {}
    for node in active:
        reachable[node] = []
        for dim, n in enumerate(extents(node)):
            linked = [
                (i, argument, link)
                for i, (argument, axes) in enumerate(read[node])
                for link in axes
                if link.dim == dim
            ]
            bias = None if node.target is ops.constant else bias_of(node)
            axis = dim - len(extents(node)) + len(extents(bias)) if bias is not None else -1
            if node.target is ops.source:
                reachable[node].append([0] * n)
            elif not read[node] or len(linked) < len(read[node]):
                reachable[node].append(list(range(n)))
            elif bias is not None and axis >= 0 and extents(bias)[axis] > 1:
                reachable[node].append(list(range(n)))
            else:
                labels: list[list[Hashable]] = [[] for _ in range(n)]
                for i, argument, link in linked:
                    below = reachable[argument][link.source_dim]
                    for k, tap in enumerate(link.taps):
                        for o, row in enumerate(tap.rows):
                            labels[o].append((i, k, slow_sums([(below[p], c) for p, c in row])))
                reachable[node].append(slow_partition([tuple(x) for x in labels]))
        if node.target is ops.total:
            reachable[node] = []
    observable: dict[fx.Node, list[list[int]]] = {}
    for node in reversed(active):
        observable[node] = []
        users = [(u, i, axes) for u in active for i, (a, axes) in enumerate(read[u]) if a is node]
        for dim, n in enumerate(extents(node)):
            fenced = any(dim not in {link.dim for link in axes} for _, axes in read[node])
            seen: list[list[Hashable]] = [[] for _ in range(n)]
            for user, i, axes in users:
                linked_ = [link for link in axes if link.source_dim == dim]
                fenced = fenced or not linked_
                for link in linked_:
                    total = user.target is ops.total
                    above = [0] * n if total else observable[user][link.dim]
                    for k, tap in enumerate(link.taps):
                        reads: list[list[tuple[int, Coefficient]]] = [[] for _ in range(n)]
                        for o, row in enumerate(tap.rows):
                            for p, c in row:
                                reads[p].append((above[o], c))
                        for p, each in enumerate(reads):
                            if each:
                                seen[p].append((user, i, k, slow_sums(each)))
            multisets = [frozenset(Counter(labels).items()) for labels in seen]
            observable[node].append(list(range(n)) if fenced else slow_partition([*multisets]))
    return reachable, observable


@pytest.mark.parametrize("seed", range(24))
def test_classes_are_those_of_the_definition(seed: int) -> None:
    model = Dag(1 + seed % 3, seed, 3 + seed % 6, ["dense", "pooled", "flatten"][seed % 3]).eval()
    q = [1.0, 2.0, 0.0, 0.5][seed % 4]
    program = build(model, Given((2, *model.extent)), q=q, reduced=False)
    graph = program.lifted.graph
    mark_static(graph)
    found = find_classes(graph, q)
    reachable, observable = slow_classes(graph, q)
    assert found.reachable.keys() == {node for node in reachable if seen_through(node) is node}
    for node in found.reachable:
        assert [p.of.tolist() for p in found.reachable[node]] == reachable[node], node
        assert [p.of.tolist() for p in found.observable[node]] == observable[node], node
        for p in (*found.reachable[node], *found.observable[node]):
            assert p.sizes.tolist() == [p.of.tolist().count(c) for c in range(len(p))]
            assert p.of[p.representatives].tolist() == list(range(len(p)))


# Costs


class Weighing(nn.Module):
    """One map of each kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = {"matmul": (4, 5), "einsum": (6, 3, 2), "ellipsis": (4, 3)}.get(kind)
        self.weight = nn.Parameter(torch.ones(shape)) if shape else None
        self.map = {
            "conv": nn.Conv2d(6, 4, 3, padding=1, groups=2),
            "transposed": nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
            "linear": nn.Linear(4, 7),
        }.get(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.map is not None:
            return self.map(x)  # type: ignore[no-any-return]
        assert self.weight is not None
        if self.kind == "matmul":
            return x @ self.weight
        equation = {"einsum": "bchw,cdk->bdkhw", "ellipsis": "...w,wd->...d"}[self.kind]
        return torch.einsum(equation, x, self.weight)


@pytest.mark.parametrize("kind", ["conv", "transposed", "linear", "matmul", "einsum", "ellipsis"])
def test_multiply_adds_are_those_that_torch_counts(kind: str) -> None:
    model = Weighing(kind)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 6, 5, 4))
    program = build(model, Given((6, 5, 4)), reduced=False)
    nodes = [n for n in program.lifted.graph.nodes if n.op == "call_function"]
    assert sum(map(multiply_adds, nodes)) == counter.get_total_flops() // 2 > 0


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("nearest", {}),
        ("nearest-exact", {}),
        ("bilinear", {"align_corners": True}),
        ("bilinear", {"antialias": True}),
        ("bicubic", {}),
        ("bicubic", {"align_corners": True}),
        ("bicubic", {"antialias": True}),
    ],
)
def test_taps_of_upsampling_are_found_without_the_whole_matrix(
    mode: str, options: dict[str, bool]
) -> None:
    """Combs show the same matrix as the identity."""

    def run(rows: Tensor, out: int) -> Tensor:
        wide = rows[0][:, None, :, None].repeat(1, 1, 1, 2)
        resized = functional.interpolate(wide, size=(out, 2), mode=mode, **options)
        return resized[None, :, 0, :, 0]

    for size, out in [(1, 4), (7, 3), (40, 90), (150, 64), (333, 500), (70, 7)]:
        found = stencil.resample(size, lambda rows, out=out: run(rows, out))
        matrix = run(torch.eye(size, dtype=torch.float64)[None], out)[0].T
        held = torch.zeros_like(matrix)
        held[found.row, found.position] = found.values()
        torch.testing.assert_close(held, matrix, rtol=0, atol=1e-12)
        assert len(found.row) == int((matrix.abs() > 1e-13).sum())


def test_half_a_minute_of_sound_is_resampled_in_seconds() -> None:
    """A matrix of all positions by all positions would not fit into memory."""
    net = nn.Sequential(nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d(1, 1, 3, bias=False))
    nn.init.ones_(net[1].weight)
    start = time.process_time()
    # The windows sum three positions, each of mass 1.
    assert fxpath.path_norm(net, (1, 480_000)) == pytest.approx(3 * (960_000 - 2), rel=1e-6)
    assert time.process_time() - start < 20
