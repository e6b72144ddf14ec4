"""Links and sizes of lifted operations, against what the operations do when they are called."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxpath.graph import ops
from fxpath.graph.links import Taps, links, mark_static, static
from fxpath.model import Given
from fxpath.program.program import PathProgram, build
from tests.support.nets import randomize
from tests.support.spatial import Dag

LARGEST = 240  # entries of an argument whose basis vectors are tried


class Values(fx.Interpreter):
    """All values of a graph at its own parameters, the operations called as they are."""

    def __init__(self, program: PathProgram, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        live = program.captured.live()
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.run(*(live[n.target] for n in placeholders))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().call_function(target, args, kwargs)
        return value.double() if target is ops.source else value


def effect(values: Values, node: fx.Node, argument: fx.Node) -> Tensor:
    """What each entry of an argument adds to the result: ``[*argument, *result]``."""
    x = values.env[argument]

    def called(replaced: Tensor) -> Tensor:
        def value(n: fx.Node) -> Any:
            return replaced if n is argument else values.env[n]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        result: Tensor = node.target(*args, **kwargs)
        return result

    nothing = called(torch.zeros(x.shape, dtype=x.dtype))
    units = torch.eye(x.numel(), dtype=x.dtype)
    rows = [called(unit.reshape(x.shape)) - nothing for unit in units]
    return torch.stack(rows).reshape(*x.shape, *nothing.shape)


def in_span(found: Tensor, taps: list[Taps]) -> bool:
    """Whether matrices ``[out, source, ...]`` are combinations of those of the taps."""
    out, size = found.shape[:2]
    matrices = []
    for tap in (tap for each in taps for tap in each):
        index, weight = tap.tensors()
        read = torch.zeros(out, size, dtype=torch.float64)
        matrices.append(read.scatter_add(1, index, weight).flatten())
    basis, sizes, _ = torch.linalg.svd(torch.stack(matrices, 1), full_matrices=False)
    basis = basis[:, sizes > 1e-12 * sizes.max()]
    wanted = found.reshape(out * size, -1)
    wanted = wanted[:, wanted.any(0)]
    assert wanted.numel()
    return bool((basis @ (basis.T @ wanted) - wanted).abs().max() <= 1e-9 * wanted.abs().max())


def assert_links_are_true(program: PathProgram) -> set[Any]:
    """Along each linked axis an operation reads its argument through the taps; its targets."""
    graph = program.lifted.graph
    mark_static(graph)
    values = Values(program, program.lifted)
    seen = set()
    for node in graph.nodes:
        # What a total reads has no axes in its result.
        if node.op != "call_function" or static(node) or node.target is ops.total:
            continue
        found: dict[tuple[fx.Node, int, int], list[Taps]] = defaultdict(list)
        for argument, axes in links(node, 1.0):
            for link in axes:
                if values.env[argument].numel() <= LARGEST:
                    found[argument, link.dim, link.source_dim].append(link.taps)
        effects = {argument: effect(values, node, argument) for argument, _, _ in found}
        for (argument, dim, source_dim), taps in found.items():
            moved = effects[argument]
            rank = values.env[argument].dim()
            matrices = moved.movedim((rank + dim, source_dim), (0, 1))
            assert in_span(matrices, taps), (node, argument, dim, source_dim)
            seen.add(node.target)
    return seen


class Mixed(nn.Module):
    """Axes that are exchanged, merged, mixed by matrices, concatenated and expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 3), nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2)
        self.left, self.right = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(3, 2))
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.linear(x)) * self.factor
        x = torch.cat([x, x.flip(1), x[:, :1]], 1).clamp(-1.0, 2.0)
        x = (self.left @ x[:, 1:6] @ self.right).transpose(1, 2)
        x = nn.functional.leaky_relu(self.conv(x).unsqueeze(2).expand(-1, -1, 3, -1), 1.5)
        return torch.maximum(x.reshape(1, 2, 2, -1), x.amax()).sum(2)


@pytest.mark.parametrize(
    ("dims", "depth", "seed"),
    [*((1, 9, seed) for seed in range(6)), (2, 4, 0), (2, 5, 1), (3, 2, 0)],
)
def test_links_are_what_operations_do_to_basis_vectors(dims: int, depth: int, seed: int) -> None:
    model = Dag(dims, seed, depth, ["dense", "pooled", "flatten"][seed % 3]).eval()
    program = build(model, Given((2, *model.extent)), dtype=torch.float64, reduced=False)
    assert len(assert_links_are_true(program)) > 1


def test_links_of_operations_that_move_and_mix_axes() -> None:
    model = randomize(Mixed().double(), weights=True).eval()
    program = build(model, Given((4, 4)), dtype=torch.float64, reduced=False)
    assert len(assert_links_are_true(program)) > 8


def test_a_link_to_the_wrong_position_is_noticed() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3, bias=False), nn.Conv1d(1, 1, 2)).double()
    program = build(model, Given((1, 7)), dtype=torch.float64, reduced=False)
    assert_links_are_true(program)
    for node in program.lifted.graph.nodes:
        if node.target is ops.conv:
            assert node.args[4] == [0], "the padding"
            node.args = (*node.args[:4], [1], *node.args[5:])
    with pytest.raises(AssertionError):
        assert_links_are_true(program)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reduced", [False, True])
def test_sizes_have_the_multiply_adds_that_torch_counts(seed: int, reduced: bool) -> None:
    model = Dag(1 + seed % 3, seed, 4, "flatten").eval()
    program = build(model, Given((2, *model.extent)), dtype=torch.float64, reduced=reduced)
    with FlopCounterMode(display=False) as counter:
        Values(program, program.reduced)
    assert sum(row["reduced_macs"] for row in program.sizes()) == counter.get_total_flops() // 2 > 0
